"""Writing ids and vectors as they come: .npy, .parquet or JSON lines, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

from comatch.errors import DataError

Write = Callable[[Sequence[str], Any], None]


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when all went well and leaves no trace otherwise; DataError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)


def lines(ids: Sequence[str], vectors: Any) -> Iterator[str]:
    """One JSON object {id, vector} per item; the numbers read back to the same float32."""
    for id, vector in zip(ids, vectors.tolist(), strict=True):
        yield json.dumps({"id": id, "vector": vector})


@contextmanager
def _jsonl(path: Path, dim: int, fingerprint: str) -> Iterator[Write]:
    with replacing(path) as file:
        yield lambda ids, vectors: file.writelines(f"{line}\n".encode() for line in lines(ids, vectors))


@contextmanager
def _npy(path: Path, dim: int, fingerprint: str) -> Iterator[Write]:
    """float32 [n, dim], and the ids beside it: one JSON string per line of `<name>.ids.jsonl`."""
    from numpy.lib import format as npy

    rows = 0
    with replacing(path) as file, replacing(path.with_suffix(".ids.jsonl")) as names:

        def header() -> None:
            # numpy pads it so that the number of rows can grow in place
            file.seek(0)
            npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)})

        def write(ids: Sequence[str], vectors: Any) -> None:
            nonlocal rows
            rows += len(ids)
            file.write(vectors.astype("<f4").tobytes())
            names.writelines(f"{json.dumps(id)}\n".encode() for id in ids)

        header()
        yield write
        header()


@contextmanager
def _parquet(path: Path, dim: int, fingerprint: str) -> Iterator[Write]:
    """Columns id and vector; the schema's metadata names the encoder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        {"id": pa.string(), "vector": pa.list_(pa.float32(), dim)}, metadata={"fingerprint": fingerprint}
    )

    def write(ids: Sequence[str], vectors: Any) -> None:
        # file names may hold bytes that are no text
        names = pa.array([id.encode("utf-8", "backslashreplace").decode() for id in ids], pa.string())
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
        table.write_table(pa.Table.from_arrays([names, values], schema=schema))

    with replacing(path) as file, pq.ParquetWriter(file, schema) as table:
        yield write


FORMATS: dict[str, Callable[[Path, int, str], AbstractContextManager[Write]]] = {
    ".npy": _npy,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
}
