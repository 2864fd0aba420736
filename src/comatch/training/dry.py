"""What a run would do, without its weights: token layout, mask, trainable parameters, memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.registry import SHIPPED, family, resolve
from comatch.backbones.shapes import config_of, known
from comatch.config import RunConfig, StageRun
from comatch.content import Dialogue, Group, as_message
from comatch.core.batch import Example
from comatch.core.flops import Shape, forward_flops
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.recipe import ROLES, Stage
from comatch.recipes import load_recipe
from comatch.training.loader import Sample, StageData
from comatch.training.loop import UNTRAINED, Plan, check_stages, open_parameters, plan_encoder, stage_source

_MARK = {"context": "x", "compression": "C", "dialogue": "d", "target": "t"}
_PICTURED = 10
_SAMPLES = 16
_GB = 2**30
# specs/performance.md section 2: 5.0 MB per token kept by the eager 3B model (36 layers of width 2048), forward and backward in bf16.
_KEPT = 5.0e6 / (36 * 2048)
_H200 = 790e12
# What Qwen2.5-VL's own preprocessor_config.json says.
_PUBLISHED_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}


def describe(config: RunConfig) -> str:
    """Build everything but the weights and tell it in plain text. Raises what the run itself would raise for its config.

    Data and recorded models that are not on this machine get a stand-in and a note.
    """
    recipe = load_recipe(config.recipe).with_tokens(config.tokens)
    check_stages(config, recipe)
    backbone, notes = weightless(config)
    todo = Plan(config, recipe, plan_encoder(config, recipe, backbone), [])
    if (config.folder / "manifest.json").is_file():
        notes.append(f"note: {config.folder} holds a run already; training stops there without --overwrite")
    open_parameters(config, backbone)
    lines = [
        f"run {config.name}: recipe {recipe.name}, model {config.model}, seed {config.seed}, {config.precision}, to {config.folder}",
        *notes,
        *_parameters(backbone),
    ]
    chosen = [(stage, run) for stage in recipe.stages if (run := config.stages.get(stage.name))]
    total = 0.0
    for i, (stage, run) in enumerate(chosen):
        told, work = _stage(todo, stage, run)
        optim = f"lr {run.optim.lr:g} {run.optim.schedule} after {round(run.optim.warmup * run.steps)} steps of warm-up"
        objective = ", ".join(f"{name} x {weight:g}" for name, weight in stage.objectives.items())
        lines += ["", f"stage {stage.name} ({i + 1} of {len(chosen)}): {objective}; {run.steps:,} steps of {run.batch:,}; {optim}", *told]
        total += work
    if len(chosen) > 1:
        lines += ["", f"all stages: {_time(total)}"]
    return "\n".join(lines)


def weightless(config: RunConfig) -> tuple[Backbone, list[str]]:
    """The backbone on the meta device (shapes, tokenizer, image settings, no weights), and what stood in for what is not at hand."""
    recipe = load_recipe(config.recipe).with_tokens(config.tokens)
    folder = _at_hand("comatch-nano" if config.model == UNTRAINED else config.model, config.revision)
    notes: list[str] = []
    if folder is None and config.model in known():
        folder, model_config = SHIPPED / "comatch-nano", config_of(config.model)
        notes.append(
            f"note: {config.model} is not on this machine; its published shape is used, "
            "and the nano tokenizer stands in: text lengths are estimates"
        )
    else:
        folder = folder or resolve(config.model, config.revision, weights=False)
        model_config = AutoConfig.from_pretrained(folder)
    family(model_config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    if notes:
        processor.size = dict(_PUBLISHED_PIXELS)
    return Backbone(model, AutoTokenizer.from_pretrained(folder), processor, recipe, source=config.model), notes


class _StandIn:
    """Data in the place of a file that is not here: a blank picture with four turns, or against one sentence."""

    name = "stand-in"
    _picture = as_message(np.zeros((640, 640, 3), np.uint8))
    _turns = (("What is the main object in the picture, and what colour is it?", "A red car that is parked in front of a house."),) * 4

    def __len__(self) -> int:
        return 1

    def dialogue(self, i: int, epoch: int = 0) -> Dialogue:
        return Dialogue(self._picture, self._turns)

    def group(self, i: int, epoch: int = 0) -> Group:
        return Group(self._picture, (as_message(self._turns[0][1]),))


def _at_hand(name: str, revision: str | None) -> Path | None:
    """A folder, a shipped model, or what the hub's cache has of a model: everything small, weights or not."""
    if Path(name).is_dir() or (SHIPPED / name).is_dir():
        return resolve(name)
    try:
        small = [
            try_to_load_from_cache(name, file, revision=revision) for file in ("config.json", "tokenizer.json", "preprocessor_config.json")
        ]
    except HFValidationError:  # not a hub id either; `resolve` says so in our words
        return None
    return Path(small[0]).parent if isinstance(small[0], str) and all(isinstance(path, str) for path in small) else None


