"""Two results: a difference that is there is found, one that is not is not, and unequal queries are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_run import run
from mmeb_results import suite_result, task

from comatch.errors import EvaluationError
from comatch.evaluation.aggregate import OVERALL, per_query
from comatch.evaluation.compare import LEVEL, Comparison, compare, holm
from comatch.evaluation.metrics import paired_difference
from comatch.evaluation.records import SuiteResult
from comatch.evaluation.results import write_result
from comatch.evaluation.suites import SUITES

V1 = SUITES["mmeb-v1"]


def pair(n: int = 40) -> tuple[SuiteResult, SuiteResult]:
    """B does everything that A does, and more on every task."""
    return suite_result(n=n, skill=0.4, model="a"), suite_result(n=n, skill=0.7, model="b", fingerprint="b" * 32)


@pytest.fixture(scope="module")
def found() -> Comparison:
    return compare(*pair(), seed=3)


def short(result: SuiteResult, tasks: int = 3) -> SuiteResult:
    return replace(result, tasks=result.tasks[:tasks])


def test_each_task_is_the_paired_test_of_its_queries(found: Comparison) -> None:
    a, b = pair()
    assert [one.name for one in found.tasks] == list(V1)
    for one, mine, theirs in list(zip(found.tasks, a.tasks, b.tasks, strict=True))[::6]:
        assert one.difference == paired_difference(mine.score.hits, theirs.score.hits, seed=3)
        assert (one.a, one.b) == (mine.score.hit, theirs.score.hit) and one.b > one.a
    assert sum(one.holm < LEVEL for one in found.tasks) > 5


def test_the_means_add_up_and_their_intervals_hold_them(found: Comparison) -> None:
    a, b = pair()
    means = {mean.key: mean for mean in found.means}
    by_hand = np.mean([theirs.score.hit - mine.score.hit for mine, theirs in zip(a.tasks, b.tasks, strict=True)])
    assert "common" not in means and means[OVERALL].value == pytest.approx(by_hand), "the same number stands there once"
    assert means["CLS"].value == pytest.approx(np.mean([one.difference.mean for one in found.tasks[:10]]))
    assert all(mean.low < mean.value < mean.high for mean in found.means)
    assert means[OVERALL].low > 0, "forty queries times 36 tasks see 30 points"
    turned = compare(short(b), short(a)).means[0]
    assert turned.value == pytest.approx(-compare(short(a), short(b)).means[0].value) and turned.value < 0


def test_pairing_is_not_for_nothing() -> None:
    """The interval of the paired mean is narrower than that of two results with unrelated luck."""
    a, b = pair(200)
    c = suite_result(n=200, skill=0.7, seed=9)
    paired, unpaired = (compare(short(a), short(other)).means[0] for other in (b, c))
    assert paired.high - paired.low < 0.8 * (unpaired.high - unpaired.low)


def test_equal_results_differ_nowhere() -> None:
    a, _ = pair(10)
    found = compare(a, replace(a, model="the same"))
    assert found.means and {one.holm for one in found.tasks} == {1.0} and {one.difference.mean for one in found.tasks} == {0.0}
    assert all(mean.value == 0 and mean.low < 0 < mean.high for mean in found.means)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == [] and holm([0.02]) == [0.02]


def test_raw_p_values_deceive_where_holm_does_not() -> None:
    """Thirty-six comparisons of nothing with nothing: some p fall below 0.05, none after the correction."""
    rng = np.random.default_rng(5)
    results = []
    for name in ("x", "y"):
        tasks = [task(t, place, [int(r) for r in rng.integers(1, 3, size=60)]) for t, place in V1.items()]
        results.append(SuiteResult("mmeb-v1", name, name, "comatch", "r1", tuple(tasks), ()))
    found = compare(*results)
    assert any(one.difference.p < LEVEL for one in found.tasks)
    assert not any(one.holm < LEVEL for one in found.tasks)
    assert "better on 0, worse on 0" in found.markdown()


def test_documents_are_compared_in_their_own_metric() -> None:
    place = SUITES["mmeb-v2"]["VisRAG_ChartQA"]
    results = [
        SuiteResult("mmeb-v2", name, name, "comatch", "r1", (task("VisRAG_ChartQA", place, ranks),), ())
        for name, ranks in (("a", [5] * 30), ("b", [2] * 30))
    ]
    (found,) = compare(*results).tasks
    assert found.difference.mean == pytest.approx(1 / np.log2(3) - 1 / np.log2(6)) and found.holm < LEVEL
    assert not results[0].tasks[0].score.hits.any(), "hit@1 would see no difference"
    assert per_query(results[1].tasks[0]).mean() == found.b


def test_tasks_of_one_side_count_nowhere() -> None:
    a, b = pair(10)
    found = compare(a, replace(b, tasks=b.tasks[2:]))
    assert found.only_a == tuple(list(V1)[:2]) and found.only_b == () and len(found.tasks) == 34
    assert {mean.key for mean in found.means} == {"common", "VQA", "RET", "VG", "OOD"}, "what lacks a task has no mean"
    assert "mean of the 34 common tasks" in found.markdown() and "ImageNet-1K, N24News" in found.markdown()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"suite": "mmeb-v2"}, "suite 'mmeb-v1', b has 'mmeb-v2'"),
        ({"revision": "r2"}, "revision 'r1', b has 'r2'"),
        ({"tasks": ()}, "none is common"),
    ],
)
def test_other_data_are_refused(change: dict[str, object], told: str) -> None:
    a, b = pair(10)
    with pytest.raises(EvaluationError, match=told):
        compare(a, replace(b, **change))  # type: ignore[arg-type]


def test_other_queries_are_refused() -> None:
    a, b = pair(10)
    first = b.tasks[0]
    swapped = (first.predictions[1], first.predictions[0], *first.predictions[2:])
    more = tuple(replace(p, candidates=11) for p in first.predictions)
    for predictions, count in ((swapped, 2), (more, 10)):
        with pytest.raises(EvaluationError, match=rf"ImageNet-1K: 10 and 10 queries, {count} of them"):
            compare(a, replace(b, tasks=(replace(first, predictions=predictions), *b.tasks[1:])))


def test_the_verb_is_the_library(tmp_path: Path) -> None:
    a, b = (short(result) for result in pair())
    for name, result in (("a", a), ("b", b)):
        write_result(tmp_path / f"{name}.json", result)
    ran = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--seed", 2)
    assert ran.code == 0 and ran.out == compare(a, b, seed=2).markdown()
    assert "# b (comatch) against a (comatch), mmeb-v1" in ran.out and "p, Holm" in ran.out and "B better" in ran.out
    told = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--json").objects[0]
    assert told == json.loads(json.dumps(compare(a, b).to_dict())) and told["correction"] == "Holm over 3 tasks"
    missing = run("compare", tmp_path / "a.json", tmp_path / "none.json")
    assert missing.code == 1 and "none.json cannot be read as a result" in missing.err
