"""InfoNCE and its additions: several positives, explicit negatives, masks, hardness, shorter lengths, several vectors an item.

Every positive is one term of the mean: its query must find it among all candidates that are not answers to that query themselves.

    loss(i, p) = log(exp(s_ip / T) + sum over negatives j of w_ij exp(s_ij / T)) - s_ip / T

s is the cosine, or MaxSim where an item has several vectors. w is 1, or exp(alpha s_ij) without gradient (LLaVE, arXiv 2503.04812).
Focal weighting (KaLM-Embedding-V2, arXiv 2506.20923) multiplies a term by (1 - exp(-loss))^gamma, without gradient. Similarities are
held for some terms at a time and computed again for the gradient, so their matrix is never the peak of memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from comatch.config import LossConfig

# Similarities of single vectors held at once: 64 MiB in float32, a few times that with masks and logits.
CELLS = 1 << 24


@dataclass(frozen=True)
class Pairing:
    """Which candidate belongs to which query.

    owner: [candidates], the query that each was given for. positive: bool [candidates]; the others are explicit negatives.
    query_keys: [queries], keys: [candidates], int64: equal items have equal keys, below 0 is unknown and equals nothing.
    """

    owner: torch.Tensor
    positive: torch.Tensor
    query_keys: torch.Tensor
    keys: torch.Tensor

    @cached_property
    def terms(self) -> torch.Tensor:
        """The candidates that are positives: [terms]."""
        return self.positive.nonzero().squeeze(1)

    @cached_property
    def answers(self) -> torch.Tensor:
        """Keys of each query's positives, filled up with -1: [queries, most positives of a query]."""
        owner, order = self.owner[self.terms].sort(stable=True)
        count = torch.bincount(owner, minlength=len(self.query_keys))
        place = torch.arange(len(owner), device=owner.device) - (count.cumsum(0) - count)[owner]
        table = torch.full((len(self.query_keys), int(count.max())), -1, dtype=self.keys.dtype, device=self.keys.device)
        table[owner, place] = self.keys[self.terms][order]
        return table

    def no_candidates(self, terms: torch.Tensor, config: LossConfig) -> torch.Tensor:
        """Candidates that are no negatives of a term's query: bool [terms, candidates]."""
        query = self.owner[terms].unsqueeze(1)
        banned = (self.owner == query) & self.positive
        if config.negatives == "own":
            banned |= (self.owner != query) & ~self.positive
        if config.mask_duplicates:
            banned |= _same(self.query_keys[query], self.keys)
            for answers in self.answers[query.squeeze(1)].T:
                banned |= _same(answers.unsqueeze(1), self.keys)
        return banned

    def no_queries(self, terms: torch.Tensor, config: LossConfig) -> torch.Tensor:
        """Queries that are no negatives of a term's positive: bool [terms, queries]."""
        if not config.mask_duplicates:
            return torch.zeros(len(terms), len(self.query_keys), dtype=torch.bool, device=terms.device)
        key = self.keys[terms].unsqueeze(1)
        banned = _same(self.query_keys[self.owner[terms]].unsqueeze(1), self.query_keys) | _same(key, self.query_keys)
        for answers in self.answers.T:
            banned |= _same(key, answers)
        return banned


