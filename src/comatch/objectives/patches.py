"""Masked-patch reconstruction: the pixels of hidden visual tokens, by mean squared error (MoCa, arXiv 2506.23115).

One visual token stands for a group of merge x merge patches, and its state predicts all of them.
"""

from __future__ import annotations

import torch

from comatch.devices import moved

_EPS = 1e-6


def masked_patch(
    predicted: torch.Tensor, pixels: torch.Tensor, owner: torch.Tensor, size: int, normalised: bool = False
) -> torch.Tensor:
    """Squared error of each example, averaged over the values of its hidden patches.

    predicted: [hidden tokens, patches of a token * values of a patch]. pixels: [hidden patches, values], as the processor normalises them,
    patches of a token one after the other. owner: [hidden tokens] in host memory, the example of each. normalised: every patch is first
    brought to mean 0 and variance 1 (MAE, arXiv 2111.06377). Returns [size] in float32, 0 where nothing is hidden.
    """
    pixels = pixels.float()
    if normalised:
        spread, mean = torch.var_mean(pixels, dim=1, keepdim=True, unbiased=False)
        pixels = (pixels - mean) / (spread + _EPS).sqrt()
    errors = (predicted.float() - pixels.reshape(predicted.shape)).square().mean(1)
    count = torch.bincount(owner, minlength=size).clamp(min=1)
    return errors.new_zeros(size).index_add(0, moved(owner, errors.device), errors) / moved(count, errors.device)
