"""How right is a ranking? Strict about ties, suspicious of broken vectors, honest about chance.

Every query ranks its own listed candidates by dot product of unit vectors. A gold candidate is right only
when it beats every other candidate by more than `TIE`, so a constant encoder scores 0 and not 100 %. A NaN or
zero vector never helps: as query or gold it is never found, as rival it is taken to win. The protocol follows
specs/mmeb.md sections 1.5 and 5; the differences to the reference evaluators (which favour ties at index 0)
are deliberate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from comatch.errors import EvaluationError

Floats = npt.NDArray[np.floating[Any]]

TIE = 1e-6
"""Scores closer than this are equal: float32 products of equal vectors differ in the last bits."""
NORM_TOLERANCE = 1e-3
CUTS = (1, 5, 10)
_BLOCK = 64
_RESAMPLES = 2000


@dataclass(frozen=True)
class Score:
    """The scores of one task.

    hit        share of queries whose best gold candidate beats every other candidate strictly (hit@1,
               Precision@1)
    low, high  95 % interval of `hit` from resampling queries; equal seeds resample equal queries
    expected   hit@1 if ties were broken by a fair coin
    chance     hit@1 of a random ranking
    recall     {k: mean share of a query's gold candidates among its first k}
    mrr        mean of 1 / rank of the best gold candidate
    ndcg5      nDCG at 5, linear gain; where nobody says otherwise, relevance is 1 for gold and 0 for others
    n          queries; ties: queries whose best place is shared by gold and others
    invalid    queries that touch a NaN, infinite or zero vector (their own or a listed candidate's)
    hits       the 0/1 of every query in order, for paired tests; ndcgs: its nDCG at 5
    """

    name: str
    meta: str
    n: int
    hit: float
    low: float
    high: float
    expected: float
    chance: float
    recall: Mapping[int, float]
    mrr: float
    ndcg5: float
    ties: int
    invalid: int
    hits: npt.NDArray[np.bool_] = field(repr=False, compare=False)
    ndcgs: npt.NDArray[np.float64] = field(repr=False, compare=False)


@dataclass(frozen=True)
class Verdict:
    """The ranking of one query.

    chosen      row of the best candidate; where gold does not clearly win, of its best rival
    gold        row of the best gold candidate; rank: its place from 1 on, 0 where it or the query cannot be used
    margin      score of the best gold candidate minus that of its best rival, from -2 to 2
    candidates  how many distinct ones were ranked
    """

    chosen: int
    gold: int
    correct: bool
    rank: int
    margin: float
    tie: bool
    candidates: int


@dataclass(frozen=True)
class Difference:
    """Model b minus model a on the same queries: mean, 95 % interval, two-sided p of a sign-flip test."""

    mean: float
    low: float
    high: float
    p: float
    n: int


def hit_at_1(
    query_vectors: Floats,
    candidate_vectors: Floats,
    candidates: Sequence[Sequence[int]],
    gold: Sequence[Sequence[int]],
    *,
    name: str = "",
    meta: str = "",
    seed: int = 0,
) -> Score:
    """The score of `judge`, where all gold candidates are equally relevant."""
    return judge(query_vectors, candidate_vectors, candidates, gold, name=name, meta=meta, seed=seed)[0]


def judge(
    query_vectors: Floats,
    candidate_vectors: Floats,
    candidates: Sequence[Sequence[int]],
    gold: Sequence[Sequence[int]],
    relevance: Sequence[Sequence[float]] = (),
    *,
    name: str = "",
    meta: str = "",
    seed: int = 0,
) -> tuple[Score, tuple[Verdict, ...]]:
    """Rank each query's listed candidates; the score of the ranking, and each query's verdict.

    query_vectors [n, dim] and candidate_vectors [pool, dim], unit rows; candidates[i] and gold[i] hold row
    numbers of candidate_vectors, relevance[i] how relevant each of gold[i] is (() is 1 everywhere). A list is
    read as a set: a candidate named twice counts once. Raises EvaluationError where the lists do not fit, a
    gold candidate is not listed, or a finite vector is not of unit length.
    """
    queries, pool = _checked(query_vectors, "query"), _checked(candidate_vectors, "candidate")
    if queries.shape[1] != pool.shape[1]:
        raise EvaluationError(
            f"query vectors have {queries.shape[1]} dimensions, candidates {pool.shape[1]}; encode both "
            "with one model"
        )
    grades = relevance or [[1.0] * len(right) for right in gold]
    if not len(queries) == len(candidates) == len(gold) == len(grades):
        raise EvaluationError(
            f"{len(queries)} queries, {len(candidates)} candidate lists, {len(gold)} gold lists, {len(grades)} of their relevance; "
            "the numbers must be equal"
        )
    bad_query, bad_pool = _invalid(queries), _invalid(pool)
    queries, pool = np.where(bad_query[:, None], 0, queries), np.where(bad_pool[:, None], 0, pool)
    outcomes, verdicts = [], list[Verdict]()
    for start in range(0, len(queries), _BLOCK):
        for i, scores in enumerate(queries[start : start + _BLOCK] @ pool.T, start=start):
            ids, grade = _listed(i, candidates[i], gold[i], grades[i], len(pool))
            outcomes.append(_outcome(scores[ids], grade, bad_pool[ids], bool(bad_query[i])))
            verdicts.append(_verdict(ids, scores[ids], grade > 0, bad_pool[ids], outcomes[-1]))
    table = np.asarray(outcomes, dtype=np.float64)
    hits = table[:, 0] == 1
    low, high = interval(hits, seed=seed)
    ties, invalid = table[:, 1:3].sum(axis=0).astype(int).tolist()
    hit, _, _, expected, chance, mrr, ndcg5, *recall = table.mean(axis=0).tolist()
    found = MappingProxyType(dict(zip(CUTS, recall, strict=True)))
    score = Score(
        name, meta, len(hits), hit, low, high, expected, chance, found, mrr, ndcg5, ties, invalid, hits, table[:, 6]
    )
    return score, tuple(verdicts)


def _outcome(scores: Floats, grade: Floats, bad: npt.NDArray[np.bool_], bad_query: bool) -> list[float]:
    """One query: [hit, tie, invalid, expected, chance, reciprocal rank, ndcg5, recall at each of CUTS]."""
    gold = grade > 0
    chance = float(gold.mean())
    if bad_query:
        return [0, 0, 1, 0, chance, 0, 0, *(0 for _ in CUTS)]
    golds, grades = scores[gold & ~bad], grade[gold & ~bad]
    # Of gold ones with equal scores the less relevant stands first, as a tie never helps.
    order = np.lexsort((grades, -np.round(golds / TIE)))
    golds, grades = golds[order], grades[order]
    rivals = np.where(bad, np.inf, scores)[~gold]
    # A gold one stands behind the better gold ones and behind every rival that does not clearly lose.
    ahead = np.array([np.sum(rivals >= g - TIE) for g in golds], dtype=np.int64)
    ranks = ahead + np.arange(1, len(golds) + 1)
    best = ranks[0] if len(ranks) else math.inf
    top = max(golds.max(initial=-np.inf), rivals.max(initial=-np.inf))
    gold_on_top, rivals_on_top = (int(np.sum(some >= top - TIE)) for some in (golds, rivals))
    tie = gold_on_top > 0 and rivals_on_top > 0
    expected = gold_on_top / max(gold_on_top + rivals_on_top, 1)
    total = int(gold.sum())
    gains = np.sum((grades / np.log2(ranks + 1.0))[ranks <= 5])
    ideal = sum(value / math.log2(rank + 1) for rank, value in enumerate(sorted(grade[gold], reverse=True)[:5], start=1))
    recall = [int(np.sum(ranks <= k)) / total for k in CUTS]
    return [best == 1, tie, bool(bad.any()), expected, chance, 1 / best, gains / ideal, *recall]


def _verdict(
    ids: npt.NDArray[np.int64], scores: Floats, gold: npt.NDArray[np.bool_], bad: npt.NDArray[np.bool_], outcome: Sequence[float]
) -> Verdict:
    """What `_outcome` found, by candidates: the best right one, and the one that beats it or ties with it where there is one."""
    hit, tie, _, _, _, reciprocal, *_ = outcome
    right = np.where(gold & ~bad, scores, -np.inf)
    rival = np.where(gold, -np.inf, np.where(bad, np.inf, scores))
    best = int(right.argmax()) if np.isfinite(right).any() else int(gold.argmax())
    chosen = best if hit or gold.all() else int(rival.argmax())
    rank = round(1 / reciprocal) if reciprocal else 0
    # Cosines differ by 2 at most, which stands for a margin without a rival.
    margin = float(np.clip(right.max() - rival.max(), -2, 2)) if rank else 0.0
    return Verdict(int(ids[chosen]), int(ids[best]), bool(hit), rank, margin, bool(tie), len(ids))


def interval(values: npt.ArrayLike, *, seed: int = 0, floor: float = 0.0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [n] between `floor` and 1, by resampling them with replacement.

    Resampling learns nothing from values that are all equal; the exact binomial bound of n successes in n
    trials stands in.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise EvaluationError("no values to estimate an interval from; the task has no queries")
    if np.all(values == values[0]):
        slack = 1 - 0.025 ** (1 / n)
        return max(values[0] - slack, floor), min(values[0] + slack, 1.0)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(n, size=n)].mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_difference(a: npt.ArrayLike, b: npt.ArrayLike, *, seed: int = 0) -> Difference:
    """Is model b better than model a on the same queries? a, b: values [n] per query, such as `Score.hits`.

    p is the share of random sign flips of the n differences whose mean is at least as far from 0 as the
    observed one.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if len(a) != len(b):
        raise EvaluationError(
            f"{len(a)} values against {len(b)}; a paired test needs the same queries in the same order"
        )
    difference = b - a
    low, high = interval(difference, seed=seed, floor=-1.0)
    rng = np.random.default_rng(seed)
    moved = difference[difference != 0]
    flipped = [abs(moved @ rng.choice((-1.0, 1.0), size=len(moved))) for _ in range(_RESAMPLES)]
    extreme = np.count_nonzero(np.array(flipped) >= abs(moved.sum()) - 1e-9)
    return Difference(float(difference.mean()), low, high, (1 + extreme) / (1 + _RESAMPLES), len(difference))


def _invalid(vectors: Floats) -> npt.NDArray[np.bool_]:
    """Rows that are not finite or (nearly) zero: [n] bool."""
    with np.errstate(invalid="ignore", over="ignore"):
        norms: Floats = np.linalg.norm(vectors, axis=1)
    return ~(np.isfinite(norms) & (norms > 1e-6))


def _checked(vectors: Floats, what: str) -> Floats:
    """The vectors as float32 [n, dim], refused unless every usable row has unit length."""
    vectors = np.asarray(vectors, dtype=np.float32)
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise EvaluationError(
            f"{what} vectors have shape {list(vectors.shape)}; expected [n, dim] with n and dim above 0"
        )
    bad = _invalid(vectors)
    norms = np.linalg.norm(np.where(bad[:, None], 1, vectors), axis=1)
    wrong = np.flatnonzero(~bad & (np.abs(norms - 1) > NORM_TOLERANCE))
    if len(wrong):
        raise EvaluationError(
            f"{what} vector {wrong[0]} has length {norms[wrong[0]]:.4g}, and {len(wrong)} of {len(vectors)} "
            f"are not of unit length (within {NORM_TOLERANCE}); divide each row by its norm first"
        )
    return vectors


def _listed(
    i: int, candidates: Sequence[int], gold: Sequence[int], relevance: Sequence[float], pool: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The distinct candidates of query i, and how relevant each is: 0 unless it is gold."""
    ids = np.unique(np.asarray(candidates, dtype=np.int64))
    if not len(ids) or ids[0] < 0 or ids[-1] >= pool:
        raise EvaluationError(
            f"query {i} lists candidates {ids[:3].tolist()}..; allowed are 1 or more of 0 to {pool - 1}"
        )
    right = np.asarray(gold, dtype=np.int64)
    if not len(right) or not np.isin(right, ids).all():
        raise EvaluationError(
            f"query {i} has gold {list(gold)[:5]}, not all among its {len(ids)} candidates; each query lists "
            "at least one gold candidate"
        )
    if len(relevance) != len(right) or not all(0 < value < math.inf for value in relevance):
        raise EvaluationError(f"query {i} has {len(right)} gold candidates of relevance {list(relevance)[:5]}; each needs one above 0")
    grade = np.zeros(len(ids))
    np.maximum.at(grade, np.searchsorted(ids, right), relevance)
    return ids, grade
