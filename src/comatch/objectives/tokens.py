"""Prediction of next or of hidden tokens, which differ in their labels only (core/corruption.py draws those of hidden ones).

The head runs on supervised rows only; every example weighs the same.

The reference averages within a sample and then over samples (specs/coma.md 3.1), so a long answer does not outweigh a short one;
packing must not change that, which is why the owner of each token is an argument.

Logits are the largest tensors of training: 150,000 float32 numbers a token. They are made in chunks, and of all chunks only the last
keeps its own until the backward pass, which reads it first; the others are made again there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from comatch.devices import moved

IGNORE = -100
ROWS = 128
"""The head sees a multiple of this many rows: few shapes, so that kernels and their caches are used again."""

CHUNK = 2048
"""Rows of one call of the head; it bounds memory and changes no result."""

Head = Callable[[torch.Tensor], torch.Tensor]


def next_token(
    hidden: torch.Tensor, labels: torch.Tensor, example: torch.Tensor, size: int, head: Head, chunk: int = CHUNK
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each example, averaged over its supervised tokens.

    hidden: [rows, seq, dim], on any device. labels: [rows, seq], the token to predict from each place, negative for none; example: [rows,
    seq]; both in host memory. head: [n, dim] -> [n, vocabulary], a frozen one gets no gradient of its weight. chunk: rows of one call of
    it, a multiple of 128. Returns (loss [size] in float32 or better, 0 where nothing is supervised; [2] = tokens predicted right, tokens).
    """
    place, targets, owner, count = supervised_rows(labels, example, size, hidden.device)
    states = hidden.flatten(0, 1)[place]
    losses, right = [], torch.zeros((), dtype=torch.long, device=hidden.device)
    for start in range(0, len(place), chunk):
        part = states[start : start + chunk], targets[start : start + chunk]
        if start + chunk < len(place):
            loss, hits = checkpoint(_cross_entropy, head, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, hits = _cross_entropy(head, *part)
        losses.append(loss)
        right = right + hits
    return per_example(torch.cat(losses), owner, count), torch.stack([right, count.sum()])


def supervised_rows(
    labels: torch.Tensor, example: torch.Tensor, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Places of the flattened batch that carry a label, their labels and examples, filled up to a multiple of ROWS; labels of each example.

    labels, example: in host memory; what is returned is on `device`.
    """
    place = (labels >= 0).flatten().nonzero().squeeze(1)
    owner = example.flatten()[place]
    count = torch.bincount(owner, minlength=size)
    spare = -len(place) % ROWS if len(place) else ROWS  # a batch without labels still reaches the weights, with zeros
    targets = F.pad(labels.flatten()[place], (0, spare), value=IGNORE)
    place, owner = (F.pad(x, (0, spare)) for x in (place, owner))
    return moved(place, device), moved(targets, device), moved(owner, device), moved(count, device)


def per_example(each: torch.Tensor, owner: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Means over the labels of each example: [size]. each: loss of every place, 0 where it was only filled up; owner: its example."""
    return each.new_zeros(len(count)).index_add(0, owner, each) / count.clamp(min=1)


def _cross_entropy(head: Head, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row [n], and how many rows have their target first."""
    logits = head(states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE), (logits.detach().argmax(-1) == targets).sum()
