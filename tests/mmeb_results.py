"""What the tests of results share: made-up results of a whole suite, whose every number can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

import numpy as np

from comatch.evaluation.metrics import Score
from comatch.evaluation.records import Prediction, SuiteResult, TaskResult
from comatch.evaluation.suites import SUITES, Place


def task(name: str, place: Place, ranks: list[int], ties: tuple[int, ...] = ()) -> TaskResult:
    """A task whose queries find their right one at these ranks (0: a broken vector), among 10 candidates each."""
    hits = np.array([rank == 1 for rank in ranks])
    reciprocal = np.array([1 / rank if rank else 0 for rank in ranks])
    ndcgs = np.array([1 / np.log2(rank + 1) if 0 < rank <= 5 else 0.0 for rank in ranks])
    recall = MappingProxyType({k: float(np.mean([0 < rank <= k for rank in ranks])) for k in (1, 5, 10)})
    hit = float(hits.mean())
    score = Score(
        name, place.meta, len(ranks), hit, max(0.0, hit - 0.1), min(1.0, hit + 0.1), hit, 0.1, recall,
        float(reciprocal.mean()), float(ndcgs.mean()), len(ties), sum(rank == 0 for rank in ranks), hits, ndcgs,
    )  # fmt: skip
    predictions = tuple(
        Prediction(
            query=str(i),
            chosen=f"gold {i}" if rank == 1 else f"rival {i} of {name}",
            gold=f"gold {i}",
            correct=rank == 1,
            rank=rank,
            margin=0.0 if i in ties or not rank else (0.25 if rank == 1 else -rank / 64),
            tie=i in ties,
            candidates=10,
        )
        for i, rank in enumerate(ranks)
    )
    return TaskResult(name, place.meta, place.modality, place.split, place.metric, score, predictions)


@cache
def suite_result(
    suite: str = "mmeb-v1", *, seed: int = 0, n: int = 20, skill: float = 0.5, without: tuple[str, ...] = (), **about: str
) -> SuiteResult:
    """A result with `n` queries per task, of which about `skill` are right; the same seed draws the same luck for any skill."""
    rng = np.random.default_rng(seed)
    tasks = []
    for name, place in SUITES[suite].items():
        luck, ranks = rng.random(n), rng.integers(2, 11, size=n)
        if name not in without:
            tasks.append(task(name, place, [1 if x < skill else int(rank) for x, rank in zip(luck, ranks, strict=True)]))
    told: Mapping[str, str] = {"model": "ours", "fingerprint": "f" * 32, "protocol": "comatch", "revision": "r1", **about}
    return SuiteResult(suite=suite, tasks=tuple(tasks), missing=without, **told)


def exact_result(scores: Mapping[str, float], n: int = 1000) -> SuiteResult:
    """A result on mmeb-v1 whose tasks have exactly these scores in percent, to one decimal."""
    tasks = []
    for name, place in SUITES["mmeb-v1"].items():
        right = round(scores[name] * n / 100)
        tasks.append(task(name, place, [1] * right + [2] * (n - right)))
    return SuiteResult("mmeb-v1", "golden", "g" * 32, "vlm2vec-v2", "r1", tuple(tasks), ())
