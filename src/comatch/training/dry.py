"""What a run would do, without its weights: token layout, mask, trainable parameters, memory and time."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.registry import SHIPPED, family, resolve
from comatch.backbones.shapes import config_of, known
from comatch.config import RunConfig, StageRun
from comatch.content import Dialogue, as_message
from comatch.core.batch import Example
from comatch.core.flops import Shape, forward_flops
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.errors import DataError
from comatch.recipe import ROLES, Stage
from comatch.recipes import load_recipe
from comatch.training.loop import Plan, check_stages, open_parameters, plan_encoder, stage_source

_MARK = {"context": "x", "compression": "C", "dialogue": "d", "target": "t"}
# specs/performance.md section 2: 5.0 MB per token kept by the eager 3B model (36 layers of width 2048), forward and backward in bf16.
_BYTES_PER_TOKEN_LAYER_WIDTH = 5.0e6 / (36 * 2048)
_H200 = 790e12
_MASK_CELLS = 40


def describe(config: RunConfig) -> str:
    """Build everything but the weights and tell it in plain text. Raises what the run itself would raise for its config."""
    recipe = load_recipe(config.recipe).with_tokens(config.tokens)
    check_stages(config, recipe)
    backbone, notes = weightless(config)
    encoder = plan_encoder(config, recipe, backbone)
    lines = [f"run {config.name}: recipe {recipe.name}, model {config.model}, seed {config.seed}, to {config.folder}", *notes]
    open_parameters(config, backbone)
    trained = adapters.trainable(backbone)
    total, open_ = sum(p.numel() for p in backbone.parameters()), sum(p.numel() for p in trained.values())
    lines.append(f"trains {open_:,} of {total:,} parameters ({100 * open_ / total:.2f} %): {_groups(trained)}")
    todo = Plan(config, recipe, encoder, [])
    for stage in recipe.stages:
        if run := config.stages.get(stage.name):
            lines += _stage(todo, stage, run, open_, total)
    return "\n".join(lines)


def weightless(config: RunConfig) -> tuple[Backbone, list[str]]:
    """The backbone on the meta device (shapes, tokenizer, image settings, no weights), and what stood in for what is not at hand."""
    recipe = load_recipe(config.recipe).with_tokens(config.tokens)
    notes: list[str] = []
    local = Path(config.model).is_dir() or (SHIPPED / config.model).is_dir()
    if not local and config.model in known():
        folder = SHIPPED / "comatch-nano"
        model_config = config_of(config.model)
        notes.append(f"note: {config.model} is not on this machine; its published shape is used, and the nano tokenizer stands in: text lengths are estimates")
    else:
        folder = resolve("comatch-nano" if config.model == "untrained-nano" else config.model, config.revision)
        model_config = AutoConfig.from_pretrained(folder)
    family(model_config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    if notes:
        processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
    backbone = Backbone(model, AutoTokenizer.from_pretrained(folder), processor, recipe, source=config.model)
    return backbone, notes


def _groups(trained: dict[str, torch.nn.Parameter]) -> str:
    count: dict[str, int] = {}
    for name, parameter in trained.items():
        kind = "compression rows" if name == "rows" else "adapters" if "lora_" in name else "vision" if ".visual." in name else "language model"
        count[kind] = count.get(kind, 0) + parameter.numel()
    return ", ".join(f"{kind} {n:,}" for kind, n in count.items())


def _stage(todo: Plan, stage: Stage, run: StageRun, trained: int, total: int) -> list[str]:
    example, note = _example(todo, stage, run)
    shape = Shape.of(todo.encoder.backbone.stock.config)
    patches = sum(t * h * w for t, h, w in example.grids)
    forward = forward_flops(shape, len(example), patches, example.supervised)
    pairs = "contrastive" in stage.objectives
    full = todo.config.adapter.kind == "full"
    # Frozen matrices need no weight gradient: forward plus input gradient; a matching item runs forward once more under a token budget.
    passes = (3 if full else 2) + (1 if pairs else 0)
    work = forward * passes * run.batch * run.steps * (2 if pairs else 1)
    bytes_: float = total * (4 if full or todo.config.precision == "fp32" else 2) + trained * 16
    bytes_ += min(run.tokens_per_pass, run.batch * len(example)) * _BYTES_PER_TOKEN_LAYER_WIDTH * shape.layers * shape.width
    layout = _runs(example)
    objective = ", ".join(f"{name} x {weight:g}" for name, weight in stage.objectives.items())
    lines = ["", f"stage {stage.name}: {objective}; {run.steps} steps of {run.batch}; visibility {' '.join(stage.visibility.table)}"]
    lines += [note] if note else []
    lines.append(f"  tokens of one example: {len(example)} = {layout}; {example.supervised} supervised, {patches} patches")
    lines.append(f"  memory: about {bytes_ / 2**30:.1f} GiB (weights, optimiser, activations of one pass of {run.tokens_per_pass} tokens)")
    hours = work / _H200 / 0.5 / 3600
    lines.append(f"  work: {work:.2e} FLOP; about {hours:.1f} h on one H200 at half its matmul rate (an estimate, not a measurement)")
    return [*lines, "  mask (row looks at column; x context, C compression, d dialogue):", *_mask(example, stage)]


def _example(todo: Plan, stage: Stage, run: StageRun) -> tuple[Example, str]:
    preparer, note = todo.encoder.preparer, ""
    try:
        source = stage_source(todo.config, run)
        context, turns = source.dialogue(0).context, source.dialogue(0).turns
        if "contrastive" in stage.objectives:
            context = source.group(0).query
    except DataError as error:
        note = f"  note: the data cannot be opened ({error}); a blank picture of 640 x 640 with four turns stands in"
        context = as_message(torch.zeros(640, 640, 3, dtype=torch.uint8).numpy())
        turns = (("What is the main object in the picture, and what colour is it?", "A red car that is parked in front of a house."),) * 4
    if "dialogue" in stage.visibility.roles:
        return preparer.dialogue(Dialogue(context, turns), stage), note
    return preparer.item(context, stage), note


def _runs(example: Example) -> str:
    out: list[tuple[str, int]] = []
    for role in example.roles.tolist():
        if out and out[-1][0] == ROLES[role]:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        else:
            out.append((ROLES[role], 1))
    return " + ".join(f"{n} {role}" for role, n in out)


def _mask(example: Example, stage: Stage) -> list[str]:
    batch = collate([example])
    allowed = dense(batch.roles, batch.example, stage.visibility)[0, 0]
    # Each role keeps a share of the rows, so that a long context does not hide the rest.
    share = _MASK_CELLS // len(stage.visibility.roles)
    picked: list[int] = []
    for role in range(len(ROLES)):
        places = (batch.roles[0] == role).nonzero().flatten().tolist()
        step = max(1, -(-len(places) // share))
        picked += places[::step]
    names = [_MARK[ROLES[int(batch.roles[0, i])]] for i in picked]
    rows = ["    " + " " + "".join(names)]
    return rows + ["    " + names[i] + "".join("#" if allowed[a, b] else "." for b in picked) for i, a in enumerate(picked)]
