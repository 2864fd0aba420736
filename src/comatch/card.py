"""The card of a saved model: what else than weights decides its vectors, and where a name's card lies."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from comatch.backbones.registry import read_json, resolve
from comatch.data.images import ImageSettings
from comatch.errors import ModelError
from comatch.recipe import Recipe

CARD = "comatch.json"
FORMAT = 1


def resolve_any(name: str | Path, revision: str | None = None) -> Path:
    """Like `resolve`, but a run folder or an adapter folder, which hold no model of their own, also pass."""
    folder = Path(name)
    if (folder / CARD).is_file() or (folder / "manifest.json").is_file():
        return folder
    return resolve(name, revision)


def write_json(path: Path, value: Any, *, in_order: bool = False) -> None:
    """Write JSON beside the target and rename, so that a reader never sees half a file. in_order: keep the order of keys, do not sort."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=not in_order, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def run_result(folder: Path) -> Path:
    """The folder of a run's last stage; any other folder is its own. Raises ModelError for an unfinished run."""
    manifest = folder / "manifest.json"
    if not manifest.is_file() or (folder / CARD).is_file():
        return folder
    record = read_json(manifest)
    if record.get("status") != "complete":
        raise ModelError(
            f"{folder} is a half-written run (status {record.get('status')!r}); finish it with comatch train, or name "
            f"one of its stages: {record.get('done')}"
        )
    if not record.get("done"):
        raise ModelError(f"{manifest} names no finished stage; train again")
    return folder / str(record["done"][-1])


def read_card(folder: Path) -> dict[str, Any] | None:
    """The card of a folder that comatch saved, None of another."""
    path = folder / CARD
    if not path.is_file():
        return None
    card = read_json(path)
    if card.get("format") != FORMAT:
        raise ModelError(f"{path} has format {card.get('format')!r}, this version reads {FORMAT}; upgrade comatch")
    return card


def settings_of(folder: Path, card: dict[str, Any]) -> tuple[Recipe, ImageSettings]:
    """Recipe and image settings of a card. Raises ModelError where it is damaged."""
    try:
        listed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in card["images"].items()}
        _ = card["base"], card["first_token"], card["fingerprint"]
        return Recipe.from_dict(card["recipe"]), ImageSettings(**listed)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / CARD} is damaged ({error!r}); save or fetch the model again") from error


def brief(recipe: Recipe) -> str:
    """A recipe in a few words, for messages."""
    stage = recipe.encoding
    return f"recipe {recipe.name!r} with tokens={recipe.tokens}, pooling={stage.pooling if stage else None!r}"
