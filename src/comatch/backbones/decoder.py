"""From states to hidden pixels: a few decoder layers and one matrix, trained with a stage and thrown away after it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from comatch.backbones.base import Backbone
from comatch.core.batch import Batch
from comatch.devices import moved
from comatch.recipe import Visibility


class PatchDecoder(nn.Module):
    """Layers that begin as copies of the language model's middle one, and a matrix to the pixels of one visual token.

    It runs over whole rows, under the stage's visibility, so that a hidden token may look at those that are not (MoCa).
    """

    def __init__(self, layers: Sequence[nn.Module], dim: int, values: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.out = nn.Linear(dim, values)
        # It begins with the guess of the processor's mean colour; random weights on states of any size would begin far worse.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def of(cls, backbone: Backbone, layers: int) -> PatchDecoder:
        """A decoder for a backbone that has no adapter yet; in float32, all of it trains."""
        stack = backbone.text.layers
        copies = [deepcopy(stack[len(stack) // 2]) for _ in range(layers)]
        for copy in copies:
            copy.gradient_checkpointing = False
        return cls(copies, backbone.dim, _values(backbone)).float().requires_grad_(True).to(backbone.device)

    def forward(self, hidden: torch.Tensor, batch: Batch, visibility: Visibility, backbone: Backbone) -> torch.Tensor:
        """Pixels of the hidden visual tokens: [hidden tokens, merge * merge * 3 * patch * patch]. hidden: [rows, seq, dim]."""
        if len(self.layers):
            rotary, visible = backbone.text.rotary_emb(hidden, moved(batch.positions, hidden.device)), backbone.visible(batch, visibility)
            for layer in self.layers:
                hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, use_cache=False, **visible)
        predicted: torch.Tensor = self.out(hidden.flatten(0, 1)[moved(batch.target_places, hidden.device)])
        return predicted


def decoder_size(backbone: Backbone, layers: int) -> int:
    """Parameters of a patch decoder for a backbone, with or without an adapter."""
    stack = backbone.text.layers
    layer = sum(p.numel() for name, p in stack[len(stack) // 2].named_parameters() if "lora_" not in name)
    size: int = layers * layer + (backbone.dim + 1) * _values(backbone)
    return size


def _values(backbone: Backbone) -> int:
    """Numbers of one visual token's pixels. The frames of a still are equal, so one is predicted (backbones/stills.py)."""
    return int(backbone.processor.merge_size**2 * 3 * backbone.processor.patch_size**2)
