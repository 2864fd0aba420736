"""A result on disk: one JSON in the form that the MMEB leaderboard takes, and every query's prediction as Parquet beside it.

    NAME.json             {"metadata": {"model_name", ..., "comatch": {...}}, "metrics": {"image": {dataset: {"hit@1": ...}}, ...}}
    NAME.<hash>.parquet   one row per query: task, query, chosen, gold, correct, rank, margin, tie, candidates, ndcg

The JSON names its Parquet by content and is replaced last and in one step, so a killed run leaves the result
as it was before. A file belongs to one model, protocol and data revision; results of others are refused.
Source of the form: specs/mmeb.md 1.5.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from comatch.errors import EvaluationError
from comatch.evaluation.metrics import CUTS, Score
from comatch.evaluation.records import Prediction, SuiteResult, TaskResult
from comatch.evaluation.suites import SUITES

FORMAT: Final = 1
_IDENTITY: Final = ("suite", "fingerprint", "protocol", "revision")
_PACKAGES: Final = ("comatch", "torch", "transformers", "numpy", "pillow")
_SCHEMA: Final = pa.schema(
    [
        ("task", pa.dictionary(pa.int32(), pa.string())),
        ("query", pa.string()),
        ("chosen", pa.string()),
        ("gold", pa.string()),
        ("correct", pa.bool_()),
        ("rank", pa.int32()),
        ("margin", pa.float64()),
        ("tie", pa.bool_()),
        ("candidates", pa.int32()),
        ("ndcg", pa.float64()),
    ]
)


def write_result(path: str | Path, result: SuiteResult, *, about: Mapping[str, Any] | None = None) -> SuiteResult:
    """Write a result to `path` (NAME.json), or add its tasks to the one there; returns what now stands there.

    Tasks of the same name are replaced, all others kept, so a run may write after each task. about: what the
    leaderboard asks for, such as model_size, url or embedding_dimension; what was told before is kept. Raises
    EvaluationError where the file there is of another model, protocol, data revision or suite, or is no result.
    """
    file = _json(path)
    for task in result.tasks:
        _check_predictions(task)
    told: dict[str, Any] = {}
    before = None
    if file.exists():
        metadata, there = _read(file)
        result = merged(there, result, file)
        told = {key: value for key, value in metadata.items() if key != "comatch"}
        before = metadata["comatch"]["predictions"]
    table = _parquet(result)
    name = f"{file.stem}.{hashlib.sha256(table).hexdigest()[:16]}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    _replace(file.with_name(name), table)
    content = json.dumps(_plain(result, {**told, **(about or {})}, name), indent=1, ensure_ascii=False, allow_nan=False)
    _replace(file, content.encode())
    if before not in (None, name):
        file.with_name(before).unlink(missing_ok=True)
    return result


def read_result(path: str | Path) -> SuiteResult:
    """The result at `path`, equal to what was written. Raises EvaluationError where it is no result of ours, or damaged."""
    return _read(_json(path))[1]


def merged(old: SuiteResult, new: SuiteResult, where: str | Path = "the result there") -> SuiteResult:
    """Both results' tasks, of `new` where both have one. Raises EvaluationError where they are not of one run's settings."""
    if differing := [name for name in _IDENTITY if getattr(old, name) != getattr(new, name)]:
        raise EvaluationError(
            f"{where} is of {_identity(old)}, not of {_identity(new)}; they differ in {', '.join(differing)}. "
            "Write to another file, or remove this one"
        )
    tasks = {task.name: task for task in (*old.tasks, *new.tasks)}
    order = [name for name in SUITES.get(new.suite, ()) if name in tasks]
    done = tuple(tasks[name] for name in dict.fromkeys((*order, *tasks)))
    missing = tuple(name for name in dict.fromkeys((*old.missing, *new.missing)) if name not in tasks)
    return replace(new, tasks=done, missing=missing)


def _identity(result: SuiteResult) -> str:
    return (
        f"{result.model} on {result.suite} (fingerprint {result.fingerprint[:12]}, protocol {result.protocol}, data {result.revision[:40]})"
    )


# --- writing


def _plain(result: SuiteResult, about: Mapping[str, Any], predictions: str) -> dict[str, Any]:
    metrics: dict[str, dict[str, Any]] = {"image": {}, "video": {}, "visdoc": {}}
    for task in result.tasks:
        metrics.setdefault(task.modality, {})[task.name] = _submitted(task)
    ours = {
        "format": FORMAT,
        **{name: getattr(result, name) for name in (*_IDENTITY, "model", "missing")},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "predictions": predictions,
        "tasks": [_task(task) for task in result.tasks],
    }
    written = datetime.now(UTC).isoformat(timespec="seconds")
    return {"metadata": {"model_name": result.model, **about, "report_generated_date": written, "comatch": ours}, "metrics": metrics}


def _submitted(task: TaskResult) -> dict[str, float | int]:
    """The leaderboard's metrics of one dataset, as far as ranks of the best right candidate and our scores tell them."""
    ranks = np.array([prediction.rank or np.inf for prediction in task.predictions])
    hit = {f"hit@{k}": float(np.mean(ranks <= k)) for k in CUTS}
    mrr = {f"mrr@{k}": float(np.mean(np.where(ranks <= k, 1 / ranks, 0))) for k in CUTS}
    recall = {f"recall@{k}": task.score.recall[k] for k in CUTS}
    return {**hit, "ndcg_linear@5": task.score.ndcg5, **mrr, **recall, "num_pred": task.score.n, "num_data": task.score.n}


