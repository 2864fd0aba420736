"""The training loop: every stage of a recipe in order, on Hugging Face Accelerate."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import nn
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.nano import make_nano
from comatch.config import OptimConfig, RunConfig, StageRun
from comatch.data.images import ImageSettings
from comatch.data.scenes import scene
from comatch.data.sources import Source, open_source
from comatch.encoder import Encoder
from comatch.errors import ConfigError, TrainingError
from comatch.recipe import Recipe, Stage
from comatch.recipes import load_recipe
from comatch.training.loader import Quarantine, Sample, StageData, batches
from comatch.training.progress import Reporter
from comatch.training.run import RunFolder
from comatch.training.step import StepResult, check_finite, contrastive_step, token_step

UNTRAINED = "untrained-nano"


@dataclass
class Plan:
    """Everything a run needs but the optimiser: recipe, encoder (backbone, preparer), and a source for each stage that will run."""

    config: RunConfig
    recipe: Recipe
    encoder: Encoder
    stages: list[tuple[Stage, StageRun, Source]]


def plan(config: RunConfig) -> Plan:
    """Check a config against its recipe, open its data, load its model. Raises ConfigError or DataError before anything heavy is loaded."""
    recipe = load_recipe(config.recipe).with_tokens(config.tokens)
    check_stages(config, recipe)
    stages = [(stage, run, stage_source(config, run)) for stage in recipe.stages if (run := config.stages.get(stage.name))]
    if config.model == UNTRAINED:
        with TemporaryDirectory() as scratch:
            make_nano(Path(scratch), nano_texts(), seed=config.seed)
            backbone = Backbone.load(scratch, recipe, seed=config.seed)
    else:
        low = torch.bfloat16 if config.precision == "bf16" and config.adapter.kind != "full" else torch.float32
        backbone = Backbone.load(config.model, recipe, dtype=low, revision=config.revision, seed=config.seed)
    return Plan(config, recipe, plan_encoder(config, recipe, backbone), stages)


def check_stages(config: RunConfig, recipe: Recipe) -> None:
    """Raise ConfigError where a config trains a stage that its recipe does not have."""
    known = [stage.name for stage in recipe.stages]
    if unknown := sorted(set(config.stages) - set(known)):
        raise ConfigError(f"stages {unknown}: recipe {recipe.name!r} has {known}; use those names under 'stages'")


def check_trackers(config: RunConfig) -> None:
    """Raise ConfigError for a tracker that is not installed; Accelerate would leave it out without a word."""
    absent = [name for name in config.tracking if find_spec(name) is None]
    if absent:
        raise ConfigError(f"tracking {absent} is not installed; pip install {' '.join(absent)}, or take it out")


def plan_encoder(config: RunConfig, recipe: Recipe, backbone: Backbone) -> Encoder:
    """The encoder that a run trains, with the config's image limits."""
    images = ImageSettings.from_processor(backbone.processor).limited(config.images.min_pixels, config.images.max_pixels)
    return Encoder(backbone, recipe, images)


def stage_source(config: RunConfig, run: StageRun) -> Source:
    """The data of one stage: its own, or the run's."""
    data = run.data or config.data
    return open_source(
        data.source, path=data.path, split=data.split, limit=data.limit, seed=config.seed, columns=data.columns, dialogue=data.dialogue
    )


def open_parameters(config: RunConfig, backbone: Backbone) -> None:
    """Freeze everything but what the run trains, and keep that in float32."""
    a = config.adapter
    adapters.attach(backbone, a.kind, r=a.r, alpha=a.alpha, dropout=a.dropout, targets=tuple(a.targets), train_vision=a.train_vision)
    backbone.rows.requires_grad_(len(backbone.rows) > 0)
    adapters.cast_trainable(backbone)


def train(config: RunConfig, *, overwrite: bool = False, quiet: bool = False) -> Path:
    """Run every stage that the config names and return the run folder.

    Each finished stage is saved under its name in the run folder; `Encoder.load(folder)` loads the last. Raises TrainingError
    where the folder already holds a run, or a loss is not finite.
    """
    check_trackers(config)
    set_seed(config.seed)
    todo = plan(config)
    # Accelerate keeps the precision of the first run in a process for all later ones; each of ours has its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=config.device == "cpu",
        log_with=list(config.tracking) or None,
        project_dir=str(config.folder),
    )
    folder = RunFolder.create(config.folder, config, todo.recipe, overwrite=overwrite, main=accelerator.is_main_process)
    if config.tracking:
        accelerator.init_trackers(config.name, config={"digest": config.digest})
    for stage, run, source in todo.stages:
        quarantine = run_stage(accelerator, todo, stage, run, source, folder, quiet=quiet)
        adapters.merge(todo.encoder.backbone)
        if accelerator.is_main_process:
            save_stage(todo.encoder, folder.path / stage.name)
            folder.stage_done(stage.name, bad_rows=dict(quarantine.reasons))
        accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.complete()
    accelerator.end_training()
    AcceleratorState._reset_state()
    return folder.path


