"""Laying examples of unequal length into rows, so that little of the work is padding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from comatch.core.batch import IGNORE, PADDING, Batch, Example


def plan(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Which examples share a row of `width` tokens: best fit, longest first.

    Returns one list of indices per row; within a row indices rise. Every example must fit: `max(lengths) <= width`.
    """
    free: list[int] = []
    rows: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if free[r] >= lengths[i]]
        if fits:
            row = min(fits, key=lambda r: free[r])
        else:
            row = len(rows)
            rows.append([])
            free.append(width)
        rows[row].append(i)
        free[row] -= lengths[i]
    return [sorted(row) for row in rows]


def budget(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Split examples, in the order given, into passes of at most `tokens` tokens each (at least one example a pass)."""
    passes: list[list[int]] = []
    room = 0
    for i, length in enumerate(lengths):
        if not passes or length > room:
            passes.append([])
            room = tokens
        passes[-1].append(i)
        room -= length
    return passes


def collate(examples: Sequence[Example], pack: bool = True, side: str = "right") -> Batch:
    """Examples to one Batch as wide as the longest of them.

    `pack` lets short examples share a row; without it every example has its own row, padded on `side`.
    """
    width = max(len(example) for example in examples)
    rows = plan([len(example) for example in examples], width) if pack else [[i] for i in range(len(examples))]
    shape = (len(rows), width)
    ids, labels = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
    roles, owner = np.full(shape, PADDING, np.int8), np.full(shape, PADDING, np.int64)
    positions = np.zeros((3, *shape), np.int64)
    patches: list[np.ndarray] = []
    grids: list[tuple[int, int, int]] = []
    for r, row in enumerate(rows):
        start = 0 if side == "right" else width - sum(len(examples[i]) for i in row)
        for i in row:
            example = examples[i]
            place = slice(start, start + len(example))
            ids[r, place], labels[r, place], roles[r, place] = example.ids, example.labels, example.roles
            owner[r, place], positions[:, r, place] = i, example.positions
            patches.extend(example.patches)
            grids.extend(example.grids)
            start = place.stop
    return Batch(
        ids=torch.from_numpy(ids),
        roles=torch.from_numpy(roles),
        labels=torch.from_numpy(labels),
        example=torch.from_numpy(owner),
        positions=torch.from_numpy(positions),
        patches=torch.from_numpy(np.concatenate(patches)) if patches else torch.zeros(0, 0, dtype=torch.uint8),
        grids=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        size=len(examples),
        tokens=sum(len(example) for example in examples),
    )
