"""What follows from the runs of a study: means over seeds, their intervals, and paired differences to a baseline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from comatch.evaluation.compare import LEVEL, holm

Key = tuple[str, ...]
"""A measured value: ("scores", "scenes-t2i"), ("redundancy", "compress", "cosine")."""


MEAN = "mean of tasks"


@dataclass(frozen=True)
class Mean:
    """Mean over seeds. half: of its 95 % interval by Student's t; None for a single seed. std: over seeds, likewise."""

    value: float
    half: float | None
    std: float | None
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of one value per seed."""
        n = len(values)
        std = float(np.std(values, ddof=1)) if n > 1 else None
        half = None if std is None else float(stats.t.ppf(0.975, n - 1)) * std / n**0.5
        return cls(float(np.mean(values)), half, std, n)


@dataclass(frozen=True)
class Gap:
    """An arm minus the baseline, seed by seed. p: two-sided, of the paired t-test; holm: corrected for all gaps of its kind of value."""

    mean: Mean
    p: float | None
    holm: float | None

    @property
    def sure(self) -> bool:
        """Whether the corrected p is below 0.05."""
        return self.holm is not None and self.holm < LEVEL


def values(run: Mapping[str, Any]) -> Iterator[tuple[Key, float]]:
    """All numbers that a run gives: hit@1 of tasks and, of several, their mean; last losses, cost, and what else was measured."""
    hits = {task: score["hit"] for task, score in run["scores"].items()}
    for task, hit in hits.items():
        yield ("scores", task), hit
    if len(hits) > 1:
        yield ("scores", MEAN), float(np.mean(list(hits.values())))
    for stage, told in run["stages"].items():
        yield ("loss", stage), told["loss"]
    for name in ("tflop", "seconds", "tokens", "items"):
        yield ("cost", name), sum(told[name] for told in run["stages"].values())
    for kind in ("redundancy", "carried", "answers"):
        for stage, told in run.get(kind, {}).items():
            for name, value in told.items():
                if value is not None:
                    yield (kind, stage, name), value


def table(results: Mapping[str, Any]) -> dict[str, dict[Key, dict[int, float]]]:
    """{arm: {value: {seed: number}}}, arms in the order of the file."""
    found: dict[str, dict[Key, dict[int, float]]] = {name: {} for name in results["arms"]}
    for run in sorted(results["runs"], key=lambda run: run["seed"]):
        for key, value in values(run):
            found[run["arm"]].setdefault(key, {})[run["seed"]] = value
    return {arm: row for arm, row in found.items() if row}


def means(results: Mapping[str, Any]) -> dict[str, dict[Key, Mean]]:
    """{arm: {value: mean over its seeds}}."""
    return {arm: {key: Mean.of(list(by_seed.values())) for key, by_seed in row.items()} for arm, row in table(results).items()}


def gaps(results: Mapping[str, Any], baseline: str | None = None) -> dict[str, dict[Key, Gap]]:
    """{arm: {value: its gap to the baseline}} over the seeds that both have; the study's own baseline unless another is named.

    Holm's correction is over all arms and values of one kind ("scores", "answers" ...).
    """
    rows = table(results)
    found: dict[tuple[str, Key], tuple[Mean, float | None]] = {}
    for arm, row in rows.items():
        base = rows.get(_base(results["arms"], arm, baseline or results["baseline"]) or "", row)
        for key, by_seed in row.items():
            seeds = sorted(set(by_seed) & set(base.get(key, {})))
            if row is not base and seeds:
                each = [by_seed[seed] - base[key][seed] for seed in seeds]
                found[arm, key] = Mean.of(each), _p(each)
    out: dict[str, dict[Key, Gap]] = {}
    for kind in dict.fromkeys(key[0] for _, key in found):
        tested = [(place, p) for place, (_, p) in found.items() if place[1][0] == kind and p is not None]
        corrected = dict(zip([place for place, _ in tested], holm([p for _, p in tested]), strict=True))
        for (arm, key), (mean, p) in found.items():
            if key[0] == kind:
                out.setdefault(arm, {})[key] = Gap(mean, p, corrected.get((arm, key)))
    return out


def _base(arms: Mapping[str, Any], arm: str, baseline: str | None) -> str | None:
    """What an arm is compared with: the baseline, or the baseline at the arm's own point of the grid."""
    point = arms[arm]["point"]
    return next((name for name, told in arms.items() if name == baseline or (told["arm"], told["point"]) == (baseline, point)), None)


def _p(each: Sequence[float]) -> float | None:
    """Two-sided p of the mean of paired differences; None for a single one, 1 or 0 where all are equal."""
    if len(each) < 2:
        return None
    if np.ptp(each) == 0:
        return float(each[0] == 0)
    return float(stats.ttest_1samp(each, 0).pvalue)
