"""The one counter of floating-point work: logs, dry runs, benchmarks and pages all count with it. A multiply and an add are two.

Only useful work counts (specs/performance.md section 13): pairs of places that may see each other, heads on supervised places, no
padding, no pass that is run a second time. Elementwise work and norms are left out, as in torch's own counter.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from comatch.core.batch import PADDING, Example
from comatch.recipe import ROLES, Visibility

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Work:
    """Forward FLOP by part. text: the language model's matrix products; attention: of its queries, keys and values; adapter: LoRA's."""

    text: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    vision: float = 0.0
    adapter: float = 0.0

    @property
    def forward(self) -> float:
        """All of it."""
        return self.text + self.attention + self.head + self.vision + self.adapter

    def __add__(self, other: Work) -> Work:
        """The work of both."""
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Trains:
    """What trains, which decides what the backward pass costs. rank, targets: of LoRA or DoRA, where `full` is false."""

    full: bool = False
    vision: bool = False
    rank: int = 0
    targets: tuple[str, ...] = ()

    def flops(self, work: Work, again: float = 0.0) -> float:
        """Forward and backward, and `again` further forward passes of the language model, which are no useful work.

        A frozen matrix passes a gradient through and gets none: 2 forwards instead of 3. A frozen vision tower runs forward only.
        """
        matrices = (work.text + work.head) * (3 if self.full else 2)
        vision = work.vision * (3 if self.vision else 1)
        repeated = (work.text + work.attention + work.adapter) * again
        return matrices + (work.attention + work.adapter) * 3 + vision + repeated


@dataclass(frozen=True)
class Shape:
    """The numbers of a Qwen-VL config that decide its work. window: patches of a full window of the vision tower, per side; 0 without."""

    layers: int
    width: int
    mlp: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    vision_layers: int
    vision_width: int
    vision_mlp: int
    merge: int
    gated: bool
    pixels: int
    mergers: int
    full_layers: int
    window: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a stock Qwen2-VL, Qwen2.5-VL or Qwen3-VL config."""
        t, v = config.text_config, config.vision_config
        # Qwen2-VL calls the tower's width embed_dim and gives its MLP as a ratio.
        width = getattr(v, "embed_dim", None) or v.hidden_size
        mlp = getattr(v, "intermediate_size", None) or int(width * v.mlp_ratio)
        windows = hasattr(v, "fullatt_block_indexes")
        return cls(
            layers=t.num_hidden_layers,
            width=t.hidden_size,
            mlp=t.intermediate_size,
            heads=t.num_attention_heads,
            key_heads=t.num_key_value_heads,
            head_dim=getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads,
            vocabulary=t.vocab_size,
            vision_layers=v.depth,
            vision_width=width,
            vision_mlp=mlp,
            merge=v.spatial_merge_size,
            gated=windows,
            pixels=3 * v.patch_size**2,  # of one frame: those of a still are equal (backbones/stills.py)
            mergers=1 + len(getattr(v, "deepstack_visual_indexes", None) or ()),
            full_layers=sum(i < v.depth for i in v.fullatt_block_indexes) if windows else v.depth,
            window=v.window_size // v.spatial_merge_size // v.patch_size * v.spatial_merge_size if windows else 0,
        )

    @property
    def text_token(self) -> int:
        """Matrix products of one token in the language model, without attention and head."""
        return 2 * self.layers * sum(rows * columns for rows, columns in self._matrices.values())

    @property
    def head(self) -> int:
        """The language-model head on one place."""
        return 2 * self.width * self.vocabulary

    @property
    def pair(self) -> int:
        """Attention of one place to one place, in all layers."""
        return 4 * self.layers * self.heads * self.head_dim

    @property
    def patch(self) -> int:
        """Matrix products of one image patch in the vision tower, mergers included, without attention."""
        w = self.vision_width
        block = 4 * w**2 + (3 if self.gated else 2) * w * self.vision_mlp
        merged = w * self.merge**2
        # A merger is two matrices on `merge` x `merge` patches at once.
        merger = merged * (merged + self.width) // self.merge**2
        return 2 * (self.pixels * w + self.vision_layers * block + self.mergers * merger)

    def adapter_token(self, rank: int, targets: Iterable[str]) -> int:
        """LoRA of that rank on one token, forward."""
        return 2 * self.layers * rank * sum(sum(self._matrices[name]) for name in targets)

    def picture(self, grid: Grid) -> float:
        """The vision tower on one picture. grid: (time, height, width) in patches."""
        t, h, w = grid
        everything = t * (h * w) ** 2
        rows, columns = (sum(n * n for n in _cut(side, self.window)) for side in (h, w))
        pairs = everything * self.full_layers + t * rows * columns * (self.vision_layers - self.full_layers)
        return float(t * h * w * self.patch + 4 * self.vision_width * pairs)

    def work(self, tokens: int, pairs: float, supervised: int = 0, grids: Iterable[Grid] = (), trains: Trains | None = None) -> Work:
        """Forward work of an example. pairs: of places that see each other; a causal row of n tokens has n * (n + 1) / 2."""
        lora = trains is not None and trains.rank and not trains.full
        return Work(
            text=float(tokens * self.text_token),
            attention=float(pairs * self.pair),
            head=float(supervised * self.head),
            vision=sum((self.picture(grid) for grid in grids), 0.0),
            adapter=float(tokens * self.adapter_token(trains.rank, trains.targets)) if trains and lora else 0.0,
        )

    @property
    def _matrices(self) -> dict[str, tuple[int, int]]:
        """In and out of the matrices of one layer of the language model."""
        asked, kept = self.heads * self.head_dim, self.key_heads * self.head_dim
        return {
            "q_proj": (self.width, asked),
            "k_proj": (self.width, kept),
            "v_proj": (self.width, kept),
            "o_proj": (asked, self.width),
            "gate_proj": (self.width, self.mlp),
            "up_proj": (self.width, self.mlp),
            "down_proj": (self.mlp, self.width),
        }


def work_of(shape: Shape, examples: Iterable[Example], visibility: Visibility, trains: Trains | None = None) -> Work:
    """Forward work of examples under a table of visibility."""
    total = Work()
    for e in examples:
        total += shape.work(len(e), seen_pairs(e.roles, visibility), e.supervised, e.grids, trains)
    return total


def seen_pairs(roles: np.ndarray, visibility: Visibility) -> int:
    """How many (query, key) pairs a row's table allows. roles: [n] places in ROLES, in row order; padding is left out."""
    real = roles[roles != PADDING]
    starts = np.flatnonzero(np.diff(real, prepend=PADDING))
    lengths = np.diff(starts, append=len(real)).tolist()
    runs = [(ROLES[real[start]], n) for start, n in zip(starts, lengths, strict=True)]
    pairs = 0
    for i, (query, n) in enumerate(runs):
        for j, (key, m) in enumerate(runs):
            letter = visibility.letter(query, key)
            if letter == "f" or (letter == "c" and j < i):
                pairs += n * m
            elif letter == "c" and j == i:
                pairs += n * (n + 1) // 2
    return pairs


def matmul_rate(device: torch.device | str, dtype: torch.dtype, size: int = 8192, seconds: float = 1.0) -> float:
    """The device's measured rate of square matrix products, in FLOP/s: the ceiling to hold other rates against. size: rows and columns."""
    device = torch.device(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    _wait(device)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            a @ b
        _wait(device)
        done += 10
    return done * 2 * size**3 / (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cut(side: int, window: int) -> list[int]:
    """A side in windows, the last of which may be smaller; one window where there is none."""
    step = window or side
    return [min(step, side - start) for start in range(0, side, step)]