def _task(task: TaskResult) -> dict[str, Any]:
    score = {field.name: getattr(task.score, field.name) for field in fields(Score) if field.compare}
    score["recall"] = {str(k): value for k, value in task.score.recall.items()}
    return {**{name: getattr(task, name) for name in ("name", "meta", "modality", "split", "metric")}, "score": score}


def _check_predictions(task: TaskResult) -> None:
    if [prediction.correct for prediction in task.predictions] != task.score.hits.tolist() or len(task.score.ndcgs) != task.score.n:
        raise EvaluationError(f"task {task.name} has predictions that are not those of its score; score it again")


def _parquet(result: SuiteResult) -> bytes:
    rows = [
        {"task": task.name, **vars(prediction), "ndcg": float(ndcg)}
        for task in result.tasks
        for prediction, ndcg in zip(task.predictions, task.score.ndcgs, strict=True)
    ]
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), stream, compression="zstd")
    return stream.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Write beside the target and rename, so that a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@cache
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


# --- reading


def _json(path: str | Path) -> Path:
    file = Path(path)
    if file.suffix != ".json":
        raise EvaluationError(f"a result is a .json file, got {str(path)!r}")
    return file


def _read(file: Path) -> tuple[dict[str, Any], SuiteResult]:
    """The metadata as written, and the result."""
    try:
        metadata: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["metadata"]
        ours = metadata["comatch"]
        if ours["format"] != FORMAT:
            raise EvaluationError(f"{file} has format {ours['format']!r}, this version reads {FORMAT}; upgrade comatch")
        rows = _rows(file.with_name(Path(ours["predictions"]).name))
        tasks = tuple(_read_task(task, rows.get(task["name"], [])) for task in ours["tasks"])
        told = {name: ours[name] for name in (*_IDENTITY, "model")}
        return metadata, SuiteResult(**told, tasks=tasks, missing=tuple(ours["missing"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, pa.ArrowException) as error:
        raise EvaluationError(f"{file} cannot be read as a result of comatch: {error!r}; evaluate again, into another file") from error


def _rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The predictions by task, after a look at the name: it holds the hash of the content."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest()[:16] != path.suffixes[-2][1:]:
        raise ValueError(f"{path.name} has other content than its name says")
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(io.BytesIO(content), schema=_SCHEMA).to_pylist():
        rows.setdefault(row.pop("task"), []).append(row)
    return rows


def _read_task(task: Mapping[str, Any], rows: list[dict[str, Any]]) -> TaskResult:
    ndcgs = np.array([row.pop("ndcg") for row in rows], dtype=np.float64)
    predictions = tuple(Prediction(**row) for row in rows)
    hits = np.array([prediction.correct for prediction in predictions], dtype=np.bool_)
    recall = MappingProxyType({int(k): value for k, value in task["score"]["recall"].items()})
    score = Score(**{**task["score"], "recall": recall}, hits=hits, ndcgs=ndcgs)
    if len(hits) != score.n or hits.mean() != score.hit:
        raise ValueError(f"task {task['name']} has {len(hits)} predictions, {hits.sum()} of them right, against its score {score}")
    return TaskResult(**{**task, "score": score}, predictions=predictions)
