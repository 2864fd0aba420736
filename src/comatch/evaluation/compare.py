"""Is one model better than another? Two results on the same queries, paired query by query.

Each task has a sign-flip test of its own. Among many tests some come out small by chance, so the p values are
also given after Holm's correction over all tasks compared: those below 0.05 are significant together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from comatch.errors import EvaluationError
from comatch.evaluation.aggregate import Aggregate, Mean, aggregates, estimate, per_query
from comatch.evaluation.metrics import Difference, Floats, paired_difference
from comatch.evaluation.records import SuiteResult, TaskResult
from comatch.evaluation.suites import SUITES

LEVEL = 0.05


@dataclass(frozen=True)
class TaskDifference:
    """One task of both results. a, b: scores from 0 to 1 in `metric`; holm: the p of `difference`, corrected for the number of tasks."""

    name: str
    metric: str
    a: float
    b: float
    difference: Difference
    holm: float


@dataclass(frozen=True)
class Comparison:
    """Model b minus model a.

    a, b            model and protocol of each, as words
    tasks           every task of both
    means           mean difference over the common tasks where these are not all, then every aggregate of the suite that they allow
    only_a, only_b  tasks of one result alone, which count nowhere
    """

    suite: str
    a: str
    b: str
    tasks: tuple[TaskDifference, ...]
    means: tuple[Mean, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "level": LEVEL, "correction": f"Holm over {len(self.tasks)} tasks"}

    def markdown(self) -> str:
        """Two tables in percentage points, and what a reader must know to read them."""
        won = [task for task in self.tasks if task.holm < LEVEL]
        better, n = sum(task.difference.mean > 0 for task in won), len(self.tasks)
        alone = ((self.a, self.only_a), (self.b, self.only_b))
        lines = [
            f"# {self.b} against {self.a}, {self.suite}",
            "",
            f"{n} common tasks, the same queries. B is significantly better on {better}, worse on {len(won) - better}, undecided on",
            f"{n - len(won)} (p below {LEVEL} after Holm's correction over the {n} tasks).",
            *(f"\nOnly in {name}, not compared: {', '.join(tasks)}." for name, tasks in alone if tasks),
            "",
            "| mean | difference | 95 % interval |",
            "|---|---:|---:|",
            *(f"| {mean.label} | {_points(mean.value)} | {_points(mean.low)} to {_points(mean.high)} |" for mean in self.means),
            "",
            "| task | metric | n | A | B | B - A | 95 % interval | p | p, Holm |  |",
            "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
            *map(_row, self.tasks),
            "",
            f"A: {self.a}. B: {self.b}. Differences in percentage points. p: two-sided sign-flip test over queries, not corrected;",
            "the smallest it can show is 0.0005. Intervals: resampled queries, tasks as they are.",
        ]
        return "\n".join(lines) + "\n"


def compare(a: SuiteResult, b: SuiteResult, *, seed: int = 0) -> Comparison:
    """Model b minus model a, task by task and in the mean.

    Raises EvaluationError where the suites or data revisions differ, a task has other queries or candidates in
    the two, or no task is common.
    """
    for name in ("suite", "revision"):
        if getattr(a, name) != getattr(b, name):
            mine, other = getattr(a, name), getattr(b, name)
            raise EvaluationError(f"{a.model} has {name} {mine!r}, {b.model} has {other!r}; compare results on the same data")
    ours, theirs = ({task.name: task for task in result.tasks} for result in (a, b))
    common = [name for name in ours if name in theirs]
    if not common:
        raise EvaluationError(f"{a.model} has tasks {list(ours)[:5]}, {b.model} {list(theirs)[:5]}; none is common")
    pairs = [(ours[name], theirs[name]) for name in common]
    for one, other in pairs:
        _check_same(one, other)
    values = {one.name: (per_query(one), per_query(other)) for one, other in pairs}
    found = [paired_difference(*pair, seed=seed) for pair in values.values()]
    corrected = holm([difference.p for difference in found])
    return Comparison(
        a.suite,
        f"{a.model} ({a.protocol})",
        f"{b.model} ({b.protocol})",
        tuple(
            TaskDifference(one.name, one.metric, float(x.mean()), float(y.mean()), difference, p)
            for (one, _), (x, y), difference, p in zip(pairs, values.values(), found, corrected, strict=True)
        ),
        tuple(_means(a.suite, {name: y - x for name, (x, y) in values.items()}, seed)),
        tuple(name for name in ours if name not in theirs),
        tuple(name for name in theirs if name not in ours),
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the i-th smallest of m values times (m - i), made monotone, at most 1 (Holm 1979)."""
    corrected = [1.0] * len(p)
    worst = 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, p[i] * (len(p) - place)))
        corrected[i] = worst
    return corrected


def _means(suite: str, differences: dict[str, Floats], seed: int) -> list[Mean]:
    plain = Aggregate("common", f"mean of the {len(differences)} common tasks", dict.fromkeys(differences, 1 / len(differences)))
    known = aggregates(suite) if suite in SUITES else ()
    wanted = known if any(dict(one.weights) == plain.weights for one in known) else (plain, *known)
    return estimate(wanted, differences, seed=seed, floor=-1.0)


def _check_same(one: TaskResult, other: TaskResult) -> None:
    sides = [[(p.query, p.candidates) for p in task.predictions] for task in (one, other)]
    if sides[0] != sides[1] or one.metric != other.metric:
        n = sum(x != y for x, y in zip(*sides, strict=False))
        raise EvaluationError(
            f"task {one.name}: {len(sides[0])} and {len(sides[1])} queries, {n} of them with another id or number of candidates, "
            f"metrics {one.metric} and {other.metric}; a paired test needs the same queries in the same order"
        )


def _row(task: TaskDifference) -> str:
    d = task.difference
    told = "" if task.holm >= LEVEL else "B better" if d.mean > 0 else "A better"
    return (
        f"| {task.name} | {task.metric} | {d.n} | {100 * task.a:.1f} | {100 * task.b:.1f} | {_points(d.mean)} "
        f"| {_points(d.low)} to {_points(d.high)} | {d.p:.4f} | {task.holm:.4f} | {told} |"
    )


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
