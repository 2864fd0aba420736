"""Examples that begin alike are computed alike up to there: questions about one picture share the picture (specs/performance.md section 9).

The common beginning stands in the batch once, with the first of them; the others keep what is their own and borrow the rest
(`Batch.loans`).
Inside attention the lent rows of queries, keys and values are repeated before each borrower's own, as compression rows are. Exact
where no lent place sees what follows it, which the table says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np

from comatch.core.batch import ROLE_ID, Example, Loan
from comatch.recipe import Visibility

CONTEXT = ROLE_ID["context"]


def shareable(visibility: Visibility, pooling: str | None) -> bool:
    """Whether what comes first in a context is the same whatever follows, and no vector is made of it."""
    blind = all(visibility.letter("context", role) == ("c" if role == "context" else ".") for role in visibility.roles)
    return blind and pooling != "mean"


def share(examples: Sequence[Example], image_id: int) -> tuple[list[Example], tuple[Loan, ...]]:
    """The examples without what they borrow, and the loans. image_id: the token of pictures.

    Neighbours that show the same named picture first make a family; the first of it lends.
    """
    left, loans, start = list(examples), list[Loan](), 0
    while start < len(examples):
        lead = examples[start].pictures[:1]
        end = start + 1
        while end < len(examples) and lead not in ((), (b"",)) and examples[end].pictures[:1] == lead:
            end += 1
        family = examples[start:end]
        length = min((_common(family[0], other, image_id) for other in family[1:]), default=0)
        if length:
            loans += [Loan(i, start, length) for i in range(start + 1, end)]
            left[start + 1 : end] = [_after(example, length, image_id) for example in family[1:]]
        start = end
    return left, tuple(loans)


def _common(a: Example, b: Example, image_id: int) -> int:
    """How many places at the beginning are context and equal in both: whole pictures, not all of either example."""
    n = min(len(a), len(b)) - 1
    differs = (a.ids[:n] != b.ids[:n]) | (a.positions[:, :n] != b.positions[:, :n]).any(0)
    differs |= (a.roles[:n] != CONTEXT) | (b.roles[:n] != CONTEXT)
    equal = int(np.argmax(differs)) if differs.any() else n
    # All pictures have the same id, so what they show is compared by their names.
    spans = _spans(a, image_id)
    for (begin, end), name, other in zip_longest(spans, a.pictures, b.pictures[: len(spans)]):
        if begin < equal and (end > equal or not name or name != other):
            return int(begin)
    return equal


def _after(example: Example, length: int, image_id: int) -> Example:
    seen = sum(end <= length for _, end in _spans(example, image_id))
    return replace(
        example,
        ids=example.ids[length:],
        roles=example.roles[length:],
        labels=example.labels[length:],
        positions=example.positions[:, length:],
        patches=example.patches[seen:],
        grids=example.grids[seen:],
        pictures=example.pictures[seen:],
    )


def _spans(example: Example, image_id: int) -> list[tuple[int, int]]:
    """Where the tokens of each picture begin and end; each has as many as its share of the patches."""
    places = np.flatnonzero(example.ids == image_id)
    patches = np.array([t * h * w for t, h, w in example.grids], np.int64)
    counts = patches * len(places) // max(1, int(patches.sum()))
    ends = np.cumsum(counts)
    return [(int(places[end - n]), int(places[end - 1]) + 1) for n, end in zip(counts.tolist(), ends.tolist(), strict=True)]
