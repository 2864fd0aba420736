"""What a run config may say: names, types, defaults and limits. All else is refused."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from comatch.config.data import DataConfig
from comatch.config.evaluate import EvaluateConfig
from comatch.config.images import ImagesConfig
from comatch.config.loss import LossConfig
from comatch.config.part import Part


class AdapterConfig(Part):
    """Which weights of the backbone learn."""

    kind: Literal["lora", "dora", "full"] = "lora"
    """`full` trains the backbone's own weights; the next four must then stay at their defaults."""
    r: int = Field(default=16, ge=1)
    """Rank."""
    alpha: int = Field(default=64, ge=1)
    """Scale is alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(default=["q_proj", "k_proj", "v_proj", "o_proj"], min_length=1)
    """Names of the linear layers of the language model that get an adapter."""
    train_vision: bool = False
    """Also train the vision tower, which is frozen otherwise."""

    @model_validator(mode="after")
    def _no_effect(self) -> AdapterConfig:
        idle = ("r", "alpha", "dropout", "targets") if self.kind == "full" else ()
        self.refuse_changed(
            idle, "has no effect with kind 'full'; remove it, or set kind to 'lora' or 'dora'"
        )
        return self


class OptimConfig(Part):
    """AdamW and its schedule."""

    lr: float = Field(default=5e-5, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.999), strict=False)  # lax: YAML has no tuples
    eps: float = Field(default=1e-8, gt=0)
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"

    @model_validator(mode="after")
    def _decaying(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; each must be at least 0 and below 1")
        return self


class StageRun(Part):
    """How long and how large one stage of the recipe is trained."""

    steps: int = Field(default=0, ge=0)
    """Optimiser steps; this or epochs."""
    epochs: float | None = Field(default=None, gt=0)
    """In the place of steps: how often all rows are seen, in whole batches."""
    batch: int = Field(ge=1)
    """Examples of one batch, over all processes and passes; a contrastive loss sees them together."""
    tokens_per_pass: int = Field(default=4096, ge=1)
    """Language-model tokens of one forward pass; it changes memory and speed, not the result."""
    data: DataConfig | None = None
    """This stage's own data; None is the run's."""
    patches_per_pass: int | None = Field(default=None, ge=1)
    """Picture patches of one forward pass; None sets no limit."""
    keep_passes: int = Field(default=1, ge=1)
    """Contrastive stages only: passes whose graph is held in memory at once; those are not run a second time."""
    loss: LossConfig = LossConfig()
    """Contrastive stages only."""
    optim: OptimConfig = OptimConfig()
    log_every: int = Field(default=10, ge=1)
    """Steps from one line of metrics to the next."""

    @model_validator(mode="after")
    def _one_length(self) -> StageRun:
        if (self.steps > 0) == (self.epochs is not None):
            raise ValueError(f"steps is {self.steps} and epochs is {self.epochs}; give one of the two, above 0")
        return self


class RunConfig(Part):
    """A whole run: which model, which recipe, which data, how long, where to."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's name; it becomes a folder name."""
    model: str = Field(min_length=1)
    """A model shipped with comatch ("comatch-nano"), a folder, or a Hub id."""
    revision: str | None = None
    """Hub revision: a commit, tag or branch."""
    recipe: str = Field(min_length=1)
    """A recipe's name, or a path ending in .yaml."""
    tokens: int | None = Field(default=None, ge=1)
    """Number K of compression tokens; None is the recipe's own."""
    seed: int = Field(default=0, ge=0)
    output: str = Field(default="out/{name}", min_length=1)
    """Run folder; `{name}` stands for the run's name."""
    precision: Literal["fp32", "bf16"] = "bf16"
    device: Literal["cpu"] | None = None
    """"cpu" keeps off a GPU; None takes what Accelerate finds (choose GPUs by CUDA_VISIBLE_DEVICES)."""
    workers: int = Field(default=0, ge=0)
    """Processes that prepare examples; 0 prepares them in the main one."""
    compile: bool = False
    """Fuse the language model's layers by torch.compile; the first passes then take a minute or two."""
    checkpointing: Literal["auto", "none", "all"] | Annotated[int, Field(ge=0)] = "auto"
    """How many layers of the language model are run again in the backward pass in the place of being kept; auto takes those that
    do not fit into free memory. Memory and speed change, the result does not."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """What one device could do, in TFLOP/s; metrics then tell the share that was reached (mfu)."""
    timeout_minutes: float = Field(default=30.0, gt=0)
    """With several processes: how long one waits for the others before the run ends with an error."""
    images: ImagesConfig = ImagesConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    stages: dict[str, StageRun] = Field(min_length=1)
    """Which stages of the recipe to train, by name."""
    save_every: int | None = Field(default=100, ge=1)
    """Steps from one checkpoint to the next; None saves at the end of a stage and on signals only."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay, besides the best."""
    evaluate: EvaluateConfig | None = None
    """Scores while the stage that makes the vectors is trained, and the choice of its best checkpoint."""
    tracking: list[Literal["tensorboard", "wandb"]] = Field(default=[])
    """Trackers beside the metrics file that is always written."""

    @model_validator(mode="after")
    def _store_of_a_frozen_tower(self) -> RunConfig:
        if self.images.store and self.adapter.train_vision:
            both = f"images.store is {self.images.store!r} and adapter.train_vision is true"
            raise ValueError(f"{both}; what a tower that learns gave is soon stale, so drop one of the two")
        return self

    @model_validator(mode="after")
    def _folder_is_plain(self) -> RunConfig:
        if re.search(r"[{}]", self.output.replace("{name}", "")):
            raise ValueError(f"output is {self.output!r}; the only placeholder is {{name}}")
        return self

    @property
    def folder(self) -> Path:
        """The run folder: `output` with the name filled in."""
        return Path(self.output.replace("{name}", self.name))

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all values: equal digests, equal runs."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
