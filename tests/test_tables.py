"""Tables of every kind give the same rows, hold little in memory, and name what is wrong with a file."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from table_files import KINDS, ROWS, written

from comatch.data.sources import open_source
from comatch.data.tables import Parquet, open_table
from comatch.errors import DataError


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    table = open_table(written(tmp_path, kind, ROWS))
    assert [table[i] for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert list(table.rows()) == ROWS and len(table) == 3
    assert table.columns == ("caption", "file", "other") and "other" in table.filled
    copy = pickle.loads(pickle.dumps(table))  # noqa: S301, what worker processes do
    assert [copy[i] for i in range(3)] == ROWS


def test_the_random_access_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": i, "blob": bytes([i]) * 200_000} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "big.parquet", row_group_size=4)
    monkeypatch.setattr("comatch.data.tables._CACHE_BYTES", 2_000_000)
    table = Parquet(tmp_path / "big.parquet")
    for i in np.random.default_rng(0).permutation(40):
        assert table[int(i)] == rows[i]
        assert sum(group.nbytes for group in table._cache.values()) <= 2_000_000
    assert len(table._cache) == 2
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in Parquet(tmp_path / "big.parquet").rows())
    assert peak < 16_000_000
    monkeypatch.setattr("comatch.data.tables._LARGEST_GROUP", 500_000)
    with pytest.raises(DataError, match="row_group_size"):
        Parquet(tmp_path / "big.parquet")


def test_a_long_text_table_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "x" * 2000}) + "\n" for i in range(4000)))
    tracemalloc.start()
    table = open_table(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 4000 and table[3999]["text"].startswith("3999 ")
    assert held < 100_000 and peak < 1_000_000 < path.stat().st_size


Bad = Callable[[Path], Path]


def raw(name: str, data: bytes) -> Bad:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def arrow(columns: dict[str, Any], schema: pa.Schema | None = None) -> Bad:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns, schema=schema), folder / "t.parquet")
        return folder / "t.parquet"

    return write


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FAULTS: dict[str, tuple[Bad, str]] = {
    "cut last line": (raw("t.jsonl", b'{"text": "a"}\n{"text": "b'), r"t\.jsonl, line 2: the last line is"),
    "broken line": (raw("t.jsonl", b'{"text": "a"}\n{text}\n{"text": ""}\n'), r"jsonl, line 2: .*JSON ob"),
    "no object": (raw("t.jsonl", b'{"text": "a"}\n\n[1]\n'), r"line 3: found list"),
    "deep": (raw("t.jsonl", b"[" * 100_000 + b"\n"), r"line 1"),
    "not UTF-8": (raw("t.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n'), r"line 2: byte 0xe4 at place 11"),
    "UTF-16": (raw("t.csv", "text\na\n".encode("utf-16")), r"t\.csv, line 1: byte 0xff"),
    "latin CSV": (raw("t.csv", b"text,image\nok,1.png\n\xe4h,2.png\n"), r"t\.csv, line 3: byte 0xe4"),
    "open quote": (raw("t.csv", b'text,image\n"a,1.png\nb,2.png\n'), r"t\.csv, line 2 to 3: .*quote"),
    "quote inside": (raw("t.csv", b'text,image\n"a"b,1.png\n'), r"t\.csv, line 2: .*quote"),
    "more fields": (raw("t.csv", b"text,image\na,b,c\n"), r"line 2: 3 fields, but 2 in the header"),
    "equal names": (raw("t.csv", b"text,text\na,b\n"), "must be there and differ"),
    "header alone": (raw("t.csv", b"text,image\n"), "holds no rows"),
    "no bytes": (raw("t.jsonl", b""), "holds no rows"),
    "no parquet": (raw("t.parquet", b"PAR1 hello"), r"t\.parquet is no readable Parquet"),
    "no rows": (arrow({"text": pa.array([], pa.string())}), "holds no rows"),
    "other suffix": (raw("t.xlsx", b"x"), r"\.csv, \.tsv, \.jsonl"),
    "nothing there": (lambda folder: folder / "t.csv", "there is no file"),
    "missing column": (arrow({"title": ["a"], "x": ["b"]}), "no column 'text' .*; its columns are title, x"),
    "null column": (arrow({"text": ["a"], "image": pa.array([None], pa.binary())}), "'image' .* is empty in"),
    "null bytes": (
        arrow({"text": ["a"], "image": pa.array([{"bytes": None, "path": None}], PICTURE)}),
        "'image' .* is empty in all 1 rows",
    ),
    "wrong type": (arrow({"text": [1], "image": ["a.png"]}), "'text' holds int64, but query.text needs text"),
    "wrong picture": (arrow({"text": ["a"], "image": [[1.0]]}), "'image' holds list<.*double>, but pos"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_is_named_with_file_and_line(fault: str, tmp_path: Path) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(DataError, match=message):
        open_source("table", path=make(tmp_path), columns={"query.text": "text", "positive.image": "image"})


def test_shards_must_agree(tmp_path: Path) -> None:
    def shard(name: str, **columns: Any) -> None:
        pq.write_table(pa.table(columns), tmp_path / name)

    shard("a.parquet", text=["a", "b"], label=["x", "y"])
    shard("b.parquet", text=["c"], label=["z"])
    table = open_table(tmp_path)
    assert [table[i]["text"] for i in range(3)] == ["a", "b", "c"] == [row["text"] for row in table.rows()]
    for wrong, message in (
        (
            {"text": ["c"], "label": [1]},
            r"column 'label' is string in .*a\.parquet and int64 in .*b\.parquet",
        ),
        ({"text": ["c"]}, r"b\.parquet has no column 'label', .*a\.parquet has"),
        ({"text": ["c"], "label": ["z"], "new": [1]}, r"a\.parquet has no column 'new', .*b\.parquet has"),
    ):
        shard("b.parquet", **wrong)
        with pytest.raises(DataError, match=message):
            open_table(tmp_path)
    (tmp_path / "c.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"\.csv, \.parquet"):
        open_table(tmp_path)
