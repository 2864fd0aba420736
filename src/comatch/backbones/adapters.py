"""What trains: LoRA or DoRA on the language model's attention by PEFT, or everything."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from comatch.backbones.base import Backbone
from comatch.backbones.dora import with_dora
from comatch.backbones.registry import check_folder, read_json
from comatch.errors import ModelError

WEIGHTS = "adapter_model.safetensors"
# Where transformers 4.52 moved the two halves of a VLM; whole models are renamed by transformers itself, adapters are not.
_RENAMED = {r"^visual\.": "model.visual.", r"^model\.(?!language_model\.|visual\.)": "model.language_model."}


def attach(
    backbone: Backbone,
    kind: str,
    *,
    r: int,
    alpha: int,
    dropout: float,
    targets: tuple[str, ...],
    train_vision: bool,
    head: bool = True,
) -> None:
    """Freeze the backbone and open what the run trains; the compression rows always train.

    kind: "lora", "dora" (specs/coma.md section 4) or "full" (language model; the vision tower only with `train_vision`).
    head: whether the stage predicts tokens; a head with weights of its own, not the vocabulary's, stays frozen where nothing reaches it.
    Raises ModelError where a target matches no layer of the language model.
    """
    backbone.hf.requires_grad_(False)
    if kind == "full":
        backbone.text.requires_grad_(True)
        if head:
            backbone.stock.lm_head.requires_grad_(True)
        backbone.vision_tower.requires_grad_(train_vision)
        return
    if train_vision:
        raise ModelError(f"adapter.kind={kind!r} with adapter.train_vision=true is not supported; use kind='full' or train_vision=false")
    names = [name for name, _ in backbone.stock.named_modules()]
    missing = [t for t in targets if not any(n.startswith("model.language_model.") and n.endswith("." + t) for n in names)]
    if missing:
        raise ModelError(
            f"adapter.targets {missing} match no layer of the language model; Qwen's attention has q_proj, k_proj, v_proj, o_proj"
        )
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=kind == "dora",
        init_lora_weights="gaussian",
        target_modules=r"model\.language_model\..*\.(" + "|".join(targets) + ")",
    )
    backbone.hf = get_peft_model(backbone.hf, with_dora(config))


def adapted(backbone: Backbone) -> bool:
    """Whether an adapter is attached and not merged."""
    return isinstance(backbone.hf, PeftModel)


def merge(backbone: Backbone) -> None:
    """Fold the adapter into the weights; does nothing where there is none."""
    if adapted(backbone):
        backbone.hf = backbone.hf.merge_and_unload()


def load_adapter(backbone: Backbone, folder: Path) -> None:
    """Attach a saved LoRA adapter for encoding. Raises ModelError where its weights do not fit the base."""
    backbone.hf = adapt(backbone.hf, folder, backbone.source)


def adapt(model: Any, folder: Path, source: str) -> Any:
    """A stock model below a saved LoRA adapter, whose names may be those of before transformers 4.52.

    source: the base's name, for messages. Raises ModelError where a weight does not fit the base, is missing or left over.
    """
    check_folder(folder, WEIGHTS)
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind != "LORA":  # other kinds may fetch or import what their config names
        raise ModelError(f"adapter {folder} is of kind {kind!r}; only LORA is loaded, merge another into its base")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            saved = set(map(_renamed, file.keys()))
        model.requires_grad_(False)
        config = with_dora(LoraConfig.from_pretrained(str(folder)))
        adapted = PeftModel.from_pretrained(model, str(folder), config=config, key_mapping=_RENAMED)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"adapter {folder} does not fit its base {source}: {error}") from error
    # Told not to look whether the vocabulary grew, for which PEFT would ask the hub for the base.
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if saved != wanted:
        off = sorted(saved ^ wanted)
        raise ModelError(f"adapter {folder} does not fit its base: {len(off)} weights differ, {off[:10]}")
    return adapted


def _renamed(key: str) -> str:
    prefix = "base_model.model."
    for old, new in _RENAMED.items():
        key, done = re.subn(old, new, key.removeprefix(prefix))
        key = prefix + key
        if done:
            break
    return key


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def cast_trainable(module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Keep everything that trains in float32: small updates are lost in bf16 (specs/coma.md 8.3)."""
    for parameter in trainable(module).values():
        parameter.data = parameter.data.to(dtype)
