"""What an evaluation leaves behind: each query's prediction, each task's score, the suite's tasks and what is missing of it."""

from __future__ import annotations

from dataclasses import dataclass

from comatch.evaluation.metrics import Score


@dataclass(frozen=True)
class Prediction:
    """The best candidate of one query beside the right one.

    query       the query's id, or its place in the task
    chosen      the best candidate by readable text or path; gold: the best right one, likewise
    rank        of the best right candidate, from 1 on; 0 where its vector or the query's cannot be used
    margin      score of the best right candidate minus that of its best rival; 0 within `metrics.TIE` is a tie
    candidates  how many distinct ones were ranked
    """

    query: str
    chosen: str
    gold: str
    correct: bool
    rank: int
    margin: float
    tie: bool
    candidates: int


@dataclass(frozen=True)
class TaskResult:
    """One task's score and predictions, with what a summary groups by.

    modality  image, video or visdoc; split: IND, OOD or ""; metric: the one that counts, "hit@1" or "ndcg@5"
    """

    name: str
    meta: str
    modality: str
    split: str
    metric: str
    score: Score
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class SuiteResult:
    """A whole run. fingerprint: of the model; protocol: by name; revision: of the data; missing: tasks that failed or were left out."""

    suite: str
    model: str
    fingerprint: str
    protocol: str
    revision: str
    tasks: tuple[TaskResult, ...]
    missing: tuple[str, ...]
