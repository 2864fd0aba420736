"""A few real steps of a stage, of which nothing is kept: is the first loss right, do gradients reach what should learn, how fast is it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.config import RunConfig, StageRun
from comatch.core.memory import shortage
from comatch.core.packing import collate
from comatch.core.pooling import pool
from comatch.data.mixture import Mixture
from comatch.errors import ComatchError
from comatch.recipe import Stage
from comatch.training import dry
from comatch.training.beside import Beside
from comatch.training.guide import Guide
from comatch.training.loader import Sample, StageData
from comatch.training.machine import Finding
from comatch.training.plan import Plan, open_parameters
from comatch.training.step import take_step

SAMPLES = 32
STEPS = 3
"""Two are the least: a fresh LoRA has zeros on one side, so the other learns from the second step on."""


@dataclass
class Trial:
    """What the steps showed.

    reached: names of parameters that had a gradient in some step. strays: frozen ones that had one. pairs: loss of right and of wrong
    pairs before the first step, where the stage matches. peak: bytes of GPU memory.
    """

    losses: list[float]
    seconds: list[float]
    reached: set[str]
    strays: set[str]
    batch: int
    pairs: tuple[float, float] | None
    peak: int = 0


def few(todo: Plan, stage: Stage, run: StageRun, mixture: Mixture, count: int = SAMPLES) -> list[list[Sample]]:
    """About `count` samples of each of the first batches, as one of many ranks would get them."""
    ranks = max(1, run.batch // count)
    part = StageData(mixture, todo.encoder.preparer, stage, seed=todo.config.seed, batch=run.batch, ranks=ranks)
    return [part[step] for step in range(min(STEPS, run.steps))]


def try_out(todo: Plan, stage: Stage, run: StageRun, batches: Sequence[list[Sample]], processes: int = 1) -> Iterator[Finding]:
    """Findings of real steps on a loaded model, which is changed by them and must be thrown away."""
    matching = "contrastive" in stage.objectives
    try:
        trial = _steps(todo, stage, run, batches)
    except torch.OutOfMemoryError as error:
        step = f"lower stages.{stage.name}.tokens_per_pass (it is {run.tokens_per_pass}) or images.max_pixels"
        yield Finding("first batch", "error", shortage(error, "the first step"), step)
        return
    except ComatchError as error:
        yield Finding("first batch", "error", str(error), "the run would stop in the same way; mend this first")
        return
    yield _contrastive(trial, run, trial.pairs) if trial.pairs else _tokens(trial, stage, todo.encoder.backbone)
    yield gradients(todo.config, todo.encoder.backbone, stage, trial)
    yield repeats(batches, matching)
    yield _speed(trial, run, processes)


def _steps(todo: Plan, stage: Stage, run: StageRun, batches: Sequence[list[Sample]]) -> Trial:
    config, backbone = todo.config, todo.encoder.backbone
    AcceleratorState._reset_state()
    low = "bf16" if config.precision == "bf16" else "no"
    accelerator = Accelerator(mixed_precision=low, cpu=config.device == "cpu")
    torch.manual_seed(config.seed)
    beside = Beside.of(backbone, stage, run, whole=config.adapter.kind == "full")
    open_parameters(config, backbone, stage)
    # Plain steps at the full rate: the run's own schedule begins at zero.
    optimizer = torch.optim.AdamW(adapters.trainable(backbone).values(), lr=run.optim.lr)
    model, optimizer = accelerator.prepare(backbone, optimizer)
    beside.join(accelerator.device, optimizer, run.optim)
    with accelerator.autocast():
        pairs = _pairs(accelerator.unwrap_model(model.eval()), stage, run, batches[0]) if beside.temperature else None
    judge = Guide.load(run.loss.guide, todo.encoder, accelerator.device) if run.loss.guide else None
    trial = Trial([], [], set(), set(), len(batches[0]), pairs)
    model.train()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for number, samples in enumerate(batches):
        began = time.perf_counter()
        result = take_step(accelerator, model, samples, stage, run, seed=number, beside=beside, judge=judge)
        # Of several objectives the first tells how good the guess is.
        trial.losses.append(next(iter(result.parts.values()), result.loss))
        for name, parameter in accelerator.unwrap_model(model).named_parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                (trial.reached if parameter.requires_grad else trial.strays).add(name)
        accelerator.clip_grad_norm_(model.parameters(), run.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        trial.seconds.append(time.perf_counter() - began)
    trial.peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    accelerator.free_memory()
    AcceleratorState._reset_state()
    return trial


@torch.no_grad()
def _pairs(model: Backbone, stage: Stage, run: StageRun, samples: Sequence[Sample]) -> tuple[float, float]:
    """Plain InfoNCE on right pairs, and on pairs that are shifted by one and so all wrong."""
    vectors = []
    for side in (0, 1):
        batches = (collate([sample.examples[side]]) for sample in samples)
        parts = [pool(model(b, stage.visibility), b.roles, b.example, b.size, stage.pooling or "") for b in batches]
        vectors.append(torch.cat(parts).float())
    scores = vectors[0] @ vectors[1].T / run.loss.temperature
    right = torch.arange(len(samples), device=scores.device)
    return float(F.cross_entropy(scores, right)), float(F.cross_entropy(scores, right.roll(1)))


def _contrastive(trial: Trial, run: StageRun, known: tuple[float, float]) -> Finding:
    right, wrong = known
    guess, loss = math.log(trial.batch), trial.losses[0]
    most = 1.1 * max(guess, wrong) + 0.1
    told = f"loss {loss:.2f} with {trial.batch} pairs (InfoNCE alone {right:.2f}); expected at most {most:.2f}: "
    told += f"guessing gives log {trial.batch} = {guess:.2f}, wrong pairs of the same vectors {wrong:.2f}; less where the task is known"
    values = {"loss": loss, "right": right, "wrong": wrong, "guessing": guess, "pairs": trial.batch}
    if right > most:
        step = "right pairs look worse than wrong ones: are the columns of query and positive those of one row?"
        return Finding("first loss", "warning", told, step, values)
    if wrong > 3 * guess:
        step = f"raise stages' loss.temperature ({run.loss.temperature}): cosines of unrelated items differ by many times as much"
        return Finding("first loss", "warning", told, step, values)
    return Finding("first loss", "ok", told, values=values)


def _tokens(trial: Trial, stage: Stage, backbone: Backbone) -> Finding:
    words = int(backbone.stock.config.text_config.vocab_size)
    guess, loss = math.log(words), trial.losses[0]
    told = f"loss {loss:.2f} a token; expected at most {1.1 * guess:.2f}: guessing gives log {words:,} = {guess:.2f}"
    values = {"loss": loss, "guessing": guess, "vocabulary": words}
    if loss > 1.1 * guess and "masked_token" in stage.objectives:
        told += "; a model that never met a mask token, or never looked ahead, begins above that"
        return Finding("first loss", "ok", told, values=values)
    if loss > 1.1 * guess:
        step = "the model does worse than guessing: do tokenizer and weights belong together? Is it an untrained model?"
        return Finding("first loss", "warning", told, step, values)
    return Finding("first loss", "ok", told, values=values)


def gradients(config: RunConfig, backbone: Backbone, stage: Stage, trial: Trial) -> Finding:
    """Whether gradients reach every parameter that the run means to train, and no other; counted by group."""
    open_names = set(adapters.trainable(backbone))
    groups, reached = Counter(map(dry.kind_of, open_names)), Counter(map(dry.kind_of, trial.reached))
    told = ", ".join(f"{kind} {reached[kind]} of {n}" for kind, n in sorted(groups.items()))
    told = f"gradients reach {told} parameters; {len(trial.strays)} frozen ones have any"
    values = {"groups": {kind: [reached[kind], n] for kind, n in groups.items()}, "strays": sorted(trial.strays)[:10]}
    wanted = {"lora": {"LoRA"}, "dora": {"LoRA", "DoRA magnitudes"}, "full": {"language model"}}[config.adapter.kind]
    wanted |= {"vision tower"} if config.adapter.train_vision else set()
    wanted |= {"compression rows"} if len(backbone.rows) else set()
    if trial.strays or set(groups) != wanted:
        step = f"the run means to train {sorted(wanted)}, and opened {sorted(groups)}: this is a fault of comatch, please report it"
        return Finding("gradients", "error", told, step, values)
    if missed := sorted(open_names - trial.reached):
        idle = {"compression rows"} if "compression" not in stage.visibility.roles else set()
        if {dry.kind_of(name) for name in missed} <= idle:
            return Finding("gradients", "ok", f"{told} (stage {stage.name} has no compression tokens)", values=values)
        step = f"{len(missed)} learn nothing in these batches, as {missed[0]}; without pictures that is so for a vision tower"
        return Finding("gradients", "warning", told, step, values)
    return Finding("gradients", "ok", told, values=values)


def repeats(batches: Sequence[list[Sample]], matching: bool) -> Finding:
    """How often equal items meet in the first batches."""
    samples = [sample for batch in batches for sample in batch]
    if not matching:
        rows = Counter((sample.source, sample.row) for sample in samples)
        told = f"{sum(n - 1 for n in rows.values())} of {len(samples)} dialogues stand twice in the first batches"
        return Finding("duplicates", "ok", told, values={"repeated": sum(n - 1 for n in rows.values())})
    replaced, kept = sum(sample.replaced for sample in samples), sum(sample.duplicate for sample in samples)
    own = sum(sample.keys[0] in sample.keys[1 : 1 + sample.positives] for sample in samples)
    told = f"{replaced} rows gave way because their positive stood in the batch already, {kept} of {len(samples)} stayed all the same"
    values = {"replaced": replaced, "kept": kept, "own": own, "samples": len(samples)}
    if own:
        return Finding("duplicates", "error", f"{own} of {len(samples)} queries equal their own positive", "drop these rows", values)
    if kept > 0.2 * len(samples):
        step = "few different positives: a smaller batch is worth as much, or use a source with more of them"
        return Finding("duplicates", "warning", told, step, values)
    return Finding("duplicates", "ok", told, values=values)


def _speed(trial: Trial, run: StageRun, processes: int) -> Finding:
    best = min(trial.seconds[1:] or trial.seconds)
    rate = trial.batch / best
    hours = run.steps * run.batch / rate / processes / 3600
    long = f"{60 * hours:.1f} minutes" if hours < 2 else f"{hours:.1f} hours" if hours < 72 else f"{hours / 24:.1f} days"
    told = f"{rate:.1f} samples a second in batches of {trial.batch}: about {long} for {run.steps:,} steps of {run.batch:,}"
    told += f" on {processes} processes, if they scale evenly" if processes > 1 else ""
    told += f"; {trial.peak / 2**30:.2f} GiB of GPU memory at most" if trial.peak else ""
    values = {"samples_per_second": rate, "seconds": 3600 * hours, "peak": trial.peak}
    return Finding("speed", "ok", f"{told}; loading and pictures are not counted", values=values)