def _parameters(backbone: Backbone) -> list[str]:
    trained = adapters.trainable(backbone)
    total, open_ = sum(p.numel() for p in backbone.parameters()), sum(p.numel() for p in trained.values())
    count: dict[str, int] = {}
    for name, parameter in trained.items():
        count[_kind(name)] = count.get(_kind(name), 0) + parameter.numel()
    lines = [f"trains {open_:,} of {total:,} parameters ({100 * open_ / total:.2f} %)"]
    if rows := count.pop("compression rows", 0):
        lines.append(f"  {'compression rows':18}{rows:>15,} = {' x '.join(map(str, backbone.rows.shape))}")
    return lines + [f"  {kind:18}{n:>15,}" for kind, n in count.items()]


def _kind(name: str) -> str:
    if name == "rows":
        return "compression rows"
    if "lora_magnitude" in name:
        return "DoRA magnitudes"
    if "lora_" in name:
        return "LoRA"
    return "vision tower" if ".visual." in name else "language model"


def _stage(todo: Plan, stage: Stage, run: StageRun) -> tuple[list[str], float]:
    """What to tell of one stage, and its work in FLOP."""
    samples, lines = _samples(todo, stage, run)
    sides = ("query", "positive") if "contrastive" in stage.objectives else ("dialogue",)
    tokens = _mean(len(e) for s in samples for e in s.examples) * len(sides)
    patches = _mean(_patches(e) for s in samples for e in s.examples) * len(sides)
    for side, example in zip(sides, samples[0].examples, strict=True):
        supervised = f"; {example.supervised:,} supervised" if "next_token" in stage.objectives else ""
        lines.append(f"  {side:<11}{len(example):,} tokens = {_layout(example)}{supervised}; {_patches(example):,} patches")
    if len(samples) > 1:
        lines.append(f"  {'mean':<11}{tokens:,.0f} tokens, {patches:,.0f} patches a sample (first {len(samples)} samples of the run)")
    longest = max(len(e) for s in samples for e in s.examples)
    a_pass = max(longest, min(run.tokens_per_pass, run.batch * tokens))
    if longest > run.tokens_per_pass:
        lines.append(f"  note: an example of {longest:,} tokens, above tokens_per_pass={run.tokens_per_pass:,}, gets a pass of its own")
    lines.append(f"  {'memory':<11}{_memory(todo, a_pass, a_pass * patches / tokens)}")
    work = _work(todo, stage, run, samples, cached=run.batch * tokens > run.tokens_per_pass)
    lines.append(f"  {'work':<11}{_time(work)}")
    roles = stage.visibility.roles
    legend = ", ".join(f"{_MARK[role]} {role}" for role in roles)
    lines.append(f"  {'visibility':<11}{' '.join(stage.visibility.table)}; row looks at column, up to {_PICTURED} places of each: {legend}")
    return [*lines, *_mask(samples[0].examples[0], roles, stage)], work


def _samples(todo: Plan, stage: Stage, run: StageRun) -> tuple[list[Sample], list[str]]:
    """The first samples of the run, or one of a stand-in where the data's file is not here."""
    data, seed = run.data or todo.config.data, todo.config.seed
    if data.path is not None and not Path(data.path).exists():
        note = f"  note: there is no {data.path} here; a blank picture of 640 x 640 stands in, and its columns are not checked"
        blank: Any = _StandIn()
        return [StageData(blank, todo.encoder.preparer, stage, seed, range(1))[0]], [note]
    source = stage_source(todo.config, run)
    made = StageData(source, todo.encoder.preparer, stage, seed, range(min(_SAMPLES, run.steps * run.batch)))
    samples = [made[i] for i in range(len(made))]
    used = run.steps * run.batch
    lines = [f"  {'data':<11}{used:,} samples of {len(source):,} rows of {source.name}: {used / len(source):.3g} epochs"]
    if bad := [reason for sample in samples for reason in sample.bad]:
        lines.append(f"  note: {len(bad)} bad rows were replaced among the first {len(samples)}, as in: {bad[0]}")
    return samples, lines


