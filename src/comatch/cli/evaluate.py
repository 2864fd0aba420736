"""`comatch evaluate MODEL --suite scenes`"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from comatch.cli import _items as common

if TYPE_CHECKING:
    from comatch.evaluation.metrics import Score


def command(
    model: common.Model,
    suite: Annotated[Literal["scenes", "emoji"], typer.Option(help="Which tasks.")] = "scenes",
    data: Annotated[Path | None, typer.Option(help="The emoji table, a Parquet file.")] = None,
    n: Annotated[int, typer.Option(min=1, help="How many test scenes.")] = 200,
    candidates: Annotated[int, typer.Option(min=1, help="How many scenes retrieval ranks.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which scenes, and the draw of the intervals.")] = 0,
    as_json: common.AsJson = False,
) -> None:
    """Score a model on ranking tasks with known answers.

    hit@1 counts a query only where a right answer beats every other one; ties are misses.
    """
    if (suite == "emoji") != (data is not None):
        raise typer.BadParameter("--suite emoji needs --data, the path of its table; scenes take none")
    if suite == "scenes" and candidates < n:
        raise typer.BadParameter(f"--candidates {candidates} must be at least --n {n}")
    from comatch.evaluation.tasks import emoji_tasks, evaluate, scene_tasks

    tasks = emoji_tasks(data) if data else scene_tasks(n, candidates, seed)
    encoder = common.load(model)
    with common.bar("evaluate") as step:
        scores = evaluate(
            encoder, tasks, progress=lambda done, total: step(completed=done, total=total), seed=seed
        )
    if as_json:
        told = [_plain(score) for score in scores]
        typer.echo(json.dumps({"suite": suite, "fingerprint": encoder.fingerprint, "tasks": told}))
        return
    for line in _table(scores):
        typer.echo(line)


def _plain(score: Score) -> dict[str, Any]:
    """A score for JSON, to six decimals: a millionth is below the interval of any task."""
    values = {field.name: getattr(score, field.name) for field in fields(score) if field.name != "hits"}
    values = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
    return {**values, "recall": {k: round(share, 6) for k, share in score.recall.items()}}


def _table(scores: list[Score]) -> list[str]:
    """Right-aligned columns; all numbers but counts in percent."""
    wide = max(len(score.name) for score in scores)
    rows = [f"{'task':<{wide}}  {'meta':<14}  hit@1  95 % interval  chance  ties     n"]
    rows += [
        f"{s.name:<{wide}}  {s.meta:<14}  {100 * s.hit:5.1f}  {100 * s.low:5.1f} to {100 * s.high:5.1f}"
        f"  {100 * s.chance:6.2f}  {s.ties:>4}  {s.n:>4}"
        for s in scores
    ]
    return rows
