"""The model as it was when a stage began, which sees the picture and none of the compression tokens (specs/coma.md 3.2)."""

from __future__ import annotations

from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace

import torch

from comatch.backbones import adapters
from comatch.backbones.base import Backbone, Vision
from comatch.core.batch import ROLE_ID, Batch
from comatch.recipe import Visibility


@dataclass(frozen=True)
class Teacher:
    """backbone: the one that learns, whose adapter is then turned off for the teacher's pass, or a frozen copy of one that learns whole."""

    backbone: Backbone

    @classmethod
    def of(cls, backbone: Backbone, whole: bool) -> Teacher:
        """A teacher made before anything is opened. whole: all weights will train, so they are copied; with an adapter nothing is."""
        if not whole:
            return cls(backbone)
        shared = {id(part): part for part in (backbone.store, backbone.tokenizer, backbone.processor)}
        return cls(deepcopy(backbone, shared).requires_grad_(False).eval())

    @torch.no_grad()
    def __call__(self, batch: Batch, vision: Vision | None) -> torch.Tensor:
        """States [rows, seq, dim] of the same rows, as if the compression tokens were not there: plain causal attention to context and
        dialogue, and positions that close the gap they leave."""
        gap = torch.bincount(batch.example[batch.roles == ROLE_ID["compression"]], minlength=batch.size)
        after = (batch.roles == ROLE_ID["dialogue"]) * gap[batch.example.clamp(min=0)]
        backbone = self.backbone
        with backbone.hf.disable_adapter() if adapters.adapted(backbone) else nullcontext():
            hidden: torch.Tensor = backbone(replace(batch, positions=batch.positions - after), OPEN, vision, (batch.labels >= 0).numpy())
        return hidden


OPEN = Visibility(("context", "compression", "target", "dialogue"), ("c...", ".c..", "..c.", "c..c"))
