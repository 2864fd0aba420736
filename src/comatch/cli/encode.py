"""`comatch encode MODEL INPUT --out vectors.npy`"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comatch.cli import QUARANTINED
from comatch.cli import _items as common
from comatch.cli._vectors import FORMATS, lines

if TYPE_CHECKING:
    from comatch.data.items import Item


def command(
    model: common.Model,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="INPUT",
            help="A folder of pictures, a CSV, TSV, JSONL or Parquet table, or - for standard input: lines "
            "that are JSON objects, or texts.",
        ),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Embed this text; INPUT is then left out.")] = None,
    image: Annotated[Path | None, typer.Option(help="Embed this picture, with --text as one item.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write: .npy (ids beside it), .parquet or .jsonl. Otherwise JSON lines."),
    ] = None,
    text_column: common.TextColumn = None,
    image_column: common.ImageColumn = None,
    dim: Annotated[int | None, typer.Option(min=1, help="Keep the first so many numbers.")] = None,
    batch_tokens: common.BatchTokens = 8192,
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors/--no-skip-errors", help="Leave bad items out and exit with code 3.")
    ] = False,
    as_json: common.AsJson = False,
) -> None:
    """Turn items into vectors.

    A bad item stops everything and nothing is written, unless --skip-errors.
    """
    if (source is None) == (text is None and image is None):
        raise typer.BadParameter("pass INPUT, or --text, --image or both of these, and not all")
    if out and out.suffix not in FORMATS:
        raise typer.BadParameter(f"--out {out} must end in one of {', '.join(FORMATS)}")
    if out and not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"--out {out}: there is no folder {out.absolute().parent}")
    items = _single(text, image) if source is None else common.open_items(source, text_column, image_column)
    encoder = common.load(model)
    fingerprint, dim = encoder.fingerprint, dim or encoder.dim
    n, bad, cut = 0, list[dict[str, Any]](), 0
    with ExitStack() as stack:
        write = stack.enter_context(FORMATS[out.suffix](out, dim, fingerprint)) if out else None
        step = stack.enter_context(common.bar("encode", source or "", shown=out is not None))
        for found in encoder.stream(
            items, dim=dim, batch_tokens=batch_tokens, on_error="mark" if skip_errors else "raise",
            progress=lambda done: step(advance=done),
        ):  # fmt: skip
            if write:
                write(found.ids, found.vectors)
            else:
                for line in lines(found.ids, found.vectors):
                    typer.echo(line)
            n, cut = n + len(found.ids), cut + len(found.cut)
            bad += [{"position": at, "id": id, "reason": reason} for at, id, reason in found.bad]
    if out:
        summary = {"out": str(out), "items": n, "dim": dim, "fingerprint": fingerprint}
        said = f"{n} vectors of {dim} numbers in {common.plain(str(out))}"
        typer.echo(json.dumps({**summary, "bad": bad, "cut": cut}) if as_json else said)
    common.report([f"{one['position']} ({one['id']}): {one['reason']}" for one in bad], cut)
    if bad:
        raise typer.Exit(QUARANTINED)


def _single(text: str | None, image: Path | None) -> Iterator[Item]:
    from comatch.content import as_message

    parts = {"image": image, "text": text}
    yield "0", as_message({kind: part for kind, part in parts.items() if part is not None})
