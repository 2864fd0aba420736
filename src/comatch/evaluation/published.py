"""What others have published on MMEB, as data, and how far each printed Overall can be trusted.

The table (published.toml beside this file) keeps the figures as printed; this file adds them up again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from comatch.errors import EvaluationError
from comatch.evaluation.aggregate import OVERALL
from comatch.evaluation.suites import places

TOLERANCE = 0.11
"""Percentage points: what rounding to one decimal leaves open (specs/mmeb.md 4.1)."""

PEERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mmeb-v1": ("CLIP ViT-L/14", "VLM2Vec Qwen2-VL-7B", "MoCa-3B", "CoCoA Qwen2.5-VL-3B"),
        "mmeb-v2": ("VLM2Vec-V2.0 Qwen2-VL-2B", "GME-7B", "RzenEmbed-8B", "Qwen3-VL-Embedding-2B"),
    }
)
"""Whom to compare with where nobody says: an early model, the benchmark's own, and those trained like ours."""

_DATASETS = {"CLS": 10, "VQA": 10, "RET": 12, "VG": 4, "IND": 20, "OOD": 16, "image": 36, "video": 18, "visdoc": 24}
_CHECKS = {"metas": ("CLS", "VQA", "RET", "VG"), "splits": ("IND", "OOD"), "modalities": ("image", "video", "visdoc")}


@dataclass(frozen=True)
class Published:
    """One published model.

    scores   in percent, by key of the aggregate; what is not printed is absent
    source   D: read where the authors put it, S: second hand, and where
    off      weighted means ("metas", "splits", "modalities") that miss the printed Overall
    overall  what the printed Overall is the mean of: "datasets", "metas" (plain mean of four) or "halves"
    """

    model: str
    scores: Mapping[str, float]
    source: str
    size: str = ""
    off: tuple[str, ...] = ()
    overall: str = "datasets"
    remark: str = ""

    @property
    def printed(self) -> float:
        """The Overall as printed (mmeb-v2: All)."""
        return self.scores[OVERALL if OVERALL in self.scores else "All"]

    @property
    def ok(self) -> bool | None:
        """Does the printed Overall fit every weighted mean that can be formed? None where none can."""
        return not self.off if self.weighted() else None

    def weighted(self) -> dict[str, float]:
        """The mean over datasets, formed anew from groups of datasets, by the name of the grouping; only those that are all printed."""
        found = {}
        for name, groups in _CHECKS.items():
            if all(group in self.scores for group in groups):
                total = sum(_DATASETS[group] for group in groups)
                found[name] = sum(_DATASETS[group] * self.scores[group] for group in groups) / total
        return found

    def missed(self) -> tuple[str, ...]:
        """The weighted means that are further than `TOLERANCE` from the printed Overall: what `off` should say."""
        return tuple(name for name, value in self.weighted().items() if abs(value - self.printed) > TOLERANCE + 1e-9)

    def dataset_mean(self) -> float:
        """The Overall in our meaning, the mean over datasets: as printed, or formed anew where the print means something else."""
        return self.printed if self.overall == "datasets" else self.weighted()["metas"]


@dataclass(frozen=True)
class Column:
    """hit@1 in percent per dataset of one model, and the aggregates that are printed for these very values."""

    model: str
    scores: Mapping[str, float]
    stated: Mapping[str, float]


def published(suite: str) -> tuple[Published, ...]:
    """Every published model of a suite, in the order of the table. Raises EvaluationError for an unknown suite."""
    places(suite)
    return tuple(_row(row) for row in _table()[suite])


def peers(suite: str, names: Sequence[str] | None = None) -> tuple[Published, ...]:
    """The published models of these names, in this order; by default `PEERS`. Raises EvaluationError for an unknown name."""
    known = {row.model: row for row in published(suite)}
    wanted = PEERS[suite] if names is None else names
    for name in wanted:
        if name not in known:
            near = ", ".join(get_close_matches(name, known, n=3, cutoff=0.3)) or "see published.toml"
            raise EvaluationError(f"no published model {name!r} on {suite}; near it: {near}")
    return tuple(known[name] for name in wanted)


def columns() -> tuple[Column, ...]:
    """Published scores per dataset of mmeb-v1."""
    table = _table()["per-dataset"]
    return tuple(
        Column(
            column["model"],
            MappingProxyType({name: row[i] for name, row in table["values"].items()}),
            MappingProxyType(column["stated"]),
        )
        for i, column in enumerate(table["columns"])
    )


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(files("comatch.evaluation").joinpath("published.toml").read_text(encoding="utf-8"))


def _row(row: Mapping[str, Any]) -> Published:
    told = {key: value for key, value in row.items() if key in ("model", "source", "size", "overall", "remark")}
    off = tuple(row.get("off", ()))
    scores = {key: float(value) for key, value in row.items() if key not in told and key != "off"}
    return Published(scores=MappingProxyType(scores), off=off, **told)
