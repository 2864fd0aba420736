"""`comatch index MODEL INPUT --out DIR`"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from comatch.cli import QUARANTINED
from comatch.cli import _items as common


def command(
    model: common.Model,
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A folder of pictures, a CSV, TSV, JSONL or Parquet table, or - for standard input.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The index: a new folder, or one made here before.")],
    text_column: common.TextColumn = None,
    image_column: common.ImageColumn = None,
    label_column: Annotated[
        str | None, typer.Option(help="The column of a table that `comatch search` shows beside the id.")
    ] = None,
    batch_tokens: common.BatchTokens = 8192,
    as_json: common.AsJson = False,
) -> None:
    """Make an index for `comatch search`, or bring one up to date.

    Only what is new is encoded, and pictures that left a folder leave the index. Bad items are left out and
    listed, with exit code 3.
    """
    items = common.open_items(source, text_column, image_column)
    from comatch.data.items import read_labels
    from comatch.search.index import Index
    from comatch.search.update import update

    labels = read_labels(source, label_column)
    encoder = common.load(model)
    where = str(Path(model).resolve()) if Path(model).is_dir() else model
    folder = source != "-" and Path(source).is_dir()
    if (out / "index.json").exists():
        index = Index.open(out)
    else:
        index = Index.create(out, encoder.fingerprint, encoder.dim, model=where)
    with index, common.bar("index", source) as step:
        done = update(
            index, encoder, items, source=source if source == "-" else str(Path(source).resolve()),
            labels=labels, prune=folder, batch_tokens=batch_tokens, progress=lambda done: step(advance=done),
        )  # fmt: skip
        held = len(index)
    if as_json:
        bad = [{"id": id, "reason": reason} for id, reason in done.bad]
        typer.echo(json.dumps({**asdict(done), "bad": bad, "index": str(out), "rows": held}))
    else:
        counts = ("added", "changed", "unchanged", "removed", "encoded")
        said = ", ".join(f"{getattr(done, name)} {name}" for name in counts)
        typer.echo(f"{common.plain(str(out))}: {held} rows; {said}, {len(done.bad)} bad")
    common.report([f"{id}: {reason}" for id, reason in done.bad], len(done.cut))
    if done.bad:
        raise typer.Exit(QUARANTINED)
