"""What the result of a run follows from: its settings, its data, its code. A run goes on only where these are as they were."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from importlib.metadata import version
from pathlib import Path
from typing import Any

from comatch.config import RunConfig
from comatch.config.part import show
from comatch.errors import TrainingError
from comatch.training.guide import guide_fingerprint

# These change what is reported, kept or how fast it goes, never a weight. `path`, `guide`: known by their content, wherever they lie.
FREE = frozenset(
    (
        "name", "output", "path", "corpus", "guide", "workers", "timeout_minutes", "store_gigabytes", "max_bad",
        "tracking", "log_every", "peak_tflops", "save_every", "keep", "evaluate.every",
    )
)  # fmt: skip
# The same sums in another order: equal up to rounding, but dropout is drawn for each pass and each process.
ROUNDING = frozenset(("tokens_per_pass", "patches_per_pass", "keep_passes", "device", "processes", "compile", "checkpointing"))
_PACKAGES = ("comatch", "torch", "transformers", "peft", "accelerate", "numpy", "pillow")
_DATA = {".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".tar", ".lance", ".txt"}
_WHOLE, _BLOCKS, _BLOCK = 16 * 2**20, 16, 2**16


@dataclass(frozen=True)
class Origin:
    """config: resolved. data: {"SOURCE: FILE": digest}. software: versions of python, packages and our own sources. processes: how many."""

    config: RunConfig
    data: Mapping[str, str]
    software: Mapping[str, str]
    processes: int

    @classmethod
    def of(cls, config: RunConfig, processes: int) -> Origin:
        """The origin of a run that would start now."""
        packages = {name: version(name) for name in _PACKAGES}
        return cls(config, data_digests(config), {"python": platform.python_version(), **packages, "sources": code_digest()}, processes)

    @property
    def record(self) -> dict[str, Any]:
        """What manifests keep of it; `check` reads it back."""
        return {
            "config": self.config.model_dump(mode="json"),
            "config_digest": self.config.digest,
            "data": dict(self.data),
            "software": dict(self.software),
            "processes": self.processes,
        }

    def check(self, before: Mapping[str, Any], config: RunConfig, inexact: bool) -> list[str]:
        """What a person should know before the run of a manifest goes on from here; [] where nothing changed.

        before: the run's manifest. config: the run's config as it was. Raises TrainingError for changed data, for a setting that changes
        the result, and, where dropout is drawn, for one that changes its draws, unless `inexact`.
        """
        fresh = "start a new run with --new-run"
        if changed := _differing(before["data"], self.data):
            raise TrainingError(f"the run began with other data: {changed[:10]} changed; put the old files back, or {fresh}")
        changes = changed_settings(config, self.config)
        if before["processes"] != self.processes:
            changes["processes"] = (before["processes"], self.processes)
        told = {name: f"{name}: {show(old)} -> {show(new)}" for name, (old, new) in changes.items()}
        refused = [line for name, line in told.items() if _class(name) == "result"]
        if refused:
            raise TrainingError(f"the run cannot go on with settings that change its result: {'; '.join(refused)}. Undo that, or {fresh}")
        inexactly = [line for name, line in told.items() if _class(name) == "rounding"]
        if inexactly and config.adapter.dropout and not inexact:
            raise TrainingError(
                f"with adapter.dropout={config.adapter.dropout} the run would go on with other draws: {'; '.join(inexactly)}. "
                f"Undo that, accept it with --inexact, or {fresh}"
            )
        notes = [f"{line} (equal up to rounding)" if line in inexactly else line for line in told.values()]
        was = before["software"]
        return notes + [f"{name}: {was.get(name)} -> {self.software.get(name)}" for name in _differing(was, self.software)]


def changed_settings(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted name: (old, new)} of all settings that differ."""
    a, b = (dict(_flat(config.model_dump(mode="json"))) for config in (old, new))
    return {name: (a.get(name), b.get(name)) for name in _differing(a, b)}


def deciding(config: RunConfig) -> dict[str, Any]:
    """{dotted name: value} of the settings that decide a run's result, up to rounding."""
    return {name: value for name, value in _flat(config.model_dump(mode="json")) if _class(name) == "result"}


def data_digests(config: RunConfig) -> dict[str, str]:
    """A digest of the content of every file of data that a run reads, and of guides; pictures beside a table are not among them.

    Files of up to 16 MiB by SHA-256 of all bytes; larger ones of their size and 16 blocks of 64 KiB, spread evenly from the first byte
    to the last, so that terabytes cost seconds.
    """
    found: dict[str, str] = {}
    for stage, run in config.stages.items():
        data = run.data or config.data
        if run.loss.guide:
            found[f"stages.{stage}.loss.guide"] = guide_fingerprint(run.loss.guide)
        for name, part in data.sources.items():
            for place in filter(None, (part.path, part.corpus)):
                found |= {f"{name}: {told}": digest(file) for told, file in _files(place)}
    return found


def digest(file: Path) -> str:
    """What `data_digests` knows a file by."""
    size, known = file.stat().st_size, hashlib.sha256()
    known.update(size.to_bytes(8))
    with open(file, "rb") as stream:
        if size <= _WHOLE:
            known.update(stream.read())
        else:
            for i in range(_BLOCKS):
                stream.seek((size - _BLOCK) * i // (_BLOCKS - 1))
                known.update(stream.read(_BLOCK))
    return known.hexdigest()


def code_digest() -> str:
    """A hash of the package's own sources."""
    root, known = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        known.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return known.hexdigest()[:16]


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]


def _class(name: str) -> str:
    names = {name, name.rpartition(".")[2]}
    return "free" if names & FREE else "rounding" if names & ROUNDING else "result"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _files(place: str) -> Iterator[tuple[str, Path]]:
    """The files of data at a path or pattern, and their names from there on."""
    for found in map(Path, sorted(glob(place)) or [place]):
        if found.is_dir():
            inside = (Path(folder, name) for folder, _, names in os.walk(found) for name in names)
            yield from ((file.relative_to(found).as_posix(), file) for file in sorted(inside) if file.suffix.lower() in _DATA)
        else:
            yield found.name, found
