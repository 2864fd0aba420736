"""From tasks to the numbers people quote: group means, and every published meaning of "Overall", each by its name.

An aggregate is a weighted sum of task scores, so a published column, a result and the difference of two
results are all added up by the same weights. An aggregate of which a task is missing has no value. Source of
the definitions: specs/mmeb.md 1.5, 3 and 5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from comatch.errors import EvaluationError
from comatch.evaluation.metrics import Floats, interval
from comatch.evaluation.records import SuiteResult, TaskResult
from comatch.evaluation.suites import Place, places

OVERALL, OVERALL_METAS, OVERALL_HALVES = "Overall", "Overall, metas", "Overall, halves"
_RESAMPLES = 2000


@dataclass(frozen=True)
class Aggregate:
    """A weighted sum of task scores. key: as in the published tables; label: what it is, in words; weights: by task, summing to 1."""

    key: str
    label: str
    weights: Mapping[str, float]

    def of(self, scores: Mapping[str, float]) -> float | None:
        """The value for these scores by task, None where one is missing."""
        if self.lacks(scores):
            return None
        return sum(weight * scores[name] for name, weight in self.weights.items())

    def lacks(self, have: Iterable[str]) -> tuple[str, ...]:
        """The tasks that it needs and that are not among `have`."""
        there = set(have)
        return tuple(name for name in self.weights if name not in there)


@dataclass(frozen=True)
class Mean:
    """The value of an aggregate from 0 to 1 (a difference: -1 to 1) with its 95 % interval over resampled queries."""

    key: str
    label: str
    value: float
    low: float
    high: float
    tasks: int


@dataclass(frozen=True)
class Summary:
    """means: every aggregate whose tasks are all there. withheld: key to missing tasks of the others. missing: of the whole suite."""

    suite: str
    means: tuple[Mean, ...]
    withheld: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]

    def __getitem__(self, key: str) -> Mean | None:
        return next((mean for mean in self.means if mean.key == key), None)


def aggregates(suite: str) -> tuple[Aggregate, ...]:
    """Every aggregate of a suite, in the order of the tables. Raises EvaluationError for an unknown suite."""
    table = places(suite)
    if suite == "mmeb-v1":
        metas = [_mean(key, f"{key}, mean of {{}} datasets", table, _meta(key)) for key in ("CLS", "VQA", "RET", "VG")]
        halves = [_mean(key, f"{key}, mean of {{}} datasets", table, _split(key)) for key in ("IND", "OOD")]
        return (
            *metas,
            *halves,
            _mean(OVERALL, "Overall: mean of the {} datasets", table, lambda _: True),
            Aggregate(OVERALL_METAS, "Overall as some print it: mean of CLS, VQA, RET, VG", _mixed(metas)),
            Aggregate(OVERALL_HALVES, "Overall as some print it: (IND + OOD) / 2", _mixed(halves)),
        )
    found = list[Aggregate]()
    for modality in ("image", "video", "visdoc"):
        for meta in dict.fromkeys(place.meta for place in table.values() if place.modality == modality):
            key = f"{modality} {meta}"
            found.append(_mean(key, f"{key}, mean of {{}} datasets", table, _meta(meta, modality)))
    for modality in ("image", "video", "visdoc"):
        found.append(_mean(modality, f"{modality}, mean of {{}} datasets", table, _modality(modality)))
    return (*found, _mean("All", "All: mean of the {} datasets", table, lambda _: True))


def summarise(result: SuiteResult, *, seed: int = 0) -> Summary:
    """Every aggregate that the tasks of a result allow, and what is missing for the others.

    Raises EvaluationError where a task is not of the suite, stands twice, or claims another place in it.
    """
    table = places(result.suite)
    for name, times in Counter(task.name for task in result.tasks).items():
        if times > 1:
            raise EvaluationError(f"task {name} stands {times} times in the result of {result.model}; keep one of them")
    for task in result.tasks:
        _check_place(task, table, result.suite)
    scores = {task.name: per_query(task) for task in result.tasks}
    wanted = aggregates(result.suite)
    withheld = {one.key: lacking for one in wanted if (lacking := one.lacks(scores))}
    return Summary(
        result.suite,
        tuple(estimate(wanted, scores, seed=seed)),
        MappingProxyType(withheld),
        tuple(name for name in table if name not in scores),
    )


def per_query(task: TaskResult) -> Floats:
    """What each query contributes to the task's score, [n] in order: 0 or 1 for hit@1, else its nDCG at 5."""
    values = {"hit@1": task.score.hits, "ndcg@5": task.score.ndcgs}
    if task.metric not in values:
        raise EvaluationError(f"task {task.name} counts {task.metric!r}; allowed: {', '.join(values)}")
    return np.asarray(values[task.metric], dtype=np.float64)


