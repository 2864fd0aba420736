"""The last layers do not compute what nobody reads (specs/performance.md section 3.3).

Of the last layer only the states that are pooled or supervised are read; of the layer before, those and the states whose keys and values
these look at; and so on. Elsewhere output projection and MLP, nine tenths of a layer's work, are left out by hooks on the two modules,
for the time of one forward pass. No model code is changed, and the states that are read are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from comatch.core.batch import ROLE_ID, Batch
from comatch.devices import moved
from comatch.recipe import Visibility


@contextmanager
def leaving_out(
    layers: Sequence[Any], batch: Batch, visibility: Visibility, read: np.ndarray | None, device: torch.device
) -> Iterator[None]:
    """Inside the block the last `layers` compute what `read` needs; all other states of the result are unusable.

    read: bool [rows, seq], the places whose final states are read; None is all. device: where the layers are. A layer that is compiled, or
    computed again in the backward pass, is left as it is: the first would be compiled for every batch, the second would find no hook the
    second time.
    """
    with ExitStack() as hooks:
        for layer, need in zip(reversed(layers), needed(batch, visibility, read), strict=False):
            again = getattr(layer, "gradient_checkpointing", False) and torch.is_grad_enabled()
            if not again and getattr(layer, "_compiled_call_impl", None) is None:
                place = moved(torch.from_numpy(np.flatnonzero(need)), device)
                for module in (layer.self_attn.o_proj, layer.mlp):
                    for hook in _only(module, place):
                        hooks.callback(hook.remove)
        yield


def needed(batch: Batch, visibility: Visibility, read: np.ndarray | None) -> Iterator[np.ndarray]:
    """The places [rows, seq] whose states are needed after the last layer, after the one before it, and so on while some are not."""
    if read is None:
        return
    roles, valid = batch.roles.numpy(), (batch.example >= 0).numpy()
    need = read & valid
    while not np.array_equal(need, valid):
        yield need
        readers = [role for role in visibility.roles if (roles[need] == ROLE_ID[role]).any()]
        seen = [ROLE_ID[role] for role in visibility.roles if any(visibility.sees(reader, role) for reader in readers)]
        need = need | (np.isin(roles, seen) & valid)


def _only(module: nn.Module, place: torch.Tensor) -> tuple[RemovableHandle, RemovableHandle]:
    """Let a module compute some places of [rows, seq, dim] and give zeros elsewhere."""
    mine = threading.get_ident()  # another thread's pass through the same model is none of ours
    shape = torch.Size()

    def gather(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        nonlocal shape
        if threading.get_ident() != mine:
            return None
        shape = args[0].shape[:2]
        return (args[0].flatten(0, 1)[place].unsqueeze(0), *args[1:])

    def scatter(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor | None:
        if threading.get_ident() != mine:
            return None
        return out.new_zeros(shape.numel(), out.shape[-1]).index_copy(0, place, out.squeeze(0)).view(*shape, -1)

    return module.register_forward_pre_hook(gather), module.register_forward_hook(scatter)
