"""`comatch ablate FILE.yaml key=value ...`"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from comatch.cli import _items as common


def command(
    file: Annotated[Path, typer.Argument(help="An ablation's YAML file, as in runs/study/methods.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Changes on top, as in seeds=2.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for results, tables and figures; out/NAME unless told.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at the same time; they share the cores.")] = 1,
    launcher: Annotated[str, typer.Option(help='Put before the command of each run, such as "srun --gpus=1".')] = "",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the trained models in their folders.")] = False,
    take: Annotated[
        list[Path] | None, typer.Option(help="Another study's results.json: its runs of equal settings are not done again.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every arm, say which runs are missing, train nothing.")] = False,
    only: Annotated[str | None, typer.Option(metavar="ARM", help="Do a single run: of this arm. What a launcher starts.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="The seed of that single run.")] = None,
    as_json: common.AsJson = False,
) -> None:
    """Train a grid of runs that differ in a few settings, with several seeds, and tell which differences are real.

    A study that was ended goes on by the same command. Writes results.json, study.md and figures.
    """
    from comatch.studies.plan import read_study
    from comatch.studies.runner import missing, one_run_command, results, run_study

    common.quiet_libraries()
    if (only is None) != (seed is None):
        raise typer.BadParameter("--only and --seed say together which single run to do; give both or neither")
    changes = overrides or []
    folder = out or _default(file, changes)
    study = read_study(file, folder, changes)
    if only is not None and seed is not None:
        _single(study, only, seed, folder)
        return
    todo = missing(study, results(study, folder, take or []))
    said = f"{study.config.name}: {len(study.arms)} arms, {study.config.seeds} seeds, {len(todo)} of {len(study.runs)} runs to do"
    if dry_run:
        typer.echo("\n".join([said, *(f"  {arm.name}, seed {n}" for arm, n in todo)]))
        return
    typer.echo(said, err=True)
    command = one_run_command(file, changes, folder)
    found = run_study(study, command, folder, jobs=jobs, launcher=launcher, keep=keep, take=take or [], tell=_tell)
    _report(found, folder, as_json)


def _default(file: Path, overrides: list[str]) -> Path:
    from comatch.config import AblateConfig, check_part, read_data

    data, origins = read_data(file, overrides)
    return Path("out") / check_part(AblateConfig, data, origins, str(file)).name


def _single(study: Any, name: str, seed: int, out: Path) -> None:
    from comatch.errors import ConfigError
    from comatch.studies.single import run_one

    arm = next((arm for arm in study.arms if arm.name == name), None)
    if arm is None:
        raise ConfigError(f"--only {name!r}: the arms are {[arm.name for arm in study.arms]}")
    run_one(arm, seed, study.config.measure, out / "runs" / f"{arm.slug}-{seed}", quiet=False)


def _tell(told: Mapping[str, Any] | str) -> None:
    if isinstance(told, str):
        typer.echo(told, err=True)
        return
    hits = "  ".join(f"{name} {100 * score['hit']:.1f}" for name, score in told["scores"].items())
    seconds = sum(stage["seconds"] for stage in told["stages"].values())
    typer.echo(f"{told['arm']}, seed {told['seed']}: {seconds:.0f} s  {hits}", err=True)


def _report(found: Mapping[str, Any], folder: Path, as_json: bool) -> None:
    from comatch.studies.report import draw, markdown

    text = markdown(found)
    (folder / "study.md").write_text(text, encoding="utf-8")
    pictures = draw(found, folder)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        typer.echo(text)
        typer.echo(f"{folder / 'results.json'}, {folder / 'study.md'}, {', '.join(map(str, pictures))}", err=True)