def task_mean(task: TaskResult, *, seed: int = 0) -> Mean:
    """The task's score in the metric that counts, with its interval."""
    if task.metric == "hit@1":
        return Mean(task.name, task.name, task.score.hit, task.score.low, task.score.high, 1)
    (mean,) = estimate([Aggregate(task.name, task.name, {task.name: 1.0})], {task.name: per_query(task)}, seed=seed)
    return mean


def estimate(wanted: Iterable[Aggregate], scores: Mapping[str, Floats], *, seed: int = 0, floor: float = 0.0) -> list[Mean]:
    """The aggregates whose tasks are all in `scores` (task to values [n] per query), with 95 % intervals.

    Queries are resampled within each task; the tasks themselves stay as they are. floor: the least value there is.
    """
    rng = np.random.default_rng(seed)
    drawn = {name: _resampled_means(values, rng) for name, values in scores.items()}
    centres = {name: float(values.mean()) for name, values in scores.items()}
    means = []
    for one in wanted:
        value = one.of(centres)
        if value is None:
            continue
        draws = np.sum([weight * drawn[name] for name, weight in one.weights.items()], axis=0)
        low, high = (float(edge) for edge in np.quantile(draws, [0.025, 0.975]))
        if np.ptp(draws) < 1e-12:  # every task has equal values throughout: resampling learns nothing, an exact bound stands in
            low, high = interval(np.full(sum(len(scores[name]) for name in one.weights), value), floor=floor)
        means.append(Mean(one.key, one.label, value, low, high, len(one.weights)))
    return means


def _resampled_means(values: Floats, rng: np.random.Generator) -> Floats:
    """Means of [_RESAMPLES] draws of n values with replacement: how often each distinct value is drawn is multinomial."""
    distinct, counts = np.unique(values, return_counts=True)
    times = rng.multinomial(len(values), counts / len(values), size=_RESAMPLES)
    means: Floats = times @ distinct / len(values)
    return means


def _check_place(task: TaskResult, table: Mapping[str, Place], suite: str) -> None:
    place = table.get(task.name)
    if place is None:
        raise EvaluationError(f"task {task.name!r} is none of the {len(table)} of {suite}")
    told, true = ((one.modality, one.meta, one.split, one.metric) for one in (task, place))
    if told != true:
        raise EvaluationError(f"task {task.name} says modality, meta, split, metric {told}; in {suite} it has {true}")
    if len(per_query(task)) != task.score.n or not task.score.n:
        raise EvaluationError(f"task {task.name} has {len(per_query(task))} values for {task.score.n} queries; score it again")


def _mean(key: str, label: str, table: Mapping[str, Place], of: Callable[[Place], bool]) -> Aggregate:
    names = [name for name, place in table.items() if of(place)]
    return Aggregate(key, label.format(len(names)), MappingProxyType(dict.fromkeys(names, 1 / len(names))))


def _mixed(parts: list[Aggregate]) -> Mapping[str, float]:
    """The weights of the plain mean of aggregates without common tasks."""
    return MappingProxyType({name: weight / len(parts) for part in parts for name, weight in part.weights.items()})


def _meta(meta: str, modality: str = "image") -> Callable[[Place], bool]:
    return lambda place: (place.modality, place.meta) == (modality, meta)


def _split(split: str) -> Callable[[Place], bool]:
    return lambda place: place.split == split


def _modality(modality: str) -> Callable[[Place], bool]:
    return lambda place: place.modality == modality
