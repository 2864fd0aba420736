"""Visibility without a mask: which rows of queries, keys and values to lay side by side so that plain attention computes a table.

Each run of one role is a query segment together with all that it may see (specs/performance.md 3.3). A run that sees itself causally
becomes part of a causal segment of equal queries and keys: the rows it may see come first, once more where another segment has them
too, and the outputs of those copies are dropped. A run that sees itself in full needs no copies of queries, only its keys. CoMa is
[context compression] and [compression' dialogue] causal; sealed CoCoA is the same rows, full; a plain table is one segment per example.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from comatch.core.batch import PADDING, Loan
from comatch.devices import HOST, moved
from comatch.recipe import ROLES, Visibility


@dataclass(frozen=True)
class Piece:
    """One segment of an example, as indices into its runs. queries == keys where causal; only `kept` queries have outputs that count."""

    causal: bool
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    kept: tuple[int, ...]


@dataclass  # not frozen, nor is Segments: torch 2.11 looks into frozen ones, and compiles layers anew for each number of segments
class Block:
    """Segments for one attention call, sorted by length.

    queries, keys: [rows] int64, where the rows stand in the flattened batch (None: all of them, in order; causal: the same tensor).
    bounds_q, bounds_k: [segments + 1] int32, where segments begin and end. longest_q, longest_k: of a segment.
    groups: (segments, query rows, key rows) of each stretch of segments of equal shape, in order.
    """

    causal: bool
    queries: torch.Tensor | None
    keys: torch.Tensor | None
    bounds_q: torch.Tensor
    bounds_k: torch.Tensor
    longest_q: int
    longest_k: int
    groups: tuple[tuple[int, int, int], ...]


@dataclass
class Segments:
    """A batch's visibility as plain attention calls: at most one causal and one full.

    source: [places] int64, for every place of the flattened batch its row among the blocks' outputs laid end to end (None: the same
    order). Padding is given the first row; nothing reads it.
    """

    blocks: tuple[Block, ...]
    source: torch.Tensor | None


@lru_cache(maxsize=1024)
def pieces(visibility: Visibility, runs: tuple[str, ...]) -> tuple[Piece, ...] | str:
    """The segments of an example whose runs have these roles, in order; or the reason, in words, why there are none."""
    strange = sorted(set(runs) - set(visibility.roles))
    if strange:
        return f"the batch has roles {strange}, which the table of {list(visibility.roles)} does not name"
    full: dict[tuple[int, ...], list[int]] = defaultdict(list)
    causal: list[tuple[tuple[int, ...], list[int]]] = []
    for i in reversed(range(len(runs))):
        letters = [visibility.letter(runs[i], key) for key in runs]
        # A run that stands before is seen whole under either letter, one that stands after only in full.
        before = tuple(j for j in range(i) if letters[j] != ".")
        after = tuple(j for j in range(i + 1, len(runs)) if letters[j] == "f")
        if letters[i] == "f":
            full[(*before, i, *after)].append(i)
        elif after:
            return f"{runs[i]!r} sees itself causally and {runs[after[0]]!r}, which follows it, in full"
        else:
            seen = (*before, i)
            kept = next((kept for rows, kept in causal if tuple(j for j in rows if j <= i) == seen), None)
            if kept is None:
                causal.append((seen, [i]))
            else:
                kept.append(i)
    return (
        *(Piece(True, rows, rows, tuple(sorted(kept))) for rows, kept in causal),
        *(Piece(False, tuple(sorted(rows)), keys, tuple(sorted(rows))) for keys, rows in full.items()),
    )


def compile_segments(
    roles: torch.Tensor,
    example: torch.Tensor,
    visibility: Visibility,
    loans: Sequence[Loan] = (),
    device: torch.device = HOST,
) -> Segments | str:
    """A batch's visibility as plain attention calls, or the reason, in words, why only the dense mask can express it.

    roles, example, loans: as in `Batch`, in host memory. device: where the calls are to run. The result equals `core.masks.dense` on
    every place that is not padding.
    """
    role, owner = (x.numpy().ravel() for x in (roles, example))
    line = np.arange(len(role)) // roles.shape[1]
    begins = np.ones(len(role), bool)
    begins[1:] = (np.diff(owner) != 0) | (np.diff(line) != 0)
    new = begins.copy()
    new[1:] |= np.diff(role) != 0
    # What is lent is a run of its own, so that a borrower can take it for its first.
    at = {loan.lender: int(np.argmax(owner == loan.lender)) for loan in loans}
    for loan in loans:
        new[at[loan.lender] + loan.length] = True
    starts = np.flatnonzero(new)
    lengths = np.diff(starts, append=len(role))
    causal: list[_Alike] = []
    full: list[_Alike] = []
    lent = {loan.borrower: int(np.searchsorted(starts, at[loan.lender])) for loan in loans}
    for kind, runs in _alike(role[starts], begins[starts], owner[starts], lent):
        plan = pieces(visibility, tuple(ROLES[i] for i in kind))
        if isinstance(plan, str):
            return plan
        for piece in plan:
            alike = _Alike(runs[:, piece.queries], runs[:, piece.keys], np.isin(piece.queries, piece.kept))
            (causal if piece.causal else full).append(alike)
    blocks, source, done = [], np.zeros(len(role), np.int64), 0
    for segments in filter(None, (causal, full)):
        block, places, kept = _block(segments is causal, segments, starts, lengths, device)
        source[places[kept]] = done + np.flatnonzero(kept)
        done += len(places)
        blocks.append(block)
    return Segments(tuple(blocks), _index(source, done, device))


@lru_cache(maxsize=8)
def stretches(bounds: tuple[int, ...], device: torch.device) -> Segments:
    """Full attention inside each stretch between neighbouring bounds, for rows that stand in order (the vision tower's windows)."""
    starts, lengths = np.asarray(bounds[:-1]), np.diff(bounds)
    runs = np.flatnonzero(lengths)[:, None]
    block, places, _ = _block(False, [_Alike(runs, runs, np.ones(1, bool))], starts, lengths, device)
    return Segments((block,), _index(np.argsort(places), bounds[-1], device))


class _Alike(NamedTuple):
    """Segments of examples with the same roles. queries, keys: [segments, runs] numbers of runs. kept: [runs] which query runs are kept."""

    queries: np.ndarray
    keys: np.ndarray
    kept: np.ndarray


def _alike(
    roles: np.ndarray, begins: np.ndarray, owners: np.ndarray, lent: Mapping[int, int]
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Examples by the roles of their runs: the roles, and [examples, runs] numbers of runs.

    roles, begins, owners: [runs] of the batch. lent: the number of the run that an example has for its first, by the example's own.
    """
    real = roles[begins] != PADDING
    first = np.flatnonzero(begins)[real]
    borrowed = np.array([lent.get(owner, -1) for owner in owners[first].tolist()], np.int64)
    shift = (borrowed >= 0).astype(np.int64)
    count = np.diff(np.flatnonzero(begins), append=len(roles))[real] + shift
    places = np.arange(count.max(initial=0))
    runs = np.where((places == 0) & (shift[:, None] == 1), borrowed[:, None], first[:, None] + places - shift[:, None])
    inside = places < count[:, None]
    table = np.where(inside, roles[np.minimum(runs, len(roles) - 1)], PADDING)
    kinds, which = np.unique(table, axis=0, return_inverse=True)
    for i, kind in enumerate(kinds):
        wide = int((kind != PADDING).sum())
        yield tuple(kind[:wide].tolist()), runs[which.ravel() == i, :wide]


def _block(
    causal: bool, segments: Sequence[_Alike], starts: np.ndarray, lengths: np.ndarray, device: torch.device
) -> tuple[Block, np.ndarray, np.ndarray]:
    """The block of some segments, the places of its query rows, and which of these are kept."""
    shapes = np.concatenate([np.stack([lengths[s.queries].sum(1), lengths[s.keys].sum(1)], axis=1) for s in segments])
    order = np.lexsort((shapes[:, 1], shapes[:, 0]))
    total = int(lengths.sum())
    runs, at = _ragged([s.queries for s in segments], order)
    places = _places(starts[runs], lengths[runs])
    kept = np.repeat(np.concatenate([np.tile(s.kept, len(s.queries)) for s in segments])[at], lengths[runs])
    queries = keys = _index(places, total, device)
    if not causal:
        runs, _ = _ragged([s.keys for s in segments], order)
        keys = _index(_places(starts[runs], lengths[runs]), total, device)
    ends = np.cumsum(np.vstack([(0, 0), shapes[order]]), axis=0, dtype=np.int32)
    bounds_q, bounds_k = (moved(torch.from_numpy(column), device) for column in ends.T.copy())
    alike, count = np.unique(shapes, axis=0, return_counts=True)
    groups = tuple((int(n), int(q), int(k)) for n, (q, k) in zip(count, alike, strict=True))
    longest_q, longest_k = shapes.max(0).tolist()
    return Block(causal, queries, keys, bounds_q, bounds_k, longest_q, longest_k, groups), places, kept


def _ragged(runs: Sequence[np.ndarray], order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of runs of all segments, the segments in another order; and where each stood before."""
    counts = np.concatenate([np.full(len(part), part.shape[1]) for part in runs])
    at = _places((np.cumsum(counts) - counts)[order], counts[order])
    return np.concatenate([part.ravel() for part in runs])[at], at


def _places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of every run, one run after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _index(places: np.ndarray, total: int, device: torch.device) -> torch.Tensor | None:
    """None where the places are all rows in order, so that nothing need be moved."""
    if len(places) == total and bool((np.diff(places) == 1).all()):
        return None
    return moved(torch.from_numpy(places), device)