def info_nce(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    pairing: Pairing,
    config: LossConfig,
    temperature: torch.Tensor | float | None = None,
    guide: tuple[torch.Tensor, torch.Tensor] | None = None,
    cells: int = CELLS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss over a batch, and the share of terms whose positive ranks first among its candidates (first of `vectors`, full length).

    queries, candidates: [n, dim], or [n, groups, dim] with the means of consecutive groups (`comatch.core.pooling`); any length, they
    are normalised here. temperature: in place of the config's. guide: unit vectors of queries and candidates by another model; its
    cosines then decide what `mask_margin` (0 where None) masks. cells: similarities held at once. Without additions the chance level is
    log(candidates). Raises ValueError where `dims` or `vectors` do not fit.
    """
    queries, candidates = (x.unsqueeze(1) if x.ndim == 2 else x for x in (queries, candidates))
    scale = config.temperature if temperature is None else temperature
    total, first = queries.new_zeros(()), None
    for count in config.vectors:
        nested = [group(x, count) for x in (queries, candidates)]
        for dim, weight in config.prefixes(queries.shape[-1]):
            q, c = (F.normalize(x[..., :dim], dim=-1) for x in nested)
            loss, right = _one(q, c, pairing, config, scale, guide, cells)
            total = total + weight / len(config.vectors) * loss
            first = right if first is None else first
    assert first is not None  # noqa: S101 - `vectors` and `prefixes` are never empty
    return total, first


def group(means: torch.Tensor, count: int) -> torch.Tensor:
    """Means of n groups to those of fewer: [items, n, dim] to [items, count, dim]. Raises ValueError unless count divides n."""
    if means.shape[1] % count:
        raise ValueError(f"{means.shape[1]} groups of tokens do not make {count} vectors; use a number that divides it")
    return means.reshape(len(means), count, -1, means.shape[-1]).mean(2)


def similarity(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """MaxSim: each query vector takes its best candidate vector, and a query the mean of those; the cosine where items have one vector.

    queries: [n, v, dim], candidates: [m, w, dim], unit vectors. Returns [n, m], at most 1. Late interaction (ColBERT, arXiv 2004.12832).
    """
    product = queries.flatten(0, 1) @ candidates.flatten(0, 1).T
    if queries.shape[1] == candidates.shape[1] == 1:
        return product
    return product.view(len(queries), queries.shape[1], len(candidates), candidates.shape[1]).amax(3).mean(1)


def _one(
    q: torch.Tensor,
    c: torch.Tensor,
    pairing: Pairing,
    config: LossConfig,
    temperature: torch.Tensor | float,
    guide: tuple[torch.Tensor, torch.Tensor] | None,
    cells: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and accuracy for one number of vectors and one length."""
    judge = None if guide is None else (guide[0].unsqueeze(1), guide[1].unsqueeze(1))

    def forth(terms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        own = pairing.owner[terms]
        opinion = None if judge is None else similarity(judge[0][own], judge[1])
        return _terms(similarity(q[own], c), terms, pairing.no_candidates(terms, config), opinion, config, temperature)

    def back(terms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        opinion = None if judge is None else similarity(judge[0], judge[1][terms]).T
        sims = similarity(q, c[terms]).T
        return _terms(sims, pairing.owner[terms], pairing.no_queries(terms, config), opinion, config, temperature)

    loss, right = _sums(forth, pairing.terms, max(1, cells // (len(c) * q.shape[1] * c.shape[1])))
    if config.symmetric:
        other, _ = _sums(back, pairing.terms, max(1, cells // (len(q) * q.shape[1] * c.shape[1])))
        loss = (loss + other) / 2
    return loss / len(pairing.terms), right / len(pairing.terms)


def _sums(
    part: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], terms: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of `part` over chunks of the terms; what a chunk needs for its gradient is computed again there."""
    if len(terms) <= chunk:
        return part(terms)
    found = [checkpoint(part, some, use_reentrant=False, preserve_rng_state=False) for some in torch.split(terms, chunk)]
    loss, right = zip(*found, strict=True)
    return torch.stack(loss).sum(), torch.stack(right).sum()


def _terms(
    sims: torch.Tensor,
    target: torch.Tensor,
    banned: torch.Tensor,
    opinion: torch.Tensor | None,
    config: LossConfig,
    temperature: torch.Tensor | float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the terms' losses and number of terms whose target ranks first. sims, banned, opinion: [terms, pool]. target: [terms]."""
    place = target.unsqueeze(1)
    if opinion is not None or config.mask_margin is not None:
        judge = sims.detach() if opinion is None else opinion
        banned = banned | (judge > judge.gather(1, place) + (config.mask_margin or 0.0))
    banned = banned.scatter(1, place, False)
    logits = sims / temperature
    if config.hardness == "llave":
        logits = logits + (config.strength * sims.detach()).scatter(1, place, 0.0)
    losses = F.cross_entropy(logits.masked_fill(banned, -torch.inf), target, reduction="none")
    if config.hardness == "focal":
        losses = losses * (1 - torch.exp(-losses.detach())).clamp(min=0) ** config.strength
    rivals = sims.detach().masked_fill(banned, -torch.inf).scatter(1, place, -torch.inf)
    right = rivals.amax(1) < sims.detach().gather(1, place).squeeze(1)
    return losses.sum(), right.sum()


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) & (b >= 0)
