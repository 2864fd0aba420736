"""A model folder's weights, tokenizer and image processor, read whole or not at all (specs/ecosystem.md row 26)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.backbones.registry import family
from comatch.errors import ModelError

HEAD = "lm_head.weight"
_FAULTS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


def read_model(folder: Path, dtype: torch.dtype | str = "auto", *, headless: bool = False) -> Any:
    """The stock model of a checked folder, every weight from its files.

    headless: a head may be absent, as embedding models are published; no vector needs it, and the vocabulary's table stands in, so that no
    random weight is left. Raises ModelError.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        family(config)
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # not ignored: `check_loaded` names them, transformers does not
        )
    except _FAULTS as error:
        raise ModelError(f"{folder} is not a complete model folder: {error}") from error
    beheaded = headless and HEAD in info["missing_keys"]
    check_loaded(folder, {**info, "missing_keys": set(info["missing_keys"]) - {HEAD}} if beheaded else info)
    if beheaded:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checked folder. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except _FAULTS as error:
        raise ModelError(f"{folder} is not a complete model folder: {error}") from error


def read_processor(folder: Path) -> Any:
    """The image processor of a checked folder. Raises ModelError."""
    try:
        return Qwen2VLImageProcessorPil.from_pretrained(folder)
    except _FAULTS as error:
        raise ModelError(f"{folder} is not a complete model folder: {error}") from error


def check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """Raise ModelError unless every weight came from the file, none was left over and none had another shape (row 26)."""
    faults = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    faults |= {"conversion_errors": sorted(map(str, info.get("conversion_errors") or ()))}
    if any(faults.values()):
        told = "; ".join(f"{kind}: {len(keys)}, {keys[:10]}" for kind, keys in faults.items() if keys)
        raise ModelError(
            f"{folder} does not fit its architecture, nothing was loaded: {told}. Loading it anyway would leave random weights"
        )
