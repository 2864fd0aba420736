"""Checks before a run: the machine, the launch, the data as the model will see them, memory, and the first batches on the real model.

Every check is a function that returns findings: data, which the command line prints or gives out as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from comatch.backbones.attention import why_no_kernel
from comatch.backbones.base import Backbone
from comatch.backbones.memory import RESERVE, head_bytes, vision_bytes
from comatch.backbones.registry import SHIPPED, lacking
from comatch.config import RunConfig, StageRun
from comatch.core.batch import Example
from comatch.core.flops import Shape
from comatch.core.packing import collate
from comatch.core.segments import compile_segments
from comatch.data.mixture import Mixture
from comatch.errors import ComatchError
from comatch.recipe import ROLES, Recipe, Stage
from comatch.training import dry
from comatch.training.fit import demand
from comatch.training.loader import Sample
from comatch.training.machine import Finding, device, environment, launch, room
from comatch.training.plan import UNTRAINED, Plan, open_encoder, open_parameters, plan_encoder, survey
from comatch.training.trial import few, try_out

_GIB = 2**30
_ROUND = 256


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of one role; learned: the model is asked to predict them."""

    role: str
    text: str
    learned: bool


@dataclass
class StageReport:
    """What was found of one stage. sample: the rows of its first sample, one list of spans for each of its examples."""

    name: str
    findings: list[Finding]
    sample: list[list[Span]]


@dataclass
class Report:
    """Everything that was found. layout: the dry run's text, with masks, memory and time of each stage."""

    findings: list[Finding] = field(default_factory=list)
    layout: str = ""
    stages: list[StageReport] = field(default_factory=list)

    @property
    def everything(self) -> list[Finding]:
        """All findings, in order."""
        return [*self.findings, *(finding for stage in self.stages for finding in stage.findings)]

    @property
    def sound(self) -> bool:
        """Whether there is no error among them."""
        return all(finding.level != "error" for finding in self.everything)


def examine(config: RunConfig, processes: int = 1) -> Report:
    """Look at a run from all sides, as if so many processes were started; nothing is written and nothing downloaded."""
    report = Report([*environment(config.folder, config.workers), device(config), *launch(config, processes)])
    try:
        report.layout = dry.describe(config)
        recipe, stages = survey(config)
        report.findings.append(Finding("config", "ok", f"recipe {recipe.name}, model {config.model}, {len(stages)} stages"))
        for stage, run, mixture in stages:
            report.stages.append(_stage(config, recipe, stage, run, mixture, processes, sound=report.sound))
    except ComatchError as error:
        step = "the run would stop in the same way; mend this first"
        report.findings.append(Finding("config", "error", f"{type(error).__name__}: {error}", step))
    return report


def _stage(
    config: RunConfig, recipe: Recipe, stage: Stage, run: StageRun, mixture: Mixture, processes: int, *, sound: bool
) -> StageReport:
    backbone, _ = dry.weightless(config)
    todo = Plan(config, recipe, plan_encoder(config, recipe, backbone), [(stage, run, mixture)])
    batches = few(todo, stage, run, mixture)
    first = batches[0]
    open_parameters(config, backbone, stage)
    drawn = [sample for batch in batches for sample in batch]
    found = [data(drawn, backbone), kernel(config, stage, backbone, first[0].labelled), fit(todo, stage, run, first, processes)]
    if not at_hand(config):
        step = f"hf download {config.model}, then ask again"
        found.append(Finding("first batch", "warning", f"the weights of {config.model} are not here, so no step was tried", step))
    elif sound and all(finding.level != "error" for finding in found):
        real = Plan(config, recipe, open_encoder(config, recipe), [(stage, run, mixture)])
        found += try_out(real, stage, run, batches, processes)
    return StageReport(stage.name, found, [spans(example, backbone) for example in first[0].everything])


def kernel(config: RunConfig, stage: Stage, backbone: Backbone, example: Example) -> Finding:
    """Which attention the language model will run in a stage, and why."""
    batch = collate([example])
    compiled = compile_segments(batch.roles, batch.example, stage.visibility)
    if isinstance(compiled, str):
        return Finding("attention", "warning", f"the dense mask, because {compiled}", "it is exact but slow; see the visibility table")
    shape, on_gpu = Shape.of(backbone.stock.config), config.device != "cpu" and torch.cuda.is_available()
    low = torch.bfloat16 if config.precision == "bf16" else torch.float32
    query = torch.empty(1, shape.heads, shape.head_dim, dtype=low, device="cuda" if on_gpu else "cpu")
    reason = why_no_kernel(query, 0.0)
    segments = sum(len(block.groups) for block in compiled.blocks)
    form = f"{segments} plain segments an example, no mask"
    if not reason:
        return Finding("attention", "ok", f"torch's variable-length kernel, {form}", values={"kernel": "varlen"})
    told = f"one SDPA call per shape of segment, {form}; torch's variable-length kernel is not used: {reason}"
    return Finding("attention", "warning" if on_gpu else "ok", told, reason.partition("; ")[2] if on_gpu else "", {"kernel": "sdpa"})


