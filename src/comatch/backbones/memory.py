"""How much a forward pass keeps for its backward pass, and which layers give theirs up because it does not fit.

A layer that is recomputed keeps its input only and runs forward once more in the backward pass: the result is the same, a pass of the
whole model costs half as much again. So only as many layers do it as memory asks for (specs/performance.md section 8), the first ones,
because theirs is the last turn in the backward pass, when the others have let go of what they kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import psutil
import torch
from torch.utils.checkpoint import checkpoint

from comatch.backbones.base import Backbone
from comatch.core.flops import Shape, Trains
from comatch.objectives.tokens import CHUNK

RESERVE = 0.1
"""Share of the free memory that is left for kernels' own space and for the gaps between tensors."""


@dataclass(frozen=True)
class Kept:
    """Bytes that one layer keeps of one token, for each unit of its width, of its keys' width, of its MLP and of its adapters' rank."""

    width: int
    key: int
    mlp: int
    rank: int = 0


# Counted by watching what autograd saves, on a CPU (tests/test_adapters.py counts again); keys: bf16?, kind, is the MLP adapted too?
# On a GPU attention keeps its part in bf16 and these are upper bounds. benchmarks/gpu/memory.py fits what one GPU really takes.
COUNTED: Mapping[tuple[bool, str, bool], Kept] = {
    (True, "lora", False): Kept(24, 8, 6, 2),
    (True, "dora", False): Kept(28, 12, 6, 2),
    (True, "lora", True): Kept(28, 8, 8, 2),
    (True, "dora", True): Kept(34, 12, 12, 2),
    (True, "full", False): Kept(36, 8, 8),
    (False, "lora", False): Kept(24, 8, 12, 4),
    (False, "dora", False): Kept(32, 16, 12, 4),
    (False, "lora", True): Kept(28, 8, 16, 4),
    (False, "dora", True): Kept(40, 16, 24, 4),
    (False, "full", False): Kept(36, 8, 16),
}


@dataclass(frozen=True)
class Demand:
    """Bytes of a pass for each token: what one layer keeps, and its input, which is all that a recomputed layer keeps."""

    layer: float
    input: float

    @classmethod
    def of(cls, shape: Shape, trains: Trains, kind: str, low: bool, counted: Mapping[tuple[bool, str, bool], Kept] = COUNTED) -> Demand:
        """kind: "lora", "dora" or "full". low: bf16. counted: other constants, where someone has measured them."""
        wide_mlp = any(name in ("gate_proj", "up_proj", "down_proj") for name in trains.targets)
        kept = counted[low, kind, kind != "full" and wide_mlp]
        sizes = shape.width * kept.width + shape.key_heads * shape.head_dim * kept.key + shape.mlp * kept.mlp
        small = 8 + 4 * shape.heads + trains.rank * len(trains.targets) * kept.rank  # norms' and softmaxes' denominators; adapters
        return cls(sizes + small, shape.width * (2 if low else 4))

    def bytes(self, shape: Shape, tokens: float, recomputed: int = 0) -> float:
        """What a pass of so many tokens keeps in the language model; of layers that are recomputed one at a time is whole."""
        whole = max(shape.layers - recomputed, 1)
        return tokens * (whole * self.layer + recomputed * self.input)

    def layers(self, shape: Shape, tokens: float, free: float) -> int:
        """How many layers must be recomputed so that a pass fits into `free` bytes; all of them where it never does."""
        return next((n for n in range(shape.layers) if self.bytes(shape, tokens, n) <= free), shape.layers)


def head_bytes(shape: Shape, low: bool) -> float:
    """What the head's largest call takes: logits, their logarithms in float32, and the gradients of both."""
    return float(CHUNK * shape.vocabulary * (14 if low else 16))


def vision_bytes(shape: Shape, patches: float, low: bool) -> float:
    """What a vision tower that trains keeps of a pass; its blocks are taken for language-model layers of their own width."""
    kept = COUNTED[low, "full", False]
    return patches * shape.vision_layers * (shape.vision_width * (kept.width + kept.key) + shape.vision_mlp * kept.mlp)


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take on a device."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    return float(psutil.virtual_memory().available)


def recompute(backbone: Backbone, layers: int) -> None:
    """Let the language model's first `layers` layers keep their input only, and all others everything."""
    for i, layer in enumerate(backbone.text.layers):
        layer.gradient_checkpointing = i < layers
        # Dropout inside a recomputed layer is drawn again from the state it had: torch keeps it.
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
