"""Draws docs/method.png, the picture of the method in the README: python docs/method.py"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from comatch.recipes import load_recipe

COLOURS = {"context": "#56B4E9", "compression": "#E69F00", "dialogue": "#999999"}
COUNTS = {"context": 6, "compression": 3, "dialogue": 7}


def strip(axes: Axes, y: float, roles: tuple[str, ...], texts: dict[str, str]) -> dict[str, float]:
    """One row of tokens; returns the middle of each role."""
    x, middle = 0.0, {}
    for role in roles:
        for _ in range(COUNTS[role]):
            axes.add_patch(Rectangle((x, y), 0.9, 0.9, color=COLOURS[role]))
            x += 1
        middle[role] = x - COUNTS[role] / 2
        axes.text(middle[role], y - 0.25, texts[role], ha="center", va="top", fontsize=9)
        x += 0.4
    return middle


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#222222", **style: object) -> None:
    """A curved arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=colour, connectionstyle="arc3,rad=0.3", **style))


def mask(axes: Axes) -> None:
    """CoMa's visibility table as a picture."""
    visibility = load_recipe("coma").stage("compress").visibility
    roles = [role for role in visibility.roles for _ in range(COUNTS[role])]
    n = len(roles)
    image = np.ones((n, n, 3))
    for q, query in enumerate(roles):
        for k, key in enumerate(roles):
            letter = visibility.letter(query, key)
            if letter == "f" or (letter == "c" and k <= q):
                image[q, k] = [int(COLOURS[key][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    axes.imshow(image)
    axes.set(
        xticks=[],
        yticks=[],
    )
    axes.set_title("3. who sees whom (row looks at column)", fontsize=10)
    axes.text(2.5, 12.5, "answers never\nsee the picture", ha="center", va="center", fontsize=9, color="#D55E00")


def main() -> None:
    """Draw and save."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    texts = {"context": "picture", "compression": "K learned\ntokens", "dialogue": "questions and answers"}
    middle = strip(left, 4.2, ("context", "compression", "dialogue"), texts)
    left.text(0, 6.6, "1. compress: answer from the tokens alone", fontsize=11)
    arrow(left, (middle["compression"], 5.2), (middle["context"], 5.2))
    arrow(left, (middle["dialogue"], 5.2), (middle["compression"], 5.2))
    middle = strip(left, 0.6, ("context", "compression"), texts)
    left.text(0, 2.5, "2. match: their mean is the vector", fontsize=11)
    left.annotate("", (13.2, 1.05), (9.6, 1.05), arrowprops={"arrowstyle": "-|>"})
    left.text(13.4, 1.05, "unit vector, pulled to its\ncaption, pushed from others", va="center", fontsize=9)
    left.set(xlim=(-0.3, 20), ylim=(-1, 7.3))
    left.axis("off")
    mask(right)
    figure.savefig(Path(__file__).with_name("method.png"), dpi=110)


if __name__ == "__main__":
    main()
