"""Batches of prepared examples, in an order that depends on (seed, position) alone. Bad rows are replaced and counted, never dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.utils.data import DataLoader, Dataset

from comatch.core.batch import Example
from comatch.data.order import shuffled
from comatch.data.sources import Source
from comatch.errors import ContentError, DataError
from comatch.prepare import Preparer
from comatch.recipe import Stage

_RESERVES = 20


@dataclass(frozen=True)
class Sample:
    """One training unit. examples: (dialogue,) or (query, positive). bad: reasons of rows that were tried and refused before this one."""

    row: int
    examples: tuple[Example, ...]
    bad: tuple[str, ...] = ()


@dataclass
class Quarantine:
    """Counts bad rows and stops the run above a stated share (specs/ecosystem.md rows 1 and 2)."""

    max_bad: float
    rows: int
    seen: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return sum(self.reasons.values())

    def add(self, sample: Sample) -> None:
        """Count one sample. Raises DataError once more than max(10, max_bad * rows) rows were bad."""
        self.seen += 1
        self.reasons.update(sample.bad)
        limit = max(10, int(self.max_bad * self.rows))
        if self.count > limit:
            commonest = "; ".join(f"{n} x {reason}" for reason, n in self.reasons.most_common(10))
            raise DataError(f"{self.count} bad rows of {self.seen} read, allowed are {limit} (data.max_bad={self.max_bad}): {commonest}")


class StageData(Dataset[Sample]):
    """The samples of one stage by their place in the run; a pure function of the place."""

    def __init__(self, source: Source, preparer: Preparer, stage: Stage, seed: int, positions: range) -> None:
        self.source, self.preparer, self.stage = source, preparer, stage
        self.seed, self.positions = seed, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        row, epoch = shuffled(self.positions[index], len(self.source), self.seed)
        bad: list[str] = []
        for reserve in range(_RESERVES):
            # Reserves step by a large odd stride, because bad rows often stand side by side.
            place = (row + reserve * 7919) % len(self.source)
            try:
                return Sample(place, self._examples(place, epoch), tuple(bad))
            except ContentError as error:
                bad.append(error.reason)
        raise DataError(f"row {row} and {_RESERVES - 1} reserves of source {self.source.name!r} are all bad: {bad[:3]}")

    def _examples(self, row: int, epoch: int) -> tuple[Example, ...]:
        if "contrastive" in self.stage.objectives:
            group = self.source.group(row, epoch)
            return self.preparer.item(group.query, self.stage), self.preparer.item(group.positives[0], self.stage)
        return (self.preparer.dialogue(self.source.dialogue(row, epoch), self.stage),)


def batches(data: StageData, size: int, workers: int) -> Iterator[list[Sample]]:
    """Lists of `size` samples; the same for any number of worker processes."""
    return iter(DataLoader(data, batch_size=size, shuffle=False, drop_last=True, num_workers=workers, collate_fn=list))
