"""Masks, packing, positions and order against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comatch.core.batch import IGNORE, Example
from comatch.core.flops import Shape, forward_flops
from comatch.core.masks import dense
from comatch.core.packing import budget, collate, plan
from comatch.data.order import shuffled
from comatch.objectives.contrastive import info_nce
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
    rows = plan(lengths, 50)
    assert sorted(i for row in rows for i in row) == list(range(60))
    assert all(sum(lengths[i] for i in row) <= 50 for row in rows)
    assert len(rows) <= -(-sum(lengths) // 50) + 2, "best fit should waste little"
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


@pytest.mark.parametrize("symmetric", [False, True])
def test_info_nce_equals_a_plain_loop(symmetric: bool) -> None:
    torch.manual_seed(0)
    q, t, extra = (F.normalize(torch.randn(n, 6), dim=-1) for n in (5, 5, 3))
    tau = 0.07

    def one_way(a: torch.Tensor, b: torch.Tensor) -> float:
        total = 0.0
        for i in range(5):
            scores = [float(a[i] @ row) / tau for row in b]
            total -= scores[i] - float(torch.logsumexp(torch.tensor(scores, dtype=torch.float64), 0))
        return total / 5

    want = one_way(q, torch.cat([t, extra]))
    if symmetric:
        want = (want + one_way(t, q)) / 2
    got = float(info_nce(q, t, tau, symmetric, extra))
    assert abs(got - want) < 1e-5
    assert abs(got - float(info_nce(q, t.flip(0), tau, symmetric, extra))) > 1e-3


def test_flops_of_the_3b_model_are_the_published_ones() -> None:
    from comatch.backbones.shapes import config_of

    shape = Shape.of(config_of("Qwen/Qwen2.5-VL-3B-Instruct"))
    # specs/performance.md section 2: 5.55 GFLOP per token, 0.62 per head place, 5.3 per visual token of four patches.
    assert abs(shape.text_token / 5.55e9 - 1) < 0.01
    assert abs(shape.head / 0.62e9 - 1) < 0.01
    assert abs(4 * shape.patch / 5.3e9 - 1) < 0.1
    assert forward_flops(shape, 100, 0) < forward_flops(shape, 100, 400) < forward_flops(shape, 100, 400, 50)
