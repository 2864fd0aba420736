"""A guide decides what the margin masks, in training as in the step; one that reads items otherwise, or changed, is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import stop_after
from pydantic import ValidationError

from comatch.config import LossConfig, RunConfig
from comatch.encoder import Encoder
from comatch.errors import ConfigError, TrainingError
from comatch.recipes import load_recipe
from comatch.training import loop
from comatch.training.guide import Guide
from comatch.training.loop import read_metrics

COMA = load_recipe("coma").with_tokens(4)


@pytest.fixture(scope="module")
def base(folder_of: Callable[[str], Path]) -> Path:
    return folder_of("qwen2_5_vl")


@pytest.fixture(scope="module")
def twin(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student before its first step."""
    return Encoder.load(base, recipe=COMA).save(tmp_path_factory.mktemp("guides") / "twin")


@pytest.fixture(scope="module")
def other(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same tokens and pictures with other opinions."""
    encoder = Encoder.load(base, recipe=COMA)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in encoder.backbone.text.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    encoder.backbone.publish_rows()
    return encoder.save(tmp_path_factory.mktemp("guides") / "other")


def config(base: Path, out: Path, guide: Path | None, margin: float | None = -0.001, steps: int = 1) -> RunConfig:
    loss: dict[str, Any] = {"mask_margin": margin, "guide": str(guide) if guide else None}
    stage = {"steps": steps, "batch": 12, "tokens_per_pass": 400, "optim": {"lr": 0.01}, "log_every": 1, "loss": loss}
    values = {"name": "guided", "model": str(base), "recipe": "coma", "tokens": 4, "precision": "fp32", "device": "cpu", "output": str(out)}
    return RunConfig.model_validate({**values, "save_every": 1, "stages": {"match": stage}})


def first_loss(base: Path, out: Path, guide: Path | None, margin: float | None = -0.001) -> float:
    return float(read_metrics(loop.train(config(base, out, guide, margin), quiet=True) / "metrics.jsonl")[0]["loss"])


def test_a_guide_equal_to_the_student_is_the_student_judging_itself(base: Path, twin: Path, other: Path, tmp_path: Path) -> None:
    itself, guided = first_loss(base, tmp_path / "a", None), first_loss(base, tmp_path / "b", twin)
    assert guided == pytest.approx(itself, abs=1e-6)
    unlike = [first_loss(base, tmp_path / "c", other), first_loss(base, tmp_path / "d", None, margin=None)]
    assert min(abs(loss - itself) for loss in unlike) > 1e-3, "the guide decides, and without a margin nothing is masked"


def test_a_guide_of_other_tokens_is_refused(base: Path, tmp_path: Path) -> None:
    guide = Encoder.load(base, recipe=load_recipe("coma").with_tokens(8)).save(tmp_path / "eight")
    with pytest.raises(ConfigError, match=r"loss.guide .*eight reads items in another way .*token ids.*same number of tokens"):
        loop.train(config(base, tmp_path / "run", guide), quiet=True)
    with pytest.raises(ConfigError, match="no embedding model"):
        loop.train(config(base, tmp_path / "run2", base), quiet=True)


def test_other_pixels_are_refused(base: Path, twin: Path) -> None:
    student = Encoder.load(base, recipe=COMA)
    assert Guide.load(str(twin), student, torch.device("cpu")).encoder.fingerprint
    student.preparer.images = student.images.limited(10_000, None, None)
    with pytest.raises(ConfigError, match="differ"):
        Guide.load(str(twin), student, torch.device("cpu"))


def test_a_guide_that_changed_is_refused_and_one_that_moved_is_not(base: Path, twin: Path, other: Path, tmp_path: Path) -> None:
    guide = tmp_path / "guide"
    twin_copy = Encoder.load(twin).save(guide)
    run = config(base, tmp_path / "run", twin_copy, steps=3)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(loop.Stopped):
            loop.train(run, quiet=True)
    with pytest.raises(TrainingError, match=r"stages.match.loss.guide"):
        loop.train(config(base, tmp_path / "run", other, steps=3), quiet=True)
    guide.rename(tmp_path / "moved")
    loop.train(config(base, tmp_path / "run", tmp_path / "moved", steps=3), quiet=True)
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3


def test_a_guide_without_a_margin_has_no_effect_and_is_refused() -> None:
    with pytest.raises(ValidationError, match="guide"):
        LossConfig(guide="somewhere")
