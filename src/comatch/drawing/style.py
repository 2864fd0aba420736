"""One look for all figures: colours that colour-blind readers can tell apart (Okabe and Ito), sizes, and how figures leave as PNG.

Figures are made without pyplot, so nothing global changes and no window opens. Text is never read as
formulas: `$` is a dollar.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final, ParamSpec

from comatch.errors import MissingExtra

try:
    from matplotlib import rc_context, rcdefaults, rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ModuleNotFoundError as error:
    raise MissingExtra("matplotlib", "plots") from error

__all__ = ["Axes", "Figure", "data_uri", "legend", "png", "save", "styled"]

PALETTE: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#E5C700")
ROLE_COLOUR: Final = {
    "context": PALETTE[0],
    "compression": PALETTE[1],
    "dialogue": PALETTE[2],
    "target": PALETTE[3],
}
RIGHT: Final = PALETTE[2]
PALE: Final = "#ECECEF"
GREY: Final = "#666666"
INK: Final = "#222222"
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_DPI: Final = 144
_LOOK: Final[Any] = {
    "axes.edgecolor": GREY,
    "axes.grid": False,
    "axes.labelsize": 10,
    "axes.prop_cycle": f"cycler('color', {list(PALETTE)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "figure.titlesize": 12,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
_Args = ParamSpec("_Args")


def colour(i: int) -> str:
    """The colour of the i-th of several runs, models or classes."""
    return PALETTE[i % len(PALETTE)]


def styled(draw: Callable[_Args, Figure]) -> Callable[_Args, Figure]:
    """Draw under our look, whatever the process has set."""

    @wraps(draw)
    def inside(*args: _Args.args, **kwargs: _Args.kwargs) -> Figure:
        with _look():
            return draw(*args, **kwargs)

    return inside


@contextmanager
def _look() -> Iterator[None]:
    with rc_context():
        rcdefaults()
        rcParams.update(_LOOK)
        yield


def legend(figure: Figure, handles: Iterable[Any], names: Sequence[str], **how: Any) -> None:
    """A legend of any names; matplotlib itself drops those that begin with "_"."""
    drawn = figure.legend(list(handles), [str(i) for i in range(len(names))], **how)
    for text, name in zip(drawn.get_texts(), names, strict=True):
        text.set_text(name)


def png(figure: Figure) -> bytes:
    """The figure as PNG; equal figures give equal bytes."""
    stream = io.BytesIO()
    # Without the name of the software, whose version would change the bytes.
    # "tight": what stands beyond the edge, such as a long legend, makes the picture larger and is not cut off.
    with _look():
        figure.savefig(stream, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None})
    return stream.getvalue()


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG, whatever the name says, and make the folders above it."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(figure))
    return file


def data_uri(figure: Figure) -> str:
    """The figure as a `data:` URI of a PNG, for a page that holds everything itself."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode("ascii")
