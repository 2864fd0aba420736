"""torch.compile for each decoder layer: norms, rotary embeddings, SwiGLU and adapters fused, one graph for all layers and lengths.

Attention stays outside the graphs. It is one kernel already, and what it is given (segments of another number and length in every
batch) would be compiled anew each time. So each layer is two graphs with one break between, whatever the batch. Lengths are dynamic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from comatch.backbones.attention import TEXT, text
from comatch.backbones.base import Backbone
from comatch.backbones.dora import refresh_norms


@contextmanager
def compiled_layers(backbone: Backbone, on: bool = True, backend: str = "inductor") -> Iterator[None]:
    """Inside the block the language model's layers are compiled, at their first use; after it they are what they were.

    on: false does nothing. The first passes take half a minute to two minutes, so this is for training and not for a few vectors.
    Parameters keep their names.
    """
    if not on:
        yield
        return
    apart: Any = torch.compiler.disable
    AttentionInterface.register(TEXT, apart(text))
    layers = list(backbone.text.layers)
    # In a compiled layer DoRA's norms are inputs; whether they are still true is looked up before the first layer.
    hook = backbone.text.register_forward_pre_hook(_refresh)
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        hook.remove()
        AttentionInterface.register(TEXT, text)


def _refresh(module: nn.Module, *_: Any) -> None:
    refresh_norms(module)
