"""Names to folders, and the families of backbones that we know. A Qwen-like family is one record."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comatch.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
ADAPTER = "adapter_config.json"
SHIPPED = Path(__file__).resolve().parent.parent / "models"


@dataclass(frozen=True)
class Family:
    """What differs between backbones of one shape. `deepstack`: vision features also enter the first language layers."""

    model_type: str
    deepstack: bool = False


FAMILIES = {f.model_type: f for f in (Family("qwen2_vl"), Family("qwen2_5_vl"), Family("qwen3_vl", deepstack=True))}


def resolve(name: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """A shipped name, a folder or a hub id becomes a local folder that was checked for safety; `weights=False` downloads none.

    Raises ModelError where nothing is found, where the weights are pickles, or where the folder wants to run its own code.
    """
    shipped = SHIPPED / str(name)
    if isinstance(name, str) and "/" not in name and (shipped / "config.json").is_file():
        folder = shipped
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = _download(str(name), revision, weights)
    check_folder(folder)
    return folder


def family(config: Any) -> Family:
    """The record of a loaded config's model type. Raises ModelError for an unknown one."""
    if config.model_type not in FAMILIES:
        raise ModelError(f"model type {config.model_type!r} is not supported; known: {sorted(FAMILIES)}")
    return FAMILIES[config.model_type]


def check_folder(folder: Path, weights: str = "") -> None:
    """Refuse folders that hold pickles instead of `weights`, or whose files name code (specs/ecosystem.md row 27).

    weights: a pattern; "" is a whole model's, or an adapter's where the folder has an adapter's config.
    """
    weights = weights or ("adapter_model*.safetensors" if (folder / ADAPTER).is_file() else "model*.safetensors")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file() and _names_code(read_json(path)):
            raise ModelError(
                f"{path} has 'auto_map', which runs code from the model folder; comatch never does. Use one that stock transformers loads"
            )
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles and not any(folder.glob(weights)):
        raise ModelError(
            f"{folder} holds pickled weights ({pickles[0]}), which can run code on loading; convert them first, "
            "on a machine you can lose: AutoModelForImageTextToText.from_pretrained(folder)"
            ".save_pretrained(new_folder), for an adapter with PeftModel around it"
        )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}; save or fetch the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not a JSON object; save or fetch the model again")
    return value


def _names_code(value: Any) -> bool:
    if isinstance(value, dict):
        return "auto_map" in value or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))


def _download(name: str, revision: str | None, weights: bool) -> Path:
    """A hub id's folder in the cache, fetched or found there. Raises ModelError, also for a folder that lacks files (row 25)."""
    from huggingface_hub import errors, snapshot_download

    no_connection: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, by the hub's release
    shipped = sorted(p.name for p in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    where = f"it is not a folder and not one of the shipped models {shipped}"
    fetch = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    patterns = ["*.json", "*.txt", "*.jinja", *(["*.safetensors"] if weights else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except errors.HFValidationError as error:
        raise ModelError(f"no model {name!r}: {where}, nor a hub id like 'Qwen/Qwen2.5-VL-3B-Instruct'") from error
    except (OSError, ValueError, no_connection) as error:
        raise ModelError(f"model {name!r} could not be fetched: {where}, and {_why(error, name, revision, fetch)}") from error
    if gone := lacking(folder, weights):
        told = f"{folder} lacks {', '.join(gone[:10])}"
        raise ModelError(f"{told}: it was fetched in part, or the model has no such file; fetch it with: {fetch}")
    return folder


def _why(error: Exception, name: str, revision: str | None, fetch: str) -> str:
    """What kept the hub's files away, and what to do."""
    from huggingface_hub import constants, errors

    cache = f"or set HF_HOME to a cache that has it (this one is {constants.HF_HUB_CACHE})"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its terms at {constants.ENDPOINT}/{name}, then: hf auth login; {fetch}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}: name a branch, a tag or a commit of {constants.ENDPOINT}/{name}, or leave revision out"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no such model, or keeps it private: check the name, or: hf auth login; {fetch}"
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set and the cache lacks files of it. With a network and HF_HUB_OFFLINE=0: {fetch}; {cache}"
    cause = error.__cause__ or error
    told = " ".join([f"{type(cause).__name__}:", *str(cause).split()])[:200]
    return f"neither the hub nor the cache gave it ({told}). With a network: {fetch}; then pass the folder, {cache}"


def lacking(folder: Path, weights: bool) -> list[str]:
    """Files that a fetched model must have and has not; links to nowhere count as absent."""
    # A sentence-transformers model may keep each of its modules in a folder of its own.
    needed = set() if any((folder / name).is_file() for name in (ADAPTER, "modules.json")) else {"config.json"}
    if weights:
        for index in folder.rglob("*.safetensors.index.json"):
            below = index.parent.relative_to(folder)
            needed.update(str(below / str(shard)) for shard in dict(read_json(index).get("weight_map", {})).values())
        if not any(folder.rglob("*.safetensors")) and len(needed) < 2:
            needed.add("model.safetensors")
    return sorted(file for file in needed if not (folder / file).is_file())
