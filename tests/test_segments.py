"""Segments are the dense mask: which rows stand where, table by table, and what attention makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import varlen_stand_in

from comatch.backbones import attention
from comatch.core.masks import dense
from comatch.core.segments import Piece, Segments, compile_segments, pieces, stretches
from comatch.recipe import ROLES, Visibility

THREE = ROLES[:3]
TABLES = {
    "coma": ("c..", "cc.", ".cc"),
    "open": ("c..", "cc.", "ccc"),
    "paper bridge": ("ff.", "fff", ".ff"),
    "sealed bridge": ("ff.", "ff.", ".ff"),
    "strict bridge": ("f..", "ff.", ".ff"),
    "full": ("fff", "fff", "fff"),
    "causal reader of full roles": ("ff.", "ff.", ".fc"),
}


def layout(seed: int, lines: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Roles and examples of a few rows, each with one to three examples, padded on a random side; now and then a role is missing."""
    dice = np.random.default_rng(seed)
    rows = []
    for _ in range(lines):
        row: list[tuple[int, int]] = []
        for e in range(int(dice.integers(1, 4))):
            for role in range(3):
                row += [(role, e)] * int(dice.integers(0 if role == 2 else 1, 5))
        rows.append(row)
    wide = max(map(len, rows)) + 2
    left = bool(dice.integers(2))
    padded = [[(-1, -1)] * (wide - len(row)) + row if left else row + [(-1, -1)] * (wide - len(row)) for row in rows]
    both = torch.tensor(padded)
    return both[..., 0].to(torch.int8), both[..., 1]


def mask_of(segments: Segments, places: int) -> torch.Tensor:
    """The mask that segments amount to: bool [places, places]."""
    every, allowed = torch.arange(places), []
    for block in segments.blocks:
        queries, keys = (every if at is None else at for at in (block.queries, block.keys))
        rows = torch.zeros(len(queries), places, dtype=torch.bool)
        for s in range(len(block.bounds_q) - 1):
            q, k = (range(int(b[s]), int(b[s + 1])) for b in (block.bounds_q, block.bounds_k))
            assert len(q) <= block.longest_q and len(k) <= block.longest_k
            for i, row in enumerate(q):
                rows[row, keys[k.start : k.start + i + 1 if block.causal else k.stop]] = True
        shapes = [(int(q), int(k)) for q, k in zip(block.bounds_q.diff(), block.bounds_k.diff(), strict=True)]
        assert [shape for n, *shape in block.groups for _ in range(n)] == [list(shape) for shape in shapes]
        allowed.append(rows)
    out = torch.cat(allowed)
    return out if segments.source is None else out[segments.source]


def test_the_published_tables() -> None:
    found = {name: pieces(Visibility(THREE, table), THREE) for name, table in TABLES.items()}
    assert found["coma"] == (Piece(True, (1, 2), (1, 2), (2,)), Piece(True, (0, 1), (0, 1), (0, 1)))
    assert found["open"] == (Piece(True, (0, 1, 2), (0, 1, 2), (0, 1, 2)),)
    assert found["sealed bridge"] == (Piece(False, (2,), (1, 2), (2,)), Piece(False, (0, 1), (0, 1), (0, 1)))
    bridge = (Piece(False, (2,), (1, 2), (2,)), Piece(False, (1,), (0, 1, 2), (1,)), Piece(False, (0,), (0, 1), (0,)))
    assert found["paper bridge"] == bridge
    strict = (Piece(False, (2,), (1, 2), (2,)), Piece(False, (1,), (0, 1), (1,)), Piece(False, (0,), (0,), (0,)))
    assert found["strict bridge"] == strict
    assert found["full"] == (Piece(False, (0, 1, 2), (0, 1, 2), (0, 1, 2)),)


def test_a_table_without_this_form_says_why() -> None:
    told = pieces(Visibility(("context", "compression"), ("cf", "cc")), ("context", "compression"))
    assert told == "'context' sees itself causally and 'compression', which follows it, in full"
    told = pieces(Visibility(("context",), ("c",)), ("context", "compression"))
    assert isinstance(told, str) and "roles ['compression']" in told
    roles, example = torch.tensor([[0, 0, 1]], dtype=torch.int8), torch.zeros(1, 3, dtype=torch.int64)
    assert isinstance(compile_segments(roles, example, Visibility(("context", "compression"), ("cf", "cc"))), str)


def tables() -> list[tuple[str, ...]]:
    rows = ["".join(row) for row in itertools.product(".cf", repeat=3)]
    every = [t for t in itertools.product(rows, repeat=3) if all(t[i][i] != "." for i in range(3))]
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:800]]


def test_segments_are_the_dense_mask_for_any_table() -> None:
    expressed = 0
    for seed, table in enumerate([*TABLES.values(), *tables()]):
        visibility = Visibility(THREE, table)
        roles, example = layout(seed)
        found = compile_segments(roles, example, visibility)
        if isinstance(found, str):
            assert any(row[i] == "c" and "f" in row[i + 1 :] for i, row in enumerate(table)), (table, found)
            continue
        expressed += 1
        places, wide = roles.numel(), roles.shape[1]
        wanted = torch.zeros(places, places, dtype=torch.bool)
        for r, part in enumerate(dense(roles, example, visibility)):
            wanted[r * wide : (r + 1) * wide, r * wide : (r + 1) * wide] = part[0]
        valid = (roles >= 0).flatten()
        assert torch.equal(mask_of(found, places)[valid], wanted[valid]), table
    assert expressed > 300


