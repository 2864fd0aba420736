"""The run folder: resolved config, manifest and metrics. A folder that holds a run is never written into by another."""

from __future__ import annotations

import json
import platform
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comatch.config import RunConfig, dump
from comatch.encoder import write_json
from comatch.errors import TrainingError
from comatch.recipe import Recipe

_PACKAGES = ("comatch", "torch", "transformers", "peft", "accelerate", "numpy", "pillow")


class RunFolder:
    """config.yaml, manifest.json (status, stages done, versions) and metrics.jsonl of one run."""

    def __init__(self, path: Path, main: bool) -> None:
        self.path, self.main = path, main
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def create(cls, path: Path, config: RunConfig, recipe: Recipe, *, overwrite: bool, main: bool) -> RunFolder:
        """Make a fresh run folder. Raises TrainingError where one is there already, naming its state."""
        folder = cls(path, main)
        if not main:
            return folder
        if path.exists() and any(path.iterdir()):
            state = folder._state()
            if not overwrite:
                raise TrainingError(
                    f"run folder {path} already holds {state}; choose another with output=..., or pass --overwrite to delete it first"
                )
            if state == "files that are no run":
                raise TrainingError(
                    f"run folder {path} holds files that are not a comatch run, --overwrite will not delete them; "
                    "choose another with output=..."
                )
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(dump(config), encoding="utf-8")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        folder._write(
            {
                "status": "running",
                "started": now,
                "done": [],
                "bad_rows": {},
                "config_digest": config.digest,
                "recipe": recipe.to_dict(),
                "seed": config.seed,
                "python": platform.python_version(),
                "packages": {name: version(name) for name in _PACKAGES},
            }
        )
        return folder

    @property
    def manifest(self) -> dict[str, Any]:
        """What the manifest says now."""
        record: dict[str, Any] = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        return record

    def stage_done(self, name: str, bad_rows: dict[str, int]) -> None:
        """Record a finished stage and the rows it had to replace."""
        record = self.manifest
        record["done"].append(name)
        record["bad_rows"][name] = bad_rows
        self._write(record)

    def complete(self) -> None:
        """Record the end of the run."""
        self._write({**self.manifest, "status": "complete", "finished": datetime.now(UTC).isoformat(timespec="seconds")})

    def _state(self) -> str:
        if not (self.path / "manifest.json").is_file():
            return "files that are no run"
        record = self.manifest
        return "a complete run" if record["status"] == "complete" else f"a half-written run (stages done: {record['done'] or 'none'})"

    def _write(self, record: dict[str, Any]) -> None:
        write_json(self.path / "manifest.json", record)
