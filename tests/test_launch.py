"""The launch files start what they say: two processes by them train what one trains, with whole and with sharded weights."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from forked import Ranks, sharded
from torch.distributed.fsdp import FSDPModule

from comatch.backbones.base import Backbone
from comatch.config import RunConfig
from comatch.encoder import Encoder
from comatch.errors import ConfigError
from comatch.recipes import load_recipe
from comatch.training import loop
from comatch.training.loop import read_metrics, train
from comatch.training.plan import open_encoder

ROOT = Path(__file__).resolve().parent.parent
FILES = {path.stem: path for path in sorted((ROOT / "accelerate").glob("*.yaml"))}
Folders = Callable[[str], Path]


def config(model: Path, out: Path, **changes: Any) -> RunConfig:
    stage = {"tokens_per_pass": 300, "optim": {"lr": 0.01}, "log_every": 1}
    stages = {"compress": {**stage, "steps": 2, "batch": 4}, "match": {**stage, "steps": 2, "batch": 6, "loss": {"temperature": 0.2}}}
    values = {"name": "run", "model": str(model), "recipe": "coma", "tokens": 4, "precision": "fp32", "stages": stages}
    return RunConfig.model_validate({**values, "adapter": {"kind": "lora", "r": 4}, "output": str(out), **changes})


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def asked(name: str, *more: str) -> Namespace:
    """What `accelerate launch` makes of a file."""
    given = launch_command_parser().parse_args(["--config_file", str(FILES[name]), *more, "-m", "comatch"])
    args, _, _ = _validate_launch_command(given)
    return args


def test_every_file_is_read_as_it_is_meant() -> None:
    assert list(FILES) == ["ddp", "fsdp2", "single"]
    for path in FILES.values():
        said, taken = yaml.safe_load(path.read_text()), load_config_from_file(str(path))
        assert all(hasattr(taken, key) for key in said), "Accelerate does not know a key"
        assert path.read_text().startswith("# ") and str(path.relative_to(ROOT)) in path.read_text()
    assert not asked("single").multi_gpu and asked("single").num_processes == 1
    assert asked("ddp", "--num_processes", "8").multi_gpu and asked("ddp", "--num_processes", "8").num_processes == 8


def test_fsdp2_is_version_2_and_wraps_the_layers_of_every_family(folder_of: Folders, family: str) -> None:
    said = prepare_multi_gpu_env(asked("fsdp2"))
    assert (said["ACCELERATE_USE_FSDP"], said["FSDP_VERSION"], said["FSDP_AUTO_WRAP_POLICY"]) == ("true", "2", "TRANSFORMER_BASED_WRAP")
    assert (said["FSDP_RESHARD_AFTER_FORWARD"], said["FSDP_CPU_RAM_EFFICIENT_LOADING"]) == ("true", "false")
    assert "FSDP_TRANSFORMER_CLS_TO_WRAP" not in said, "the classes are the backbone's to name: those of other families would be refused"
    backbone = Backbone.load(folder_of(family))
    named = [type(module).__name__ for module in backbone.modules() if type(module).__name__ in backbone._no_split_modules]
    assert len(named) == len(backbone.text.layers) + len(backbone.vision_tower.blocks)


def test_two_processes_by_ddp_train_what_one_trains(folder_of: Folders, tmp_path: Path) -> None:
    two = config(folder_of("qwen2_5_vl"), tmp_path / "two", device="cpu")
    (tmp_path / "run.yaml").write_text(json.dumps(two.model_dump(mode="json")))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES["ddp"]), "--num_processes", "2"]
    ask = [*launch, "--main_process_port", "0", "-m", "comatch", "train", str(tmp_path / "run.yaml"), "--quiet"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one = train(config(folder_of("qwen2_5_vl"), tmp_path / "one"), quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), rtol=1e-4)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    items = ["a red circle", "two stars"]
    a, b = (Encoder.load(folder).encode(items) for folder in (tmp_path / "two", one))
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert np.abs(a[0] - a[1]).max() > 1e-2 and len(set(losses(one))) == 4


def test_two_processes_with_sharded_layers_train_what_one_trains(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs Accelerate itself shards nothing (docs/running.md), so its state is told otherwise; torch runs FSDP2 on gloo all the same."""
    one = train(config(folder_of("qwen2_5_vl"), tmp_path / "one"), quiet=True)
    real = loop._prepare
    shards = tmp_path / "shards"

    def counting(*args: Any) -> Any:
        prepared = real(*args)
        shards.write_text(str(sum(isinstance(module, FSDPModule) for module in prepared[0].modules())))
        return prepared

    monkeypatch.setattr(loop, "Accelerator", sharded)
    monkeypatch.setattr(loop, "_prepare", counting)
    ranks = Ranks(config(folder_of("qwen2_5_vl"), tmp_path / "two", device="cpu"), tmp_path / "log", 2)
    assert ranks.wait() == [0, 0], (tmp_path / "log").read_text()
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(one), rtol=1e-4)
    layers = len(Backbone.load(folder_of("qwen2_5_vl")).text.layers)
    assert int(shards.read_text()) > layers, "only the whole model was a unit"
    vectors = [Encoder.load(folder).encode(["a red circle", "two stars"]) for folder in (tmp_path / "two", one)]
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-3)


def test_an_untrained_nano_is_not_made_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path, tmp_path / "run").model_copy(update={"model": "untrained-nano"})
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="without a launcher"):
        open_encoder(run, load_recipe(run.recipe))