def test_turns_of_a_role_between_others() -> None:
    """[X C D X D]: a role may come back; the rule goes by runs, not by roles."""
    roles = torch.tensor([[0, 0, 1, 2, 2, 0, 2, -1]], dtype=torch.int8)
    example = torch.tensor([[0, 0, 0, 0, 0, 0, 0, -1]])
    for table in [*TABLES.values(), ("c..", ".c.", "c.c")]:
        found = compile_segments(roles, example, Visibility(THREE, table))
        assert isinstance(found, Segments)
        assert torch.equal(mask_of(found, 8)[:7], dense(roles, example, Visibility(THREE, table))[0, 0, :7])


def test_copies_are_few() -> None:
    """CoMa repeats its compression rows and nothing else; sealed CoCoA repeats no query."""
    roles = torch.tensor([[0] * 50 + [1] * 4 + [2] * 30], dtype=torch.int8)
    rows = {}
    for name, table in TABLES.items():
        found = compile_segments(roles, torch.zeros(1, 84, dtype=torch.int64), Visibility(THREE, table))
        assert isinstance(found, Segments)
        rows[name] = [(int(b.bounds_q[-1]), int(b.bounds_k[-1])) for b in found.blocks]
    assert rows["coma"] == [(88, 88)] and rows["open"] == [(84, 84)] and rows["full"] == [(84, 84)]
    assert rows["sealed bridge"] == [(84, 88)]


def test_a_plain_row_moves_nothing() -> None:
    roles, example = torch.zeros(1, 6, dtype=torch.int8), torch.tensor([[0, 0, 0, 1, 1, 1]])
    found = compile_segments(roles, example, Visibility(("context",), ("c",)))
    assert isinstance(found, Segments) and found.source is None and found.blocks[0].queries is None
    plain = stretches((0, 3, 6), torch.device("cpu"))
    assert plain.source is None and plain.blocks[0].groups == ((2, 3, 3),)


def qkv(places: int, seed: int, heads: int = 4, key_heads: int = 2) -> list[torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    return [torch.randn(places, n, 8, generator=dice, dtype=torch.float64).requires_grad_() for n in (heads, key_heads, key_heads)]


def by_mask(rows: Sequence[torch.Tensor], roles: torch.Tensor, example: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    q, k, v = (x.view(*roles.shape, *x.shape[1:]).transpose(1, 2) for x in rows)
    mask = dense(roles, example, visibility)
    return attention.masked(torch.nn.Module(), q, k, v, None, visibility_mask=mask, scaling=0.3)[0].flatten(0, 1)


@pytest.mark.parametrize("kernel", ["groups", "varlen", "varlen of 2.11"])
@pytest.mark.parametrize("name", TABLES)
def test_attention_over_segments_is_attention_under_the_mask(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    visibility = Visibility(THREE, TABLES[name])
    calls = varlen_stand_in.install(monkeypatch, kernel == "varlen") if kernel != "groups" else None
    for seed in range(6):
        roles, example = layout(seed, lines=1 + seed % 3)
        valid = (roles >= 0).flatten()
        rows = qkv(roles.numel(), seed)
        found = compile_segments(roles, example, visibility)
        assert isinstance(found, Segments)
        fast, slow = attention.attend(rows[0], rows[1], rows[2], found, 0.3), by_mask(rows, roles, example, visibility)
        torch.testing.assert_close(fast[valid], slow[valid], atol=1e-12, rtol=1e-10)
        weights = torch.randn(slow.shape, dtype=torch.float64) * valid[:, None, None]
        grads = [torch.autograd.grad((out * weights).sum(), rows) for out in (fast, slow)]
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)
            assert (theirs != 0).any()
        other = by_mask(rows, roles, example, Visibility(THREE, TABLES["full" if name != "full" else "coma"]))
        assert (other - slow)[valid].abs().max() > 1e-3, "another table must show"
        if calls is not None:
            assert len(calls) == len(found.blocks) and calls[0]["key"].shape[1] == (2 if kernel == "varlen" else 4)
            calls.clear()


@pytest.mark.parametrize("name", ["coma", "causal reader of full roles"])
def test_outputs_of_copies_are_dropped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    roles, example = layout(3)
    rows = qkv(roles.numel(), 3)
    found = compile_segments(roles, example, Visibility(THREE, TABLES[name]))
    assert isinstance(found, Segments) and found.source is not None
    right = attention.attend(rows[0], rows[1], rows[2], found, 0.3)
    copies = torch.ones(sum(int(b.bounds_q[-1]) for b in found.blocks), dtype=torch.bool)
    copies[found.source] = False
    assert copies.any()
    original, done = attention._grouped, [0]

    def spoiled(q: torch.Tensor, *rest: object) -> torch.Tensor:
        out = original(q, *rest)  # type: ignore[arg-type]
        mine = copies[done[0] : done[0] + len(q)]
        done[0] += len(q)
        return torch.where(mine[:, None, None], torch.full_like(out, torch.nan), out)

    monkeypatch.setattr(attention, "_grouped", spoiled)
    assert torch.equal(attention.attend(rows[0], rows[1], rows[2], found, 0.3), right)