def fit(todo: Plan, stage: Stage, run: StageRun, samples: Sequence[Sample], processes: int = 1) -> Finding:
    """Whether a pass fits the memory, by the counts of `backbones.memory`, and how many tokens would without recomputing a layer."""
    config, backbone = todo.config, todo.encoder.backbone
    shape, low, matching = Shape.of(backbone.stock.config), config.precision == "bf16", "contrastive" in stage.objectives
    whole = sum(len(example) for sample in samples for example in sample.everything) / len(samples) * run.batch / processes
    a_pass = min(run.tokens_per_pass, whole)
    held = dry.memory(todo, a_pass, 0)
    fixed = held["weights"] + held["gradients and AdamW"] + (0 if matching else head_bytes(shape, low))
    if config.adapter.train_vision:
        fixed += vision_bytes(shape, run.patches_per_pass or a_pass * shape.merge**2, low)
    have, kept = room(config), demand(config, shape)
    left = have * (1 - RESERVE) - fixed
    tokens = a_pass * (run.keep_passes if matching else 1)
    again, most = kept.layers(shape, tokens, left), int(left / kept.bytes(shape, 1)) // _ROUND * _ROUND
    told = f"a pass of {a_pass:,.0f} tokens needs about {(fixed + kept.bytes(shape, tokens)) / _GIB:.2f} GiB of {have / _GIB:.1f} GiB free"
    values = {"need": fixed + kept.bytes(shape, tokens), "have": have, "recomputed": again, "proposed": max(most, 0)}
    key = f"stages.{stage.name}.tokens_per_pass"
    if left <= 0:
        step = "the weights alone do not fit: accelerate/fsdp2.yaml on more GPUs, adapter.kind=lora, or a smaller model"
        return Finding("memory", "error", told, step, values)
    if kept.bytes(shape, tokens, shape.layers) > left:
        fits = int(left / kept.bytes(shape, 1, shape.layers)) // _ROUND * _ROUND
        return Finding("memory", "error", told, f"set {key}={max(fits, _ROUND)}, or lower images.max_pixels", values)
    if again:
        step = f"{again} of {shape.layers} layers are recomputed, which is slower; {key}={max(most, _ROUND)} needs none"
        return Finding("memory", "warning", told, step, values)
    if matching and whole > run.tokens_per_pass and most > run.tokens_per_pass:
        enough = min(most, -(-int(whole) // _ROUND) * _ROUND)
        step = f"{key}={enough} needs fewer passes for the batch's {whole:,.0f} tokens, with equal results"
        return Finding("memory", "ok", told, step, values)
    return Finding("memory", "ok", told, values=values)


def data(samples: Sequence[Sample], backbone: Backbone) -> Finding:
    """What the first samples are like: sizes of pictures in pixels, cut texts, replaced rows."""
    examples, side = [example for sample in samples for example in sample.everything], backbone.processor.patch_size
    pictures = [(wide * side, high * side) for example in examples for _, high, wide in example.grids]
    cut, bad = sum(example.cut > 0 for example in examples), sum(len(sample.bad) for sample in samples)
    sizes = f"pictures of {_span([w for w, _ in pictures])} x {_span([h for _, h in pictures])} pixels" if pictures else "no pictures"
    told = f"{len(samples)} samples, {_span([len(e) for e in examples])} tokens, {sizes}; {cut} texts cut, {bad} bad rows replaced"
    values = {"samples": len(samples), "cut": cut, "bad": bad, "pictures": [list(size) for size in pictures]}
    if bad:
        reason = next(reason for sample in samples for reason in sample.bad)
        return Finding("data", "warning", told, f"look at the data, as in: {reason}", values)
    if cut:
        return Finding("data", "warning", told, "shorten the texts, or lower images.max_pixels to leave them more of the window", values)
    return Finding("data", "ok", told, values=values)


def spans(example: Example, backbone: Backbone) -> list[Span]:
    """A row as a person reads it: text by role, pictures and compression tokens as one mark each."""
    learned = [False, *(example.labels[:-1] >= 0)]
    marks, pictures = list[tuple[tuple[str, str, bool], list[int]]](), iter(example.grids)
    for token, role, asked in zip(example.ids.tolist(), example.roles.tolist(), learned, strict=True):
        kind = "picture" if token == backbone.image_id else "rows" if ROLES[role] == "compression" else "text"
        if not marks or marks[-1][0] != (kind, ROLES[role], bool(asked)):
            marks.append(((kind, ROLES[role], bool(asked)), []))
        marks[-1][1].append(token)
    told = []
    for (kind, role, asked), tokens in marks:
        text = backbone.tokenizer.decode(tokens)
        if kind == "rows":
            text = f"<{len(tokens)} compression tokens>"
        elif kind == "picture":
            _, high, wide = next(pictures)
            side = backbone.processor.patch_size
            text = f"<picture of {wide * side} x {high * side} pixels, {len(tokens)} tokens>"
        told.append(Span(role, text, asked))
    return told


def at_hand(config: RunConfig) -> bool:
    """Whether the weights are on this machine, so that nothing is downloaded to look at a run."""
    folder = SHIPPED / "comatch-nano" if config.model == UNTRAINED else dry.at_hand(config.model, config.revision)
    return folder is not None and not lacking(folder, weights=True)


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
