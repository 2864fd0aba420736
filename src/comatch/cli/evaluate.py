"""`comatch evaluate MODEL --suite scenes`, `comatch evaluate MODEL --suite mmeb-v1 --data FOLDER --out OUT`"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from comatch.cli import _items as common
from comatch.errors import MissingExtra

if TYPE_CHECKING:
    from comatch.evaluation.metrics import Score
    from comatch.evaluation.mmeb import Suite
    from comatch.evaluation.records import SuiteResult
    from comatch.evaluation.running import Model


def command(
    model: common.Model,
    suite: Annotated[Literal["scenes", "emoji", "mmeb-v1", "mmeb-v2"], typer.Option(help="Which tasks.")] = "scenes",
    data: Annotated[str | None, typer.Option(help="MMEB's folder, hub or hub@REVISION; or the emoji table, a Parquet file.")] = None,
    out: Annotated[Path | None, typer.Option(help="MMEB: folder of the result and of kept vectors; a run goes on there.")] = None,
    protocol: Annotated[str, typer.Option(help="MMEB: whose prompts and picture sizes; the name stands in the result.")] = "comatch",
    tasks: Annotated[list[str] | None, typer.Option("--task", help="MMEB: only this dataset; may be repeated.")] = None,
    mode: Annotated[Literal["local", "global"] | None, typer.Option(help="MMEB: rank each query's own list, or all candidates.")] = None,
    allow_missing: Annotated[bool, typer.Option(help="MMEB: leave out datasets that cannot be read; then there is no Overall.")] = False,
    kind: common.As = None,
    base: common.Base = None,
    n: Annotated[int, typer.Option(min=1, help="How many test scenes.")] = 200,
    candidates: Annotated[int, typer.Option(min=1, help="How many scenes retrieval ranks.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which scenes, and the draw of the intervals.")] = 0,
    as_json: common.AsJson = False,
) -> None:
    """Score a model on ranking tasks with known answers.

    hit@1 counts a query only where a right answer beats every other one; ties are misses.
    """
    if (suite == "scenes") != (data is None):
        raise typer.BadParameter("--suite emoji needs --data, the path of its table, and MMEB its folder or hub; scenes take none")
    if suite == "scenes" and candidates < n:
        raise typer.BadParameter(f"--candidates {candidates} must be at least --n {n}")
    if suite.startswith("mmeb") != (out is not None):
        raise typer.BadParameter("--suite mmeb-v1 and mmeb-v2 need --out, the folder of their results; others take none")
    if out is not None:
        from comatch.evaluation.mmeb import Suite

        opened = Suite(str(data), suite, protocol, names=tasks or None, mode=mode or "", work=out)
        return _mmeb(model, opened, lambda: common.load_as(model, kind, base), out, allow_missing, seed, as_json)
    from comatch.evaluation.tasks import emoji_tasks, evaluate, scene_tasks

    chosen = emoji_tasks(data) if data else scene_tasks(n, candidates, seed)
    encoder = common.load_as(model, kind, base)
    with common.bar("evaluate") as step:
        scores = evaluate(
            encoder, chosen, progress=lambda done, total: step(completed=done, total=total), seed=seed
        )
    if as_json:
        told = [_plain(score) for score in scores]
        typer.echo(json.dumps({"suite": suite, "fingerprint": encoder.fingerprint, "tasks": told}))
        return None
    for line in _table(scores):
        typer.echo(line)
    return None


def _mmeb(model: str, suite: Suite, load: Callable[[], Model], out: Path, allow_missing: bool, seed: int, as_json: bool) -> None:
    from accelerate import PartialState

    from comatch.evaluation.running import run_suite

    state = PartialState()  # before the model, so that each process loads it to its own device
    encoder = load()
    with common.bar("evaluate", shown=state.is_main_process) as step:
        result = run_suite(
            encoder, suite, out, name=model, allow_missing=allow_missing, seed=seed,
            progress=lambda at: step(description=at.task, completed=at.done, total=at.total),
        )  # fmt: skip
    if state.is_main_process:
        _report(suite, out, seed)
        for line in [_json(result)] if as_json else _summary(result, seed):
            typer.echo(line)


def _report(suite: Suite, out: Path, seed: int) -> None:
    """What stands in OUT by now, for people: report.md, and report.html where matplotlib is installed."""
    from comatch.evaluation.mistakes import showing
    from comatch.evaluation.report import markdown, write_report
    from comatch.evaluation.results import read_result
    from comatch.evaluation.running import RESULT

    result = read_result(out / RESULT)
    (out / "report.md").write_text(markdown(result, seed=seed), encoding="utf-8")
    try:
        write_report(out / "report.html", result, show=showing(suite.task), seed=seed)
    except MissingExtra as error:
        typer.echo(f"no report.html: {error}", err=True)


def _json(result: SuiteResult) -> str:
    told = {name: getattr(result, name) for name in ("suite", "model", "fingerprint", "protocol", "revision", "missing")}
    return json.dumps(told | {"tasks": [_plain(task.score) for task in result.tasks]})


def _summary(result: SuiteResult, seed: int) -> list[str]:
    """The tasks, then every mean of which no task is missing, by its own name."""
    from comatch.evaluation.aggregate import summarise

    summary = summarise(result, seed=seed)
    lines = [*_table([task.score for task in result.tasks]), ""]
    lines += [f"{mean.label}: {100 * mean.value:.1f} ({100 * mean.low:.1f} to {100 * mean.high:.1f})" for mean in summary.means]
    if summary.missing:
        lines.append(f"missing, so no {', '.join(summary.withheld)}: {', '.join(summary.missing)}")
    return [*lines, f"{result.suite} by protocol {result.protocol}, data {result.revision}"]


def _plain(score: Score) -> dict[str, Any]:
    """A score for JSON, to six decimals: a millionth is below the interval of any task."""
    values = {field.name: getattr(score, field.name) for field in fields(score) if field.compare}
    values = {name: round(value, 6) if isinstance(value, float) else value for name, value in values.items()}
    return {**values, "recall": {k: round(share, 6) for k, share in score.recall.items()}}


def _table(scores: list[Score]) -> list[str]:
    """Right-aligned columns; all numbers but counts in percent."""
    wide = max((len(score.name) for score in scores), default=4)
    rows = [f"{'task':<{wide}}  {'meta':<14}  hit@1  95 % interval  chance  ties     n"]
    rows += [
        f"{s.name:<{wide}}  {s.meta:<14}  {100 * s.hit:5.1f}  {100 * s.low:5.1f} to {100 * s.high:5.1f}"
        f"  {100 * s.chance:6.2f}  {s.ties:>4}  {s.n:>4}"
        for s in scores
    ]
    return rows
