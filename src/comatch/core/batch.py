"""The two shapes in which tokens travel: one Example, and a Batch of packed rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from comatch.recipe import ROLES

ROLE_ID = {role: i for i, role in enumerate(ROLES)}
PADDING = -1
IGNORE = -100
BARE_IMAGE = 2**30
"""In place of the image token where no picture belongs to it (VLM2Vec's dangling marker): it takes that token's embedding."""


@dataclass(frozen=True)
class Example:
    """One item or dialogue as a token row, made in loader workers without weights.

    ids: [n] int64. roles: [n] int8, places in `comatch.recipe.ROLES`. labels: [n] int64, the token to predict FROM each place, or -100.
    positions: [3, n] int64 (time, height, width of M-RoPE). patches: per picture uint8 [patches, 3 * patch * patch].
    grids: per picture (time, height, width) in patches. cut: text tokens that were cut off to fit the window.
    pictures: per picture a hash of its patches and grid, or b"" where nobody asked for one; none at all is the same.
    targets: uint8 [hidden tokens * merge * merge, 3 * patch * patch], the pixels of hidden visual tokens as they were; target_places:
    [hidden tokens] int64, where these tokens stand in the row. untouched: corruptions that wanted a word to hide and found none.
    """

    ids: np.ndarray
    roles: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    patches: tuple[np.ndarray, ...] = ()
    grids: tuple[tuple[int, int, int], ...] = ()
    cut: int = 0
    pictures: tuple[bytes, ...] = ()
    targets: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    target_places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    untouched: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Number of places that carry a label."""
        return int((self.labels != IGNORE).sum())


class Loan(NamedTuple):
    """The first `length` places of example `lender` stand for the borrower's own beginning, which is equal and was left out."""

    borrower: int
    lender: int
    length: int


@dataclass(frozen=True)
class Batch:
    """Examples laid into rows; several examples may share a row.

    A batch stays in host memory. What is planned from it (segments, places of labels, owners of tokens) is computed there, and only what a
    kernel reads goes to the device, by `comatch.devices.moved`: nobody waits for a device to learn what it was just told.

    ids, labels: [rows, seq] int64. roles: [rows, seq] int8, -1 on padding. example: [rows, seq] int64, index of the example, -1 on padding.
    positions: [3, rows, seq] int64. patches: [patches, 3 * patch * patch] uint8, pictures in the order their tokens stand when rows are
    read from left to right and top to bottom. grids: [pictures, 3] int64. size: number of examples. pictures, targets: as in Example.
    target_places: [hidden tokens] int64, places in the flattened batch. loans: of examples that begin like one before them in their row
    (core/sharing.py); none in training.
    """

    ids: torch.Tensor
    roles: torch.Tensor
    labels: torch.Tensor
    example: torch.Tensor
    positions: torch.Tensor
    patches: torch.Tensor
    grids: torch.Tensor
    size: int
    tokens: int = field(default=0)
    pictures: tuple[bytes, ...] = ()
    targets: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.uint8))
    target_places: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    loans: tuple[Loan, ...] = ()
