"""All recipes of the family train: by themselves, on two processes, from their config files; and the doctor has no objection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Ranks, sharded, weights

from comatch.config import RunConfig, load_config
from comatch.data.mixture import Ingredient, Mixture
from comatch.data.scenes import scene
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import ConfigError
from comatch.recipes import load_recipe
from comatch.training import loop
from comatch.training.doctor import examine
from comatch.training.dry import describe
from comatch.training.loader import StageData, batches

Folders = Callable[[str], Path]


def run(folder: Path, out: Path, recipe: str, **changes: Any) -> RunConfig:
    stage = {"steps": 2, "batch": 4, "tokens_per_pass": 200, "optim": {"lr": 0.01}, "log_every": 1}
    values: dict[str, Any] = {"name": "tiny", "model": str(folder), "recipe": recipe, "precision": "fp32", "device": "cpu"}
    values |= {"output": str(out), "adapter": {"kind": "lora", "r": 4}, "stages": {s.name: stage for s in load_recipe(recipe).stages}}
    values |= {} if load_recipe(recipe).tokens < 2 else {"tokens": 4}
    return RunConfig.model_validate(values | changes)


BEYOND = ("coma-nested", "coma-apart", "coma-rebuild")
TRAINED = ("cocoa-sealed", "moca", "matching-bidirectional", "coma-full", "coma-kl", "coma-joint", *BEYOND)


@pytest.mark.parametrize("name", TRAINED)
def test_every_recipe_trains_and_encodes(folder_of: Folders, tmp_path: Path, name: str) -> None:
    config = run(folder_of("qwen2_5_vl"), tmp_path / "run", name)
    text = describe(config)
    assert all(f"stage {stage.name} " in text for stage in load_recipe(name).stages)
    rows = loop.read_metrics(loop.train(config, quiet=True) / "metrics.jsonl")
    assert all(np.isfinite(row["loss"]) for row in rows) and len(rows) == 2 * len(config.stages)
    encoder = Encoder.load(tmp_path / "run")
    assert encoder.encode(["a red circle", scene(0, 0).draw()]).shape == (2, encoder.dim)
    if name == "coma-joint":
        assert all(abs(row["loss"] - row["loss_contrastive"] - row["loss_next_token"]) < 1e-6 for row in rows)


@pytest.mark.parametrize("name", ["cocoa", "coma-kl", "coma-joint", "coma-rebuild"])
def test_the_doctor_finds_nothing_wrong(folder_of: Folders, tmp_path: Path, name: str) -> None:
    report = examine(run(folder_of("qwen2_5_vl"), tmp_path / "run", name))
    assert report.sound, [finding for finding in report.everything if finding.level == "error"]
    assert [stage.name for stage in report.stages] == [stage.name for stage in load_recipe(name).stages]
    assert all(any(f.check == "gradients" and f.level == "ok" for f in stage.findings) for stage in report.stages)


RANKED = [("cocoa", "warmup", 2), ("coma-joint", "joint", 6)]
RANKED += [(name, "compress", 6) for name in ("coma-kl", *BEYOND)]


@pytest.mark.parametrize("sharding", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize(("name", "stage", "batch"), RANKED)
def test_two_processes_train_what_one_trains(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stage: str, batch: int, sharding: bool
) -> None:
    """In CoCoA's warm-up one rank has a picture and the other words alone, so it has nothing for the decoder."""
    pq.write_table(pa.table({"a": ["a red circle"] * 8, "b": [f"{n} large red circles" for n in range(8)]}), tmp_path / "words.parquet")
    words = {"source": "table", "path": str(tmp_path / "words.parquet"), "columns": {"query.text": "a", "positive.text": "b"}, "weight": 1}
    data = {"data": {"mixture": {"scenes": {"source": "scenes", "weight": 1}, "words": words}}} if name == "cocoa" else {}
    base = run(folder_of("qwen2_5_vl"), tmp_path, name).stages[stage].model_dump(exclude_defaults=True)
    for ranks in (1, 2):
        if sharding and ranks == 2:
            monkeypatch.setattr(loop, "Accelerator", sharded)
        config = run(folder_of("qwen2_5_vl"), tmp_path / str(ranks), name, stages={stage: {**base, "batch": batch, **data}})
        assert Ranks(config, tmp_path / f"log{ranks}", ranks).wait() == [0] * ranks, (tmp_path / f"log{ranks}").read_text()
    one, two = (loop.read_metrics(tmp_path / n / "metrics.jsonl") for n in "12")
    for a, b in zip(one, two, strict=True):
        for key in (k for k in a if k.startswith("loss") or k in ("gradient_norm", "accuracy")):
            assert abs(a[key] - b[key]) < 2e-4 * max(1, abs(a[key])), key
    first, second = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert first.keys() == second.keys()
    assert max(float((first[k] - second[k]).abs().max()) for k in first) < 2e-3  # AdamW's first steps are of full size whatever the slope


@pytest.mark.parametrize("name", ["cocoa-nano", "moca-nano"])
def test_the_shipped_runs_train(tmp_path: Path, name: str) -> None:
    path = Path(__file__).resolve().parent.parent / "runs" / f"{name}.yaml"
    stages = load_config(path).stages
    short = [f"stages.{stage}.{setting}" for stage in stages for setting in ("steps=2", "batch=4", "log_every=1")]
    config = load_config(path, [*short, f"output={tmp_path / 'run'}", "device=cpu"])
    rows = loop.read_metrics(loop.train(config, quiet=True) / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [stage for stage in stages for _ in range(2)]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_a_joint_row_is_of_the_pairs_row_for_any_number_of_workers(folder_of: Folders) -> None:
    recipe = load_recipe("coma-joint").with_tokens(4)
    encoder, stage, source = Encoder.load(folder_of("qwen2_5_vl"), recipe=recipe), recipe.stages[0], open_source("scenes", limit=30)
    data = StageData(Mixture((Ingredient("scenes", source),)), encoder.preparer, stage, seed=0, batch=4)
    told = {}
    for workers in (0, 1):
        samples = [sample for batch in batches(data, 0, 3, workers) for sample in batch]
        told[workers] = [(s.row, [(e.ids.tolist(), [p.tolist() for p in e.patches]) for e in s.everything]) for s in samples]
    assert told[0] == told[1] and all(len(everything) == 3 for _, everything in told[0])
    for sample in samples:
        query, _, dialogue = sample.everything
        n = len(query)
        assert sample.labelled is dialogue and dialogue.supervised and not query.supervised
        assert np.array_equal(dialogue.ids[:n], query.ids) and np.array_equal(dialogue.patches[0], query.patches[0])


def test_a_prompt_counts_for_stages_that_read_pairs(folder_of: Folders, tmp_path: Path) -> None:
    text = "name: t\nmodel: m\nrecipe: {}\nstages:\n  {}:\n    steps: 1\n    batch: 2\n    data: {{source: scenes, prompt: describe it}}\n"
    (tmp_path / "a.yaml").write_text(text.format("cocoa", "bridge"))
    assert load_config(tmp_path / "a.yaml").stages["bridge"].data.prompt == "describe it"  # type: ignore[union-attr]
    (tmp_path / "b.yaml").write_text(text.format("coma", "compress"))
    with pytest.raises(ConfigError, match="prompt has no effect"):
        load_config(tmp_path / "b.yaml")
