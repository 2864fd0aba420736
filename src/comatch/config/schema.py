"""What a run config may say: names, types, defaults and limits. All else is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Part(BaseModel):
    """What all parts share: unknown keys, wrong types, infinities and later changes are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def refuse_changed(self, names: Sequence[str], why: str) -> None:
        """Raise ValueError if one of these fields is not at its default: no setting is ignored in silence."""
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {show(value)}, which {why}")


class ImagesConfig(Part):
    """How large pictures may be, in pixels; None keeps the model's own setting."""

    min_pixels: int | None = Field(default=None, ge=1)
    """Smaller pictures are scaled up to this."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Larger pictures are scaled down to this."""

    @model_validator(mode="after")
    def _ordered(self) -> ImagesConfig:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            both = f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}"
            raise ValueError(f"{both}; lower the first or raise the second")
        return self


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


class DataConfig(Part):
    """One source of examples."""

    source: str = "scenes"
    """A source's name: the generated world, or a format that `path` is read as."""
    path: str | None = None
    """File or folder, for sources that read one."""
    split: str = "train"
    limit: int | None = Field(default=None, ge=1)
    """Use only this many examples."""
    max_bad: float = Field(default=0.001, ge=0, le=1)
    """Stop when a larger share of rows than this is unreadable."""
    columns: dict[str, str] | None = None
    """Our column names to the file's, where they differ."""
    dialogue: Literal["multi-turn", "single-turn", "description", "caption", "mixed"] = "multi-turn"
    """What a dialogue is made of."""


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
    schedule: Literal["cosine", "constant"] = "cosine"

    @model_validator(mode="after")
    def _decaying(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {list(self.betas)}; each must be at least 0 and below 1")
        return self


class StageRun(Part):
    """How long and how large one stage of the recipe is trained."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch: int = Field(ge=1)
    """Examples of one batch, over all processes and passes; a contrastive loss sees them together."""
    tokens_per_pass: int = Field(default=4096, ge=1)
    """Language-model tokens of one forward pass; it changes memory and speed, not the result."""
    data: DataConfig | None = None
    """This stage's own data; None is the run's."""
    temperature: float = Field(default=0.03, gt=0)
    """Contrastive stages only."""
    symmetric: bool = False
    """Contrastive stages only: also match positives to queries."""
    optim: OptimConfig = OptimConfig()
    log_every: int = Field(default=10, ge=1)
    """Steps from one line of metrics to the next."""


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
    images: ImagesConfig = ImagesConfig()
    adapter: AdapterConfig = AdapterConfig()
    data: DataConfig = DataConfig()
    stages: dict[str, StageRun] = Field(min_length=1)
    """Which stages of the recipe to train, by name."""
    tracking: list[Literal["tensorboard", "wandb"]] = []
    """Trackers beside the metrics file that is always written."""

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


def show(value: Any) -> str:
    """A value as error messages show it, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
