"""One optimiser step of each objective, under a token budget per forward pass.

The contrastive step is exact at any batch size: vectors first, one loss over all of them and all ranks, then each pass again with
its cached gradients (GradCache, arXiv 2101.06983). The graph of the last passes is kept, so those run once; a batch that fits one
pass is an ordinary step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from comatch.backbones.base import Backbone, Vision
from comatch.config import StageRun
from comatch.core.pooling import group_means, pooled
from comatch.devices import moved
from comatch.errors import ConfigError, TrainingError
from comatch.objectives.contrastive import Pairing, info_nce
from comatch.objectives.temperature import Temperature
from comatch.recipe import Stage, check_vectors
from comatch.training.beside import Beside
from comatch.training.loader import Sample
from comatch.training.passes import Pass, fill, no_sync, open_methods, plan_passes, run_backward
from comatch.training.rows import StepResult as StepResult
from comatch.training.rows import check_finite as check_finite
from comatch.training.rows import token_step as token_step

_QUERY, _POSITIVE, _NEGATIVE = range(3)


def contrastive_step(
    accelerator: Accelerator,
    model: nn.Module,
    samples: Sequence[Sample],
    stage: Stage,
    run: StageRun,
    *,
    seed: int,
    temperature: Temperature | None = None,
    guide: torch.Tensor | None = None,
) -> StepResult:
    """Forward and backward of the contrastive loss over all ranks' samples; gradients are those of the one global loss.

    samples: this rank's, with any number of positives and negatives each. seed: fixes dropout in both passes. temperature: the run's, where
    it is learned; its gradient is set here. guide: unit vectors [items, dim] by another model, of every sample's examples in turn.
    Raises TrainingError where a vector or the loss is not finite (on every rank), ConfigError where the loss does not fit the model.
    """
    backbone = accelerator.unwrap_model(model)
    _check(run, stage, backbone, samples, temperature)
    examples = [example for sample in samples for example in sample.examples]
    kinds, keys = _table(samples)
    chosen, place = _distinct(keys, alone=_draws(backbone))
    once = _Once(accelerator, model, stage, math.lcm(*run.loss.vectors), seed)
    planned = plan_passes(accelerator, backbone, [examples[i] for i in chosen], run.tokens_per_pass, run.patches_per_pass)
    kept: dict[int, torch.Tensor] = {}
    found: list[torch.Tensor] = []
    for i, part in enumerate(planned):
        keep = i >= len(planned) - run.keep_passes
        with torch.set_grad_enabled(keep):
            means = once(i, part)
        found.append(means.detach()[: len(part.members)])
        if keep:
            kept[i] = means
    order = torch.argsort(torch.tensor([j for part in planned for j in part.members]))
    vectors = torch.cat(found)[moved(order[place], accelerator.device)]
    result, gradient = _loss(accelerator, vectors, kinds, keys, len(chosen), run, stage, temperature or Temperature(run.loss), guide)
    merged = torch.zeros_like(gradient[: len(chosen)]).index_add_(0, moved(place, gradient.device), gradient)
    for i, part in reversed(list(enumerate(planned))):
        means = kept.pop(i) if i in kept else once(i, part)
        weights = merged[moved(torch.tensor(part.members), merged.device)] if part.members else torch.zeros_like(means)
        run_backward(accelerator, model, (means * weights).sum(), last=i == 0)
    filled, slots = fill(planned)
    return StepResult(examples=len(samples), tokens=sum(map(len, examples)), filled=filled, slots=slots, **result)


def take_step(
    accelerator: Accelerator,
    model: nn.Module,
    samples: Sequence[Sample],
    stage: Stage,
    run: StageRun,
    *,
    seed: int,
    beside: Beside,
    judge: Callable[[Sequence[Sample], int], torch.Tensor] | None = None,
) -> StepResult:
    """The step of a stage's objectives. judge: gives a guide's vectors of samples. beside: what the stage needs besides the model.

    A stage that matches and has rows with labels does one after the other; their gradients add up.
    """
    matched = told = None
    if "contrastive" in stage.objectives:
        guide = judge(samples, run.tokens_per_pass) if judge else None
        matched = contrastive_step(accelerator, model, samples, stage, run, seed=seed, temperature=beside.temperature, guide=guide)
    if stage.tells:
        rows = [sample.labelled for sample in samples]
        told = token_step(accelerator, model, rows, stage, run.tokens_per_pass, run.patches_per_pass, beside)
    if matched and told:
        parts = {"contrastive": matched.loss, **told.parts}
        loss = stage.objectives["contrastive"] * matched.loss + told.loss
        sums = {name: getattr(matched, name) + getattr(told, name) for name in ("tokens", "filled", "slots")}
        return replace(matched, loss=loss, parts=parts, **sums)
    done = matched or told
    if done is None:
        raise ConfigError(f"stage {stage.name!r} has the objectives {list(stage.objectives)}, and no step for any of them")
    return done


class _Once:
    """Runs a pass to the pooled means of its items; again with equal dropout, and with the pictures' features of the first time."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, stage: Stage, groups: int, seed: int) -> None:
        self.accelerator, self.model, self.stage, self.groups, self.seed = accelerator, model, stage, groups, seed
        self.backbone: Backbone = accelerator.unwrap_model(model)
        self.frozen = not self.backbone.vision_trains
        self.seen: dict[int, Vision | None] = {}
        open_methods(self.backbone)

    def __call__(self, number: int, part: Pass) -> torch.Tensor:
        """[items, groups, dim] float32."""
        batch, seed = part.batch, [self.seed, self.accelerator.process_index, number]
        with no_sync(self.accelerator, self.model), _dropout(seed, self.accelerator.device), self.accelerator.autocast():
            if self.frozen and number not in self.seen:
                with torch.no_grad():
                    self.seen[number] = self.backbone.see(batch)
            hidden = self.model(batch, self.stage.visibility, self.seen.get(number), pooled(batch.roles, self.stage.pooling))
            return group_means(hidden, batch.roles, batch.example, batch.size, self.stage.pooling or "", self.groups)


