"""Checkpoints on disk: written aside, flushed, renamed; a manifest with the hash of every file, checked before any is used.

A folder `checkpoints/STAGE-STEP` holds weights.safetensors (what trains, nothing else), optimizer.safetensors, state.json (small
numbers) and manifest.json. Nothing in it can run code. There is no random state in it: the loop derives that of every step from
(seed, stage, step, rank), see `comatch.training.state`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from comatch.card import write_json
from comatch.errors import TrainingError

FORMAT = 1
ASIDE = ".unfinished-"
MANIFEST, STATE, WEIGHTS, OPTIMIZER = "manifest.json", "state.json", "weights.safetensors", "optimizer.safetensors"
_NAME = re.compile(r"(?P<stage>.+)-(?P<step>\d{6,})")

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint by its folder; `step` counts the finished steps of its stage."""

    path: Path
    stage: str
    step: int

    @property
    def name(self) -> str:
        """STAGE-STEP, as the folder is called."""
        return self.path.name

    @property
    def score(self) -> float | None:
        """What the evaluation gave at this step, None without one or where the manifest is damaged."""
        try:
            score = read_manifest(self.path).get("score")
        except TrainingError:
            return None
        return None if score is None else float(score)

    def state(self) -> dict[str, Any]:
        """The small numbers: scheduler, counts, sums since the last line of metrics."""
        state: dict[str, Any] = json.loads((self.path / STATE).read_text(encoding="utf-8"))
        return state

    def tensors(self, file: str) -> dict[str, torch.Tensor]:
        """WEIGHTS or OPTIMIZER, on the CPU."""
        return load_file(self.path / file)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` when the block ends; it replaces what was there, whole or not at all.

    Files and folders are flushed to the disk before the rename. Raises TrainingError where something cannot be written; then, and on
    any other exception, what was written is removed.
    """
    aside, replaced = (target.with_name(f"{ASIDE}{kind}{target.name}") for kind in ("", "old-"))
    try:
        for path in (aside, replaced):
            shutil.rmtree(path, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in sorted(aside.rglob("*"), reverse=True):
            _flush(path)
        _flush(aside)
        if target.exists():
            os.rename(target, replaced)
        os.rename(aside, target)
        _flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{target} could not be written: {error}. What was saved before is untouched, and the same command goes on from it"
        ) from error
    finally:
        for path in (aside, replaced):
            shutil.rmtree(path, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder."""
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path)


def write(
    folder: Path, stage: str, step: int, weights: Tensors, moments: Tensors, state: Mapping[str, Any], about: Mapping[str, Any]
) -> Checkpoint:
    """Write `folder/STAGE-STEP` atomically. about: what the manifest says beside the files. Raises TrainingError."""
    made = Checkpoint(folder / f"{stage}-{step:06d}", stage, step)
    with atomic_folder(made.path) as aside:
        size, free = sum(t.nbytes for part in (weights, moments) for t in part.values()), shutil.disk_usage(aside).free
        if size > free:
            raise OSError(errno.ENOSPC, f"no space left on the disk: {size:,} bytes are needed, {free:,} are free")
        save_file(dict(weights), aside / WEIGHTS)
        save_file(dict(moments), aside / OPTIMIZER)
        write_json(aside / STATE, dict(state))
        files = {p.name: {"bytes": p.stat().st_size, "sha256": _hash(p)} for p in sorted(aside.iterdir())}
        record = {**about, "format": FORMAT, "stage": stage, "step": step, "files": files}
        write_json(aside / MANIFEST, {**record, "sha256": _seal(record)})
    return made


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises TrainingError where it is missing, damaged or of another format."""
    file = path / MANIFEST
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        seal = record.pop("sha256")
        whole = seal == _seal(record)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TrainingError(f"checkpoint {path}: {MANIFEST} cannot be read ({type(error).__name__})") from error
    if not whole:
        raise TrainingError(f"checkpoint {path}: {MANIFEST} was changed after it was written")
    if record.get("format") != FORMAT:
        raise TrainingError(f"checkpoint {path} has format {record.get('format')!r}, this version of comatch reads {FORMAT}")
    checked: dict[str, Any] = record
    return checked


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file has the right size and hash. Raises TrainingError naming the one that has not."""
    record = read_manifest(path)
    for name, wanted in record["files"].items():
        file = path / name
        try:
            found = file.stat().st_size
            told = f"{found:,} bytes instead of {wanted['bytes']:,}" if found != wanted["bytes"] else ""
            told = told or (_hash(file) != wanted["sha256"] and "another SHA-256 than it was written with")
        except OSError as error:
            raise TrainingError(f"checkpoint {path}: {name} cannot be read: {error.strerror or error}") from error
        if told:
            raise TrainingError(f"checkpoint {path}: {name} has {told}")
    return record


def found(folder: Path, stages: Sequence[str]) -> list[Checkpoint]:
    """All checkpoints of a folder, damaged or not, from oldest to newest; `stages` is the order of stages."""
    named = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*") if path.is_dir() and not path.name.startswith(ASIDE)]
    all_of_them = [Checkpoint(path, match["stage"], int(match["step"])) for path, match in named if match and match["stage"] in stages]
    return sorted(all_of_them, key=lambda one: (stages.index(one.stage), one.step))


def newest(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The newest that verifies; warns of each that does not."""
    for one in reversed(checkpoints):
        try:
            verify(one.path)
        except TrainingError as error:
            warnings.warn(f"{error}; it is skipped, an older one is taken", stacklevel=2)
        else:
            return one
    return None


def best(checkpoints: Sequence[Checkpoint]) -> Checkpoint | None:
    """The one with the highest score, the earliest of equals; None where none has one."""
    scored = [(score, -i) for i, one in enumerate(checkpoints) if (score := one.score) is not None]
    return checkpoints[-max(scored)[1]] if scored else None


def prune(checkpoints: Sequence[Checkpoint], keep: int) -> None:
    """Remove all but the newest `keep` and the best."""
    top = best(checkpoints)
    for one in checkpoints[:-keep]:
        if one != top:
            remove(one)


def remove(checkpoint: Checkpoint) -> None:
    """Remove a checkpoint, by a rename first: half of one must not look like one."""
    aside = checkpoint.path.with_name(ASIDE + checkpoint.name)
    os.rename(checkpoint.path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