def run_stage(
    accelerator: Accelerator, todo: Plan, stage: Stage, run: StageRun, source: Source, folder: RunFolder, *, quiet: bool = False
) -> Quarantine:
    """Train one stage to its end; the encoder's backbone holds the result. Returns the account of bad rows."""
    config, encoder = todo.config, todo.encoder
    share, rest = divmod(run.batch, accelerator.num_processes)
    if rest:
        raise ConfigError(f"stages.{stage.name}.batch={run.batch} does not divide by {accelerator.num_processes} processes")
    model, optimizer, scheduler = _prepare(accelerator, config, encoder.backbone, run)
    start = accelerator.process_index
    # Each rank takes every n-th sample of the one global order.
    data = StageData(source, encoder.preparer, stage, config.seed, range(start, run.steps * run.batch, accelerator.num_processes))
    quarantine = Quarantine((run.data or config.data).max_bad, len(source))
    reporter = Reporter(folder.metrics, stage.name, run.steps, accelerator, quiet=quiet, every=run.log_every)
    model.train()
    with reporter:
        for step, samples in enumerate(batches(data, share, config.workers)):
            began = time.perf_counter()
            for sample in samples:
                quarantine.add(sample)
            try:
                result = _step(accelerator, model, samples, stage, run, seed=config.seed + step * 1_000_003)
                norm = accelerator.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], run.optim.clip)
                check_finite(torch.as_tensor(norm), "gradient norm")
            except TrainingError as error:
                where = f"stage {stage.name}, step {step + 1}, rows {[sample.row for sample in samples]} of {source.name}"
                raise TrainingError(f"{where}: {error}") from error
            optimizer.step()
            rate = scheduler.get_last_lr()[0]
            scheduler.step()
            optimizer.zero_grad()
            reporter.step(step, result, float(norm), rate, quarantine.count, time.perf_counter() - began)
    accelerator.free_memory()
    encoder.backbone = accelerator.unwrap_model(model)
    encoder.backbone.eval()
    return quarantine


def save_stage(encoder: Encoder, path: Path) -> None:
    """Save an embedding model, or a plain VLM where the recipe has no pooling."""
    if encoder.recipe.encoding is not None:
        encoder.save(path)
        return
    path.mkdir(parents=True, exist_ok=True)
    for part in (encoder.backbone.hf, encoder.backbone.tokenizer, encoder.backbone.processor):
        part.save_pretrained(path)


def nano_texts() -> list[str]:
    """What the nano tokenizer learns its words from: scene texts, and English from Python's own help pages for everything else."""
    from pydoc_data.topics import topics

    scenes = [scene(0, i) for i in range(2000)]
    texts = [text for i, s in enumerate(scenes) for text in (s.dense_caption(), s.caption(i), s.describe(i)[0])]
    texts += [f"{question}\n{answer}" for i, s in enumerate(scenes) for question, answer, _ in s.dialogue(i, 9)]
    return texts + [topics[name] for name in sorted(topics)]


def _prepare(accelerator: Accelerator, config: RunConfig, backbone: Backbone, run: StageRun) -> tuple[nn.Module, Any, Any]:
    open_parameters(config, backbone)
    params = list(adapters.trainable(backbone).values())
    o = run.optim
    optimizer = torch.optim.AdamW(params, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
    model, optimizer = accelerator.prepare(backbone, optimizer)
    return model, optimizer, schedule(optimizer, o, run.steps)


def schedule(optimizer: Any, optim: OptimConfig, steps: int) -> Any:
    """Linear warm-up over a share of the steps, then cosine to zero or constant."""
    warmup = round(optim.warmup * steps)
    if optim.schedule == "constant":
        return get_constant_schedule_with_warmup(optimizer, warmup)
    return get_cosine_schedule_with_warmup(optimizer, warmup, steps)


def _step(accelerator: Accelerator, model: nn.Module, samples: Sequence[Sample], stage: Stage, run: StageRun, seed: int) -> StepResult:
    if "contrastive" in stage.objectives:
        queries, targets = zip(*(sample.examples for sample in samples), strict=True)
        return contrastive_step(
            accelerator,
            model,
            queries,
            targets,
            stage,
            run.tokens_per_pass,
            temperature=run.temperature,
            symmetric=run.symmetric,
            seed=seed,
        )
    examples = [sample.examples[0] for sample in samples]
    return token_step(accelerator, model, examples, stage, run.tokens_per_pass, run.batch)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
