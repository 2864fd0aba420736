"""Scores equal a plain loop, and no broken or lazy encoder scores well."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from comatch.errors import EvaluationError
from comatch.evaluation.metrics import TIE, Score, hit_at_1, interval, paired_difference

DIM = 12


def unit(rng: np.random.Generator, n: int) -> np.ndarray:
    vectors = rng.normal(size=(n, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def fixture(seed: int = 0, n: int = 150, pool: int = 40, most_gold: int = 3) -> dict[str, Any]:
    """Queries, pool, lists of unequal length with some candidates twice, and one to three gold ones each."""
    rng = np.random.default_rng(seed)
    candidates = [list(rng.integers(pool, size=rng.integers(4, 60))) for _ in range(n)]
    gold = [list(set(rng.choice(c, size=rng.integers(1, most_gold + 1)))) for c in candidates]
    return {
        "query_vectors": unit(rng, n),
        "candidate_vectors": unit(rng, pool),
        "candidates": candidates,
        "gold": gold,
    }


def by_loop(
    query_vectors: np.ndarray, candidate_vectors: np.ndarray, candidates: Any, gold: Any
) -> dict[str, Any]:
    """The same scores, one candidate at a time, for vectors without faults."""
    out: dict[str, list[float]] = {
        k: [] for k in ("hit", "expected", "mrr", "ndcg5", "ties", "chance", "r1", "r5", "r10")
    }
    for query, listed, right in zip(query_vectors, candidates, gold, strict=True):
        scores = {
            c: sum(float(a) * float(b) for a, b in zip(query, candidate_vectors[c], strict=True))
            for c in set(listed)
        }
        wrong = [scores[c] for c in scores if c not in right]
        ranks = []
        for place, good in enumerate(sorted((scores[c] for c in right), reverse=True)):
            ranks.append(1 + place + sum(other > good - TIE for other in wrong))
        top = max(scores.values())
        on_top = [c for c in scores if scores[c] > top - TIE]
        out["hit"].append(ranks[0] == 1)
        out["expected"].append(sum(c in right for c in on_top) / len(on_top))
        out["ties"].append(0 < sum(c in right for c in on_top) < len(on_top))
        out["mrr"].append(1 / ranks[0])
        ideal = sum(1 / math.log2(1 + r) for r in range(1, 1 + min(5, len(right))))
        out["ndcg5"].append(sum(1 / math.log2(1 + r) for r in ranks if r <= 5) / ideal)
        out["chance"].append(len(right) / len(scores))
        for k in (1, 5, 10):
            out[f"r{k}"].append(sum(r <= k for r in ranks) / len(right))
    return {key: sum(values) if key == "ties" else sum(values) / len(values) for key, values in out.items()}


def numbers(score: Score) -> dict[str, Any]:
    return {key: getattr(score, key) for key in ("hit", "expected", "mrr", "ndcg5", "ties", "chance")} | {
        f"r{k}": share for k, share in score.recall.items()
    }


@pytest.mark.parametrize("tied", [False, True])
def test_scores_equal_a_plain_loop(tied: bool) -> None:
    data = fixture()
    if tied:  # every vector stands in the pool twice: ties between gold and gold, gold and others
        data["candidate_vectors"][20:] = data["candidate_vectors"][:20]
    expected, score = by_loop(**data), hit_at_1(**data)
    assert numbers(score) == pytest.approx(expected, abs=1e-9)
    assert score.n == 150 and score.invalid == 0 and score.low < score.hit < score.high
    assert 0 < score.hit < 1 and 0 < score.mrr < 1
    assert (score.ties > 0) == tied and (score.expected > score.hit) == tied


def test_perfect_and_hopeless_encoders() -> None:
    data = fixture(most_gold=1)
    right = np.array([g[0] for g in data["gold"]])
    data["query_vectors"] = data["candidate_vectors"][right]
    good = hit_at_1(**data)
    assert good.hit == good.mrr == good.ndcg5 == good.recall[1] == good.high == 1 and 0.9 < good.low < 1
    data["query_vectors"] = -data["query_vectors"]
    bad = hit_at_1(**data)
    assert bad.hit == 0 == bad.low < bad.high < 0.1 and bad.mrr < 0.2


def test_a_constant_encoder_scores_nothing_and_its_coin_scores_chance() -> None:
    data = fixture()
    for key in ("query_vectors", "candidate_vectors"):
        data[key] = np.repeat(data[key][:1], len(data[key]), axis=0)
    score = hit_at_1(**data)
    assert score.hit == 0 and score.ties == score.n
    assert score.expected == pytest.approx(score.chance) and score.chance > 0.05


@pytest.mark.parametrize("fault", [np.nan, np.inf, 0.0])
def test_broken_vectors_never_help(fault: float) -> None:
    data = fixture(most_gold=1)
    right = np.array([g[0] for g in data["gold"]])
    data["query_vectors"] = data["candidate_vectors"][right].copy()
    assert hit_at_1(**data).hit == 1
    for key, place in (("query_vectors", 0), ("candidate_vectors", right[0])):
        broken = {**data, key: data[key].copy()}
        broken[key][place] = fault
        score = hit_at_1(**broken)
        touched = [
            i for i in range(150) if (i == 0 if key == "query_vectors" else place in data["candidates"][i])
        ]
        assert score.invalid == len(touched) > 0
        assert np.flatnonzero(~score.hits).tolist() == touched
        assert score.expected == score.hit
    everything = {
        **data,
        "query_vectors": np.full((150, DIM), fault),
        "candidate_vectors": np.full((40, DIM), fault),
    }
    score = hit_at_1(**everything)
    assert (
        score.hit == score.expected == score.mrr == score.ndcg5 == score.recall[10] == 0
        and score.invalid == 150
    )


def test_the_order_of_candidates_does_not_matter() -> None:
    data = fixture()
    data["candidate_vectors"][20:] = data["candidate_vectors"][:20]
    first = numbers(hit_at_1(**data))
    assert numbers(hit_at_1(**{**data, "candidates": [c[::-1] for c in data["candidates"]]})) == first
    order = np.random.default_rng(1).permutation(40)
    moved = {
        "query_vectors": data["query_vectors"],
        "candidate_vectors": data["candidate_vectors"][np.argsort(order)],
        "candidates": [[order[c] for c in some] for some in data["candidates"]],
        "gold": [[order[c] for c in some] for some in data["gold"]],
    }
    assert numbers(hit_at_1(**moved)) == pytest.approx(first)


@pytest.mark.parametrize("key", ["query_vectors", "candidate_vectors"])
def test_vectors_that_are_not_of_unit_length_are_refused(key: str) -> None:
    data = fixture()
    data[key] = data[key] * np.linspace(1, 1.002, len(data[key]))[:, None]
    with pytest.raises(EvaluationError, match=rf"{key.split('_')[0]} vector \d+ has length 1\.00"):
        hit_at_1(**data)
    hit_at_1(**{**data, key: data[key] / np.linalg.norm(data[key], axis=1, keepdims=True)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": [[0], []]}, "query 1"),
        ({"candidates": [[0], [-1]]}, "query 1"),
        ({"candidates": [[0], [2, 7]]}, "0 to 2"),
        ({"gold": [[0], []]}, "query 1 has gold"),
        ({"gold": [[0], [2]]}, "query 1 has gold"),
        ({"gold": [[0]]}, "1 gold lists"),
        ({"query_vectors": np.eye(4)[:2]}, "4 dimensions"),
        ({"query_vectors": np.empty((0, 3))}, r"\[0, 3\]"),
    ],
)  # fmt: skip
def test_lists_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    data = {
        "query_vectors": np.eye(3)[:2],
        "candidate_vectors": np.eye(3),
        "candidates": [[0, 1], [0, 1]],
        "gold": [[0], [1]],
    }
    assert hit_at_1(**data).hit == 1
    with pytest.raises(EvaluationError, match=message):
        hit_at_1(**{**data, **change})


def test_the_interval_covers_and_pairs() -> None:
    rng = np.random.default_rng(0)
    draws = [interval(rng.random(100) < 0.3, seed=i) for i in range(60)]
    covered = sum(low <= 0.3 <= high for low, high in draws)
    assert 51 <= covered <= 60 and all(0.1 < high - low < 0.25 for low, high in draws)
    values = rng.random(100) < 0.3
    assert interval(values, seed=1) == interval(values, seed=1) != interval(values, seed=2)
    assert interval(1.0 - values, seed=1) == pytest.approx(
        [1 - x for x in reversed(interval(values, seed=1))]
    )


def test_the_paired_test_sees_what_two_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(400) < 0.5
    b = a.copy()
    b[np.flatnonzero(~a)[:12]] = True
    better = paired_difference(a, b)
    assert better.mean == pytest.approx(0.03) and better.low > 0 and better.p < 0.01 and better.n == 400
    assert interval(a)[1] > interval(b)[0], "the two intervals do not even overlap: nothing shown"
    worse = paired_difference(b, a)
    assert (worse.mean, worse.p) == (-better.mean, better.p)
    same = paired_difference(a, a)
    assert same.mean == 0 and same.p == 1 and -0.02 < same.low < 0 < same.high < 0.02
    assert paired_difference(a, rng.permutation(a)).p > 0.05
    with pytest.raises(EvaluationError, match="400 values against 3"):
        paired_difference(a, b[:3])
