"""A model folder runs no code, and is loaded whole and as it was saved or not at all (specs/ecosystem.md rows 25 to 27)."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from comatch.backbones import adapters
from comatch.backbones.registry import resolve
from comatch.encoder import CARD, ROWS, Encoder
from comatch.errors import ModelError
from comatch.recipes import load_recipe

Folders = Callable[[str], Path]
Edit = Callable[[dict[str, Any]], None]
RECIPE = load_recipe("coma").with_tokens(4)
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def saved(folder_of: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder with random weights; only to be copied."""
    return Encoder.load(folder_of("qwen2_5_vl"), recipe=RECIPE).save(tmp_path_factory.mktemp("safety") / "model")


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def base(folder_of: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain VLM of our own, which an adapter can name as its base."""
    return Path(shutil.copytree(folder_of("qwen2_5_vl"), tmp_path_factory.mktemp("base") / "base"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A saved LoRA adapter and its base, both copies that a test may damage."""
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    encoder = Encoder.load(mine, recipe=RECIPE)
    adapters.attach(encoder.backbone, "lora", r=2, alpha=4, dropout=0.0, targets=("q_proj",), train_vision=False)
    return encoder.save(tmp_path / "adapter", merged=False), mine


def edit_json(path: Path, change: Edit) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


# --- row 27: no code


def test_the_canary_sings(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))  # noqa: S301
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
@pytest.mark.parametrize("recipe", [None, RECIPE], ids=["saved by us", "plain"])
def test_pickled_weights_are_refused_with_a_way_out(model: Path, tmp_path: Path, name: str, recipe: Any) -> None:
    (model / WEIGHTS).unlink()
    (model / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    if recipe is not None:
        (model / CARD).unlink()
    with pytest.raises(ModelError, match=r"pickled weights .*save_pretrained") as caught:
        Encoder.load(model, recipe=recipe)
    assert name in str(caught.value) and not (tmp_path / "canary").exists()


def test_pickles_beside_safetensors_are_never_opened(model: Path, tmp_path: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    (model / "training_args.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    Encoder.load(model)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("config.json", "AutoConfig"),
        ("config.json", "AutoModelForImageTextToText"),
        ("tokenizer_config.json", "AutoTokenizer"),
        ("preprocessor_config.json", "AutoImageProcessor"),
        ("processor_config.json", "AutoProcessor"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_folder_that_names_code_is_refused(model: Path, tmp_path: Path, file: str, key: str, nested: bool) -> None:
    canary = tmp_path / "canary"
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    evil = {"auto_map": {key: ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"}}
    data = json.loads((model / file).read_text()) if (model / file).exists() else {}
    (model / file).write_text(json.dumps({**data, **({"text_config": [evil]} if nested else evil)}))
    with pytest.raises(ModelError, match=r"auto_map.*stock transformers"):
        Encoder.load(model)
    assert not canary.exists()


def test_an_adapter_that_is_a_pickle_or_of_another_kind_is_refused(adapter: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = adapter
    whole = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    with pytest.raises(ModelError, match=r"pickled weights \(adapter_model.bin\)"):
        Encoder.load(folder)
    (folder / adapters.WEIGHTS).write_bytes(whole)
    Encoder.load(folder)
    edit_json(folder / "adapter_config.json", lambda d: d.update(peft_type="XLORA", adapters={"0": "some/one"}))
    with pytest.raises(ModelError, match="'XLORA'"):
        Encoder.load(folder)
    assert not (tmp_path / "canary").exists()


# --- row 26: whole, and as it was saved


def drop(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if "layers.1.self_attn" in key]:
        del tensors[key]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(48, 32)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(16)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop, r"missing_keys: 7, .*layers\.1\.self_attn\.k_proj"),
        (add, r"unexpected_keys: 1, .*layers\.9\.mlp\.up_proj"),
        (reshape, r"mismatched_keys: 1, .*norm\.weight"),
    ],
    ids=["missing", "unexpected", "wrong shape"],
)
@pytest.mark.parametrize("recipe", [None, RECIPE], ids=["saved by us", "plain"])
def test_weights_that_do_not_fit_are_refused(model: Path, change: Any, told: str, recipe: Any) -> None:
    edit_weights(model / WEIGHTS, change)
    if recipe is not None:
        (model / CARD).unlink()
    with pytest.raises(ModelError, match=told):
        Encoder.load(model, recipe=recipe)


@pytest.mark.parametrize("name", [WEIGHTS, ROWS, CARD, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_files_that_are_cut_or_gone_are_a_clear_error(model: Path, name: str, how: str) -> None:
    path = model / name
    if how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()
    with pytest.raises(ModelError):
        Encoder.load(model)


def set_recipe(**changes: Any) -> Edit:
    return lambda card: card["recipe"].update(changes)


def set_pooling(card: dict[str, Any]) -> None:
    stages = [stage for stage in card["recipe"]["stages"] if stage["pooling"]]
    assert stages and stages[-1]["pooling"] == "mean_compression"
    stages[-1]["pooling"] = "last_compression"


@pytest.mark.parametrize(
    "change",
    [
        set_recipe(tokens=2),
        set_recipe(tokens=6),
        set_recipe(instruction="find it"),
        set_pooling,
        lambda card: card["images"].update(max_pixels=card["images"]["max_pixels"] * 2),
        lambda card: card["images"].update(unknown=1),
        lambda card: card.pop("recipe"),
        lambda card: card.update(first_token=card["first_token"] - 1),
    ],
    ids=["fewer K", "more K", "instruction", "pooling", "pixels", "unknown setting", "no recipe", "first token"],
)
def test_a_model_whose_settings_were_edited_is_refused(model: Path, change: Edit) -> None:
    edit_json(model / CARD, change)
    with pytest.raises(ModelError, match=r"fingerprint|compression|damaged|two models|tokens of its own"):
        Encoder.load(model)


def test_another_recipe_than_the_trained_one_is_refused(model: Path, saved: Path) -> None:
    Encoder.load(model, recipe=RECIPE)
    for other in (RECIPE.with_tokens(2), load_recipe("matching")):
        with pytest.raises(ModelError, match="was trained as recipe 'coma' with tokens=4"):
            Encoder.load(model, recipe=other)


def test_another_vocabulary_is_noticed(model: Path) -> None:
    def swap(tokenizer: dict[str, Any]) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]

    edit_json(model / "tokenizer.json", swap)
    with pytest.raises(ModelError, match="fingerprint"):
        Encoder.load(model)


def test_one_flipped_bit_is_noticed(model: Path) -> None:
    data = bytearray((model / WEIGHTS).read_bytes())
    data[-100] ^= 1
    (model / WEIGHTS).write_bytes(data)
    with pytest.raises(ModelError, match="fingerprint"):
        Encoder.load(model)


def test_rows_of_another_model_are_refused(model: Path, saved: Path) -> None:
    edit_weights(model / ROWS, lambda tensors: tensors.update(rows=tensors["rows"] + 1))
    with pytest.raises(ModelError, match="fingerprint"):
        Encoder.load(model)
    edit_weights(model / ROWS, lambda tensors: tensors.update(rows=tensors["rows"][:2]))
    with pytest.raises(ModelError, match="two models"):
        Encoder.load(model)


def test_an_adapter_of_another_base_is_refused(adapter: tuple[Path, Path]) -> None:
    folder, mine = adapter
    before = Encoder.load(folder).encode(["x"])
    edit_weights(mine / WEIGHTS, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 2}))
    with pytest.raises(ModelError, match=r"fingerprint.*base") as caught:
        Encoder.load(folder)
    assert str(mine) in str(caught.value)
    shutil.rmtree(mine)
    with pytest.raises(ModelError, match=r"hf download|nor a hub id"):
        Encoder.load(folder)
    assert before.shape == (1, 32)


def test_an_adapter_whose_weights_do_not_fit_is_refused(adapter: tuple[Path, Path]) -> None:
    folder, _ = adapter
    key = next(key for key in load_file(folder / adapters.WEIGHTS) if "layers.2" in key)
    whole = (folder / adapters.WEIGHTS).read_bytes()
    for change in (
        lambda t: t.pop(key),
        lambda t: t.update({key: t[key][:1, :1].clone()}),
        lambda t: t.update({key.replace("layers.2", "layers.7"): t[key] + 1}),
    ):
        (folder / adapters.WEIGHTS).write_bytes(whole)
        edit_weights(folder / adapters.WEIGHTS, change)
        with pytest.raises(ModelError, match="does not fit its base"):
            Encoder.load(folder)


def test_an_adapter_of_a_16_bit_model_loads_to_the_same_bits(base: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(base, recipe=RECIPE, dtype=torch.bfloat16)
    adapters.attach(encoder.backbone, "lora", r=2, alpha=4, dropout=0.0, targets=("q_proj",), train_vision=False)
    adapters.cast_trainable(encoder.backbone)
    again = Encoder.load(encoder.save(tmp_path / "adapter", merged=False))
    assert again.fingerprint == encoder.fingerprint
    np.testing.assert_array_equal(again.encode(["x"]), encoder.encode(["x"]))
    whole = Encoder.load(again.save(tmp_path / "whole"))
    assert whole.backbone.stock.dtype == torch.bfloat16


# --- row 25: no network


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "hf download Qwen/Qwen2.5-VL-3B-Instruct"),
        ("no such name!", "nor a hub id"),
        ("./no/such/folder", "nor a hub id"),
    ],
)
def test_without_network_the_command_is_named(tmp_path: Path, name: str, told: str) -> None:
    code = (
        "import sys\nfrom comatch.backbones.registry import resolve\nfrom comatch.errors import ModelError\n"
        "try:\n    resolve(sys.argv[1])\nexcept ModelError as error:\n    print(error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, check=True, env=env)
    assert told in done.stdout and "comatch-nano" in done.stdout and done.stderr == ""


def test_a_folder_without_a_model_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a complete model folder"):
        Encoder.load(tmp_path, recipe=RECIPE)
    with pytest.raises(ModelError, match="not an embedding model"):
        Encoder.load(tmp_path)
    assert resolve(tmp_path) == tmp_path
