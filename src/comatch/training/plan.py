"""What a run needs before its first step: checked config, opened data, loaded model, what trains; and how a stage is saved."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.nano import make_nano
from comatch.card import CARD
from comatch.config import RunConfig, StageRun
from comatch.data.images import ImageSettings
from comatch.data.mixture import Mixture, open_mixture
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ConfigError, DataError
from comatch.recipe import Recipe, Stage
from comatch.recipes import load_recipe

UNTRAINED = "untrained-nano"


@dataclass
class Plan:
    """Everything a run needs but the optimiser: recipe, encoder (backbone, preparer), and the data of each stage that will run."""

    config: RunConfig
    recipe: Recipe
    encoder: Encoder
    stages: list[tuple[Stage, StageRun, Mixture]]


def plan(config: RunConfig) -> Plan:
    """Check a config against its recipe, open its data, load its model. Raises ConfigError or DataError before anything heavy is loaded."""
    recipe, stages = survey(config)
    return Plan(config, recipe, open_encoder(config, recipe), stages)


def survey(config: RunConfig) -> tuple[Recipe, list[tuple[Stage, StageRun, Mixture]]]:
    """The recipe and the stages that will run, with their data. Raises ConfigError or DataError."""
    recipe = load_recipe(config.recipe).with_tokens(config.tokens)
    check_stages(config, recipe)
    check_trackers(config)
    return recipe, [(stage, *open_data(config, run, stage)) for stage in recipe.stages if (run := config.stages.get(stage.name))]


def open_encoder(config: RunConfig, recipe: Recipe, start: Path | None = None) -> Encoder:
    """The encoder that a stage trains: of the config's model, or of the folder `start` of the stage before.

    Also without an interruption a stage starts from the folder of the one before, so that a run that goes on there is the same run.
    """
    low = torch.bfloat16 if config.precision == "bf16" and config.adapter.kind != "full" else torch.float32
    if start is not None and (start / CARD).is_file():
        backbone = Encoder.load(start, device="cpu").backbone
    elif start is not None:
        backbone = Backbone.load(start, recipe, dtype=low, seed=config.seed)
    elif config.model == UNTRAINED:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # transformers writes a model on the first process alone, and each would read its own.
            told = f"model {UNTRAINED!r} is made anew by each process, and that goes for one only; start it without a launcher"
            raise ConfigError(f"{told}, or save one by comatch.backbones.nano.make_nano and name its folder")
        with TemporaryDirectory() as scratch:
            make_nano(Path(scratch), nano_texts(), seed=config.seed)
            backbone = Backbone.load(scratch, recipe, seed=config.seed)
    else:
        backbone = Backbone.load(config.model, recipe, dtype=low, revision=config.revision, seed=config.seed)
    encoder = plan_encoder(config, recipe, backbone)
    if config.images.store:
        kept = torch.bfloat16 if config.precision == "bf16" else None
        encoder.keep_features(config.images.store, max_bytes=int(config.images.store_gigabytes * 2**30), dtype=kept)
    return encoder


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
    wanted = config.images
    images = ImageSettings.from_processor(backbone.processor).limited(wanted.min_pixels, wanted.max_pixels, wanted.draft)
    return Encoder(backbone, recipe, images)


def open_data(config: RunConfig, run: StageRun, stage: Stage) -> tuple[StageRun, Mixture]:
    """The stage with `steps` where the config said epochs, and its data: its own, or the run's. Raises ConfigError or DataError."""
    mixture = open_mixture(run.data or config.data, config.seed)
    try:
        if run.epochs is not None:
            run = run.model_copy(update={"steps": mixture.steps(run.epochs, run.batch), "epochs": None})
        mixture.check(run.steps, run.batch)
        if "contrastive" in stage.objectives:
            mixture.try_out(pairs=True)
        if stage.tells == "dialogue":
            mixture.try_out(pairs=False, target="target" in stage.visibility.roles)
    except (ConfigError, DataError) as error:
        raise type(error)(f"stages.{stage.name}: {error}") from error
    return run, mixture


def open_parameters(config: RunConfig, backbone: Backbone, stage: Stage | None = None) -> None:
    """Freeze everything but what the run trains, or what it trains in one stage, and keep that in float32."""
    a, head = config.adapter, stage is None or stage.speaks
    targets = tuple(a.targets)
    adapters.attach(
        backbone, a.kind, r=a.r, alpha=a.alpha, dropout=a.dropout, targets=targets, train_vision=a.train_vision, head=head
    )
    backbone.rows.requires_grad_(len(backbone.rows) > 0)
    adapters.cast_trainable(backbone)


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
