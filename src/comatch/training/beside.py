"""What a stage trains or asks besides its model: a temperature, a patch decoder, a teacher. All of it ends with the stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from comatch.backbones.base import Backbone
from comatch.backbones.decoder import PatchDecoder
from comatch.config import OptimConfig, StageRun
from comatch.objectives.temperature import Temperature
from comatch.recipe import Stage
from comatch.training.teacher import Teacher


@dataclass
class Beside:
    """The parts, None where a stage has no use for them.

    They are not wrapped for several processes: the temperature's gradient is computed alike by all, the decoder's is averaged here.
    """

    temperature: Temperature | None = None
    decoder: PatchDecoder | None = None
    teacher: Teacher | None = None

    @classmethod
    def of(cls, backbone: Backbone, stage: Stage, run: StageRun, whole: bool) -> Beside:
        """The parts of a stage, of a backbone of which nothing was opened yet. whole: it will train without an adapter."""
        return cls(
            Temperature(run.loss) if "contrastive" in stage.objectives else None,
            PatchDecoder.of(backbone, stage.decoder_layers) if "masked_patch" in stage.objectives else None,
            Teacher.of(backbone, whole) if "distillation" in stage.objectives else None,
        )

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """What belongs into a checkpoint."""
        there: dict[str, nn.Module | None] = {"temperature": self.temperature, "decoder": self.decoder}
        return {name: module for name, module in there.items() if module is not None}

    def join(self, device: torch.device, optimizer: Any, optim: OptimConfig) -> Beside:
        """Move to the device, and give the optimiser what trains; to be called on the prepared one, before its schedule is made."""
        for module in self.modules.values():
            module.to(device)
        if self.teacher:
            self.teacher.backbone.to(device)
        if self.temperature:
            self.temperature.join(optimizer, optim)
        if self.decoder:
            optimizer.add_param_group({"params": list(self.decoder.parameters()), "lr": optim.lr, "weight_decay": optim.weight_decay})
        return self

    def average(self, accelerator: Accelerator) -> None:
        """Let the decoder's gradient be that of all processes; one without pictures has none of its own."""
        if self.decoder is None:
            return
        for parameter in self.decoder.parameters():
            mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = accelerator.reduce(mine, "mean")

    def clip(self, norm: float) -> None:
        """Clip the decoder's gradient by itself: sharded and whole weights have no norm in common."""
        if self.decoder is not None:
            nn.utils.clip_grad_norm_(self.decoder.parameters(), norm)
