"""One run of a study: trained, evaluated, measured, and told as plain data."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comatch.analysis.carried import Told, carried
from comatch.analysis.masks import dialogue_stage
from comatch.analysis.redundancy import redundancy
from comatch.analysis.survival import scene_questions, survival
from comatch.card import write_json
from comatch.config import DataConfig, MeasureConfig, RunConfig
from comatch.data.sources import Source, open_source
from comatch.encoder import Encoder
from comatch.evaluation.tasks import Task, emoji_tasks, evaluate, scene_tasks
from comatch.studies.plan import Arm
from comatch.training.loop import read_metrics, train
from comatch.training.origin import code_digest

RESULT = "result.json"
_LAST = 5


def run_one(arm: Arm, seed: int, measure: MeasureConfig, folder: Path, *, quiet: bool = True) -> dict[str, Any] | None:
    """Train and measure one seed of an arm, write `folder`/result.json and return what it holds; an interrupted run goes on.

    Of several processes that train together only the first measures; the others return None.
    """
    config = arm.run(seed, folder / "run")
    trained = _trained(config, quiet)
    if int(os.environ.get("RANK", "0")):
        return None
    result = {
        "arm": arm.name,
        "seed": seed,
        "stages": _stages(trained),
        "scores": _scores(Encoder.load(trained), tasks(measure)),
        "redundancy": _redundancy(trained, arm, config, measure),
        "carried": _carried(trained, arm, config, measure),
        "answers": _answers(trained, arm, config, measure),
        "made_by": {"code": code_digest(), "torch": torch.__version__, "machine": platform.machine(), "device": _device()},
    }
    write_json(folder / RESULT, result, in_order=True)
    return result


def tasks(measure: MeasureConfig) -> list[Task]:
    """The ranking tasks of a study."""
    if measure.suite == "emoji":
        return emoji_tasks(str(measure.data), split=measure.split)
    return scene_tasks(measure.n, measure.candidates, seed=measure.seed, split=measure.split)


def _trained(config: RunConfig, quiet: bool) -> Path:
    manifest = config.folder / "manifest.json"
    if manifest.is_file() and json.loads(manifest.read_text(encoding="utf-8"))["status"] == "complete":
        return config.folder  # it was killed after its training
    return train(config, quiet=quiet)


def _stages(folder: Path) -> dict[str, dict[str, float]]:
    """Of each stage its last loss, mean of a few lines, and what it took."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
    out = {}
    for stage in dict.fromkeys(row["stage"] for row in rows):
        mine = [row for row in rows if row["stage"] == stage]
        out[stage] = {
            "loss": float(np.mean([row["loss"] for row in mine[-_LAST:]])),
            "steps": mine[-1]["step"],
            "items": sum(row["items"] for row in mine),
            "tokens": sum(row["tokens"] for row in mine),
            "tflop": sum(row["tflop"] for row in mine),
            "seconds": sum(row["seconds"] for row in mine),
        }
    return out


def _scores(encoder: Encoder, wanted: list[Task]) -> dict[str, dict[str, Any]]:
    names = ("hit", "chance", "mrr", "n", "ties")
    return {score.name: {name: getattr(score, name) for name in names} for score in evaluate(encoder, wanted)}


def _redundancy(folder: Path, arm: Arm, config: RunConfig, measure: MeasureConfig) -> dict[str, Mapping[str, float]]:
    """How alike the compression tokens are after each stage."""
    if not measure.tokens or arm.recipe.tokens < 2:
        return {}
    held_out = _held_out(config.data, measure, measure.tokens)
    items = [held_out.dialogue(i).context for i in range(len(held_out))]
    found: dict[str, Mapping[str, float]] = {}
    for stage in config.stages:
        report = redundancy(Encoder.load(folder / stage), items)
        found[stage] = {"cosine": report.mean_cosine, "centred": report.mean_cosine_centred, "rank": report.rank_centred}
    return found


def _carried(folder: Path, arm: Arm, config: RunConfig, measure: MeasureConfig) -> dict[str, Mapping[str, float]]:
    """How much readers of the compression tokens get from them, after each stage that has such readers."""
    found: dict[str, Mapping[str, float]] = {}
    for stage in (arm.recipe.stage(name) for name in config.stages):
        if measure.carried and stage.tells and stage.speaks and "compression" in stage.visibility.roles:
            rows = _held_out(config.stages[stage.name].data or config.data, measure, measure.carried)
            told = [_told(rows, i, stage.tells) for i in range(len(rows))]
            found[stage.name] = carried(Encoder.load(folder / stage.name), stage, told).to_dict()
    return found


def _answers(folder: Path, arm: Arm, config: RunConfig, measure: MeasureConfig) -> dict[str, Mapping[str, float]]:
    """Shares of right answers from the compression tokens alone, by kind, after each stage; of all, also where the picture or another
    item's tokens may be looked at."""
    if not measure.answers or dialogue_stage(arm.recipe) is None:
        return {}
    questions = scene_questions(measure.answers, seed=measure.seed, split=measure.split)
    found: dict[str, Mapping[str, float]] = {}
    for stage in config.stages:
        kinds = survival(Encoder.load(folder / stage), questions).by_kind
        whole = {"all, looking": kinds["all"].looking, "all, another's tokens": kinds["all"].another}
        found[stage] = {kind: row.kept for kind, row in kinds.items()} | whole
    return found


def _told(rows: Source, i: int, tells: str) -> Told:
    if tells == "dialogue":
        return rows.dialogue(i)
    group = rows.group(i)
    return group.query, group.positives[0]


def _held_out(data: DataConfig, measure: MeasureConfig, n: int) -> Source:
    """The first rows of another split of what a stage was trained on, of a mixture its first source."""
    part = next(iter(data.sources.values()))
    return open_source(part.source, path=part.path, split=measure.split, limit=n, columns=part.columns, dialogue=part.dialogue)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
