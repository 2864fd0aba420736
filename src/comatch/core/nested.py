"""Nested dropout of the last compression tokens, so that any first few of them work alone (Rippel et al., arXiv 1402.0915).

Tokens that are dropped do not stand in the row at all: nothing can look at them, and what follows stands right behind those that are
left, in training as later where only so many are asked for.
"""

from __future__ import annotations

import numpy as np


def kept(tokens: int, nested: str, seed: int) -> int:
    """How many of so many compression tokens a row keeps: the first ones, 1 to `tokens`. nested: one of `comatch.recipe.NESTED`."""
    if nested == "none":
        return tokens
    # A key of its own, so that corruptions drawn by the same seed stay what they are without nested dropout.
    rng = np.random.default_rng([seed, tokens])
    if nested == "any":
        return int(rng.integers(1, tokens + 1))
    ladder = [2**i for i in range(tokens.bit_length()) if 2**i < tokens] + [tokens]
    return int(rng.choice(ladder))
