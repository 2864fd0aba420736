"""`comatch compare A B`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from comatch.cli import _items as common


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A result file of `comatch evaluate`, the yardstick.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The result file to judge.")],
    seed: Annotated[int, typer.Option(help="Of the sign flips and the resampling.")] = 0,
    as_json: common.AsJson = False,
) -> None:
    """Is model B better than model A? A paired test per task, and the mean difference with its interval.

    Both results must be of the same suite and data. Prints Markdown.
    """
    from comatch.evaluation.compare import compare
    from comatch.evaluation.results import read_result

    found = compare(read_result(a), read_result(b), seed=seed)
    typer.echo(json.dumps(found.to_dict()) if as_json else found.markdown(), nl=as_json)
