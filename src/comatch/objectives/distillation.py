"""Distillation: at every supervised place the student learns the whole distribution that a teacher expects there, not its one word.

    loss = T^2 KL(softmax(teacher / T) || softmax(student / T))

The square keeps the gradient's size when T changes (Hinton et al., arXiv 1503.02531). Unlike the reference (specs/coma.md 3.2), places that
carry no label do not enter the mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from comatch.objectives.tokens import CHUNK, IGNORE, Head, per_example, supervised_rows


def distillation(
    hidden: torch.Tensor,
    taught: torch.Tensor,
    labels: torch.Tensor,
    example: torch.Tensor,
    size: int,
    heads: tuple[Head, Head],
    temperature: float = 1.0,
    chunk: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence of each example, averaged over its supervised tokens.

    hidden, taught: [rows, seq, dim], states of student and teacher. labels, example: [rows, seq], as for `next_token`. heads: of student
    and teacher. chunk: rows of one call of the heads. Returns (loss [size]; [2] = labels that the student has first, all labels).
    """
    place, targets, owner, count = supervised_rows(labels, example, size, hidden.device)
    states, known = hidden.flatten(0, 1)[place], taught.flatten(0, 1)[place].detach()
    losses, right = [], torch.zeros((), dtype=torch.long, device=hidden.device)
    for start in range(0, len(place), chunk):
        part = slice(start, start + chunk)
        rows = heads, states[part], known[part], targets[part], temperature
        if start + chunk < len(place):
            loss, hits = checkpoint(_divergence, *rows, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, hits = _divergence(*rows)
        losses.append(loss)
        right = right + hits
    return per_example(torch.cat(losses), owner, count), torch.stack([right, count.sum()])


def _divergence(
    heads: tuple[Head, Head], states: torch.Tensor, known: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divergence of each row [n], 0 without a label, and how many rows have their label first with the student."""
    logits = heads[0](states)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.no_grad():
        wanted = F.log_softmax(heads[1](known).to(logits.dtype) / temperature, dim=-1)
    each = F.kl_div(F.log_softmax(logits / temperature, dim=-1), wanted, reduction="none", log_target=True).sum(-1)
    each = (each * temperature**2).masked_fill(targets == IGNORE, 0.0)
    return each, (logits.detach().argmax(-1) == targets).sum()
