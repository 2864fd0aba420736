"""Items to embed, from folders, tables and standard input."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from table_files import KINDS, ROWS, png, written

from comatch.content import Message, Text
from comatch.data.items import read_items
from comatch.errors import ContentError, DataError, ImageError


def test_items_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".git/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    items = list(read_items(tmp_path))
    assert [id for id, _ in items] == ["a.JPG", "b.png", "sub/c.webp"]
    assert all(isinstance(m, Message) and m.images[0].size == (8, 8) and not m.text for _, m in items)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(read_items(tmp_path)) == items
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to embed"):
        list(read_items(tmp_path / "empty"))


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_a_table(kind: str, tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", **row} for n, row in enumerate(ROWS)]
    items = list(read_items(written(tmp_path, kind, rows)))
    assert [id for id, _ in items] == ["i0", "i1", "i2"]
    for (_, message), row in zip(items, ROWS, strict=True):
        assert isinstance(message, Message) and message.text == row["caption"] and len(message.images) == 1
    plain = list(read_items(written(tmp_path, kind, ROWS), text_column="other"))
    assert [id for id, _ in plain] == ["0", "1", "2"]
    assert isinstance(plain[1][1], ContentError), "an empty cell is a fault of its row alone"
    assert plain[2][1] == Message((Text("x"),))


def test_columns_that_cannot_be_guessed(tmp_path: Path) -> None:
    both = written(tmp_path, "csv", [{"text": "a", "caption": "b"}])
    with pytest.raises(DataError, match="text or caption; say which with text_column"):
        list(read_items(both))
    neither = written(tmp_path, "csv", [{"name": "a", "weight": "b"}])
    with pytest.raises(DataError, match="has name, weight"):
        list(read_items(neither))
    with pytest.raises(DataError, match="no column 'names'"):
        list(read_items(neither, text_column="names"))
    twice = written(tmp_path, "csv", [{"id": "1", "text": "a"}, {"id": "1", "text": "b"}])
    with pytest.raises(DataError, match="'1' occurs twice"):
        list(read_items(twice))


def test_items_of_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes) -> list[tuple[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return list(read_items("-"))

    monkeypatch.chdir(tmp_path)
    assert read("a cat\r\n\nü {}\n/etc/hostname".encode()) == [
        ("0", Message((Text("a cat"),))),
        ("2", Message((Text("ü {}"),))),
        ("3", Message((Text("/etc/hostname"),))),
    ]
    items = read(b'{"id": 7, "text": "x"}\n{"image": "../y.png"}\n{"caption": "z"}\n')
    assert [id for id, _ in items] == ["7", "1", "2"]
    assert isinstance(items[1][1], ImageError) and items[2][1] == Message((Text("z"),))
    with pytest.raises(DataError, match="standard input, line 2: the last line is cut"):
        read(b'{"text": "x"}\n{"text": ')
    with pytest.raises(DataError, match="standard input, line 1: byte 0xe4"):
        read(b"\xe4\n")
    with pytest.raises(DataError, match="nothing to embed"):
        read(b"\n")
