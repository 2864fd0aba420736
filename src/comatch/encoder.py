"""The one object that turns items into vectors; training, evaluation, the command line and the server all use it."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.registry import read_json, resolve
from comatch.content import as_message
from comatch.core.batch import Example
from comatch.core.packing import budget, collate
from comatch.core.pooling import pool
from comatch.data.images import ImageSettings
from comatch.errors import ContentError, ModelError
from comatch.prepare import Preparer
from comatch.recipe import Recipe, Stage
from comatch.render import Renderer

CARD = "comatch.json"
ROWS = "compression.safetensors"
FORMAT = 1
WINDOW = 8192
CHUNK = 512


class Encoded(NamedTuple):
    """A stretch of a stream.

    ids, vectors   of the good items, in order; float32 [n, dim]
    bad            (position, id, reason) of the others
    cut            ids of those whose text was longer than the window
    """

    ids: list[str]
    vectors: Any
    bad: list[tuple[int, str, str]]
    cut: list[str]


class Encoder:
    """A backbone, a recipe and image settings: everything that decides a vector.

    `encode` turns items into float32 unit vectors [n, dim]; `fingerprint` names all that they depend on.
    """

    def __init__(self, backbone: Backbone, recipe: Recipe, images: ImageSettings | None = None) -> None:
        self.backbone, self.recipe = backbone, recipe
        self.images = images or ImageSettings.from_processor(backbone.processor)
        window = min(backbone.window, WINDOW)
        renderer = Renderer(backbone.tokenizer, recipe, self.images.tokens, backbone.first_token, window)
        self.preparer = Preparer(renderer, self.images)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        recipe: Recipe | None = None,
        device: str | None = None,
        dtype: torch.dtype | str = "auto",
        revision: str | None = None,
    ) -> Encoder:
        """Load a model that comatch saved, a run folder (its last stage), or a plain VLM together with a `recipe`.

        Raises ModelError where weights do not fit, the run is unfinished, or `recipe` differs from the one the model was trained with.
        """
        folder = _run_result(resolve_any(name, revision))
        card = _read_card(folder)
        if card is None:
            if recipe is None:
                raise ModelError(
                    f"{name} is a plain VLM, not an embedding model; pass a recipe, or train one with: "
                    f"comatch train runs/coma-nano.yaml model={name}"
                )
            encoder = cls(Backbone.load(folder, recipe, dtype=dtype), recipe)
        else:
            saved, images = _settings(folder, card)
            if recipe is not None and recipe != saved:
                raise ModelError(f"{name} was trained as {_brief(saved)}, asked for {_brief(recipe)}; leave the recipe out, or train again")
            base = folder if card["base"] is None else resolve(card["base"])
            as_saved = dtype == "auto"
            backbone = Backbone.load(base, saved, dtype=card.get("dtype", dtype) if as_saved else dtype)
            encoder = cls(backbone, saved, images)
            encoder._load_trained(folder, card)
            if as_saved and encoder.fingerprint != card["fingerprint"]:
                raise ModelError(
                    f"{name} has fingerprint {encoder.fingerprint}, and was saved with {card['fingerprint']}: {CARD} was edited, a file is "
                    f"damaged or of another model, or the base ({card['base'] or 'none'}) is another one now; save or fetch it again"
                )
        encoder.backbone.eval().to(device or _default_device())
        return encoder

    @property
    def stage(self) -> Stage:
        """The stage whose layout and pooling make the vectors. Raises ModelError for a plain VLM."""
        stage = self.recipe.encoding
        if stage is None:
            raise ModelError(f"recipe {self.recipe.name!r} has no stage with a pooling, so it makes no vectors; use e.g. recipe=coma")
        return stage

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.backbone.dim

    @property
    def fingerprint(self) -> str:
        """A hash of weights, vocabulary, recipe and image settings. Vectors of different fingerprints never mix."""
        self.backbone.publish_rows()
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.recipe.to_json().encode())
        digest.update(json.dumps(dict(self.images.to_dict()), sort_keys=True).encode())
        digest.update(json.dumps(self.backbone.tokenizer.get_vocab(), sort_keys=True).encode())
        for key, tensor in sorted(self.backbone.state_dict().items()):
            digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def encode(
        self,
        items: Sequence[Any] | Any,
        *,
        dim: int | None = None,
        batch_tokens: int = 8192,
        on_error: str = "raise",
        progress: Callable[[int], None] | None = None,
    ) -> Any:
        """Vectors of items, in the order given.

        items: anything `as_message` reads; a single item that is not a list gives one row. dim: keep the first `dim`
        numbers and normalise again. batch_tokens: tokens in one forward pass. on_error: "raise" stops at the first
        bad item with a ContentError that names its position; "mark" leaves a zero row and returns (vectors,
        {position: reason}). progress: called with the number of items done. Returns float32 [n, dim] of unit length.
        """
        if on_error not in ("raise", "mark"):
            raise ContentError(f"on_error is {on_error!r}; allowed: 'raise', 'mark'")
        many = list(items) if isinstance(items, list | tuple) else [items]
        examples, errors = self._prepare(many, on_error)
        if cut := [i for i, example in examples.items() if example.cut]:
            told = f"text of {len(cut)} items was longer than the window and was cut: items {cut[:10]}"
            warnings.warn(told, stacklevel=2)
        vectors = self._vectors(examples, len(many), dim, batch_tokens, progress)
        return vectors if on_error == "raise" else (vectors, errors)

    def stream(
        self,
        items: Iterable[tuple[str, Any]],
        *,
        dim: int | None = None,
        batch_tokens: int = 8192,
        on_error: str = "raise",
        chunk: int = CHUNK,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Encoded]:
        """Vectors of any number of (id, item) pairs, `chunk` of them in memory at a time.

        Each stretch equals `encode` of its items to the bit. on_error: "raise" stops with a ContentError that
        names id and position; "mark" goes on and lists the bad in the stretch.
        """
        rows, position = iter(items), 0
        while some := list(islice(rows, chunk)):
            examples, errors = self._prepare([item for _, item in some], "mark")
            bad = [(position + i, some[i][0], reason) for i, reason in errors.items()]
            if bad and on_error == "raise":
                raise ContentError(f"{bad[0][1]!r}: {bad[0][2]}", bad[0][0])
            vectors = self._vectors(examples, len(some), dim, batch_tokens, progress)[list(examples)]
            cut = [some[i][0] for i, example in examples.items() if example.cut]
            yield Encoded([some[i][0] for i in examples], vectors, bad, cut)
            position += len(some)

    @torch.no_grad()
    def forward(self, examples: Sequence[Example]) -> torch.Tensor:
        """Unit vectors [n, dim] of prepared examples, in one pass."""
        batch = collate(examples).to(self.backbone.device)
        hidden = self.backbone(batch, self.stage.visibility)
        return pool(hidden, batch.roles, batch.example, batch.size, self.stage.pooling or "")

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine of every row of a [n, dim] with every row of b [m, dim]: float32 [n, m]."""
        product: np.ndarray = np.atleast_2d(a) @ np.atleast_2d(b).T
        return product

    def save(self, path: str | Path, *, merged: bool = True) -> Path:
        """Write a folder that loads again here, and in transformers where `merged` (an adapter is then folded in for good).

        With `merged=False` an adapter is kept as PEFT writes it, beside the compression rows and the name of its base.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        backbone = self.backbone
        base = None
        if merged:
            adapters.merge(backbone)
            backbone.publish_rows()
        if adapters.adapted(backbone):
            base = backbone.source
            backbone.hf.save_pretrained(folder)
        else:
            backbone.hf.save_pretrained(folder)
            backbone.tokenizer.save_pretrained(folder)
            backbone.processor.size = {"shortest_edge": self.images.min_pixels, "longest_edge": self.images.max_pixels}
            backbone.processor.save_pretrained(folder)
        save_file({"rows": backbone.rows.detach().cpu().contiguous()}, folder / ROWS)
        card = {
            "format": FORMAT,
            "recipe": self.recipe.to_dict(),
            "images": dict(self.images.to_dict()),
            "base": base,
            "first_token": backbone.first_token,
            "dtype": str(backbone.stock.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
        }
        write_json(folder / CARD, card)
        return folder

    def _prepare(self, items: list[Any], on_error: str) -> tuple[dict[int, Example], dict[int, str]]:
        examples: dict[int, Example] = {}
        errors: dict[int, str] = {}
        for i, item in enumerate(items):
            try:
                if isinstance(item, ContentError):
                    raise item
                examples[i] = self.preparer.item(as_message(item), self.stage)
            except ContentError as error:
                if on_error == "raise":
                    raise error.at(i) from error
                errors[i] = error.reason
        return examples, errors

    def _vectors(
        self,
        examples: dict[int, Example],
        n: int,
        dim: int | None,
        batch_tokens: int,
        progress: Callable[[int], None] | None,
    ) -> np.ndarray:
        if dim is not None and not 0 < dim <= self.dim:
            raise ContentError(f"dim is {dim}; this model's vectors have {self.dim} numbers, pass 1 to {self.dim}")
        vectors = np.zeros((n, self.dim), dtype=np.float32)
        order = sorted(examples, key=lambda i: len(examples[i]))
        for chosen in budget([len(examples[i]) for i in order], batch_tokens):
            places = [order[i] for i in chosen]
            vectors[places] = self.forward([examples[i] for i in places]).cpu().numpy()
            if progress:
                progress(len(places))
        bad = [i for i in examples if not np.isfinite(vectors[i]).all() or not vectors[i].any()]
        if bad:
            raise ModelError(
                f"items {bad[:10]} got vectors with NaN or only zeros; the weights are damaged or overflow in "
                f"{self.backbone.stock.dtype}"
            )
        if dim is not None and dim < self.dim:  # to cut nothing changes no bit
            vectors = vectors[:, :dim]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors

    def _load_trained(self, folder: Path, card: dict[str, Any]) -> None:
        if card["base"] is not None:
            adapters.load_adapter(self.backbone, folder)
        try:
            rows = load_file(folder / ROWS)["rows"]
        except (OSError, KeyError, SafetensorError) as error:
            raise ModelError(f"{folder / ROWS} cannot be read: {error}; save or fetch the model again") from error
        if rows.shape != self.backbone.rows.shape or card["first_token"] != self.backbone.first_token:
            raise ModelError(
                f"{folder}: compression rows {tuple(rows.shape)} from token {card['first_token']} on, the model has "
                f"{tuple(self.backbone.rows.shape)} from token {self.backbone.first_token} on; the folder mixes files of two models"
            )
        self.backbone.rows.data = rows


def resolve_any(name: str | Path, revision: str | None = None) -> Path:
    """Like `resolve`, but a run folder or an adapter folder, which hold no model of their own, also pass."""
    folder = Path(name)
    if (folder / CARD).is_file() or (folder / "manifest.json").is_file():
        return folder
    return resolve(name, revision)


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside the target and rename, so that a reader never sees half a file."""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _run_result(folder: Path) -> Path:
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


def _read_card(folder: Path) -> dict[str, Any] | None:
    path = folder / CARD
    if not path.is_file():
        return None
    card = read_json(path)
    if card.get("format") != FORMAT:
        raise ModelError(f"{path} has format {card.get('format')!r}, this version reads {FORMAT}; upgrade comatch")
    return card


def _settings(folder: Path, card: dict[str, Any]) -> tuple[Recipe, ImageSettings]:
    try:
        listed: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in card["images"].items()}
        _ = card["base"], card["first_token"], card["fingerprint"]
        return Recipe.from_dict(card["recipe"]), ImageSettings(**listed)
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / CARD} is damaged ({error!r}); save or fetch the model again") from error


def _brief(recipe: Recipe) -> str:
    stage = recipe.encoding
    return f"recipe {recipe.name!r} with tokens={recipe.tokens}, pooling={stage.pooling if stage else None!r}"


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
