"""What an index keeps on disk: two files that only grow, and a manifest that says how much of them counts.

    index.json        which model the vectors are of, and the counted sizes; replaced in one step
    vectors.<g>.f32   float32 [written, dim], little endian, memory-mapped
    rows.<g>.jsonl    one line per vector: {"id": ..., anything}; or {"deleted": [ids]}, which has no vector

A write appends behind the counted part, is flushed to the disk, and only then counted. So a batch is there
whole or not at all, and what a killed or failed writer left behind is overwritten by the next. Writers take
turns by a lock that dies with its process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from comatch.errors import SearchError

try:
    import fcntl
except ImportError:  # Windows has none; there, one writer at a time is the user's care
    fcntl = None  # type: ignore[assignment]

Floats = npt.NDArray[np.float32]
Record = Mapping[str, Any]

FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """The content of index.json.

    fingerprint, dim, prompt, metric   the encoder whose vectors these are
    model                              name or folder it was loaded from, where known
    count                              living rows
    written, rows_bytes                vectors and bytes of rows that count, dead ones included
    generation                         number in the two file names; a compaction starts the next
    revision                           changes so far
    """

    fingerprint: str
    dim: int
    prompt: str = ""
    metric: str = "cosine"
    model: str = ""
    count: int = 0
    written: int = 0
    rows_bytes: int = 0
    generation: int = 0
    revision: int = 0
    format: int = FORMAT


class Store:
    """The files of one index folder. `manifest` is what this process last saw of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = self._read_manifest()

    @classmethod
    def create(cls, folder: Path, manifest: Manifest) -> Store:
        """Lay out an empty store in a new or empty folder."""
        if (folder / "index.json").exists():
            raise SearchError(
                f"{folder} already holds an index; open it with Index.open, or choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise SearchError(f"{folder} holds other files; an index wants a new or an empty folder")
        for path in _files(folder, 0):
            path.touch()
        _write_whole(folder / "index.json", [_manifest_bytes(manifest)])
        return cls(folder)

    @property
    def files(self) -> tuple[Path, Path]:
        """The vectors file and the rows file that count now."""
        return _files(self.folder, self.manifest.generation)

    def refresh(self) -> bool:
        """Look at the disk again; True if another process changed the index meanwhile."""
        before, self.manifest = self.manifest, self._read_manifest()
        return self.manifest.revision != before.revision

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writers' lock of the folder."""
        try:
            with (self.folder / "lock").open("w") as file:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise SearchError(
                f"{self.folder} cannot be written: {error}; the index is as it was before"
            ) from error

    def records(self) -> Iterator[Record]:
        """The counted lines of the rows file, oldest first."""
        path = self.files[1]
        left = self.manifest.rows_bytes
        with self._opened(path, left) as file:
            for number, line in enumerate(file, start=1):
                left -= len(line)
                if left < 0:
                    break
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise SearchError(
                        f"{path}, line {number}: {error}; the index is damaged, index again"
                    ) from None

    def matrix(self) -> Floats:
        """All counted vectors, dead ones included: [written, dim], mapped from the disk, read-only."""
        shape = (self.manifest.written, self.manifest.dim)
        if not self.manifest.written:
            return np.empty(shape, np.float32)
        path = self.files[0]
        self._opened(path, 4 * shape[0] * shape[1]).close()
        return np.memmap(path, dtype="<f4", mode="r", shape=shape)

    def append(self, records: Sequence[Record], vectors: Floats, count: int) -> None:
        """Add lines and their vectors, and count them; `count` is the number of living rows afterwards."""
        old = self.manifest
        body = encoded(records)
        tails = ((4 * old.written * old.dim, vectors.astype("<f4").tobytes()), (old.rows_bytes, body))
        for path, (start, data) in zip(self.files, tails, strict=True):
            with path.open("r+b") as file:
                file.truncate(start)
                file.seek(start)
                file.write(data)
                _sync(file)
        self._commit(
            replace(
                old, written=old.written + len(vectors), rows_bytes=old.rows_bytes + len(body), count=count
            )
        )

    def rewrite(self, records: Sequence[Record], blocks: Iterable[Floats]) -> None:
        """Put these lines and vectors in the place of all others."""
        old_files, old = self.files, self.manifest
        body = encoded(records)
        new = replace(
            old, generation=old.generation + 1, written=len(records), rows_bytes=len(body), count=len(records)
        )
        new_files = _files(self.folder, new.generation)
        try:
            _write_whole(new_files[0], (block.astype("<f4").tobytes() for block in blocks))
            _write_whole(new_files[1], [body])
            self._commit(new)
        finally:
            for path in old_files if self.manifest.generation == new.generation else new_files:
                path.unlink(missing_ok=True)

    def _commit(self, manifest: Manifest) -> None:
        manifest = replace(manifest, revision=manifest.revision + 1)
        _write_whole(self.folder / "index.json", [_manifest_bytes(manifest)])
        self.manifest = manifest

    def _opened(self, path: Path, needed: int) -> BinaryIO:
        """The file, open for reading, after a check that all that counts is there."""
        try:
            file = path.open("rb")
        except OSError as error:
            raise SearchError(f"{path}: {error.strerror}; the index is damaged, index again") from None
        size = os.fstat(file.fileno()).st_size
        if size < needed:
            file.close()
            raise SearchError(
                f"{path} has {size} bytes, its index.json counts {needed}; the index is damaged, index again"
            )
        return file

    def _read_manifest(self) -> Manifest:
        path = self.folder / "index.json"
        try:
            data = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise SearchError(f"{self.folder} holds no index; make one with: comatch index") from None
        except (OSError, ValueError) as error:
            raise SearchError(f"{path}: {error}; the index is damaged, index again") from None
        if (
            not isinstance(data, dict)
            or data.get("format") != FORMAT
            or set(data) != set(Manifest.__dataclass_fields__)
        ):
            raise SearchError(f"{path} is not of format {FORMAT}, which this comatch reads; index again")
        return Manifest(**data)


def encoded(records: Iterable[Record]) -> bytes:
    """Records as JSON lines; SearchError where one cannot be written as JSON."""
    try:
        return b"".join(json.dumps(record, allow_nan=False).encode() + b"\n" for record in records)
    except (TypeError, ValueError) as error:
        raise SearchError(
            f"a row cannot be stored as JSON: {error}; rows hold texts, numbers, lists and dicts"
        ) from None


def _manifest_bytes(manifest: Manifest) -> bytes:
    return json.dumps(asdict(manifest), indent=1).encode() + b"\n"


def _files(folder: Path, generation: int) -> tuple[Path, Path]:
    return folder / f"vectors.{generation}.f32", folder / f"rows.{generation}.jsonl"


def _write_whole(path: Path, chunks: Iterable[bytes]) -> None:
    """Write aside, flush, rename: readers see the old file or the new one."""
    aside = path.with_name(path.name + ".new")
    try:
        with aside.open("wb") as file:
            file.writelines(chunks)
            _sync(file)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself lives in the folder; Windows cannot open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
