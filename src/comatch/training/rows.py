"""One step of the objectives on rows with labels, hidden patches or compression tokens: all but the contrastive one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from comatch.backbones.base import Backbone
from comatch.core.batch import IGNORE, PADDING, ROLE_ID, Batch, Example
from comatch.devices import moved
from comatch.errors import ConfigError, TrainingError
from comatch.objectives.distillation import distillation
from comatch.objectives.orthogonality import orthogonality
from comatch.objectives.patches import masked_patch
from comatch.objectives.tokens import next_token
from comatch.recipe import Stage
from comatch.training.beside import Beside
from comatch.training.passes import fill, no_sync, open_methods, plan_passes, run_backward


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    loss, accuracy (next tokens predicted right, or positives that rank first) are of all ranks; examples, tokens of this one.
    filled, slots: places that held a token, and all places, in one run through this rank's passes. repeated: share of all ranks' items that
    equal another of their rank and were not encoded again. temperature: of a contrastive loss.
    parts: the loss of each objective, without its weight, where rows have labels.
    """

    loss: float
    accuracy: float
    examples: int
    tokens: int
    filled: int = 0
    slots: int = 0
    repeated: float = 0.0
    temperature: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)


def token_step(
    accelerator: Accelerator,
    model: nn.Module,
    examples: Sequence[Example],
    stage: Stage,
    tokens: int,
    patches: int | None = None,
    beside: Beside | None = None,
) -> StepResult:
    """Forward and backward of a stage's objectives on rows with labels or hidden patches; gradients are those of the global means.

    examples: this rank's. Each objective is a mean over the examples of all ranks that have something for it: a picture without text counts
    for masked patches only. beside: the decoder or teacher that the stage needs. Raises TrainingError on every rank where a loss is not
    finite; by then there are gradients, and no optimizer has seen them.
    """
    backbone, beside = accelerator.unwrap_model(model), beside or Beside()
    planned = plan_passes(accelerator, backbone, examples, tokens, patches)
    names = [name for name in stage.objectives if name != "contrastive"]
    there = torch.tensor([[_concerns(name, e, stage) for name in names] for e in examples])
    counts = accelerator.reduce(moved(there.sum(0), accelerator.device), "sum").clamp(min=1).tolist()
    sums = torch.zeros(len(names) + 2, device=accelerator.device)
    for i, part in reversed(list(enumerate(planned))):
        real = bool(part.members)
        with no_sync(accelerator, model), accelerator.autocast():
            losses, hits = row_losses(accelerator, model, part.batch, stage, beside)
        scale = [accelerator.num_processes * stage.objectives[name] / count * real for name, count in zip(names, counts, strict=True)]
        weighed = sum((loss * factor for loss, factor in zip(losses, scale, strict=True)), losses.new_zeros(()))
        run_backward(accelerator, model, weighed, last=i == 0)
        if real:
            sums += torch.cat([losses.detach(), hits])
    beside.average(accelerator)
    sums = accelerator.reduce(sums, "sum")
    # Once a step and not once a pass, since who looks at a loss waits for the device; and on all ranks, so that none waits for another.
    check_finite(sums, "loss")
    *totals, right, supervised = sums.tolist()
    parts = {name: total / count for name, total, count in zip(names, totals, counts, strict=True)}
    loss = sum(stage.objectives[name] * part for name, part in parts.items())
    return StepResult(loss, right / max(supervised, 1), len(examples), sum(map(len, examples)), *fill(planned), parts=parts)


def row_losses(
    accelerator: Accelerator, model: nn.Module, batch: Batch, stage: Stage, beside: Beside
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass: the sum over its examples of each objective but the contrastive one [objectives], and [2] = labels hit, labels."""
    backbone: Backbone = accelerator.unwrap_model(model)
    vision = taught = None
    if beside.teacher:
        open_methods(backbone)
        vision = None if backbone.vision_trains else backbone.see(batch)
        taught = beside.teacher(batch, vision)
    tokens = batch.roles == ROLE_ID["compression"]
    read = (batch.labels >= 0) | tokens if "orthogonality" in stage.objectives else batch.labels >= 0
    # The decoder's layers look at all states, the other objectives at these.
    hidden = model(batch, stage.visibility, vision, None if beside.decoder else read.numpy())
    losses, hits = list[torch.Tensor](), torch.zeros(2, device=hidden.device)
    rows = batch.example, batch.size
    for name in stage.objectives:
        own = batch.labels.masked_fill(~_own(name, stage, batch.roles), IGNORE)
        if name in ("next_token", "masked_token"):
            each, found = next_token(hidden, own, *rows, backbone.head)
            hits = hits + found
        elif name == "distillation" and beside.teacher and taught is not None:
            heads = backbone.head, beside.teacher.backbone.head
            each, found = distillation(hidden, taught, own, *rows, heads, stage.kl_temperature)
            hits = hits + found
        elif name == "orthogonality":
            each = orthogonality(hidden, tokens, *rows)
        elif name == "masked_patch" and beside.decoder:
            predicted = beside.decoder(hidden, batch, stage.visibility, backbone)
            owner = batch.example.flatten()[batch.target_places]
            each = masked_patch(predicted, backbone.pixels(batch.targets), owner, batch.size, stage.patch_target == "normalised")
        elif name == "contrastive":
            continue
        else:
            raise ConfigError(f"stage {stage.name!r} has {name}, but the step got no part for it; pass beside=Beside.of(...)")
        losses.append(each.sum())
    return torch.stack(losses), hits


def _own(name: str, stage: Stage, roles: Any) -> Any:
    """Which places carry labels of an objective: bool like `roles`, a tensor or an array.

    All, where one kind of token is predicted. Where hidden ones are beside a dialogue, the place tells: what stands in the dialogue
    says its next token, every other place a hidden one (`comatch.corruption` refuses stages where both want one place).
    """
    if not (stage.tells == "dialogue" and "masked_token" in stage.objectives):
        return roles >= PADDING
    said = roles == ROLE_ID["dialogue"]
    return ~said if name == "masked_token" else said


def _concerns(name: str, example: Example, stage: Stage) -> bool:
    """Whether an example has something for an objective."""
    if name == "masked_patch":
        return len(example.target_places) > 0
    if name == "orthogonality":
        return int((example.roles == ROLE_ID["compression"]).sum()) > 1
    return bool(((example.labels != IGNORE) & _own(name, stage, example.roles)).any())


def check_finite(value: torch.Tensor, what: str) -> None:
    """Raise TrainingError before a non-finite number can reach the weights (row 22)."""
    if not bool(torch.isfinite(value).all()):
        raise TrainingError(
            f"{what} became NaN or infinite; nothing was updated. Lower optim.lr, set precision=fp32, or look at this batch's data"
        )
