"""One counter of floating-point work, from a model's shape alone. A multiply and an add are two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The numbers of a Qwen-VL config that decide its work."""

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

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read a stock Qwen2-VL, Qwen2.5-VL or Qwen3-VL config."""
        t, v = config.text_config, config.vision_config
        # Qwen2-VL calls the tower's width embed_dim and gives its MLP as a ratio.
        width = getattr(v, "embed_dim", None) or v.hidden_size
        mlp = getattr(v, "intermediate_size", None) or int(width * v.mlp_ratio)
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
        )

    @property
    def text_token(self) -> int:
        """Matmul work of one token in the language model, forward, without attention scores and head."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.key_heads)
        return 2 * self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def patch(self) -> int:
        """Matmul work of one image patch in the vision tower, forward, without attention scores; a gated MLP is assumed."""
        return 2 * self.vision_layers * (4 * self.vision_width**2 + 3 * self.vision_width * self.vision_mlp)

    @property
    def head(self) -> int:
        """Work of the language-model head on one place."""
        return 2 * self.width * self.vocabulary


def forward_flops(shape: Shape, tokens: int, patches: int, supervised: int = 0) -> float:
    """Forward work of one example: language model with causal attention, vision tower, head on supervised places only."""
    scores = 2 * shape.layers * shape.heads * shape.head_dim * tokens * tokens
    return float(tokens * shape.text_token + scores + patches * shape.patch + supervised * shape.head)
