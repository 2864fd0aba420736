"""The run folder: resolved config, manifest, metrics, checkpoints and finished stages, and from where a run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from accelerate.utils import broadcast_object_list
from pydantic import ValidationError

from comatch.backbones.registry import read_json
from comatch.card import write_json
from comatch.config import RunConfig, dump
from comatch.errors import TrainingError
from comatch.recipe import Recipe
from comatch.training import checkpoint as on_disk
from comatch.training.checkpoint import Checkpoint, Tensors
from comatch.training.origin import Origin

_BEFORE_ANYTHING = {".lock", "manifest.json.tmp"}


class RunFolder:
    """config.yaml, manifest.json (status, stages done, origin), metrics.jsonl, checkpoints/ and a folder for each finished stage.

    done: names of the finished stages, in order. checkpoint: the one to go on from, None at the start of a stage. Only the first
    process writes, and while it lives no other run may write into the folder.
    """

    def __init__(self, path: Path, origin: Origin, recipe: Recipe, main: bool) -> None:
        self.path, self.origin, self.recipe, self.main = path, origin, recipe, main
        self.metrics, self.checkpoints = path / "metrics.jsonl", path / "checkpoints"
        self.done: list[str] = []
        self.checkpoint: Checkpoint | None = None
        self._notes: list[str] | None = None
        self._lock: IO[str] | None = None

    @property
    def last(self) -> Path | None:
        """The model that the next stage starts from, None where that is the config's own."""
        return self.path / self.done[-1] if self.done else None

    @property
    def left(self) -> list[str]:
        """Names of the stages that are not finished."""
        planned = (stage.name for stage in self.recipe.stages if stage.name in self.origin.config.stages)
        return [name for name in planned if name not in self.done]

    @property
    def manifest(self) -> dict[str, Any]:
        """What the manifest says now."""
        return read_json(self.path / "manifest.json")

    def find(self, *, overwrite: bool = False, new_run: bool = False, from_step: str | None = None, inexact: bool = False) -> None:
        """Look at what is there and decide where to start, on all processes alike; nothing is changed before `begin`.

        new_run: be the first of path-2, path-3 ... that does not exist, unless there is nothing yet.
        from_step: a checkpoint by its name or step. Raises TrainingError where the folder holds a complete run, files that are no run, a
        run of another origin, or not the checkpoint asked for.
        """
        if new_run:
            self._move(broadcast_object_list([unused(self.path)])[0])
        if self.main:
            state = self._state()
            if state == "files that are no run":
                hint = ", --overwrite will not delete them" if overwrite else ""
                raise TrainingError(f"run folder {self.path} holds files that are not a comatch run{hint}; choose another with output=...")
            if state == "a complete run" and not overwrite:
                raise TrainingError(
                    f"run folder {self.path} already holds a complete run; choose another with --new-run or output=..., "
                    "or pass --overwrite to delete it first"
                )
            if state == "a half-written run" and not overwrite:
                self._take_up(from_step, inexact)
            elif from_step is not None:
                raise TrainingError(f"--from-step {from_step}: there would be no checkpoint in {self.path}, which holds {state}")
        self.done, self.checkpoint = broadcast_object_list([self.done, self.checkpoint])

    def begin(self, base: str) -> None:
        """Make a fresh folder, or take up the run that is there: later metrics and checkpoints are removed, changes are told and noted.

        base: a hash of the weights that the first of the remaining stages starts from. Raises TrainingError where they are others than
        before, or where another process is writing into the folder.
        """
        if not self.main:
            return
        if self._notes is None:
            self._make(base)
            return
        self._take_lock()
        record = self.manifest
        if not self.done and record["base"] != base:
            raise TrainingError(
                f"model {self.origin.config.model!r} has other weights than when the run began ({base} instead of {record['base']}); "
                "set revision, put the old ones back, or start a new run with --new-run"
            )
        for folder in (self.path, self.checkpoints):
            on_disk.remove_unfinished(folder)
        stage, step = (self.left or [""])[0], self.checkpoint.step if self.checkpoint else 0
        there = self._found()
        for one in there[there.index(self.checkpoint) + 1 :] if self.checkpoint else there:
            on_disk.remove(one)
        self._cut_metrics(stage, step)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        taken_up = {"at": now, "stage": stage, "step": step, "changes": self._notes}
        if self._notes:
            warnings.warn(f"the run goes on, with changes: {'; '.join(self._notes)}", stacklevel=2)
        self._write({**record, "done": self.done, "resumed": [*record["resumed"], taken_up], **self.origin.record})
        self._write_config()

    def save(self, stage: str, step: int, weights: Tensors, moments: Tensors, state: Mapping[str, Any], score: float | None) -> Checkpoint:
        """Write a checkpoint, then remove those that are not kept. score: of the evaluation at this step."""
        self.checkpoints.mkdir(exist_ok=True)
        made = on_disk.write(self.checkpoints, stage, step, weights, moments, state, {**self.origin.record, "score": score})
        on_disk.prune(self._found(stage), self.origin.config.keep)
        return made

    def best(self, stage: str) -> Checkpoint | None:
        """The checkpoint of a stage with the highest score whose files are whole."""
        there = self._found(stage)
        while there and (top := on_disk.best(there)):
            if on_disk.newest([top]):
                return top
            there.remove(top)
        return None

    def stage_done(self, name: str, bad_rows: dict[str, int], best: Mapping[str, Any] | None = None) -> None:
        """Record a finished stage, the rows it had to replace and its best step; its checkpoints are not needed any more."""
        record = self.manifest
        self.done.append(name)
        record["done"] = self.done
        record["bad_rows"][name] = bad_rows
        if best:
            record["best"] = dict(best)
        self._write(record)
        for one in self._found(name):
            on_disk.remove(one)

    def complete(self) -> None:
        """Record the end of the run."""
        self._write({**self.manifest, "status": "complete", "finished": datetime.now(UTC).isoformat(timespec="seconds")})
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Let others write into the folder."""
        if self._lock:
            self._lock.close()

    def _make(self, base: str) -> None:
        if self.path.exists():
            self._take_lock()
            shutil.rmtree(self.path)
            self.close()
        self.path.mkdir(parents=True)
        self._take_lock()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"status": "running", "started": now, "resumed": [], "done": [], "bad_rows": {}, "base": base}
        self._write({**record, "recipe": self.recipe.to_dict(), "seed": self.origin.config.seed, **self.origin.record})
        self._write_config()

    def _write_config(self) -> None:
        (self.path / "config.yaml").write_text(dump(self.origin.config), encoding="utf-8")

    def _move(self, path: Path) -> None:
        origin = replace(self.origin, config=self.origin.config.model_copy(update={"output": str(path)}))
        RunFolder.__init__(self, path, origin, self.recipe, self.main)

    def _take_up(self, from_step: str | None, inexact: bool) -> None:
        record = self.manifest
        try:
            before = RunConfig.model_validate(record["config"])
        except (KeyError, ValidationError) as error:
            raise TrainingError(f"{self.path} was begun by another version of comatch, its config is not understood: {error}") from error
        self._notes = self.origin.check(record, before, inexact)
        self.done = list(record["done"])
        there = self._found(self.left[0]) if self.left else []
        if from_step is None:
            self.checkpoint = on_disk.newest(there)
            return
        fitting = [one for one in there if from_step in (one.name, str(one.step))]
        if not fitting:
            raise TrainingError(f"--from-step {from_step}: {self.path} has the checkpoints {[one.name for one in there]}")
        self.checkpoint = fitting[-1]
        on_disk.verify(self.checkpoint.path)

    def _found(self, stage: str | None = None) -> list[Checkpoint]:
        return on_disk.found(self.checkpoints, [stage] if stage else [one.name for one in self.recipe.stages])

    def _cut_metrics(self, stage: str, step: int) -> None:
        """Keep the lines of finished stages, and those of `stage` up to `step`."""
        if not self.metrics.is_file():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the last line was cut when the process was killed
            if row["stage"] in self.done or (row["stage"] == stage and row["step"] <= step):
                kept.append(line)
        aside = self.metrics.with_name(self.metrics.name + ".tmp")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, self.metrics)

    def _take_lock(self) -> None:
        """Ends with the process, however that ends, and is not inherited by the workers of the loader."""
        self._lock = open(self.path / ".lock", "w", encoding="utf-8")  # noqa: SIM115 - closing it is what unlocks
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            told = f"run folder {self.path} is being written by another process"
            raise TrainingError(f"{told}; wait for it, or choose another with --new-run or output=...") from error

    def _state(self) -> str:
        if not self.path.exists() or {path.name for path in self.path.iterdir()} <= _BEFORE_ANYTHING:
            return "nothing"
        if not (self.path / "manifest.json").is_file():
            return "files that are no run"
        return "a complete run" if self.manifest["status"] == "complete" else "a half-written run"

    def _write(self, record: dict[str, Any]) -> None:
        write_json(self.path / "manifest.json", record)


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3 ... that does not exist."""
    return next(p for p in (path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 10_000))) if not p.exists())
