"""What a run would do, without its weights: token layout, mask, trainable parameters, memory and time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from glob import iglob
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
from comatch.backbones.memory import vision_bytes
from comatch.backbones.registry import SHIPPED, family, resolve
from comatch.backbones.shapes import config_of, known
from comatch.config import RunConfig, StageRun
from comatch.content import Dialogue, Group, as_message
from comatch.core.batch import Example
from comatch.core.flops import Shape, work_of
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.data.mixture import Ingredient, Mixture
from comatch.errors import DataError
from comatch.recipe import ROLES, Stage
from comatch.recipes import load_recipe
from comatch.training.fit import beside_bytes, beside_flops, demand, told_layers, trained_part
from comatch.training.loader import Sample, StageData
from comatch.training.plan import UNTRAINED, Plan, check_stages, open_data, open_parameters, plan_encoder

_MARK = {"context": "x", "compression": "C", "dialogue": "d", "target": "t"}
_PICTURED = 10
_SAMPLES = 16
_GB = 2**30
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
        notes.append(f"note: {config.folder} holds a run already; training goes on with it, or stops where it is complete")
    open_parameters(config, backbone)
    lines = [
        f"run {config.name}: recipe {recipe.name}, model {config.model}, seed {config.seed}, {config.precision}, to {config.folder}",
        *notes,
        *_parameters(backbone),
    ]
    chosen = [(stage, run) for stage in recipe.stages if (run := config.stages.get(stage.name))]
    total = 0.0
    for i, (stage, run) in enumerate(chosen):
        told, run, work = _stage(todo, stage, run)
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
    folder = at_hand("comatch-nano" if config.model == UNTRAINED else config.model, config.revision)
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

    name, has_pairs = "stand-in", True
    _picture = as_message(np.zeros((640, 640, 3), np.uint8))
    _turns = (("What is the main object in the picture, and what colour is it?", "A red car that is parked in front of a house."),) * 4

    def __len__(self) -> int:
        return 1

    def dialogue(self, i: int, epoch: int = 0) -> Dialogue:
        return Dialogue(self._picture, self._turns)

    def group(self, i: int, epoch: int = 0) -> Group:
        return Group(self._picture, (as_message(self._turns[0][1]),))


def at_hand(name: str, revision: str | None) -> Path | None:
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
        count[kind_of(name)] = count.get(kind_of(name), 0) + parameter.numel()
    lines = [f"trains {open_:,} of {total:,} parameters ({100 * open_ / total:.2f} %)"]
    if rows := count.pop("compression rows", 0):
        mask = ", one of them the mask token's" if len(backbone.rows) > backbone.tokens else ""
        lines.append(f"  {'compression rows':18}{rows:>15,} = {' x '.join(map(str, backbone.rows.shape))}{mask}")
    return lines + [f"  {kind:18}{n:>15,}" for kind, n in count.items()]


def kind_of(name: str) -> str:
    """The group that a trained parameter of this name is counted in."""
    if name == "rows":
        return "compression rows"
    if "lora_magnitude" in name:
        return "DoRA magnitudes"
    if "lora_" in name:
        return "LoRA"
    return "vision tower" if ".visual." in name else "language model"


def _stage(todo: Plan, stage: Stage, run: StageRun) -> tuple[list[str], StageRun, float]:
    """What to tell of one stage, its run with the number of steps, and its work in FLOP."""
    samples, run, lines = _samples(todo, stage, run)
    shown = samples[0]
    negatives = len(shown.examples) - 1 - shown.positives
    sides = ["query", *["positive"] * shown.positives, *["negative"] * negatives] if shown.positives else []
    sides += [stage.tells] if stage.tells else []
    tokens = _mean(sum(map(len, s.everything)) for s in samples)
    patches = _mean(sum(map(patches_of, s.everything)) for s in samples)
    for side, example in zip(sides, shown.everything, strict=True):
        supervised = f"; {example.supervised:,} supervised" if stage.speaks and example is shown.labelled else ""
        hidden = f", {len(example.targets):,} of them hidden" if len(example.targets) else ""
        lines.append(f"  {side:<11}{len(example):,} tokens = {_layout(example)}{supervised}; {patches_of(example):,} patches{hidden}")
    if len(samples) > 1:
        many = f"{len(samples)} samples from the start of the run"
        lines.append(f"  {'mean':<11}{tokens:,.0f} tokens, {patches:,.0f} patches a sample ({many})")
    longest = max(len(e) for s in samples for e in s.everything)
    a_pass = max(longest, min(run.tokens_per_pass, run.batch * tokens))
    if longest > run.tokens_per_pass:
        lines.append(f"  note: an example of {longest:,} tokens, above tokens_per_pass={run.tokens_per_pass:,}, gets a pass of its own")
    parts = memory(todo, a_pass, a_pass * patches / tokens)
    parts = beside_bytes(todo.encoder.backbone, stage, todo.config.adapter.kind == "full") | parts
    told = " + ".join(f"{_bytes(n)} {what}" for what, n in parts.items())
    lines.append(f"  {'memory':<11}about {_bytes(sum(parts.values()))} in each process: {told} of a pass of {a_pass:,.0f} tokens")
    work = _work(todo, stage, run, samples, cached=run.batch * tokens > run.tokens_per_pass)
    lines.append(f"  {'work':<11}{_time(work)}")
    roles = stage.visibility.roles
    legend = ", ".join(f"{_MARK[role]} {role}" for role in roles)
    lines.append(f"  {'visibility':<11}{' '.join(stage.visibility.table)}; row looks at column, up to {_PICTURED} places of each: {legend}")
    return [*lines, *_mask(shown.everything[-1 if stage.tells else 0], roles, stage)], run, work


def _samples(todo: Plan, stage: Stage, run: StageRun) -> tuple[list[Sample], StageRun, list[str]]:
    """Samples from the start of the run, or one of a stand-in where its file is not here; the run with its steps; what to tell."""
    data, seed = run.data or todo.config.data, todo.config.seed
    if absent := [source.path for source in data.sources.values() if source.path is not None and not _is_here(source.path)]:
        if not run.steps:
            raise DataError(f"there is no {absent[0]} here, so stages.{stage.name}.epochs cannot be counted; say steps instead")
        note = f"  note: there is no {', '.join(dict.fromkeys(absent))} here; a blank picture stands in, columns are not checked"
        blank: Any = _StandIn()
        made = StageData(Mixture((Ingredient(blank.name, blank),)), todo.encoder.preparer, stage, seed=seed, batch=1)
        return made[0], run, [note]
    run, mixture = open_data(todo.config, run, stage)
    # As if on many ranks, so that of a large batch only a few samples are decoded.
    few = StageData(mixture, todo.encoder.preparer, stage, seed=seed, batch=run.batch, ranks=max(1, run.batch // _SAMPLES))
    samples = [sample for step in range(min(run.steps, -(-_SAMPLES // run.batch))) for sample in few[step]][:_SAMPLES]
    lines = []
    for ingredient, used in zip(mixture.ingredients, mixture.given(run.steps, run.batch), strict=True):
        rows = len(ingredient.source)
        lines.append(f"  {'data':<11}{used:,} samples of {rows:,} rows of {ingredient.name}: {used / rows:.3g} epochs")
    if bad := [reason for sample in samples for reason in sample.bad]:
        lines.append(f"  note: {len(bad)} bad rows were replaced among the first {len(samples)}, as in: {bad[0]}")
    return samples, run, lines


def _is_here(path: str) -> bool:
    return Path(path).exists() or any(iglob(path))


def memory(todo: Plan, tokens: float, patches: float) -> dict[str, float]:
    """Bytes of weights, of gradients with AdamW's two moments, and of activations of one pass of that many tokens and patches."""
    backbone, config = todo.encoder.backbone, todo.config
    shape = Shape.of(backbone.stock.config)
    trained = sum(p.numel() for p in adapters.trainable(backbone).values())
    total = sum(p.numel() for p in backbone.parameters())
    low = config.precision == "bf16"
    weights = 4 * trained + (2 if low and config.adapter.kind != "full" else 4) * (total - trained)
    kept = demand(config, shape).bytes(shape, tokens, told_layers(config, shape.layers) or 0)
    kept += vision_bytes(shape, patches, low) if config.adapter.train_vision else 0
    return {"weights": weights, "gradients and AdamW": 12 * trained, "activations": kept}


def _work(todo: Plan, stage: Stage, run: StageRun, samples: Sequence[Sample], cached: bool) -> float:
    """Useful work, and in a matching stage of several passes one more forward; pictures run twice only where their tower trains."""
    shape, trains = Shape.of(todo.encoder.backbone.stock.config), trained_part(todo.config.adapter)
    again = 1 if cached and "contrastive" in stage.objectives else 0
    examples = [example for sample in samples for example in sample.everything]
    work = work_of(shape, examples, stage.visibility, trains)
    each = (trains.flops(work, again) + again * trains.vision * work.vision + beside_flops(shape, stage, examples)) / len(samples)
    return each * run.batch * run.steps


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


def patches_of(example: Example) -> int:
    """Patches of all its pictures."""
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
