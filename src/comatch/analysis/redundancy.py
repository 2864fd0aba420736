"""Do the compression tokens say different things? Their similarity and effective rank (CoMa, figure 3: specs/coma.md section 7.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from comatch.content import as_messages
from comatch.core.batch import ROLE_ID
from comatch.core.packing import budget, collate
from comatch.encoder import Encoder
from comatch.errors import ContentError, RecipeError

LIMIT = 0.8
"""Mean cosine between compression tokens above which they count as redundant."""
TOKENS = 8192


@dataclass(frozen=True, eq=False)
class RedundancyReport:
    """How alike the K compression tokens of an item end up, mean over items.

    cosine: [K, K], between the final states of two tokens of one item. rank: effective rank of an item's [K,
    dim] states, from 1 (all parallel) to K: e to the entropy of the singular values as shares of their sum
    (Roy and Vetterli 2007). The centred forms are the same after the mean state over all items and tokens is
    taken away, which states of language models largely share.
    """

    tokens: int
    items: int
    cosine: np.ndarray
    cosine_centred: np.ndarray
    rank: float
    rank_centred: float

    @property
    def mean_cosine(self) -> float:
        """Mean over pairs of different tokens."""
        return _off_diagonal(self.cosine)

    @property
    def mean_cosine_centred(self) -> float:
        """Mean over pairs of different tokens, centred."""
        return _off_diagonal(self.cosine_centred)

    @property
    def redundant(self) -> bool:
        """Whether the mean cosine, not centred, is above LIMIT."""
        return self.mean_cosine > LIMIT

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = asdict(self) | {
            "cosine": self.cosine.tolist(),
            "cosine_centred": self.cosine_centred.tolist(),
        }
        means = {"mean_cosine": self.mean_cosine, "mean_cosine_centred": self.mean_cosine_centred}
        return plain | means | {"redundant": self.redundant, "limit": LIMIT}


def states(encoder: Encoder, items: Sequence[Any]) -> list[np.ndarray]:
    """Final states of each item's compression tokens, before pooling: one float32 [K, dim] per item, in the order given.

    items: what `as_message` reads. Raises RecipeError where the recipe has no compression tokens,
    ContentError for an item that cannot be read.
    """
    stage = encoder.stage
    if "compression" not in stage.visibility.roles:
        raise RecipeError(
            f"recipe {encoder.recipe.name!r} pools {stage.pooling!r} and has no compression tokens; try a model of the recipe coma"
        )
    examples = [encoder.preparer.item(message, stage) for message in as_messages(items)]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    found: dict[int, np.ndarray] = {}
    for chosen in budget([len(examples[i]) for i in order], TOKENS):
        batch = collate([examples[order[i]] for i in chosen])
        with torch.no_grad():
            hidden = encoder.backbone(batch, stage.visibility)
        compression, states = batch.roles == ROLE_ID["compression"], hidden.float().cpu()
        found |= {order[i]: states[compression & (batch.example == place)].numpy() for place, i in enumerate(chosen)}
    return [found[i] for i in range(len(examples))]


def redundancy(encoder: Encoder, items: Sequence[Any]) -> RedundancyReport:
    """Measure how alike the compression tokens are over some items (a few dozen are enough).

    Raises RecipeError where there are fewer than two compression tokens, ContentError where there are no
    items.
    """
    if encoder.recipe.tokens < 2:
        raise RecipeError(
            f"recipe {encoder.recipe.name!r} has tokens={encoder.recipe.tokens}; redundancy compares at least 2 compression tokens"
        )
    if not len(items):
        raise ContentError("no items to measure redundancy on; pass at least one")
    stack = np.stack(states(encoder, items)).astype(np.float64)
    centred = stack - stack.mean((0, 1))
    return RedundancyReport(
        tokens=stack.shape[1],
        items=len(stack),
        cosine=_cosine(stack),
        cosine_centred=_cosine(centred),
        rank=float(np.mean([effective_rank(item) for item in stack])),
        rank_centred=float(np.mean([effective_rank(item) for item in centred])),
    )


def effective_rank(matrix: np.ndarray) -> float:
    """How many directions a matrix [n, dim] uses: e to the entropy of its singular values as shares of their sum.

    From 1 to the smaller side; 0 for a matrix of zeros.
    """
    values = np.linalg.svd(matrix, compute_uv=False)
    values = values[values > 0]
    shares = values / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())) if len(values) else 0.0


def _cosine(stack: np.ndarray) -> np.ndarray:
    unit = stack / np.maximum(np.linalg.norm(stack, axis=-1, keepdims=True), 1e-12)
    mean: np.ndarray = (unit @ unit.swapaxes(1, 2)).mean(0)
    return mean


def _off_diagonal(square: np.ndarray) -> float:
    n = len(square)
    return float((square.sum() - np.trace(square)) / (n * (n - 1)))
