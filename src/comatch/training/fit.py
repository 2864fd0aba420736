"""How a stage fits its machine: the work of what trains, and which layers are recomputed so that a pass fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.decoder import decoder_size
from comatch.backbones.memory import RESERVE, Demand, free_memory, head_bytes, recompute, vision_bytes
from comatch.config import AdapterConfig, RunConfig, StageRun
from comatch.core.batch import Example
from comatch.core.flops import Shape, Trains, work_of
from comatch.core.packing import Size
from comatch.devices import moved
from comatch.recipe import Stage
from comatch.training.loader import Sample


def trained_part(adapter: AdapterConfig) -> Trains:
    """What trains, as the counter of work wants to know it."""
    if adapter.kind == "full":
        return Trains(full=True, vision=adapter.train_vision)
    return Trains(rank=adapter.r, targets=tuple(adapter.targets))


def useful_flops(config: RunConfig, backbone: Backbone, stage: Stage, samples: Sequence[Sample]) -> float:
    """Forward and backward work of a step's samples, without padding and without any pass that is run a second time."""
    trains, examples = trained_part(config.adapter), [example for sample in samples for example in sample.everything]
    shape = Shape.of(backbone.stock.config)
    return trains.flops(work_of(shape, examples, stage.visibility, trains)) + beside_flops(shape, stage, examples)


def beside_flops(shape: Shape, stage: Stage, examples: Sequence[Example]) -> float:
    """Work of a stage's patch decoder, forward and backward, and of its teacher, forward only."""
    work = 0.0
    if "masked_patch" in stage.objectives and stage.decoder_layers:
        decoded = work_of(replace(shape, layers=stage.decoder_layers), [e for e in examples if len(e.target_places)], stage.visibility)
        work += 3 * (decoded.text + decoded.attention)
    if "distillation" in stage.objectives:
        taught = work_of(shape, [e for e in examples if e.supervised], stage.visibility)
        work += taught.text + taught.attention + taught.head
    return work


def beside_bytes(backbone: Backbone, stage: Stage, whole: bool) -> dict[str, float]:
    """What a stage's patch decoder takes with its gradient and moments, and its teacher where all weights train and so are copied."""
    held: dict[str, float] = {}
    if "masked_patch" in stage.objectives:
        held["patch decoder"] = 16 * decoder_size(backbone, stage.decoder_layers)
    if "distillation" in stage.objectives and whole:
        held["teacher"] = float(sum(p.numel() * p.element_size() for p in backbone.parameters()))
    return held


def cost_of(backbone: Backbone) -> Callable[[Size], float]:
    """What an example of some size costs, in FLOP of a forward pass; attention, a few percent, is left out."""
    shape = Shape.of(backbone.stock.config)
    return lambda size: float(size.tokens * shape.text_token + size.patches * shape.patch)


def demand(config: RunConfig, shape: Shape) -> Demand:
    """What a pass keeps for each token under a run's adapter and precision."""
    return Demand.of(shape, trained_part(config.adapter), config.adapter.kind, config.precision == "bf16")


def fit_layers(accelerator: Accelerator, config: RunConfig, backbone: Backbone, stage: Stage, run: StageRun) -> int:
    """Let as many layers be recomputed as `config.checkpointing` says, or as do not fit; the same number on all ranks. Returns it."""
    count = told_layers(config, len(backbone.text.layers))
    if count is None:
        needed = moved(torch.tensor([_needed(accelerator, config, backbone, stage, run)]), accelerator.device)
        count = int(accelerator.gather(needed).max())
    recompute(backbone, count)
    return count


def told_layers(config: RunConfig, layers: int) -> int | None:
    """How many of so many layers the config wants recomputed; None where it leaves that to the machine."""
    wanted = config.checkpointing
    if isinstance(wanted, int):
        return min(wanted, layers)
    return {"none": 0, "all": layers}.get(wanted)


def _needed(accelerator: Accelerator, config: RunConfig, backbone: Backbone, stage: Stage, run: StageRun) -> int:
    shape, low, device = Shape.of(backbone.stock.config), config.precision == "bf16", accelerator.device
    sharing = accelerator.num_processes if device.type == "cpu" else 1
    free = free_memory(device) / sharing * (1 - RESERVE)
    # Gradients and AdamW's two moments are made in the first step; they are float32, like all that trains.
    free -= 12 * sum(p.numel() for p in adapters.trainable(backbone).values())
    if stage.speaks:
        free -= head_bytes(shape, low)
    free -= sum(beside_bytes(backbone, stage, config.adapter.kind == "full").values())
    if config.adapter.train_vision:
        free -= vision_bytes(shape, run.patches_per_pass or run.tokens_per_pass * shape.merge**2, low)
    tokens = run.tokens_per_pass * (run.keep_passes if "contrastive" in stage.objectives else 1)
    return demand(config, shape).layers(shape, tokens, free)
