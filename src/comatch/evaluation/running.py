"""A run over MMEB: every distinct message is encoded once for the whole suite, each task is scored and written when its vectors are there.

    OUT/result.json     the result as far as it is done, see `results`
    OUT/tasks/KEY/      one result per finished task: a run that goes on takes it where model, protocol and data are the same
    OUT/vectors/KEY/    shards of vectors, see `vectors`

Messages that show one picture are encoded together, so that it is decoded once. Several processes (Accelerate) share the shards of a task
and meet by way of OUT, which all of them must see; what they find is what one process finds.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from comatch import __version__
from comatch.content import Image, Message
from comatch.errors import ComatchError, ContentError, EvaluationError
from comatch.evaluation.metrics import NORM_TOLERANCE, Floats, judge
from comatch.evaluation.mmeb import Suite, pictures_of
from comatch.evaluation.records import Prediction, SuiteResult, TaskResult
from comatch.evaluation.results import read_result, write_result
from comatch.evaluation.tasks import Task
from comatch.evaluation.vectors import VectorStore, digest_of, key_of

SHARD = 512
RESULT = "result.json"


class Model(Protocol):
    """What an evaluation needs of a model: unit vectors [n, dim] of messages, and a name for all they depend on."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, items: list[Message], /) -> Any: ...


@dataclass(frozen=True)
class Progress:
    """How far a run is: the task at hand, its messages that have vectors, and all its messages."""

    task: str
    done: int
    total: int


class _Fault(EvaluationError):
    """The data of one task cannot be used; others may."""


