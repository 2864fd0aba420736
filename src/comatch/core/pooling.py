"""Hidden states to one unit vector per example, or to several."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from comatch.core.batch import ROLE_ID
from comatch.devices import moved


def pool(hidden: torch.Tensor, roles: torch.Tensor, example: torch.Tensor, size: int, how: str, vectors: int = 1) -> torch.Tensor:
    """Pool the states of each example and normalise (specs/coma.md 1.4).

    hidden: [rows, seq, dim], on any device. roles, example: [rows, seq] in host memory, -1 on padding. how: one of
    `comatch.recipe.POOLINGS`.
    Returns float32 [size, dim] of unit length, or [size, vectors, dim] for more than one.
    """
    means = group_means(hidden, roles, example, size, how, vectors)
    return F.normalize(means if vectors > 1 else means.squeeze(1), dim=-1)


def group_means(hidden: torch.Tensor, roles: torch.Tensor, example: torch.Tensor, size: int, how: str, groups: int = 1) -> torch.Tensor:
    """Pool the chosen states of each example in `groups` consecutive groups of equal size, without normalising.

    Arguments as in `pool`; groups above 1 are for "mean_compression" and divide the
    compression tokens (`comatch.recipe.check_vectors`).
    Means of equal groups average to the mean of their union, so one tensor holds every coarser pooling.
    Returns float32 [size, groups, dim]. Sums run in float32, because a mean in bf16 loses digits.
    """
    chosen = example >= 0
    if how.endswith("compression"):
        chosen &= roles == ROLE_ID["compression"]
    owner, places = example[chosen], chosen.flatten().nonzero().squeeze(1)
    states = hidden.flatten(0, 1)
    if how.startswith("last"):
        last = torch.full((size,), -1).scatter_reduce(0, owner, places, "amax")
        return states[moved(last, hidden.device)].float().unsqueeze(1)
    count = torch.bincount(owner, minlength=size)
    if groups > 1:
        # The tokens of an example stand together, in order.
        order = torch.arange(len(owner))
        start = torch.full((size,), len(owner)).scatter_reduce(0, owner, order, "amin")
        owner = owner * groups + (order - start[owner]) * groups // count[owner]
        count = torch.bincount(owner, minlength=size * groups)
    places, owner, count = (moved(x, hidden.device) for x in (places, owner, count))
    total = torch.zeros(size * groups, hidden.shape[-1], dtype=torch.float32, device=hidden.device)
    total = total.index_add(0, owner, states[places].float())
    return (total / count.unsqueeze(1)).view(size, groups, -1)


def pooled(roles: torch.Tensor, how: str | None) -> np.ndarray | None:
    """Which states a pooling reads: bool like `roles` [rows, seq], or None where it may be any."""
    return (roles == ROLE_ID["compression"]).numpy() if how and how.endswith("compression") else None
