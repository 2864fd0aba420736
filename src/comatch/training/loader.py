"""Samples of each global batch, as a pure function of (seed, step, rank, ranks). Bad rows are replaced and counted, never dropped."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from comatch.content import Message
from comatch.core.batch import Example
from comatch.core.packing import Size, deal
from comatch.data.mixture import Mixture, key
from comatch.data.scene_truth import Dice
from comatch.errors import ContentError, DataError
from comatch.prepare import Preparer
from comatch.recipe import Stage
from comatch.render import Renderer, Row
from comatch.training.parcel import Parcel

_TRIES = 8


@dataclass(frozen=True)
class Sample:
    """One training unit, of one row.

    row: its number within its source. examples: (row with labels,), or (query, *positives, *negatives). positives: how many of
    examples[1:] are positives. told: the row with labels of a stage that also matches. keys: a hash of each item's content, so that
    equal items have equal keys. bad: reasons of rows that were tried and refused before this one. replaced: rows before it whose
    positive stood in the global batch already. duplicate: no row with a new positive was found, and this one stands there with an old
    one. missing: hard negatives asked for that the row does not have.
    """

    row: int
    source: str
    examples: tuple[Example, ...]
    positives: int = 0
    keys: tuple[int, ...] = ()
    bad: tuple[str, ...] = ()
    replaced: int = 0
    duplicate: bool = False
    missing: int = 0
    told: Example | None = None

    @property
    def everything(self) -> tuple[Example, ...]:
        """All examples, the one with labels last."""
        return self.examples if self.told is None else (*self.examples, self.told)

    def with_examples(self, everything: Iterable[Example]) -> Sample:
        """The same sample of other examples, in the order of `everything`."""
        examples = tuple(everything)
        if self.told is None:
            return replace(self, examples=examples)
        return replace(self, examples=examples[:-1], told=examples[-1])

    @property
    def labelled(self) -> Example:
        """The row with labels."""
        return self.examples[0] if self.told is None else self.told


@dataclass
class Quarantine:
    """Counts what happened to the data, and stops the run above a stated share of bad rows (specs/ecosystem.md rows 1, 2 and 7).

    reasons: why rows were bad. counts: per source, of samples, bad rows, rows replaced or kept although their positive stood in the batch
    already, hard negatives missing, examples cut to fit the window, and examples without a word to hide where one was asked for. Each
    rank counts its own samples; `merged` adds them up.
    """

    max_bad: float
    rows: int
    reasons: Counter[str] = field(default_factory=Counter)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def merged(cls, accounts: Sequence[Quarantine]) -> Quarantine:
        """The account of all ranks. Raises DataError where they have too many bad rows together."""
        whole = cls(accounts[0].max_bad, accounts[0].rows)
        for account in accounts:
            whole.reasons.update(account.reasons)
            for source, counts in account.counts.items():
                whole.counts.setdefault(source, Counter()).update(counts)
        whole.check()
        return whole

    @property
    def count(self) -> int:
        """Bad rows."""
        return sum(self.reasons.values())

    def total(self, name: str) -> int:
        """One of `counts` over all sources."""
        return sum(counts[name] for counts in self.counts.values())

    def add(self, sample: Sample) -> None:
        """Count one sample. Raises DataError as `check` does."""
        cut = [example.cut for example in sample.everything if example.cut]
        untouched = sum(example.untouched for example in sample.everything)
        if cut and not self.total("cut"):
            told = f"row {sample.row} of {sample.source} is longer than the window: {max(cut)} text tokens were cut"
            warnings.warn(f"{told}; later ones are only counted, as cut_examples in the metrics", stacklevel=2)
        self.reasons.update(sample.bad)
        self.counts.setdefault(sample.source, Counter()).update(
            samples=1, bad=len(sample.bad), replaced=sample.replaced, kept=sample.duplicate, missing=sample.missing, cut=len(cut)
        )
        if untouched:
            self.counts[sample.source]["untouched"] += untouched
        self.check()

    def check(self) -> None:
        """Raise DataError once more than max(10, max_bad * rows) rows were bad."""
        limit = max(10, int(self.max_bad * self.rows))
        if self.count > limit:
            commonest = "; ".join(f"{n} x {reason}" for reason, n in self.reasons.most_common(10))
            told = f"{self.count} bad rows in {self.total('samples')} samples, allowed are {limit} (data.max_bad={self.max_bad})"
            raise DataError(f"{told}: {commonest}")

    def metrics(self) -> dict[str, Any]:
        """Plain numbers for the metrics: sums over the sources, and each source's own under `sources`."""
        names = {"cut": "cut_examples", "replaced": "duplicates_replaced", "kept": "duplicates_kept", "missing": "negatives_missing"}
        names |= {"untouched": "nothing_to_hide"} if self.total("untouched") else {}
        sums = {told: self.total(name) for name, told in names.items()}
        return {"bad_rows": self.count, **sums, "sources": {source: dict(counts) for source, counts in self.counts.items()}}


