"""The one object that turns items into vectors; training, evaluation, the command line and the server all use it."""

from __future__ import annotations

import json
import warnings
from collections import Counter
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
from comatch.backbones.registry import resolve
from comatch.backbones.store import DiskStore, Memory
from comatch.card import CARD, FORMAT, brief, read_card, resolve_any, run_result, settings_of, write_json
from comatch.core.batch import Example, Loan
from comatch.core.fingerprint import Fingerprint
from comatch.core.memory import Passes
from comatch.core.packing import collate
from comatch.core.pooling import pool, pooled
from comatch.core.sharing import share, shareable
from comatch.data.images import ImageSettings
from comatch.devices import default_device
from comatch.errors import ContentError, ModelError
from comatch.objectives.contrastive import CELLS
from comatch.objectives.contrastive import similarity as maxsim
from comatch.prepare import Ahead, Preparer, distinct, side_by_side, tell_work, threads
from comatch.recipe import Recipe, Stage, check_vectors
from comatch.render import Renderer

ROWS = "compression.safetensors"
WINDOW = 8192
CHUNK = 512
MEMORY = 2**29


class Encoded(NamedTuple):
    """A stretch of a stream.

    ids, vectors   of the good items, in order; float32 as by `encode`
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
        self._fingerprint = Fingerprint()
        self._in_passes = Passes()

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
        folder = run_result(resolve_any(name, revision))
        card = read_card(folder)
        if card is None:
            if recipe is None:
                raise ModelError(
                    f"{name} is a plain VLM, not an embedding model of ours; pass a recipe, or train one with: "
                    f"comatch train runs/coma-nano.yaml model={name}; others' embedding models load by comatch.released.load (--as)"
                )
            encoder = cls(Backbone.load(folder, recipe, dtype=dtype), recipe)
        else:
            saved, images = settings_of(folder, card)
            if recipe is not None and recipe != saved:
                raise ModelError(f"{name} was trained as {brief(saved)}, asked for {brief(recipe)}; leave the recipe out, or train again")
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
        encoder.backbone.eval().to(device or default_device())
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
        settings = [self.recipe.to_dict(), dict(self.images.to_dict()), self.backbone.tokenizer.get_vocab()]
        return self._fingerprint.of([json.dumps(part, sort_keys=True) for part in settings], self.backbone.state_dict())

    def encode(
        self,
        items: Sequence[Any] | Any,
        *,
        dim: int | None = None,
        vectors: int = 1,
        batch_tokens: int = 8192,
        on_error: str = "raise",
        progress: Callable[[int], None] | None = None,
        workers: int | None = None,
        tally: Counter[str] | None = None,
    ) -> Any:
        """Vectors of items, in the order given.

        items: anything `as_message` reads; a single item that is not a list gives one row. dim: keep the first `dim`
        numbers and normalise again. vectors: how many an item gets, the means of that many groups of compression tokens;
        compare them by `similarity`. batch_tokens: tokens in one forward pass, halved once where memory runs out.
        on_error: "raise" stops at the first bad item with a ContentError that names its position; "mark" leaves a zero row
        and returns (vectors, {position: reason}). progress: called with the number of items done. workers: threads that
        decode pictures (None: one a core). tally: gets the work done, see `tell_work`. Returns float32 [n, dim] of unit
        length, or [n, vectors, dim] for more than one. Equal items are encoded once, and a picture that several items show
        runs through the vision tower once.
        """
        if on_error not in ("raise", "mark"):
            raise ContentError(f"on_error is {on_error!r}; allowed: 'raise', 'mark'")
        check_vectors(vectors, self.stage.pooling, self.recipe.tokens)
        many = list(items) if isinstance(items, list | tuple) else [items]
        with threads(workers) as pool:
            examples, errors = Ahead(self.preparer, many, self.stage, pool).examples(stop=on_error == "raise")
        if tally is not None:
            tell_work(examples, tally)
        if cut := [i for i, example in examples.items() if example.cut]:
            told = f"text of {len(cut)} items was longer than the window and was cut: items {cut[:10]}"
            warnings.warn(told, stacklevel=2)
        found = self._vectors(examples, len(many), dim, vectors, batch_tokens, progress)
        return found if on_error == "raise" else (found, errors)

    def stream(
        self,
        items: Iterable[tuple[str, Any]],
        *,
        dim: int | None = None,
        vectors: int = 1,
        batch_tokens: int = 8192,
        on_error: str = "raise",
        chunk: int = CHUNK,
        progress: Callable[[int], None] | None = None,
        workers: int | None = None,
    ) -> Iterator[Encoded]:
        """Vectors of any number of (id, item) pairs, `chunk` of them at a time, while the pictures of the next `chunk` are decoded.

        Each stretch equals `encode` of its items to the bit. on_error: "raise" stops with a ContentError that
        names id and position; "mark" goes on and lists the bad in the stretch.
        """
        check_vectors(vectors, self.stage.pooling, self.recipe.tokens)
        rows, position = iter(items), 0
        with threads(workers) as pool:
            stretches = (
                ([id for id, _ in some], Ahead(self.preparer, [item for _, item in some], self.stage, pool))
                for some in iter(lambda: list(islice(rows, chunk)), [])
            )
            following = next(stretches, None)
            while following is not None:
                (ids, ahead), following = following, next(stretches, None)
                examples, errors = ahead.examples(stop=False)
                bad = [(position + i, ids[i], reason) for i, reason in errors.items()]
                if bad and on_error == "raise":
                    raise ContentError(f"{bad[0][1]!r}: {bad[0][2]}", bad[0][0])
                found = self._vectors(examples, len(ids), dim, vectors, batch_tokens, progress)[list(examples)]
                cut = [ids[i] for i, example in examples.items() if example.cut]
                yield Encoded([ids[i] for i in examples], found, bad, cut)
                position += len(ids)

    def keep_features(self, folder: str | Path, *, max_bytes: int, dtype: torch.dtype | None = None) -> DiskStore:
        """From now on keep what the vision tower makes of pictures in a folder, and take it from there.

        max_bytes: the last used stay. dtype: None keeps what the tower gives, so that no vector changes; bfloat16 halves float32.
        """
        self.preparer.named = True
        return self.backbone.keep_features(folder, max_bytes=max_bytes, dtype=dtype)

    def encode_prepared(self, examples: Sequence[Example], *, batch_tokens: int = 8192) -> np.ndarray:
        """Unit vectors of examples that `preparer` made: float32 [n, dim], as by `encode`."""
        return self._vectors(dict(enumerate(examples)), len(examples), None, 1, batch_tokens, None)

    @torch.no_grad()
    def forward(self, examples: Sequence[Example], memory: Memory | None = None, vectors: int = 1) -> torch.Tensor:
        """Unit vectors of prepared examples, in one pass, shaped as by `encode`. `memory`: features of named pictures between passes."""
        loans: tuple[Loan, ...] = ()
        if shareable(self.stage.visibility, self.stage.pooling):
            examples, loans = share(examples, self.backbone.image_id)
        batch = collate(examples, loans=loans)
        hidden = self.backbone(batch, self.stage.visibility, self.backbone.see(batch, memory), pooled(batch.roles, self.stage.pooling))
        return pool(hidden, batch.roles, batch.example, batch.size, self.stage.pooling or "", vectors)

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine of every row of a [n, dim] with every row of b [m, dim]: float32 [n, m].

        For [n, v, dim] and [m, w, dim] MaxSim: the mean over a's vectors of the best cosine with one of b's, so a is the query's side.
        Raises ContentError where one side has several vectors an item and the other one.
        """
        a, b = np.atleast_2d(a), np.atleast_2d(b)
        if a.ndim != b.ndim or a.shape[-1] != b.shape[-1]:
            raise ContentError(f"vectors of shape {a.shape} and {b.shape} do not compare; give both sides the same vectors= and dim=")
        if a.ndim == 2:
            product: np.ndarray = a @ b.T
            return product
        some = max(1, CELLS // (a.shape[1] * b.shape[0] * b.shape[1]))
        parts = [maxsim(torch.from_numpy(a[i : i + some]), torch.from_numpy(b)).numpy() for i in range(0, len(a), some)]
        return np.concatenate(parts) if parts else np.zeros((0, len(b)), np.float32)

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

    def _vectors(
        self,
        examples: dict[int, Example],
        n: int,
        dim: int | None,
        each: int,
        batch_tokens: int,
        progress: Callable[[int], None] | None,
    ) -> np.ndarray:
        if dim is not None and not 0 < dim <= self.dim:
            raise ContentError(f"dim is {dim}; this model's vectors have {self.dim} numbers, pass 1 to {self.dim}")
        vectors = np.zeros((n, self.dim) if each == 1 else (n, each, self.dim), dtype=np.float32)
        memory, same = Memory(MEMORY), distinct(examples)
        prepared = [examples[places[0]] for places in same]

        def forward(chosen: list[int]) -> None:
            done = self.forward([prepared[i] for i in chosen], memory, each).cpu().numpy()
            for i, vector in zip(chosen, done, strict=True):
                vectors[same[i]] = vector
            if progress:
                progress(sum(len(same[i]) for i in chosen))

        self._in_passes.run([len(example) for example in prepared], side_by_side(prepared), batch_tokens, forward)
        bad = [i for i in examples if not np.isfinite(vectors[i]).all() or not vectors[i].any(-1).all()]
        if bad:
            raise ModelError(
                f"items {bad[:10]} got vectors with NaN or only zeros; the weights are damaged or overflow in "
                f"{self.backbone.stock.dtype}"
            )
        if dim is not None and dim < self.dim:  # to cut nothing changes no bit
            vectors = vectors[..., :dim]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
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
