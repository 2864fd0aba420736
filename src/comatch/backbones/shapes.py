"""Published shapes of models too large to ship: enough to plan a run, or to time one with random weights, where no hub can be reached."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig

_TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_TEXT = {
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
}


_OLDER_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}


def _config(kind: type[PretrainedConfig], text: dict[str, Any], tied: bool) -> PretrainedConfig:
    older = kind is Qwen2VLConfig  # its tower has no windows, and calls the language model's width its hidden_size
    vision = _OLDER_VISION | {"hidden_size": text["hidden_size"]} if older else _VISION | {"out_hidden_size": text["hidden_size"]}
    return kind(
        text_config=_TEXT | text | {"tie_word_embeddings": tied},
        vision_config=vision,
        tie_word_embeddings=tied,
        **_TOKENS,
    )


def known() -> tuple[str, ...]:
    """Hub ids whose shape is recorded here."""
    return tuple(_SHAPES)


def config_of(name: str) -> PretrainedConfig:
    """The config of a recorded hub id."""
    return _config(*_SHAPES[name])


_SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any], bool]] = {
    "Qwen/Qwen2-VL-2B-Instruct": (
        Qwen2VLConfig,
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
        },
        True,
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        Qwen2_5_VLConfig,
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        True,
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        Qwen2_5_VLConfig,
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
        False,
    ),
}