def _check(run: StageRun, stage: Stage, backbone: Backbone, samples: Sequence[Sample], temperature: Temperature | None) -> None:
    if run.loss.learn_temperature and (temperature is None or temperature.log is None):
        raise ConfigError("loss.learn_temperature is true, but the step got none to train; pass temperature=Temperature(run.loss)")
    for count in run.loss.vectors:
        check_vectors(count, stage.pooling, backbone.tokens)
    try:
        run.loss.prefixes(backbone.dim)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if lone := [sample.row for sample in samples if not 0 < sample.positives < len(sample.examples)]:
        raise TrainingError(f"rows {lone[:10]} have no positive, so there is nothing to match; give every query at least one")


def _table(samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Kind and key of every item, in the order of the samples' examples; -1 for a key that is not known."""
    kinds: list[int] = []
    keys: list[int] = []
    for sample in samples:
        negatives = len(sample.examples) - 1 - sample.positives
        kinds += [_QUERY, *[_POSITIVE] * sample.positives, *[_NEGATIVE] * negatives]
        keys += sample.keys or [-1] * len(sample.examples)
    return torch.tensor(kinds), torch.tensor(keys)


def _distinct(keys: torch.Tensor, alone: bool) -> tuple[list[int], torch.Tensor]:
    """The items to encode, one of each key, and for every item the place of its own among them. alone: encode every item."""
    first: dict[int, int] = {}
    chosen: list[int] = []
    place: list[int] = []
    for i, key in enumerate(keys.tolist()):
        name = -1 - i if alone or key < 0 else key
        if name not in first:
            first[name] = len(chosen)
            chosen.append(i)
        place.append(first[name])
    return chosen, torch.tensor(place)


def _draws(backbone: Backbone) -> bool:
    """Whether a forward pass is random, so that equal items get different vectors."""
    rates = (m.p if isinstance(m, nn.Dropout) else getattr(m, "attention_dropout", 0.0) for m in backbone.modules() if m.training)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _loss(
    accelerator: Accelerator,
    vectors: torch.Tensor,
    kinds: torch.Tensor,
    keys: torch.Tensor,
    encoded: int,
    run: StageRun,
    stage: Stage,
    temperature: Temperature,
    guide: torch.Tensor | None,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Figures of the global loss, and its gradient by this rank's vectors, times the number of ranks (the later mean divides)."""
    sizes = accelerator.gather(moved(torch.tensor([[len(vectors), encoded]]), accelerator.device))
    counts = sizes[:, 0].tolist()
    everything = _gather(accelerator, vectors, counts).requires_grad_(True)
    check_finite(everything, "vectors")
    kind, key = (_gather(accelerator, moved(x, accelerator.device), counts) for x in (kinds, keys))
    query = kind == _QUERY
    # A sample's items stand together behind their query, so counting queries numbers the samples of all ranks.
    pairing = Pairing((query.cumsum(0) - 1)[~query], kind[~query] == _POSITIVE, key[query], key[~query])
    judge = None if guide is None else _gather(accelerator, moved(guide, accelerator.device), counts)
    weight = stage.objectives["contrastive"]
    with torch.enable_grad():
        scale = temperature()
        judges = None if judge is None else (judge[query], judge[~query])
        loss, accuracy = info_nce(everything[query], everything[~query], pairing, run.loss, scale, judges)
    check_finite(loss, "loss")
    learned = [] if temperature.log is None else [temperature.log]
    gradient, *rest = torch.autograd.grad(loss * weight, [everything, *learned])
    for parameter, slope in zip(learned, rest, strict=True):
        parameter.grad = slope if parameter.grad is None else parameter.grad + slope
    start = sum(counts[: accelerator.process_index])
    figures = {
        "loss": float(loss.detach()),
        "accuracy": float(accuracy),
        "repeated": 1 - float(sizes[:, 1].sum() / sizes[:, 0].sum()),
        "temperature": float(torch.as_tensor(scale).detach()),
    }
    return figures, gradient[start : start + len(vectors)] * accelerator.num_processes


def _gather(accelerator: Accelerator, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """All ranks' rows, one rank after the other; ranks may have unequal numbers of them."""
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows
    gathered: torch.Tensor = accelerator.gather(padded)
    return torch.cat([part[:count] for part, count in zip(torch.split(gathered, max(counts)), counts, strict=True)])


@contextmanager
def _dropout(seed: Sequence[int], device: torch.device) -> Iterator[None]:
    """Fix the random state inside the block by (step, rank, pass) and put it back after, so that both passes draw the same dropout."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        yield
