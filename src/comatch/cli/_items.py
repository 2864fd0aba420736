"""What verbs share: loading the model, opening the input, the bar, and the account of bad items."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from comatch.data.items import Item
    from comatch.encoder import Encoder
    from comatch.released.sentence import SentenceEncoder

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A shipped name, a folder, a run's folder or a hub id.")
]
TextColumn = Annotated[str | None, typer.Option(help="The column of a table that holds texts.")]
ImageColumn = Annotated[
    str | None, typer.Option(help="The column of a table that holds pictures or their paths.")
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in one forward pass; fewer need less memory.")]
As = Annotated[
    str | None,
    typer.Option(
        "--as",
        metavar="KIND",
        help="A released model of others: coma, cocoa, moca, vlm2vec-v1, vlm2vec-v2, qwen3-vl-embedding or sentence-transformers.",
    ),
]
Base = Annotated[str | None, typer.Option(help="With --as: the model below an adapter, or that lends a missing tokenizer.")]
AsJson = Annotated[bool, typer.Option("--json/--no-json", help="Print JSON.")]


def open_items(source: str, text_column: str | None, image_column: str | None) -> Iterator[Item]:
    """The items of an input. The first is read at once, so that a wrong path is told before a model loads."""
    from comatch.data.items import read_items

    items = read_items(source, text_column=text_column, image_column=image_column)
    return chain([next(items)], items)


def load(model: str) -> Encoder:
    """The encoder of that name or folder; transformers' own bars stay out of logs."""
    from comatch.encoder import Encoder

    quiet_libraries()
    return Encoder.load(model)


def load_as(model: str, kind: str | None, base: str | None = None) -> Encoder | SentenceEncoder:
    """Like `load`, or with `kind` a released model of others."""
    if kind is None:
        if base is not None:
            raise typer.BadParameter("--base belongs to --as")
        return load(model)
    from comatch import released

    quiet_libraries()
    return released.load(model, kind, base=base)


def quiet_libraries() -> None:
    """Leave stderr to us: transformers draws a bar for every model it reads, and PEFT calls a name that it will rename."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*", category=FutureWarning)


@contextmanager
def bar(what: str, source: str = "", *, shown: bool = True) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr where that is a terminal; yields its update(advance=, completed=, total=)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    shown = shown and console.is_terminal
    total = sum(1 for _ in open_items(source, None, None)) if shown and Path(source).is_dir() else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # stdout may be a file or a pipe: rich must not draw it to the terminal
    with Progress(
        *columns, console=console, disable=not shown, redirect_stdout=False, redirect_stderr=False
    ) as progress:
        yield partial(progress.update, progress.add_task(what, total=total))


def report(bad: Iterable[str], cut: int) -> None:
    """Say on stderr which items are missing, and how many texts were shortened."""
    for line in bad:
        typer.echo(f"bad item {plain(line)}", err=True)
    if cut:
        typer.echo(f"{cut} texts were longer than the model's window; their ends were cut", err=True)


def plain(text: str) -> str:
    """A text for a terminal: control characters and bytes that are no text are spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
