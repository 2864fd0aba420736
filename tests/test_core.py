"""Masks, packing, positions and order against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comatch.core.batch import IGNORE, Example
from comatch.core.masks import dense
from comatch.core.packing import budget, collate
from comatch.data.order import shuffled
from comatch.objectives.tokens import next_token
from comatch.recipe import ROLES, Visibility


def random_layout(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of packed examples with turns, padded on a random side."""
    rows = []
    owner = []
    for _ in range(2):
        roles: list[int] = []
        owners: list[int] = []
        for e in range(int(rng.integers(1, 4))):
            parts = [0] * int(rng.integers(1, 6)) + [1] * int(rng.integers(1, 5)) + [2] * int(rng.integers(0, 7))
            roles += parts
            owners += [e] * len(parts)
        rows.append(roles)
        owner.append(owners)
    width = max(map(len, rows)) + 2
    left = bool(rng.integers(2))
    pad = lambda x: [-1] * (width - len(x)) + x if left else x + [-1] * (width - len(x))  # noqa: E731
    return torch.tensor([pad(r) for r in rows], dtype=torch.int8), torch.tensor([pad(o) for o in owner])


@pytest.mark.parametrize("table", [("c..", "cc.", ".cc"), ("f..", "ff.", ".ff"), ("c..", "ccf", "ccc"), (".c.", "fff", "..c")][:3])
def test_dense_mask_equals_plain_loops(table: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    visibility = Visibility(ROLES[:3], table)
    for _ in range(20):
        roles, owner = random_layout(rng)
        mask = dense(roles, owner, visibility)
        assert mask.shape == (len(roles), 1, roles.shape[1], roles.shape[1]) and mask.dtype == torch.bool
        for b in range(len(roles)):
            for q in range(roles.shape[1]):
                for k in range(roles.shape[1]):
                    if q == k:
                        want = True
                    elif roles[b, q] < 0 or roles[b, k] < 0 or owner[b, q] != owner[b, k]:
                        want = False
                    else:
                        letter = table[int(roles[b, q])][int(roles[b, k])]
                        want = letter == "f" or (letter == "c" and k <= q)
                    assert bool(mask[b, 0, q, k]) == want, (b, q, k)


def example(n: int, supervised: int = 0) -> Example:
    labels = np.full(n, IGNORE)
    labels[n - 1 - supervised : n - 1] = 7
    return Example(np.arange(n), np.zeros(n, np.int8), labels, np.tile(np.arange(n), (3, 1)))


def test_packing_keeps_every_token_once() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 50, 60).tolist()
    batch = collate([example(n) for n in lengths])
    assert batch.tokens == sum(lengths) == int((batch.example >= 0).sum())
    for i, n in enumerate(lengths):
        place = batch.example == i
        assert batch.ids[place].tolist() == list(range(n)) and batch.positions[0][place].tolist() == list(range(n))


def test_budget_never_splits_nor_overflows() -> None:
    groups = budget([5, 5, 5, 40, 1, 1], 11)
    assert groups == [[0, 1], [2], [3], [4, 5]]


def test_order_is_a_permutation_that_changes_with_epoch_and_seed() -> None:
    for rows in (1, 2, 3, 17, 64, 1000):
        for epoch in (0, 1):
            seen = [shuffled(epoch * rows + i, rows, 3) for i in range(rows)]
            assert sorted(row for row, _ in seen) == list(range(rows)) and {e for _, e in seen} == {epoch}
    orders = {tuple(shuffled(e * 100 + i, 100, s)[0] for i in range(100)) for s in range(5) for e in range(5)}
    assert len(orders) == 25
    first = [shuffled(i, 10_000, 0)[0] for i in range(2000)]
    assert abs(np.mean(first) - 5000) < 250 and abs(np.corrcoef(first, range(2000))[0, 1]) < 0.1


def test_next_token_equals_a_plain_loop_and_weighs_examples_equally() -> None:
    torch.manual_seed(0)
    batch = collate([example(9, 6), example(4, 1), example(5, 2), example(3, 0)])
    hidden, weight = torch.randn(*batch.ids.shape, 8, requires_grad=True), torch.randn(20, 8)
    losses, right = next_token(hidden, batch.labels, batch.example, batch.size, lambda x: x @ weight.T, chunk=3)
    for i in range(4):
        places = [(r, c) for r, c in zip(*torch.where((batch.example == i) & (batch.labels != IGNORE)), strict=True)]
        each = [F.cross_entropy(hidden[r, c] @ weight.T, batch.labels[r, c]) for r, c in places]
        want = torch.stack(each).mean() if each else torch.tensor(0.0)
        torch.testing.assert_close(losses[i], want)
    assert int(right[1]) == 9
    assert losses[0] != losses[1]
    losses.sum().backward()
    assert (hidden.grad[batch.labels == IGNORE] == 0).all()
