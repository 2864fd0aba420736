"""Small tables of every kind with the pictures they name, for the tests of tables, sources and items."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PILImage

from comatch.content import Message


def png(colour: int) -> bytes:
    out = io.BytesIO()
    PILImage.new("RGB", (8, 8), (colour % 256, 7, 9)).save(out, "PNG")
    return out.getvalue()


def pixels(message: Message) -> bytes:
    return message.images[0].load().tobytes()


ROWS = [
    {"caption": 'a "red" cat, sitting', "file": "0.png", "other": "α\nβ"},
    {"caption": "a dog", "file": "sub/1.png", "other": ""},
    {"caption": "bird, 日本", "file": "2.png", "other": "x"},
]


KINDS = ("csv", "tsv", "jsonl", "parquet")


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """The rows as a table of a kind, with the pictures they name beside it."""
    path = folder / f"t.{kind}"
    (folder / "sub").mkdir(exist_ok=True)
    for i, row in enumerate(rows):
        if isinstance(row.get("file"), str) and not row["file"].startswith(("/", "..")):
            (folder / row["file"]).write_bytes(png(i * 40))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path