def _memory(todo: Plan, tokens: float, patches: float) -> str:
    """Weights, gradients with AdamW's two moments, and activations of one pass of that many tokens and patches."""
    backbone, config = todo.encoder.backbone, todo.config
    shape = Shape.of(backbone.stock.config)
    trained = sum(p.numel() for p in adapters.trainable(backbone).values())
    total = sum(p.numel() for p in backbone.parameters())
    low = config.precision == "bf16"
    weights = 4 * trained + (2 if low and config.adapter.kind != "full" else 4) * (total - trained)
    kept = tokens * shape.layers * shape.width + (patches * shape.vision_layers * shape.vision_width if config.adapter.train_vision else 0)
    kept *= _KEPT if low else 2 * _KEPT
    parts = {"weights": weights, "gradients and AdamW": 12 * trained, f"activations of a pass of {tokens:,.0f} tokens": kept}
    told = " + ".join(f"{_bytes(n)} {what}" for what, n in parts.items())
    return f"about {_bytes(sum(parts.values()))} in each process: {told}"


def _work(todo: Plan, stage: Stage, run: StageRun, samples: Sequence[Sample], cached: bool) -> float:
    """Frozen matrices need no weight gradient; a matching stage of several passes runs forward once more; a frozen tower runs once."""
    adapter, shape = todo.config.adapter, Shape.of(todo.encoder.backbone.stock.config)
    again = 1 if cached and "contrastive" in stage.objectives else 0
    text_passes = (3 if adapter.kind == "full" else 2) + again
    vision_passes = 3 + again if adapter.train_vision else 1
    text = _mean(sum(forward_flops(shape, len(e), 0, e.supervised) for e in s.examples) for s in samples)
    vision = _mean(sum(shape.patch * _patches(e) for e in s.examples) for s in samples)
    return (text * text_passes + vision * vision_passes) * run.batch * run.steps


def _layout(example: Example) -> str:
    """The row as runs of one role."""
    starts = np.flatnonzero(np.diff(example.roles, prepend=-1))
    lengths = np.diff(starts, append=len(example))
    return " + ".join(f"{n:,} {ROLES[example.roles[start]]}" for start, n in zip(starts, lengths, strict=True))


def _mask(example: Example, roles: Sequence[str], stage: Stage) -> list[str]:
    """The dense mask at a few evenly spread places of each role."""
    batch = collate([example])
    allowed = dense(batch.roles, batch.example, stage.visibility)[0, 0]
    places = {role: np.flatnonzero(example.roles == ROLES.index(role)) for role in roles}
    shown = {role: at[np.linspace(0, len(at) - 1, min(_PICTURED, len(at))).astype(int)] for role, at in places.items()}
    lines = ["      " + " ".join(_MARK[role] * len(at) for role, at in shown.items())]
    for role, queries in shown.items():
        seen = (" ".join("".join("#" if allowed[q, k] else "." for k in keys) for keys in shown.values()) for q in queries)
        lines += [*(f"    {_MARK[role]} {row}" for row in seen), ""]
    return lines[:-1]


def _patches(example: Example) -> int:
    return sum(t * h * w for t, h, w in example.grids)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _bytes(n: float) -> str:
    return f"{n / _GB:.1f} GiB" if n >= _GB else f"{n / 2**20:.0f} MiB"


def _time(flop: float) -> str:
    minutes = flop / _H200 / 0.5 / 60
    if minutes < 1:
        told = "under a minute"
    elif minutes < 90:
        told = f"{minutes:.0f} minutes"
    else:
        told = f"{minutes / 60:.0f} hours" if minutes < 48 * 60 else f"{minutes / 60 / 24:.1f} days"
    return f"{flop:.1e} FLOP, {told} on one H200 at half of its matmul rate (an estimate, not a measurement)"
