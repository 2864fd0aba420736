"""InfoNCE over a batch of query and target vectors (specs/coma.md 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def info_nce(
    queries: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 0.03,
    symmetric: bool = False,
    negatives: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each query must find its own target among all targets, and among extra negatives.

    queries, targets: [batch, dim] unit vectors; row i of one belongs to row i of the other. negatives: [more, dim], seen by every query.
    `symmetric` averages with the direction target to query. Returns a scalar; chance level is log(batch + more).
    """
    candidates = targets if negatives is None else torch.cat([targets, negatives])
    label = torch.arange(len(queries), device=queries.device)
    loss = F.cross_entropy(queries @ candidates.T / temperature, label)
    if symmetric:
        loss = (loss + F.cross_entropy(targets @ queries.T / temperature, label)) / 2
    return loss
