"""`comatch doctor RUN.yaml key=value ...`"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comatch.cli import FAILED
from comatch.cli import _items as common

if TYPE_CHECKING:
    from rich.console import Console

    from comatch.training.doctor import Report, StageReport
    from comatch.training.machine import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
_ROLES = {"context": "cyan", "compression": "magenta", "dialogue": "blue", "target": "blue"}
_SHOWN = 2000
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def command(
    file: Annotated[Path | None, typer.Argument(help="A run's YAML file; without one, only the machine is looked at.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Changes on top, as in seed=1.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many will be started; by default as many as this was started with.")
    ] = None,
    as_json: common.AsJson = False,
) -> None:
    """Look at a machine and a run before it starts: versions, memory, data as the model sees them, and a few real steps.

    Nothing is written and nothing downloaded. The exit code is 1 where the run would fail.
    """
    if int(os.environ.get("RANK", "0")):
        return  # below a launcher the first process speaks for all
    ranks = processes or int(os.environ.get("WORLD_SIZE", "1"))
    common.quiet_libraries()
    report = _look(file, overrides or [], ranks)
    if as_json:
        typer.echo(json.dumps(_plain(report)))
    else:
        _show(report)
    if not report.sound:
        raise typer.Exit(FAILED)


def _look(file: Path | None, overrides: list[str], ranks: int) -> Report:
    from comatch.config import load_config
    from comatch.training.doctor import Report, examine
    from comatch.training.machine import device, environment

    if file is None:
        return Report([*environment(Path()), device()])
    config = load_config(file, overrides)
    for name in _LAUNCHED:  # the trial steps run in this process alone
        os.environ.pop(name, None)
    return examine(config, ranks)


def _plain(report: Report) -> dict[str, object]:
    from dataclasses import asdict

    values = asdict(report)
    return {"sound": report.sound, **values}


def _show(report: Report) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for finding in report.findings:
        _line(console, finding)
    if report.layout:
        console.print("", report.layout, sep="\n", markup=False)
    for stage in report.stages:
        console.print(f"\nstage {stage.name}", style="bold")
        _sample(console, stage)
        for finding in stage.findings:
            _line(console, finding)
    counts = {level: sum(finding.level == level for finding in report.everything) for level in _COLOURS}
    told = f"\n{counts['ok']} checks passed, {counts['warning']} warnings, {counts['error']} errors"
    console.print(told, style=_COLOURS["ok" if report.sound else "error"])


def _line(console: Console, finding: Finding) -> None:
    from rich.text import Text

    line = Text.assemble((f"{finding.level:<8}", _COLOURS[finding.level]), f"{finding.check:<14}", common.plain(finding.told))
    console.print(line)
    if finding.step:
        console.print(Text(f"{'':22}-> {common.plain(finding.step)}"))


def _sample(console: Console, stage: StageReport) -> None:
    """The first sample, its roles in colours; what the model is asked to predict is underlined."""
    from rich.text import Text

    legend = [(role, _ROLES[role]) for role in dict.fromkeys(span.role for row in stage.sample for span in row)]
    parts = [part for role, colour in legend for part in ((role, colour), " ")]
    console.print(Text.assemble("  first sample: ", *parts, ("learned", "underline")))
    for row in stage.sample:
        text = Text("  ")
        for span in row:
            text.append(common.plain(span.text), style=f"{_ROLES[span.role]}{' underline' if span.learned else ''}")
        text.truncate(_SHOWN, overflow="ellipsis")
        console.print(text)
