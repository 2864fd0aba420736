"""The peer: the same weights as a multimodal SentenceTransformer, newest version, with its own stock modules.

A folder that `Encoder.save` wrote is loaded by sentence-transformers' Transformer module (transformers' Qwen2_5_VLModel with SDPA), then
Pooling("lasttoken") and Normalize: with one compression token its last token is the vector. The item's layout is a chat template. Two
things differ from its defaults. Its processor is built from transformers' PIL image processor, because the default one needs torchvision
and gives other pixels; and pictures are handed over as PIL images decoded from the same bytes, within the time that is measured.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image as PILImage
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoTokenizer, ProcessorMixin, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.recipe import Recipe

TEMPLATE = (
    "{% for turn in messages %}{% for part in turn['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{% if not loop.first %}{{ '\n' }}{% endif %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


class Processor(Qwen2_5_VLProcessor):  # type: ignore[misc]
    """Qwen's processor without videos, whose part needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Peer:
    """sentence-transformers over a folder that comatch saved, for a recipe with one compression token."""

    def __init__(self, folder: Path, recipe: Recipe, device: str = "cpu", dtype: str = "float32", attention: str = "sdpa") -> None:
        assert recipe.tokens == 1, "its pooling knows no mean of some tokens, only the last"
        template = TEMPLATE + recipe.token_name.format(0)
        processor = Processor(Qwen2VLImageProcessorPil.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), template)
        given = SimpleNamespace(from_pretrained=lambda *_, **__: processor)
        with mock.patch("sentence_transformers.base.modules.transformer.AutoProcessor", given):
            first = Transformer(str(folder), model_kwargs={"dtype": dtype, "attn_implementation": attention})
        pooling = Pooling(first.get_embedding_dimension(), "lasttoken")
        self.model = SentenceTransformer(modules=[first, pooling, Normalize()], device=device)

    def encode(self, items: Sequence[Mapping[str, Any]], size: int = 32) -> np.ndarray:
        """Unit vectors; `size` is the batch size, whose default is sentence-transformers' own."""
        vectors: np.ndarray = self.model.encode([_message(item) for item in items], batch_size=size, show_progress_bar=False)
        return vectors


def _message(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if "image" in item:
        parts.append({"type": "image", "image": PILImage.open(io.BytesIO(item["image"])).convert("RGB")})
    if "text" in item:
        parts.append({"type": "text", "text": item["text"]})
    return [{"role": "user", "content": parts}]