@dataclass(frozen=True)
class _Pick:
    """A row as read, before its pictures are decoded; the fields are those of Sample."""

    row: int
    epoch: int
    messages: tuple[Message, ...]
    positives: int
    keys: tuple[int, ...]
    missing: int
    replaced: int = 0
    duplicate: bool = False

    @property
    def answers(self) -> tuple[int, ...]:
        return self.keys[1 : 1 + self.positives]


class StageData(Dataset[list[Sample]]):
    """The samples of one stage: data[step] are those of this rank in global batch `step`; all ranks together have the same for any number.

    Every rank reads the rows of the whole batch, because no positive may stand in it twice and because the work is dealt out by what
    it costs, so that none waits for another. It decodes the pictures of its own.

    cost: of an item or dialogue of that size, known from headers; without one the ranks take turns.
    """

    def __init__(
        self,
        mixture: Mixture,
        preparer: Preparer,
        stage: Stage,
        *,
        seed: int,
        batch: int,
        rank: int = 0,
        ranks: int = 1,
        cost: Callable[[Size], float] | None = None,
    ) -> None:
        self.mixture, self.preparer, self.stage = mixture, preparer, stage
        self.seed, self.batch, self.rank, self.ranks, self.cost = seed, batch, rank, ranks, cost

    def __getitem__(self, step: int) -> list[Sample]:
        places = self.mixture.places(step, self.batch)
        if "contrastive" in self.stage.objectives:
            return self._groups(places)
        firsts = [(source, *next(self.mixture.rows(source, position, self.seed))) for source, position in places]
        mine = self._hand([partial(self._told_rows, *first) for first in firsts])
        return [self._alone(*places[i]) for i in mine]

    def _hand(self, units: Sequence[Callable[[], Iterable[Row]]]) -> list[int]:
        """Which of the batch's units are this rank's; a unit gives its rendered rows."""
        if self.cost is None or self.ranks == 1:
            return list(range(self.rank, len(units), self.ranks))
        costs = [0.0] * len(units)
        for i, unit in enumerate(units):
            with suppress(ContentError):  # a bad unit costs nothing; where it is prepared it is found again, and counted
                costs[i] = sum(self.cost(self.preparer.size(row)) for row in unit())
        return deal(costs, self.ranks)[self.rank]

    def _told_rows(self, source: int, row: int, epoch: int) -> Iterator[Row]:
        yield self._told(self.preparer.renderer, source, row, epoch)

    def _group_rows(self, source: int, pick: _Pick) -> Iterator[Row]:
        yield from (self.preparer.renderer.item(message, self.stage) for message in pick.messages)
        if self.stage.tells:
            yield from self._told_rows(source, pick.row, pick.epoch)

    def _told(self, by: Renderer | Preparer, source: int, row: int, epoch: int) -> Any:
        """The row with labels, rendered or prepared. What it hides depends on the seed, the stage and the row, not on who prepares it.

        Raises ContentError.
        """
        ingredient, stage = self.mixture.ingredients[source], self.stage
        seed = Dice("corruption", stage.name, ingredient.name, self.seed, epoch, row).below(2**32)
        if stage.tells == "dialogue":
            return by.dialogue(ingredient.dialogue(row, epoch, "target" in stage.visibility.roles), stage, seed)
        return by.pair(*ingredient.pair(row, epoch), stage, seed)

    def _alone(self, source: int, position: int) -> Sample:
        ingredient, bad = self.mixture.ingredients[source], list[str]()
        for row, epoch in self.mixture.rows(source, position, self.seed):
            try:
                example = self._told(self.preparer, source, row, epoch)
            except ContentError as error:
                bad.append(error.reason)
            else:
                return Sample(row, ingredient.name, (example,), bad=tuple(bad))
        raise self._exhausted(source, position, bad)

    def _groups(self, places: list[tuple[int, int]]) -> list[Sample]:
        taken: set[int] = set()
        # Class names repeat so much that looking for new ones must end: no batch reads more than twice its rows for it.
        spare, found = self.batch, []
        for place in places:
            rows, bad = self.mixture.rows(*place, self.seed), list[str]()
            pick, tried = self._pick(place, rows, taken, bad, min(spare, _TRIES))
            spare -= tried
            taken.update(pick.answers)
            found.append((place, rows, pick, bad))
        mine = self._hand([partial(self._group_rows, place[0], pick) for place, _, pick, _ in found])
        return [self._sample(*found[i], taken) for i in mine]

    def _pick(
        self, place: tuple[int, int], rows: Iterator[tuple[int, int]], taken: set[int], bad: list[str], spare: int
    ) -> tuple[_Pick, int]:
        """The next of `rows` that can be read and has new positives, and how many with old ones came before it.

        Where `spare` more rows do not help, it is the first that can be read.
        """
        first, tried = None, 0
        for row, epoch in rows:
            try:
                pick = self._read(place[0], row, epoch)
            except ContentError as error:
                bad.append(error.reason)
                continue
            if taken.isdisjoint(pick.answers):
                return replace(pick, replaced=tried), tried
            first = first or pick
            if tried == spare:
                break
            tried += 1
        if first is None:
            raise self._exhausted(*place, bad)
        return replace(first, duplicate=True), tried

    def _read(self, source: int, row: int, epoch: int) -> _Pick:
        """Query, positives and negatives of a row, as many as asked for, drawn anew in each epoch. Raises ContentError."""
        ingredient = self.mixture.ingredients[source]
        group = ingredient.group(row, epoch)
        positives, wanted = group.positives[: self.mixture.positives], self.mixture.negatives
        # A source draws the order of positives; of the negatives it does not.
        negatives = Dice(ingredient.name, "negatives", self.seed, epoch, row).shuffled(group.negatives)[:wanted]
        messages = (group.query, *positives, *negatives)
        return _Pick(row, epoch, messages, len(positives), tuple(map(key, messages)), wanted - len(negatives))

    def _sample(
        self, place: tuple[int, int], rows: Iterator[tuple[int, int]], pick: _Pick, bad: list[str], taken: set[int]
    ) -> Sample:
        """The pick with its pictures decoded, or the next row where that fails."""
        while True:
            try:
                examples = tuple(self.preparer.item(message, self.stage) for message in pick.messages)
                told = self._told(self.preparer, place[0], pick.row, pick.epoch) if self.stage.tells else None
            except ContentError as error:
                bad.append(error.reason)
                pick, _ = self._pick(place, rows, taken, bad, _TRIES)
                continue
            name = self.mixture.ingredients[place[0]].name
            what = (pick.positives, pick.keys, tuple(bad), pick.replaced, pick.duplicate, pick.missing)
            return Sample(pick.row, name, examples, *what, told=told)

    def _exhausted(self, source: int, position: int, bad: list[str]) -> DataError:
        name = self.mixture.ingredients[source].name
        return DataError(f"the row at place {position} of source {name!r} and its {len(bad) - 1} reserves are all bad: {bad[:3]}")


def batches(data: StageData, first: int, last: int, workers: int) -> Iterator[list[Sample]]:
    """The samples of steps first..last-1; the same for any number of worker processes, and from wherever it starts."""
    # Without a generator of its own a loader draws from torch's global one, and a resumed run would go on with other random numbers.
    pack = Parcel.packed if workers else list
    loader = DataLoader(
        data, batch_size=None, sampler=range(first, last), num_workers=workers, collate_fn=pack, generator=torch.Generator()
    )
    try:
        for part in loader:
            yield part.opened() if isinstance(part, Parcel) else part
    except (OSError, EOFError) as error:
        # What a worker raised names it; without that, its shared memory could not be opened, because it is dead.
        if not workers or "DataLoader worker" in str(error):
            raise
        raise RuntimeError(f"DataLoader worker is gone: {error!r}") from error
