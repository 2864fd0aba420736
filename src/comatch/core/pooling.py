"""Hidden states to one unit vector per example."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from comatch.core.batch import ROLE_ID


def pool(hidden: torch.Tensor, roles: torch.Tensor, example: torch.Tensor, size: int, how: str) -> torch.Tensor:
    """Pool the states of each example and normalise (specs/coma.md 1.4).

    hidden: [rows, seq, dim]. roles, example: [rows, seq], -1 on padding. how: one of `comatch.recipe.POOLINGS`.
    Returns float32 [size, dim] of unit length. Sums run in float32, because a mean in bf16 loses digits.
    """
    chosen = example >= 0
    if how.endswith("compression"):
        chosen &= roles == ROLE_ID["compression"]
    owner = example[chosen]
    if how.startswith("last"):
        flat = torch.arange(chosen.numel(), device=hidden.device).view_as(chosen)[chosen]
        last = torch.full((size,), -1, dtype=flat.dtype, device=hidden.device).scatter_reduce(0, owner, flat, "amax")
        return F.normalize(hidden.flatten(0, 1)[last].float(), dim=-1)
    total = torch.zeros(size, hidden.shape[-1], dtype=torch.float32, device=hidden.device)
    total = total.index_add(0, owner, hidden[chosen].float())
    count = torch.bincount(owner, minlength=size).unsqueeze(1)
    return F.normalize(total / count, dim=-1)
