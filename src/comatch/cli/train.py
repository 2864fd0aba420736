"""`comatch train RUN.yaml key=value ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(help="A run's YAML file, as in runs/coma-nano.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Changes on top, as in seed=1.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Build everything but the weights, print layout, memory and time.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete a run that is already in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; metrics are written all the same.")] = False,
) -> None:
    """Train every stage that a run's YAML file names, and save each in the run folder."""
    from comatch.cli._items import quiet_libraries
    from comatch.config import load_config

    quiet_libraries()
    config = load_config(file, overrides or [])
    if dry_run:
        from comatch.training.dry import describe

        typer.echo(describe(config))
        return
    from comatch.training.loop import train

    typer.echo(train(config, overwrite=overwrite, quiet=quiet))

