"""Features of pictures that were seen before: in memory for one call, or on disk for as long as the vision tower stays as it is.

An entry is one picture's features after the merger, named by what entered the tower (the cut pixels and their grid, see
`comatch.data.images.picture_key`) and by a hash of the tower's weights and settings, so a change of either finds nothing old. Whatever
is asked for comes back in the stored dtype, also when it was just computed: a run gives the same bits with a cold store and a warm one.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load, save

from comatch.core.fingerprint import Fingerprint
from comatch.errors import ModelError

_SUFFIX = ".features"
_CHECK = 16
_SLACK = 16
_READERS = 4


class Store(Protocol):
    """Where features of pictures are kept. Each is [1 + deepstack layers, visual tokens, dim]."""

    def get(self, keys: Sequence[bytes], device: torch.device) -> dict[bytes, torch.Tensor]:
        """Those of `keys` that are here, on a device."""
        ...

    def put(self, key: bytes, features: torch.Tensor) -> torch.Tensor:
        """Keep features; returns them as `get` will give them."""
        ...


class Memory:
    """Features on their own device, the last used of at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    def get(self, keys: Sequence[bytes], device: torch.device) -> dict[bytes, torch.Tensor]:
        """Those of `keys` that are here, on a device."""
        found = {}
        for key in keys:
            if key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key].to(device)
        return found

    def put(self, key: bytes, features: torch.Tensor) -> torch.Tensor:
        """Keep features; returns them as `get` will give them."""
        if key not in self._kept:
            self._kept[key] = features
            self.bytes += features.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._kept.popitem(last=False)[1].nbytes
        return features


