"""Any sentence-transformers model, multimodal or not, behind the interface of our Encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comatch.backbones.folder import check_loaded
from comatch.backbones.registry import ADAPTER, check_folder
from comatch.content import Image, Message, Text, as_messages
from comatch.core.fingerprint import Fingerprint
from comatch.devices import default_device
from comatch.errors import ContentError, MissingExtra, ModelError

CHUNK = 256
_SETTINGS = ("*.json", "*.jinja", "*.txt")


class SentenceEncoder:
    """A sentence-transformers model: `encode` gives float32 unit vectors [n, dim], `fingerprint` names all that they depend on."""

    def __init__(self, model: Any, folder: Path) -> None:
        self.model, self.folder = model, folder
        self._settings = [
            f"{path.relative_to(folder)}\n{path.read_text(encoding='utf-8')}"
            for pattern in _SETTINGS
            for path in sorted(folder.rglob(pattern))
        ]
        self._fingerprint = Fingerprint()

    @classmethod
    def load(cls, folder: Path, *, device: str | None = None, dtype: torch.dtype | str = "auto") -> SentenceEncoder:
        """Load a folder that sentence-transformers saved; it runs no code of its own. Raises ModelError and MissingExtra."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise MissingExtra("sentence-transformers", "st") from error
        _check(folder)
        settings = {"dtype": dtype, "use_safetensors": True}
        try:
            model = SentenceTransformer(str(folder), device=device or default_device(), local_files_only=True, model_kwargs=settings)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            raise ModelError(f"{folder} does not load in sentence-transformers: {error}") from error
        for module in model:
            if hasattr(module, "auto_model"):
                _check_weights(module.auto_model, folder)
        return cls(model.eval(), folder)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.model.get_embedding_dimension())

    @property
    def fingerprint(self) -> str:
        """A hash of weights and of every setting in the folder."""
        return self._fingerprint.of(self._settings, self.model.state_dict())

    def encode(self, items: Sequence[Any], *, batch_size: int = 32, progress: Callable[[int], None] | None = None) -> np.ndarray:
        """Vectors of items, in the order given; equal items are encoded once. An item's instruction is the model's prompt.

        progress: called with the number of items done. Raises ContentError for an item that the model does not take.
        """
        messages = as_messages(items)
        places: dict[Message, list[int]] = {}
        for i, message in enumerate(messages):
            places.setdefault(message, []).append(i)
        vectors = np.zeros((len(messages), self.dim), dtype=np.float32)
        # Calls of one kind, because a chat in a batch with plain texts gets another vector there.
        for (instruction, _), entries in groupby(sorted(places.items(), key=_kind), key=_kind):
            chosen = list(entries)
            for chunk in (chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)):
                found = self._encode([message for message, _ in chunk], instruction, batch_size)
                for (_, at), vector in zip(chunk, found, strict=True):
                    vectors[at] = vector
                if progress:
                    progress(sum(len(at) for _, at in chunk))
        bad = np.flatnonzero(~(np.isfinite(vectors).all(1) & vectors.any(1))).tolist()
        if bad:
            raise ModelError(f"items {bad[:10]} got vectors with NaN or only zeros; the weights are damaged or overflow")
        return vectors

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine of every row of a [n, dim] with every row of b [m, dim]: float32 [n, m]."""
        product: np.ndarray = np.atleast_2d(a) @ np.atleast_2d(b).T
        return product

    def _encode(self, messages: list[Message], instruction: str, batch_size: int) -> np.ndarray:
        inputs = list(map(_input, messages))
        try:
            found = self.model.encode(
                inputs, prompt=instruction or None, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        except (ValueError, TypeError) as error:
            raise ContentError(f"the model takes {list(self.model.modalities)}: {error}") from error
        return np.asarray(found, dtype=np.float32)


def _kind(entry: tuple[Message, Any]) -> tuple[str, str]:
    """What decides how a message is passed: its instruction, and whether it is a text, a picture or a chat of both."""
    message, _ = entry
    if all(isinstance(part, Text) for part in message.parts):
        return message.instruction, "text"
    return message.instruction, "picture" if len(message.parts) == 1 and message.images else "chat"


def _input(message: Message) -> Any:
    """A message as sentence-transformers knows it."""
    _, kind = _kind((message, None))
    if kind != "chat":
        return message.text if kind == "text" else message.images[0].load()
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, Text):
            content.append({"type": "text", "text": part.text})
        else:
            frames = (part,) if isinstance(part, Image) else part.frames
            content += [{"type": "image", "image": frame.load()} for frame in frames]
    return [{"role": "user", "content": content}]


def _check(folder: Path) -> None:
    """Refuse pickles and code anywhere below the folder, and adapters, whose base nothing would check."""
    if not (folder / "modules.json").is_file():
        raise ModelError(f"{folder} has no modules.json, so it is no sentence-transformers model")
    for path in (folder, *(p for p in folder.rglob("*") if p.is_dir())):
        check_folder(path, "*.safetensors")
        if (path / ADAPTER).is_file():
            raise ModelError(f"{path} is an adapter; merge it into its base and save that as a sentence-transformers model")


def _check_weights(model: Any, folder: Path) -> None:
    """Ask transformers, by a second reading that holds no weights, which ones its first made up; it only warns of them."""
    _, info = type(model).from_pretrained(
        model.name_or_path, config=model.config, device_map="meta", use_safetensors=True, output_loading_info=True
    )
    spare = set(info["unexpected_keys"])
    check_loaded(folder, {**info, "unexpected_keys": {key for key in spare if not key.endswith("lm_head.weight")}})
