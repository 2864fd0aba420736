"""`comatch search INDEX "words"`"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comatch.cli import _items as common

if TYPE_CHECKING:
    from comatch.search.index import Hit

_SHOWN = 60


def command(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="A folder that `comatch index` made.")],
    words: Annotated[
        str | None, typer.Argument(metavar="WORDS", help="What to look for, or - for one query per line.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to look for, or a part of the query.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, where it is no longer where it was.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many to show.")] = 10,
    as_json: Annotated[bool, typer.Option("--json/--no-json", help="Print one JSON object per hit.")] = False,
) -> None:
    """Find the items of an index that fit words, a picture, or both."""
    if words is None and image is None:
        raise typer.BadParameter("pass WORDS, - for standard input, or --image")
    if words == "-" and image is not None:
        raise typer.BadParameter("--image is one query, - reads many; pass one of them")
    from comatch.errors import SearchError
    from comatch.search.index import Index
    from comatch.search.store import Store

    made_by = Store(folder).manifest.model
    if not (model or made_by):
        raise SearchError(f"{folder} does not say which model made it; pass --model")
    if not model and Path(made_by).is_absolute() and not Path(made_by).is_dir():
        raise SearchError(f"{folder} was made by the model in {made_by}, which is not there; pass --model")
    encoder = common.load(model or made_by)
    with Index.open(folder, fingerprint=encoder.fingerprint) as index:
        for name, query in _queries(words, image):
            hits = index.search(encoder.encode([query], dim=index.dim), k)
            for line in _json(name, hits) if as_json else _table(name, hits, titled=words == "-"):
                typer.echo(line)
            sys.stdout.flush()


def _queries(words: str | None, image: Path | None) -> Iterator[tuple[str, Any]]:
    """Name and item of each query; lines of standard input are texts."""
    from comatch.content import Text
    from comatch.data.text_tables import Lines

    if words == "-":
        for line in Lines(sys.stdin.buffer, "standard input"):
            if line.strip():
                yield line.rstrip("\r\n"), Text(line.rstrip("\r\n"))
        return
    parts = {"image": image, "text": words}
    yield words or str(image), {kind: part for kind, part in parts.items() if part is not None}


def _json(query: str, hits: list[Hit]) -> Iterator[str]:
    for hit in hits:
        found = {"query": query, "rank": hit.rank, "score": hit.score, "margin": hit.margin}
        yield json.dumps({**hit.row, **found, "percentile": hit.percentile, "id": hit.id})


def _table(query: str, hits: list[Hit], *, titled: bool) -> Iterator[str]:
    if titled:
        yield f"# {common.plain(query)}"
    yield "rank   score  margin  id"
    wide = max(len(hit.id) for hit in hits) if hits else 0
    for hit in hits:
        margin = "     -" if hit.margin is None else f"{hit.margin:6.4f}"
        told = str(hit.row.get("label") or hit.row.get("text") or "")
        told = told if len(told) <= _SHOWN else f"{told[: _SHOWN - 3]}..."
        yield f"{hit.rank:>4}  {hit.score:6.4f}  {margin}  {common.plain(hit.id):<{wide}}  {common.plain(told)}".rstrip()