class DiskStore:
    """Features in a folder, one file a picture, shared by any number of processes.

    folder:    made where it is missing; other towers' features may lie there too and count towards the bound
    tower:     the frozen vision tower; settings: what else decides its output (mean, std, dtype of autocast)
    max_bytes: files least recently used are deleted above this; n processes that write at once may pass it by n / 16
    dtype:     what is stored; None is what the tower gives, to the bit
    counts:    hit, miss, corrupt (damaged, so deleted and computed again), unread (the disk failed), written, unwritten, deleted

    Files are written aside and renamed, so a reader sees a whole entry or none, and two writers of one entry write the same.
    Weights count as changed where torch says so: a write through `.data` goes unseen, make a new store after one.
    Raises ModelError where the folder cannot be used.
    """

    def __init__(
        self,
        folder: str | Path,
        tower: torch.nn.Module,
        settings: Callable[[], Sequence[str]] = tuple,
        *,
        max_bytes: int = 50 * 2**30,
        dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        if max_bytes <= 0:
            raise ModelError(f"a store of vision features of max_bytes={max_bytes}; give the bytes that it may take, as in {50 * 2**30}")
        self.folder, self.max_bytes, self.dtype = Path(folder), max_bytes, dtype
        self.counts: Counter[str] = Counter()
        self._tower, self._settings = tower, settings
        self._hashed: tuple[Any, str] = (None, "")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelError(f"the store of vision features {self.folder} cannot be made: {error.strerror}; name another folder") from error
        self._room = 0
        self._trim()

    @property
    def tower(self) -> bytes:
        """The hash of weights, settings and dtype under which entries lie now."""
        weights = self._tower.state_dict()
        if any(hasattr(tensor, "full_tensor") for tensor in weights.values()):
            raise ModelError(
                "vision features cannot be stored with sharded weights (FSDP2): a rank that finds its own would not help others gather; "
                "take out the store"
            )
        # Hashing takes seconds for a large tower; who changes a weight raises its version, or moves it.
        state = [(tensor.data_ptr(), tensor._version, tensor.dtype) for tensor in weights.values()]
        if self._hashed[0] != state:
            self._hashed = state, Fingerprint().of((), weights)
        return hashlib.blake2b("\n".join([*self._settings(), str(self.dtype), self._hashed[1]]).encode()).digest()

    def get(self, keys: Sequence[bytes], device: torch.device) -> dict[bytes, torch.Tensor]:
        """Those of `keys` that are here, on a device."""
        tower = self.tower
        with ThreadPoolExecutor(_READERS) as pool:
            read = list(pool.map(lambda key: self._read(self._path(tower, key)), keys))
        told = Counter(found if isinstance(found, str) else "hit" for found in read)
        if told["corrupt"] and not self.counts["corrupt"]:
            warnings.warn(f"vision features in {self.folder} were damaged; they are computed again, and such cases counted", stacklevel=2)
        self.counts += told
        return {key: found.to(device) for key, found in zip(keys, read, strict=True) if not isinstance(found, str)}

    def put(self, key: bytes, features: torch.Tensor) -> torch.Tensor:
        """Keep features; returns them as `get` will give them."""
        features = features.detach().to(self.dtype or features.dtype)
        body = save({"features": features.cpu().contiguous()})
        data = hashlib.blake2b(body, digest_size=_CHECK).digest() + body
        try:
            if len(data) > self.max_bytes:
                raise OSError(errno.EFBIG, f"one entry of {len(data):,} bytes is above max_bytes={self.max_bytes:,}")
            if len(data) > self._room:
                self._trim(len(data))
            self._write(self._path(self.tower, key), data)
        except OSError as error:
            if not self.counts["unwritten"]:
                told = f"vision features could not be stored in {self.folder}: {error.strerror}; the run goes on and counts such cases"
                warnings.warn(told, stacklevel=2)
            self.counts["unwritten"] += 1
        else:
            self._room -= len(data)
            self.counts["written"] += 1
        return features

    def _path(self, tower: bytes, key: bytes) -> Path:
        name = hashlib.blake2b(tower + key, digest_size=20).hexdigest()
        return self.folder / name[:2] / (name + _SUFFIX)

    def _read(self, path: Path) -> torch.Tensor | str:
        """The features, or what was wrong."""
        try:
            data = path.read_bytes()
            os.utime(path)  # the time of last use; a disk may be mounted without keeping it
            if hashlib.blake2b(data[_CHECK:], digest_size=_CHECK).digest() == data[:_CHECK]:
                return load(data[_CHECK:])["features"]
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            return "miss"
        except OSError:
            return "unread"
        return "corrupt"

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(exist_ok=True)
        number, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(number, "wb") as file:
                file.write(data)
            os.replace(aside, path)
        except OSError:
            Path(aside).unlink(missing_ok=True)
            raise

    def _trim(self, need: int = 0) -> None:
        """Look at the folder anew, delete what was used least recently, and note how much may be written before the next look."""
        share = max(self.max_bytes // _SLACK, need)
        entries = sorted(_entries(self.folder))
        total = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if total + share <= self.max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            self.counts["deleted"] += 1
            total -= size
        self._room = min(share, self.max_bytes - total)


def _entries(folder: Path) -> list[tuple[float, int, str]]:
    """(time of last use, bytes, path) of every file below; those that vanish meanwhile are left out."""
    found = []
    for path in (*folder.glob(f"??/*{_SUFFIX}"), *folder.glob("??/*.part")):
        try:
            state = path.stat()
        except FileNotFoundError:
            continue
        found.append((state.st_mtime, state.st_size, str(path)))
    return found


def recall(
    keys: Sequence[bytes], stores: Sequence[Store], device: torch.device, compute: Callable[[Sequence[int]], Sequence[torch.Tensor]]
) -> Mapping[int, torch.Tensor]:
    """Features of each picture by its place in `keys`, each distinct one looked up or computed once.

    keys: b"" marks a picture that nobody named, which is always computed. stores: asked in order. compute: features of the pictures at
    some places. What a later store or `compute` gave is put into the stores before it.
    """
    first: dict[bytes, int] = {}
    own = [place for place, key in enumerate(keys) if not key or first.setdefault(key, place) == place]
    found: dict[int, torch.Tensor] = {}
    missing = own
    asked: list[tuple[Store, list[int]]] = []
    for store in stores:
        here = store.get([keys[place] for place in missing if keys[place]], device)
        found |= {place: here[keys[place]] for place in missing if keys[place] in here}
        missing = [place for place in missing if place not in found]
        asked.append((store, missing))
    if missing:
        found |= dict(zip(missing, compute(missing), strict=True))
    for store, lacked in reversed(asked):
        found |= {place: store.put(keys[place], found[place]) for place in lacked if keys[place]}
    return {place: found[first[key] if key else place] for place, key in enumerate(keys)}
