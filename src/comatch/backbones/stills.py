"""A still picture is two equal frames to Qwen's vision tower, so one frame and the sum of the kernel's two halves give the same.

The stock tower multiplies both frames, by a three-dimensional convolution that has no quick kernel on a CPU, and in some releases of
torch none on a GPU. Here hooks hand it one patch to work on, and put one matrix product in the place of its result, for the time of one
pass through the tower. Weights, their names and their gradients are the stock ones; only the order of a sum is another.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn


@contextmanager
def still(projection: nn.Conv3d) -> Iterator[None]:
    """Inside the block a patch convolution takes the frames of each patch [patches, 3, frames, side, side] for equal."""
    mine = threading.get_ident()  # another thread's pass through the same tower is none of ours
    given = torch.empty(0)

    def first(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        nonlocal given
        if threading.get_ident() != mine:
            return None
        given = args[0]
        return (given[:1],)

    def product(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        if threading.get_ident() != mine:
            return None
        # In float32 or better: the sum of the halves has more digits than bfloat16 keeps.
        exact = torch.promote_types(out.dtype, torch.float32)
        weight = projection.weight.to(exact).sum(2).flatten(1)
        bias = None if projection.bias is None else projection.bias.to(exact)
        return F.linear(given[:, :, 0].flatten(1).to(exact), weight, bias).to(out.dtype)[:, :, None, None, None]

    hooks = projection.register_forward_pre_hook(first), projection.register_forward_hook(product)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
