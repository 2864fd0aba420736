"""Vectors on disk, so that an interrupted evaluation goes on where it was: shards of a file each, named by what they depend on.

A vector is known by its message: the texts, and of each picture name, size and time of change. All vectors of one folder are of one model
(fingerprint), protocol and version of comatch; another one has another folder, so nothing stale is ever found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from comatch.content import Image, Mark, Message, Text
from comatch.errors import EvaluationError
from comatch.evaluation.metrics import Floats

_BYTES: Final = 16


def key_of(settings: Mapping[str, Any]) -> str:
    """The name of everything that decides a vector besides its message."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=_BYTES).hexdigest()


def digest_of(message: Message) -> bytes:
    """A hash of a message: 16 bytes. Raises ImageError for a picture that is gone."""
    digest = hashlib.blake2b(message.instruction.encode(), digest_size=_BYTES)
    for part in message.parts:
        if isinstance(part, Text):
            told = [type(part).__name__ if isinstance(part, Mark) else "text", part.text]
        else:
            told = [type(part).__name__, *map(_identity, (part,) if isinstance(part, Image) else part.frames)]
        digest.update("".join(f"{len(entry)} {entry}\0" for entry in told).encode())
    return digest.digest()


class VectorStore:
    """The vectors of one key in a folder. Several processes may add shards; `refresh` finds those of others."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder / key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[bytes, tuple[int, int]] = {}
        self._shards: list[Any] = []
        self._known = set[str]()
        self.refresh()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._places

    def refresh(self) -> None:
        """Read the names in shards that were added since. Raises EvaluationError for a damaged one."""
        for names in sorted(self.folder.glob("*.keys")):
            if names.name in self._known:
                continue
            self._known.add(names.name)
            file = names.with_suffix(".npy")
            try:
                data, shard = names.read_bytes(), np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise EvaluationError(f"{file} cannot be read ({error}); remove it and {names.name}, it is made anew") from error
            if shard.ndim != 2 or len(data) != _BYTES * len(shard):
                raise EvaluationError(f"{file} holds shape {shard.shape} for {len(data) // _BYTES} names; remove both, they are made anew")
            for row in range(len(shard)):
                self._places[data[_BYTES * row : _BYTES * (row + 1)]] = len(self._shards), row
            self._shards.append(shard)

    def add(self, digests: Sequence[bytes], vectors: Floats) -> None:
        """Write a shard: vectors float32 [n, dim], known by their messages' digests. Its names come last, so half a shard is none."""
        name = hashlib.blake2b(b"".join(digests), digest_size=_BYTES).hexdigest()
        aside = self.folder / f".{name}.{os.getpid()}"
        for suffix in (".npy", ".keys"):
            with aside.open("wb") as file:
                if suffix == ".npy":
                    np.save(file, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
                else:
                    file.write(b"".join(digests))
                file.flush()
                os.fsync(file.fileno())
            aside.replace(self.folder / f"{name}{suffix}")
        self.refresh()

    def get(self, digests: Iterable[bytes]) -> Floats:
        """The vectors of messages, in order: float32 [n, dim]. Raises EvaluationError for vectors of two lengths."""
        found = [self._shards[shard][row] for shard, row in (self._places[digest] for digest in digests)]
        if len(lengths := {len(vector) for vector in found}) != 1:
            raise EvaluationError(f"vectors of {sorted(lengths)} numbers; all of a model have equally many, so remove {self.folder}")
        return np.stack(found)


def _identity(image: Image) -> str:
    """A picture by its file's place, size and time of change; one that came as bytes or pixels by its content."""
    source = image.source
    if isinstance(source, Path):
        try:
            status = source.stat()
        except OSError:
            return f"{source} gone"  # told by name when it is encoded
        return f"{source} {status.st_size} {status.st_mtime_ns}"
    # Archives and tables carry their time of change with them.
    return repr(source) if hasattr(source, "stamp") else image.digest
