"""Other people's embedding models behind our interface: named, not guessed, because their files do not tell them apart.

    encoder = comatch.released.load("TIGER-Lab/VLM2Vec-Qwen2VL-2B", "vlm2vec-v1")
    vectors = encoder.encode(["a red circle"])          # float32 [n, dim], as by comatch.Encoder
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from comatch.backbones.adapters import adapt
from comatch.backbones.base import Backbone
from comatch.backbones.folder import read_model, read_processor, read_tokenizer
from comatch.backbones.registry import ADAPTER, family, read_json, resolve
from comatch.data.images import ImageSettings
from comatch.devices import default_device
from comatch.encoder import Encoder
from comatch.errors import ModelError
from comatch.recipe import Prompt, Recipe
from comatch.released.records import NAMES as NAMES
from comatch.released.records import SENTENCE, Release, release_of
from comatch.released.sentence import SentenceEncoder

_ITEM, _INSTRUCTION = "\x02item\x03", "\x02instruction\x03"


def load(
    name: str | Path,
    kind: str,
    *,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
) -> Encoder | SentenceEncoder:
    """Load a released checkpoint (folder or hub id) as one of `NAMES`; every weight must come from its files.

    An adapter is merged into its base. base: the base of an adapter where its config names none that is here, and where
    tokenizer or image processor are taken from if the checkpoint has none. Raises ModelError where a weight is missing, left over or of
    another shape, an adapter changes nothing, the folder is unsafe, or the checkpoint cannot be of this kind.
    """
    if kind == SENTENCE:
        return SentenceEncoder.load(resolve(name, revision), device=device, dtype=dtype)
    release = release_of(kind)
    folder = resolve(name, revision)
    adapter = (folder / ADAPTER).is_file()
    if release.adapter and not adapter:
        raise ModelError(f"{name} has no {ADAPTER}: {kind} is a LoRA adapter, and the base without it is near chance; name the adapter")
    below = _base_of(folder, base) if adapter or base is not None else folder
    model = read_model(below if adapter else folder, dtype, headless=True)
    known = family(model.config).model_type
    if known not in release.families:
        raise ModelError(f"{name} is a {known} model; {kind} was published on {list(release.families)}")
    if adapter:
        model = _merged(adapt(model, folder, str(below)), folder)
    tokenizer = read_tokenizer(_having("tokenizer_config.json", folder, below))
    processor = read_processor(_having("preprocessor_config.json", folder, below))
    recipe = _recipe(release, tokenizer, folder)
    images = replace(ImageSettings.from_processor(processor), square=release.square, small=release.small)
    if release.pixels is not None:
        images = images.limited(*release.pixels)
    encoder = Encoder(Backbone(model, tokenizer, processor, recipe, source=str(name)), recipe, images)
    encoder.backbone.eval().to(device or default_device())
    return encoder


def _base_of(folder: Path, base: str | Path | None) -> Path:
    if base is None:
        base = read_json(folder / ADAPTER).get("base_model_name_or_path") or ""
        if not base:
            raise ModelError(f"{folder / ADAPTER} names no base; pass base=, the folder or hub id of the model that it adapts")
    return resolve(base)


def _having(file: str, *folders: Path) -> Path:
    """The first folder that has a file, or has it under its other name."""
    names = (file, "processor_config.json") if file == "preprocessor_config.json" else (file,)
    for folder in folders:
        if any((folder / name).is_file() for name in names):
            return folder
    raise ModelError(f"{folders[0]} has no {file}; pass base=, the folder or hub id of the model that it was made from")


def _merged(adapted: Any, folder: Path) -> Any:
    """The model with an adapter folded in."""
    if not any(bool(p.any()) for name, p in adapted.named_parameters() if "lora_B" in name):
        raise ModelError(f"adapter {folder} is untrained: all its B matrices are zero, so it changes nothing; fetch it again")
    return adapted.merge_and_unload()


def _recipe(release: Release, tokenizer: Any, folder: Path) -> Recipe:
    """The record's recipe with what only the checkpoint knows: its number of compression tokens, its chat template."""
    recipe = release.recipe
    if recipe.tokens:
        vocabulary = tokenizer.get_vocab()
        tokens = next(i for i in range(len(vocabulary) + 1) if recipe.token_name.format(i) not in vocabulary)
        if not tokens:
            raise ModelError(f"{folder} has no compression tokens {recipe.token_name.format(0)!r} and on, so it is no {release.name} model")
        recipe = recipe.with_tokens(tokens)
    if release.template:
        recipe = replace(recipe, prompt=_from_template(recipe.prompt, tokenizer, folder))
    return recipe


def _from_template(prompt: Prompt, tokenizer: Any, folder: Path) -> Prompt:
    """What a checkpoint's chat template, and its tokenizer, put before and after an item."""
    system = {"role": "system", "content": [{"type": "text", "text": _INSTRUCTION}]}
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _ITEM}]}
    try:
        row = str(tokenizer.apply_chat_template([system, user], tokenize=False, add_generation_prompt=True))
        before, after = row.split(prompt.picture + _ITEM)
    except ValueError as error:  # also where there is no template
        raise ModelError(f"{folder} has no chat template with one place for a picture and a text after it: {error}") from error
    if before.count(_INSTRUCTION) != 1:
        raise ModelError(f"the chat template of {folder} has no place for an instruction in a system turn; it renders {before!r}")
    plain, special = (tokenizer("x", add_special_tokens=add).input_ids for add in (False, True))
    added: list[str] = tokenizer.convert_ids_to_tokens(special[len(plain) :])
    if special[: len(plain)] != plain:
        raise ModelError(f"the tokenizer of {folder} puts tokens before a text; only an end token is known")
    return replace(prompt, before=before.replace(_INSTRUCTION, "{instruction}"), after=after + "".join(added))
