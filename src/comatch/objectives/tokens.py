"""Next-token prediction on chosen tokens. The head runs on supervised rows only; every example weighs the same.

The reference averages within a sample and then over samples (specs/coma.md 3.1), so a long answer does not outweigh a short one;
packing must not change that, which is why the owner of each token is an argument.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


def next_token(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    example: torch.Tensor,
    size: int,
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk: int = 4096,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each example, averaged over its supervised tokens.

    hidden: [rows, seq, dim]. labels: [rows, seq], the token to predict from each place, negative for none. example: [rows, seq].
    head: [n, dim] -> [n, vocabulary]. Returns (loss [size] float32, 0 where nothing is supervised; [2] = tokens
    predicted right, tokens).
    """
    chosen = labels >= 0
    states, targets, owner = hidden[chosen], labels[chosen], example[chosen]
    losses, right = [], torch.zeros((), dtype=torch.long, device=hidden.device)
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        logits = head(states[part]).float()
        losses.append(F.cross_entropy(logits, targets[part], reduction="none"))
        right = right + (logits.detach().argmax(-1) == targets[part]).sum()
    total = torch.zeros(size, dtype=torch.float32, device=hidden.device)
    if losses:
        total = total.index_add(0, owner, torch.cat(losses))
    count = torch.bincount(owner, minlength=size)
    return total / count.clamp(min=1), torch.stack([right, chosen.sum()])
