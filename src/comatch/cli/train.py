"""`comatch train RUN.yaml key=value ...`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from comatch.config import EvaluateConfig
    from comatch.encoder import Encoder
    from comatch.evaluation.tasks import Task


def command(
    file: Annotated[Path, typer.Argument(help="A run's YAML file, as in runs/coma-nano.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Changes on top, as in seed=1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything but the weights, print layout, memory and time.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete a run that is already in the folder.")] = False,
    new_run: Annotated[bool, typer.Option("--new-run", help="Leave a run in the folder alone, begin another beside it.")] = False,
    from_step: Annotated[
        str | None, typer.Option(metavar="STEP", help="Go on from this checkpoint, by its step or name, not from the newest.")
    ] = None,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Go on although dropout will be drawn otherwise than without the interruption.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; metrics are written all the same.")] = False,
) -> None:
    """Train every stage that a run's YAML file names, and save each in the run folder.

    A run that was killed or interrupted goes on by the same command. SIGTERM, SIGUSR1 and Ctrl-C finish the step, save and exit with 75,
    75 and 130; a second Ctrl-C exits at once.
    """
    from comatch.cli._items import quiet_libraries
    from comatch.config import load_config
    from comatch.errors import Stopped

    quiet_libraries()
    config = load_config(file, overrides or [])
    if sum((overwrite, new_run, from_step is not None)) > 1:
        raise typer.BadParameter("--overwrite, --new-run and --from-step exclude each other")
    if dry_run:
        from comatch.training.dry import describe

        typer.echo(describe(config))
        return
    from comatch.training.loop import train

    evaluate = Evaluation(config.evaluate) if config.evaluate else None
    try:
        folder = train(
            config, overwrite=overwrite, new_run=new_run, from_step=from_step, inexact=inexact, evaluate=evaluate, quiet=quiet
        )
    except Stopped as stopped:
        typer.echo(stopped, err=True)
        raise typer.Exit(stopped.code) from None
    typer.echo(folder)


class Evaluation:
    """Scores of an encoder on the tasks that a config names, those of the dev split: hit@1 by task name."""

    def __init__(self, config: EvaluateConfig) -> None:
        self.config = config
        self.tasks: list[Task] = []

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        from comatch.evaluation.tasks import emoji_tasks, evaluate, scene_tasks

        c = self.config
        if not self.tasks:
            self.tasks = scene_tasks(c.n, c.candidates, split="dev") if c.data is None else emoji_tasks(c.data, split="dev")
        return {score.name: score.hit for score in evaluate(encoder, self.tasks)}
