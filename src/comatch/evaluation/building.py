"""A task of MMEB under construction: candidates known by (text, path), each query's list, and what is asked of both."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence

from comatch.content import Message
from comatch.errors import EvaluationError
from comatch.evaluation.protocols import Item, Protocol
from comatch.evaluation.specs import Spec
from comatch.evaluation.suites import Place
from comatch.evaluation.tasks import Task


class Building:
    """Collects queries and candidates of one dataset. `mode` is local or global, see `tasks.toml`."""

    def __init__(self, spec: Spec, place: Place, protocol: Protocol, mode: str) -> None:
        self.spec, self.place, self.protocol, self.mode = spec, place, protocol, mode
        self._places: dict[Hashable, int] = {}
        self._pool, self._names = list[Message](), list[str]()
        self._queries, self._ids = list[Message](), list[str]()
        self._listed, self._gold, self._relevance = list[Sequence[int]](), list[Sequence[int]](), list[Sequence[float]]()

    def candidate(self, text: str, path: str, make: Callable[[], Item]) -> int:
        """The place of a candidate in the pool. `make` writes it out where it is new."""
        key = text, path
        place = self._places.get(key)
        if place is None:
            item = make()
            self._pool.append(self.protocol.message(item))
            caption = item.body.strip()
            self._names.append(f"{path}: {caption}" if path and caption else path or text)
            place = self._places[key] = len(self._places)
        return place

    def known(self, text: str, path: str, of: str) -> int:
        """The place of a candidate that must be there. Raises EvaluationError, naming the query `of` which it is gold."""
        if (text, path) not in self._places:
            raise EvaluationError(f"{of} has gold {(path or text)!r}, which is not in the pool of {len(self._pool)} candidates")
        return self._places[text, path]

    def listed(self, texts: Sequence[str], paths: Sequence[str], make: Callable[[str, str], Item]) -> Sequence[int]:
        """The places of one query's candidates, in the order given."""
        return array("q", (self.candidate(t, p, lambda t=t, p=p: make(t, p)) for t, p in zip(texts, paths, strict=True)))  # type: ignore[misc]

    def query(self, id: str, item: Item, listed: Sequence[int], gold: Sequence[int], relevance: Sequence[float] = ()) -> None:
        """Add a query with its candidates' places (unused where all are ranked) and its right ones."""
        if self.mode == "local" and not listed:
            raise EvaluationError("its queries have no lists of their own; it is ranked globally, so leave the mode out")
        if self.mode == "local" and not set(gold) <= set(listed):
            raise EvaluationError(f"query {id} has gold that is not among its {len(listed)} candidates")
        if not gold:
            raise EvaluationError(f"query {id} has no right candidate")
        self._queries.append(self.protocol.message(item))
        self._ids.append(id)
        self._listed.append(listed)
        self._gold.append(gold)
        self._relevance.append(relevance or [1.0] * len(gold))

    def task(self) -> Task:
        """The finished task. Raises EvaluationError where it has no queries."""
        if not self._queries:
            raise EvaluationError("there are no queries")
        everything = range(len(self._pool))
        return Task(
            self.spec.name,
            self.place.meta,
            self._queries,
            self._pool,
            self._listed if self.mode == "local" else [everything] * len(self._queries),
            self._gold,
            self._relevance,
            self.place.modality,
            self.place.split,
            self.place.metric,
            self._ids,
            self._names,
        )
