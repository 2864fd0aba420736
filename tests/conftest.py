"""Tiny random models of all three Qwen-VL generations, saved as stock folders, and the nano tokenizer they share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# One thread, before torch is imported: tests fork training runs, and a fork of a process whose OpenMP threads have worked hangs.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from cli_run import draw
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.backbones.nano import make_nano, make_tokenizer
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipes import load_recipe

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SHARED = Path(__file__).resolve().parents[2] / "shared"
EMOJI = SHARED / "data" / "emoji" / "emoji.parquet"

needs_emoji = pytest.mark.skipif(not EMOJI.is_file(), reason="../shared/data/emoji is not beside this checkout")


def texts() -> list[str]:
    return [scene(0, i).dense_caption() for i in range(60)] + [" ".join(map(str, scene(0, i).dialogue(0, 9))) for i in range(60)]


def _sizes(family: str) -> dict[str, object]:
    text = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    }
    if family == "qwen3_vl":
        text |= {"head_dim": 8, "rope_parameters": text["rope_parameters"] | {"mrope_interleaved": True}}  # type: ignore[operator]
    return text


def _save(family: str, folder: Path) -> None:
    tokenizer = make_tokenizer(texts(), 400)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")}
    text = _sizes(family) | {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    patch = 14
    torch.manual_seed(0)
    model: torch.nn.Module
    if family == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **tokens))
    else:
        patch = 16
        vision = {
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 16,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        }
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **tokens))
    # Random norms and biases, so that a wrong order of operations cannot hide behind ones and zeros.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, temporal_patch_size=2)
    processor.size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (6 * patch) ** 2}
    processor.save_pretrained(folder)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of a family, made once per session."""
    root = tmp_path_factory.mktemp("models")

    def get(family: str) -> Path:
        folder = root / family
        if not folder.is_dir():
            if family == "qwen2_5_vl":
                sizes = _sizes(family)
                make_nano(folder, texts(), 400, **sizes)
            else:
                _save(family, folder)
        return folder

    return get


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(folder_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved encoder with random weights; a test that changes it works on a copy."""
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=load_recipe("coma").with_tokens(4))
    return encoder.save(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="session")
def encoder(model: Path) -> Encoder:
    """The encoder of `model`."""
    return Encoder.load(model)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of six drawn scenes, s0.png to s5.png."""
    folder = tmp_path / "pictures"
    draw(folder, range(6))
    return folder