def run_suite(
    model: Model,
    suite: Suite,
    out: str | Path,
    *,
    name: str = "",
    allow_missing: bool = False,
    shard: int = SHARD,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> SuiteResult:
    """Evaluate a model on the datasets of a suite.

    out: folder of results and of kept vectors. name: of the model, in results. allow_missing: a dataset that cannot be read or encoded is
    listed in `missing` instead of ending the run; either way what was done is kept. shard: messages encoded and kept at a time. seed: of
    the intervals. options: passed on to `model.encode`. Raises EvaluationError for data that cannot be used, vectors that are not finite,
    zero or not of unit length, and an `out` that holds the result of another model, protocol or suite.
    """
    return _Run(model, suite, Path(out), name, shard, seed, progress, options).all(allow_missing)


class _Run:
    def __init__(
        self,
        model: Model,
        suite: Suite,
        out: Path,
        name: str,
        shard: int,
        seed: int,
        progress: Callable[[Progress], None] | None,
        options: dict[str, Any],
    ) -> None:
        self.state = PartialState()
        self.suite, self.out, self.shard, self.seed, self.progress, self.options = suite, out, shard, seed, progress, options
        self.model: Any = suite.protocol.ready(model)
        self.fingerprint = model.fingerprint
        settings = {"model": self.model.fingerprint, "protocol": suite.protocol.to_dict(), "version": __version__}
        self.key = key_of(settings | {"mode": suite.mode, "seed": seed})
        self.store = VectorStore(out / "vectors", key_of(settings))
        self.empty = SuiteResult(suite.name, name, self.fingerprint, suite.protocol.name, suite.revision, (), ())
        self.showing: dict[Image, list[Message]] = defaultdict(list)
        self.digests: dict[Message, bytes] = {}
        self.data: dict[str, str] = {}

    def all(self, allow_missing: bool) -> SuiteResult:
        self._together(self._check_out)
        tasks = dict[str, Task]()
        for name in self.suite.names:
            try:
                tasks[name] = self.suite.task(name)
            except EvaluationError as error:
                self._left_out(error, allow_missing)
        for task in tasks.values():
            self._digest(task)
        done = {name: result for name, task in tasks.items() if (result := self._finished(task))}
        self._plan([task for name, task in tasks.items() if name not in done])
        try:
            for name, task in tasks.items():
                if name not in done:
                    try:
                        done[name] = self._one(task)
                    except _Fault as error:
                        self._left_out(error, allow_missing)
        finally:
            if self.state.is_main_process:
                write_result(self.out / RESULT, self._result(done))
        return self._result(done)

    def _left_out(self, error: EvaluationError, allowed: bool) -> None:
        if not allowed:
            raise error
        if self.state.is_main_process:
            warnings.warn(f"left out, so there will be no Overall: {error}", stacklevel=4)

    def _check_out(self) -> None:
        """Refuse, before any work, a folder that holds another model's result."""
        if self.state.is_main_process and (self.out / RESULT).exists():
            there = read_result(self.out / RESULT)
            for field in ("suite", "fingerprint", "protocol"):
                if getattr(there, field) != getattr(self.empty, field):
                    raise EvaluationError(
                        f"{self.out / RESULT} is of {there.model or 'another model'} with {field} {getattr(there, field)!r}, "
                        f"this run has {getattr(self.empty, field)!r}; take another folder for results, or remove that file"
                    )
            if there.revision != self.empty.revision:  # what is the same in the new data is taken from tasks/
                (self.out / RESULT).unlink()

    def _digest(self, task: Task) -> None:
        """Name the task's messages, and its data: what is asked, what is ranked, what is right."""
        told = hashlib.blake2b(repr((task.modality, task.metric)).encode(), digest_size=16)
        for message in (*task.queries, *task.pool):
            if message not in self.digests:
                self.digests[message] = digest_of(message)
            told.update(self.digests[message])
        for listed, gold, relevance in zip(task.candidates, task.gold, task.relevance or [()] * len(task.gold), strict=True):
            told.update(repr(listed).encode() if isinstance(listed, range) else np.asarray(listed, dtype=np.int64).tobytes())
            told.update(repr((list(gold), list(relevance))).encode())
        self.data[task.name] = told.hexdigest()

    def _plan(self, tasks: Sequence[Task]) -> None:
        """Which messages show which picture, over all tasks to come."""
        for message in dict.fromkeys(message for task in tasks for message in (*task.queries, *task.pool)):
            for image in dict.fromkeys(pictures_of(message)):
                self.showing[image].append(message)

    def _one(self, task: Task) -> TaskResult:
        needed = dict.fromkeys((*task.queries, *task.pool))
        waiting = [message for message in needed if self.digests[message] not in self.store]
        done = len(needed) - len(waiting)
        shards = list(self._shards(waiting))
        mine = shards[self.state.process_index :: self.state.num_processes]

        def encode() -> None:
            nonlocal done
            for messages in mine:
                self._encode(task, messages, needed)
                done += sum(message in needed for message in messages)
                if self.progress:
                    self.progress(Progress(task.name, done, len(needed)))

        self._together(encode)
        self.store.refresh()
        self._together(lambda: self._save(task, self._judged(task)) if self.state.is_main_process else None)
        found = self._finished(task)
        if found is None:
            raise EvaluationError(f"{self._file(task.name)} is not there for process {self.state.process_index}; all must share {self.out}")
        return found

    def _shards(self, waiting: Sequence[Message]) -> Iterator[list[Message]]:
        """The messages, and those of other tasks that show one of their pictures, in lists of `shard` or a little more."""
        taken, current = set[Message](), list[Message]()
        for message in waiting:
            if message in taken:
                continue
            group = dict.fromkeys([message, *(other for image in pictures_of(message) for other in self.showing[image])])
            fresh = [other for other in group if other not in taken and self.digests[other] not in self.store]
            taken.update(fresh)
            current += fresh
            if len(current) >= self.shard:
                yield current
                current = []
        if current:
            yield current

    def _encode(self, task: Task, messages: list[Message], needed: dict[Message, None]) -> None:
        try:
            vectors = np.asarray(self.model.encode(messages, **self.options), dtype=np.float32)
        except ContentError as error:
            own = [message for message in messages if message in needed]
            if len(own) < len(messages):  # another task's message may be the bad one; it is told with that task
                return self._encode(task, own, needed)
            raise _Fault(f"{task.name}: {error}") from error
        _check(vectors, messages, task)
        self.store.add([self.digests[message] for message in messages], vectors)
        return None

    def _judged(self, task: Task) -> TaskResult:
        queries, pool = (self.store.get(self.digests[message] for message in side) for side in (task.queries, task.pool))
        score, verdicts = judge(
            queries, pool, task.candidates, task.gold, task.relevance, name=task.name, meta=task.meta, seed=self.seed
        )
        names = task.names or [str(i) for i in range(len(task.pool))]
        ids = task.ids or [str(i) for i in range(len(task.queries))]
        predictions = tuple(
            Prediction(id, names[v.chosen], names[v.gold], v.correct, v.rank, v.margin, v.tie, v.candidates)
            for id, v in zip(ids, verdicts, strict=True)
        )
        return TaskResult(task.name, task.meta, task.modality, task.split, task.metric, score, predictions)

    def _file(self, name: str) -> Path:
        return self.out / "tasks" / self.key / f"{name}.json"

    def _of(self, task: Task) -> SuiteResult:
        """The identity of one task's own result: its data's name stands in the place of the suite's revision."""
        return replace(self.empty, revision=self.data[task.name])

    def _save(self, task: Task, result: TaskResult) -> None:
        self._file(task.name).unlink(missing_ok=True)  # of other data, else it had been taken
        write_result(self._file(task.name), replace(self._of(task), tasks=(result,)))

    def _finished(self, task: Task) -> TaskResult | None:
        """The kept result of a task, where it is of this very model, protocol and data."""
        if not self._file(task.name).exists():
            return None
        there = read_result(self._file(task.name))
        return there.tasks[0] if replace(there, tasks=(), model=self.empty.model) == self._of(task) else None

    def _result(self, done: dict[str, TaskResult]) -> SuiteResult:
        ordered = tuple(done[name] for name in self.suite.specs if name in done)
        return replace(self.empty, tasks=ordered, missing=tuple(name for name in self.suite.specs if name not in done))

    def _together(self, work: Callable[[], None]) -> None:
        """Do something in every process, and go on in none if it failed in one. Raises what it raises, or tells of the other process."""
        own: ComatchError | None = None
        try:
            work()
        except ComatchError as error:
            own = error
        if self.state.num_processes == 1:
            found = [None if own is None else (isinstance(own, _Fault), str(own))]
        else:
            found = gather_object([None if own is None else (isinstance(own, _Fault), str(own))])
        failed = [entry for entry in found if entry]
        if failed:
            fault, told = min(failed)  # what concerns the whole run comes before a fault of one task
            if own is not None and isinstance(own, _Fault) is fault:
                raise own
            raise _Fault(told) if fault else EvaluationError(told)


def _check(vectors: Floats, messages: Sequence[Message], task: Task) -> None:
    """Refuse vectors that would score by accident: NaN, zero, or not of unit length."""
    if vectors.ndim != 2 or len(vectors) != len(messages) or not vectors.shape[1]:
        shape = list(vectors.shape)
        raise EvaluationError(f"{task.name}: the model gave shape {shape} for {len(messages)} items; needed is [{len(messages)}, dim]")
    with np.errstate(invalid="ignore", over="ignore"):
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    wrong = np.flatnonzero(~(np.abs(lengths - 1) <= NORM_TOLERANCE))
    if len(wrong):
        length = lengths[wrong[0]]
        what = "only zeros" if length < 1e-6 else f"length {length:.4g} instead of 1"
        what = what if np.isfinite(length) else "NaN or infinite numbers"
        raise EvaluationError(
            f"{task.name}: the vector of {messages[wrong[0]].text[-60:]!r} has {what}, and {len(wrong)} of {len(vectors)} are unusable; "
            "the weights are damaged or overflow, or the model does not normalise"
        )
