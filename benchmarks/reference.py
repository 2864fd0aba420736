"""The reference-style path that the benchmarks measure against (specs/performance.md): what CoMa's and CoCoA's scripts do.

The stock Hugging Face model through the class with the head, examples in chunks of 8 as they come, padded to the longest, the visibility
as a dense 4-D mask through SDPA, PEFT's LoRA or DoRA, logits at every place, pictures through the stock processor in the main process.
Token ids and positions are given to it ready-made, which is more than it would have.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage

from comatch.core.batch import Batch, Example
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.core.pooling import pool
from comatch.recipe import Stage

CHUNK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Item:
    """An example and the picture files it came from; without files the reference normalises the example's own patches."""

    example: Example
    files: tuple[bytes, ...] = ()


class Reference:
    """The stock model with PEFT's adapter, in steps that give the same gradients as ours."""

    def __init__(self, model: Any, processor: Any, kind: str, rank: int, alpha: int) -> None:
        model.requires_grad_(False)
        model.model.visual.config._attn_implementation = "sdpa"
        model.model.language_model.config._attn_implementation = "sdpa"
        named = r"model\.language_model\..*\.(" + "|".join(TARGETS) + ")"
        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=0.0, use_dora=kind == "dora", init_lora_weights="gaussian", target_modules=named
        )
        self.model, self.processor = get_peft_model(model, config).train(), processor
        self.device: torch.device = next(model.parameters()).device

    def take(self, weights: dict[str, torch.Tensor]) -> None:
        """Start from the same adapter. weights: by PEFT's names, as `adapter_of` gives them."""
        mine = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        assert mine.keys() == weights.keys(), sorted(mine.keys() ^ weights.keys())[:4]
        with torch.no_grad():
            for name, value in weights.items():
                mine[name].copy_(value)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The adapter's gradients by name, taken away from the model."""
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found

    def token_step(self, items: Sequence[Item], stage: Stage, chunk: int = CHUNK) -> float:
        """Forward and backward of next-token prediction, every example weighing the same. Returns the loss."""
        loss = 0.0
        for part in _chunks(items, chunk):
            batch = collate([item.example for item in part], pack=False)
            labels = batch.labels.to(self.device)
            with self.autocast():
                logits = self.model(**self.inputs(batch, part, stage)).logits.float()
            each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
            counted = (labels >= 0).sum(1)
            mean = (each.view_as(labels).sum(1) / counted).sum() / len(items)
            mean.backward()
            loss += float(mean.detach())
        return loss

    def matching_step(self, pairs: Sequence[tuple[Item, Item]], stage: Stage, temperature: float, chunk: int = CHUNK) -> float:
        """GradCache in chunks of examples (arXiv 2101.06983): vectors, one loss, vectors again. Returns the loss."""
        sides = [_chunks(side, chunk) for side in zip(*pairs, strict=True)]
        with torch.no_grad():
            found = [torch.cat([self.vectors(part, stage) for part in parts]) for parts in sides]
        found = [side.requires_grad_(True) for side in found]
        loss = plain_info_nce(found[0], found[1], temperature)
        loss.backward()
        for parts, vectors in zip(sides, found, strict=True):
            assert vectors.grad is not None
            for part, gradient in zip(parts, vectors.grad.split(chunk), strict=True):
                (self.vectors(part, stage) * gradient).sum().backward()
        return float(loss.detach())

    def vectors(self, items: Sequence[Item], stage: Stage) -> torch.Tensor:
        """Pooled vectors [items, dim] of one padded chunk; logits of all places are computed on the way and dropped, as the scripts do."""
        batch, stock = collate([item.example for item in items], pack=False), self.model.get_base_model()
        with self.autocast():
            hidden = stock.model(**self.inputs(batch, items, stage)).last_hidden_state
            stock.lm_head(hidden)
        return pool(hidden.float(), batch.roles, batch.example, batch.size, stage.pooling or "")

    def inputs(self, batch: Batch, items: Sequence[Item], stage: Stage) -> dict[str, Any]:
        """What the stock model is called with."""
        given: dict[str, Any] = {
            "input_ids": batch.ids.to(self.device),
            "position_ids": batch.positions.to(self.device),
            "attention_mask": dense(batch.roles.to(self.device), batch.example.to(self.device), stage.visibility),
            "use_cache": False,
        }
        if len(batch.grids):
            given |= {"pixel_values": self.pixels(batch, items), "image_grid_thw": batch.grids.to(self.device)}
        return given

    def pixels(self, batch: Batch, items: Sequence[Item]) -> torch.Tensor:
        """Normalised patches, by the stock processor from files, or from the example's own patches."""
        files = [file for item in items for file in item.files]
        if files:
            pictures = [PILImage.open(io.BytesIO(file)).convert("RGB") for file in files]
            made: torch.Tensor = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            return made.to(self.device)
        side, times = self.processor.patch_size, self.processor.temporal_patch_size
        mean, std = (torch.tensor(x, device=self.device).view(3, 1, 1, 1) for x in (self.processor.image_mean, self.processor.image_std))
        pixels = (batch.patches.to(self.device).reshape(-1, 3, 1, side, side).float() / 255 - mean) / std
        return pixels.expand(-1, -1, times, -1, -1).flatten(1)

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 on a GPU, as in training; nothing on a CPU."""
        return torch.autocast("cuda", torch.bfloat16) if self.device.type == "cuda" else nullcontext()


def plain_info_nce(queries: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE of queries [n, dim] against targets [n, dim], in its shortest form."""
    scores = F.normalize(queries, dim=-1) @ F.normalize(targets, dim=-1).T / temperature
    return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


def adapter_of(backbone: Any) -> dict[str, torch.Tensor]:
    """Our adapter's weights by PEFT's names."""
    return {name: p.detach() for name, p in backbone.hf.named_parameters() if p.requires_grad}


def our_gradients(backbone: Any) -> dict[str, torch.Tensor]:
    """Our adapter's gradients by PEFT's names, taken away from the model, with those of the compression rows, which the reference lacks."""
    found = {name: p.grad for name, p in backbone.hf.named_parameters() if p.grad is not None}
    backbone.zero_grad(set_to_none=True)
    return found


def _chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
