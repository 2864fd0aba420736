"""Laying examples of unequal length side by side, so that little of the work is padding, and dealing them to ranks, so that none waits.

Plans need sizes only: tokens and picture patches, both known from headers before any picture is decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from comatch.core.batch import IGNORE, PADDING, Batch, Example, Loan

UNLIMITED = 2**62
MULTIPLE = 64
_SMALLEST = 8


class Size(NamedTuple):
    """What an example asks of a pass, or a pass has room for: tokens of the language model, patches of the vision tower."""

    tokens: int
    patches: int = 0

    @classmethod
    def of(cls, example: Example) -> Size:
        """The size of a prepared example."""
        return cls(len(example), sum(time * height * width for time, height, width in example.grids))

    def fits(self, room: Size) -> bool:
        """Whether there is room for it."""
        return self.tokens <= room.tokens and self.patches <= room.patches

    def less(self, other: Size) -> Size:
        """What is left of it after another."""
        return Size(self.tokens - other.tokens, self.patches - other.patches)

    def share(self, room: Size) -> float:
        """How much of a room it takes, by whichever of the two is scarcer."""
        return max(self.tokens / room.tokens, self.patches / max(1, room.patches))


class Plan(NamedTuple):
    """groups: one list of indices per pass. fill: tokens over the tokens that these passes have room for."""

    groups: list[list[int]]
    fill: float


def greedy(sizes: Sequence[Size], room: Size) -> Plan:
    """Passes in order of arrival: a new one where the next example does not fit. An example larger than `room` has a pass of its own."""
    groups: list[list[int]] = []
    left = room
    for i, size in enumerate(sizes):
        if not groups or not size.fits(left):
            groups.append([])
            left = room
        groups[-1].append(i)
        left = left.less(size)
    return _planned(groups, sizes, room)


def best_fit(sizes: Sequence[Size], room: Size) -> Plan:
    """Passes by best fit, largest example first; within a pass indices rise. An example larger than `room` has a pass of its own."""
    groups: list[list[int]] = []
    left: list[Size] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i].share(room)):
        fits = [g for g, free in enumerate(left) if sizes[i].fits(free)]
        if fits:
            at = min(fits, key=lambda g: left[g].share(room))
        else:
            at = len(groups)
            groups.append([])
            left.append(room)
        groups[at].append(i)
        left[at] = left[at].less(sizes[i])
    return _planned([sorted(group) for group in groups], sizes, room)


def budget(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Split examples, in the order given, into passes of at most `tokens` tokens each (at least one example a pass)."""
    return greedy([Size(length) for length in lengths], Size(tokens, UNLIMITED)).groups


def deal(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """Indices for each rank so that costs are nearly equal, and numbers equal or one apart: dearest first, to whom has least so far.

    Within a hand indices rise.
    """
    room, more = divmod(len(costs), ranks)
    hands: list[list[int]] = [[] for _ in range(ranks)]
    spent = [0.0] * ranks
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        # So many hands as there are items over may take one more than the others.
        rank = min((r for r in range(ranks) if len(hands[r]) < room + (more > 0)), key=lambda r: spent[r])
        more -= len(hands[rank]) == room
        hands[rank].append(i)
        spent[rank] += costs[i]
    return [sorted(hand) for hand in hands]


def imbalance(costs: Sequence[float], hands: Iterable[Sequence[int]]) -> float:
    """Cost of the dearest hand over the mean hand: 1 where no rank waits for another."""
    sums = [sum(costs[i] for i in hand) for hand in hands]
    return max(sums) * len(sums) / sum(sums)


def width(tokens: int, multiple: int = MULTIPLE) -> int:
    """A row's length, rounded up so that shapes repeat: to a multiple, or to one of 8 where it is shorter than that.

    oneDNN keeps a compiled primitive, and torch.compile a graph, for every shape it has met. GPUs do as well with 128.
    """
    step = multiple if tokens > multiple else min(multiple, _SMALLEST)
    return -(-tokens // step) * step


def collate(
    examples: Sequence[Example], pack: bool = True, side: str = "right", multiple: int = MULTIPLE, loans: Sequence[Loan] = ()
) -> Batch:
    """Examples to one Batch: all in one row, one after the other, padded to a multiple.

    Without `pack` every example has its own row, as wide as the longest, padded on `side`. loans: of `core.sharing`.
    """
    lengths = [len(example) for example in examples]
    wide = width(sum(lengths), multiple) if pack else max(lengths)
    shape = (1 if pack else len(examples), wide)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    roles, owner = np.full(shape, PADDING, np.int8), np.full(shape, PADDING, np.int64)
    positions = np.zeros((3, *shape), np.int64)
    end, places = 0, []
    for i, example in enumerate(examples):
        start = end if pack else (0 if side == "right" else wide - lengths[i])
        places.append(example.target_places + (0 if pack else i * wide) + start)
        end = start + lengths[i]
        at = 0 if pack else i, slice(start, end)
        ids[at], labels[at], roles[at], owner[at] = example.ids, example.labels, example.roles, i
        positions[:, at[0], at[1]] = example.positions
    patches = [picture for example in examples for picture in example.patches]
    grids = [grid for example in examples for grid in example.grids]
    targets = [example.targets for example in examples if len(example.targets)]
    return Batch(
        ids=torch.from_numpy(ids),
        roles=torch.from_numpy(roles),
        labels=torch.from_numpy(labels),
        example=torch.from_numpy(owner),
        positions=torch.from_numpy(positions),
        patches=torch.from_numpy(np.concatenate(patches)) if patches else torch.zeros(0, 0, dtype=torch.uint8),
        grids=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        size=len(examples),
        tokens=sum(lengths),
        pictures=tuple(name for example in examples for name in example.pictures or (b"",) * len(example.grids)),
        targets=torch.from_numpy(np.concatenate(targets)) if targets else torch.zeros(0, 0, dtype=torch.uint8),
        target_places=torch.from_numpy(np.concatenate(places)),
        loans=tuple(loans),
    )


def _planned(groups: list[list[int]], sizes: Sequence[Size], room: Size) -> Plan:
    return Plan(groups, sum(size.tokens for size in sizes) / max(1, len(groups) * room.tokens))
