"""Tables of data at rest, by row number: CSV, TSV, JSON lines or array, Parquet, WebDataset tar, or shards of one kind.

A text table is read through once when it is opened, a tar by its headers, so that a fault in its form is found before
any work starts and named with file and line. Of these only the place of each row is kept, of Parquet a bounded number
of row groups. Worker processes may share a table.
"""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from comatch.data.json_arrays import JsonArray
from comatch.data.tars import Tar
from comatch.data.text_tables import Csv, JsonLines, Row, Tsv
from comatch.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_CACHE_BYTES = 256 * 2**20
_LARGEST_GROUP = 2**30
_BATCH = 64
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


class Table(Protocol):
    """Rows by number. `filled` are the columns that have a value in some row."""

    path: Path
    columns: tuple[str, ...]
    filled: frozenset[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Row: ...

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """All rows in order, none of them kept; `columns` are those needed."""
        ...

    def type_of(self, column: str) -> pa.DataType | None:
        """What the file declares the column to hold, None where files of this kind declare nothing."""
        ...


def open_table(path: Path, *, kinds: Sequence[str] = (*TABLE_SUFFIXES, ".json"), allow_cut: bool = False) -> Table:
    """Open a file by its suffix, or several as the shards of one table: a folder, or a pattern such as train-*.parquet.

    `kinds` are the suffixes allowed; of a folder all files of these are taken, without .json, which there describes the rest.
    Raises DataError for what cannot be read, naming file and line, and for files without rows.
    """
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in kinds and file.name[0] != "."]
        return Shards(path, [file for file in files if file.suffix.lower() != ".json"], kinds, allow_cut)
    if "*" in path.name and not path.exists():
        return Shards(path, list(path.parent.glob(path.name)), kinds, allow_cut)
    if path.suffix.lower() not in kinds:
        hint = f" (unpack it first: gunzip {path.name})" if path.suffix.lower() in (".gz", ".tgz") else ""
        raise DataError(f"{path} is no table{hint}; its name must end in one of {', '.join(kinds)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}; check the path")
    try:
        table = _READERS[path.suffix.lower()](path, allow_cut)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if not len(table):
        raise DataError(f"{path} holds no rows; a table needs at least one")
    return table


class Parquet:
    """A Parquet file. Random access holds up to 256 MiB of row groups in each process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = self._opened()
        metadata = self._file.metadata
        groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        self._ends = list(itertools.accumulate(group.num_rows for group in groups))
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _LARGEST_GROUP:
            raise DataError(
                f"{path} has a row group of {largest:,} bytes, allowed are {_LARGEST_GROUP:,}; "
                "write it again with smaller ones: pyarrow.parquet.write_table(..., row_group_size=1000)"
            )
        schema = self._file.schema_arrow
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{path} has columns of one name: {schema.names}; rename them")
        self.columns = tuple(schema.names)
        leaves = [[group.column(c) for group in groups] for c in range(metadata.num_columns)]
        held = [chunks[0].path_in_schema for chunks in leaves if not all(map(_all_null, chunks))]
        self.filled = frozenset(
            name for name in schema.names if any(leaf == name or leaf.startswith(f"{name}.") for leaf in held)
        )

    def __reduce__(self) -> tuple[type[Parquet], tuple[Path]]:
        return Parquet, (self.path,)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> Row:
        number = bisect.bisect_right(self._ends, i)
        if number not in self._cache:
            with self._reading():
                self._cache[number] = self._file.read_row_group(number, use_threads=False)
        self._cache.move_to_end(number)
        while len(self._cache) > 1 and sum(group.nbytes for group in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        group = self._cache[number]
        row: Row = group.slice(i - self._ends[number] + group.num_rows, 1).to_pylist()[0]
        return row

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        with self._reading():
            for batch in self._opened().iter_batches(_BATCH, columns=columns, use_threads=False):
                yield from batch.to_pylist()

    def type_of(self, column: str) -> pa.DataType | None:
        return self._file.schema_arrow.field(column).type

    def _opened(self) -> pq.ParquetFile:
        import pyarrow.parquet as pq

        with self._reading():
            return pq.ParquetFile(self.path, memory_map=True)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        import pyarrow as pa

        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path} is no readable Parquet file: {str(error).splitlines()[0]}"
            ) from error


def _all_null(chunk: pq.ColumnChunkMetaData) -> bool:
    """True where the file's own statistics say that a column chunk holds no value."""
    statistics = chunk.statistics
    return statistics is not None and statistics.has_null_count and statistics.null_count == chunk.num_values


class Shards:
    """Tables, one after the other in order of their names. All must have the same columns."""

    def __init__(self, path: Path, files: Sequence[Path], kinds: Sequence[str], allow_cut: bool) -> None:
        found = sorted({file.suffix.lower() for file in files})
        if len(found) != 1:
            raise DataError(
                f"{path} holds tables of {len(found)} kinds ({', '.join(found) or 'none'}); shards are files "
                f"of one kind: {', '.join(kinds)}"
            )
        self.path = path
        self._shards = [open_table(file, kinds=kinds, allow_cut=allow_cut) for file in sorted(files)]
        self._ends = list(itertools.accumulate(map(len, self._shards)))
        first = self._shards[0]
        if found != [".tar"]:  # an archive declares no columns: what a row lacks is told with the row
            for shard in self._shards[1:]:
                for column in (*first.columns, *shard.columns):
                    self._compare(first, shard, column)
        self.columns = tuple(dict.fromkeys(column for shard in self._shards for column in shard.columns))
        self.filled = frozenset.union(*(shard.filled for shard in self._shards))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> Row:
        number = bisect.bisect_right(self._ends, i)
        shard = self._shards[number]
        return shard[i - self._ends[number] + len(shard)]

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        return itertools.chain.from_iterable(shard.rows(columns) for shard in self._shards)

    def type_of(self, column: str) -> pa.DataType | None:
        return self._shards[0].type_of(column)

    @staticmethod
    def _compare(first: Table, shard: Table, column: str) -> None:
        for one, other in ((first, shard), (shard, first)):
            if column not in one.columns:
                raise DataError(
                    f"{one.path} has no column {column!r}, {other.path} has; all shards of a folder need the "
                    "same columns"
                )
        if first.type_of(column) != shard.type_of(column):
            raise DataError(
                f"column {column!r} is {first.type_of(column)} in {first.path} and {shard.type_of(column)} "
                f"in {shard.path}; make them equal"
            )


_READERS: dict[str, Callable[[Path, bool], Table]] = {
    ".csv": Csv,
    ".tsv": Tsv,
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".parquet": lambda path, allow_cut: Parquet(path),
    ".json": JsonArray,
    ".tar": Tar,
}
