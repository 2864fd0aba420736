"""`comatch config show FILE key=value ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def command(
    action: Annotated[Literal["show"], typer.Argument(help="What to do: show.")],
    file: Annotated[Path, typer.Argument(help="A run's YAML file, as in runs/nano.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Changes on top, as in adapter.r=8.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="Print one JSON object, not YAML.")
    ] = False,
) -> None:
    """Print a run's config with defaults and overrides filled in, and where each value came from.

    The YAML that is printed is itself a config file that gives the same run.
    """
    import json

    from comatch.config import resolve
    from comatch.plain_yaml import dump

    config, origins = resolve(file, overrides or [])
    values = config.model_dump(mode="json")
    if as_json:
        from_where = {".".join(map(str, key)): origin for key, origin in origins.items()}
        typer.echo(json.dumps({"config": values, "origins": from_where, "digest": config.digest}))
        return
    typer.echo(f"# digest {config.digest}")
    for key, value in _rows(values):
        indent, name = "  " * (len(key) - 1), dump(key[-1], one_line=True).strip()
        shown = "" if value is None else f" {value}  # {origins.get(key, 'default')}"
        typer.echo(f"{indent}{name}:{shown}")


def _rows(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], str | None]]:
    """Key and one-line YAML of every value, top to bottom; None for a key that only holds others."""
    from comatch.plain_yaml import dump

    rows: list[tuple[tuple[str, ...], str | None]] = []
    for name, value in values.items():
        key = (*path, name)
        if isinstance(value, dict) and value:
            rows += [(key, None), *_rows(value, key)]
        else:
            rows.append((key, dump(value, one_line=True).strip()))
    return rows
