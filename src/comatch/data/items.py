"""Items to embed, one after the other, from where a person has them: a folder, a table, standard input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from comatch.content import Message
from comatch.data.columns import TEXT_NAMES, check_columns, guess_columns, only
from comatch.data.tables import TABLE_SUFFIXES, open_table
from comatch.data.text_tables import Lines, Row, json_row
from comatch.errors import ContentError, DataError, ImageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
Item = tuple[str, Message | ContentError]


def read_items(
    path: str | Path, *, text_column: str | None = None, image_column: str | None = None
) -> Iterator[Item]:
    """Yield (id, message), or (id, error) for an item that cannot be embedded, from:

    - a folder: all pictures below it, by suffix, without hidden ones, in order; the id is the path below the
      folder. A folder without pictures is read as the shards of a table
    - a table (CSV, TSV, JSON lines or array, Parquet): the named columns, else those of the usual names; the id is the
      column `id`, else the number of the row from 0
    - "-": the lines of standard input, JSON objects if the first one is an object, else texts; ids as in a
      table

    Pictures named in a table must lie below its folder, those named on standard input below the working
    folder. No picture is opened here. Raises DataError for a fault of the whole: nothing to read, no fitting
    column, damaged lines, an id that occurs twice.
    """
    columns = {
        f"query.{kind}": name
        for kind, name in (("text", text_column), ("image", image_column))
        if name is not None
    }
    seen = set[str]()
    for id, item in _from_stdin(columns) if str(path) == "-" else _from_path(Path(path), columns):
        if id in seen:
            raise DataError(f"{path}: the id {id!r} occurs twice; ids must differ")
        seen.add(id)
        yield id, item
    if not seen:
        raise DataError(
            f"{path} holds nothing to embed; pass a table, or a folder with pictures ({', '.join(SUFFIXES)})"
        )


def read_labels(path: str | Path, column: str | None = None) -> dict[str, str]:
    """{id: what a person reads of the item} for the rows of a table, {} where `path` is none.

    column: where it stands; by default the first of the usual names of texts that the table has. DataError for a column that is not there.
    """
    source = Path(path)
    if str(path) == "-" or (source.is_dir() and (next(_pictures(source), None) or not _shards(source))):
        if column is not None:
            raise DataError(f"label column {column!r}: {path} is no table; leave it out")
        return {}
    table = open_table(source)
    if column is not None and column not in table.columns:
        raise DataError(f"{path} has no column {column!r} for labels; its columns are {', '.join(table.columns)}")
    column = column or next((name for name in TEXT_NAMES if name in table.filled), None)
    if column is None:
        return {}
    labels = {}
    for number, row in enumerate(table.rows(sorted({column, "id"} & set(table.columns)))):
        cell = row.get(column)
        if told := ", ".join(map(str, cell)) if isinstance(cell, list) else str(cell or ""):
            labels[_id(row, number)] = told
    return labels


def _from_path(path: Path, columns: Mapping[str, str]) -> Iterator[Item]:
    found = False
    if path.is_dir():
        for item in _pictures(path):
            found = True
            yield item
    if not found and (not path.is_dir() or _shards(path)):
        yield from _from_table(path, columns)


def _from_table(path: Path, columns: Mapping[str, str]) -> Iterator[Item]:
    table = open_table(path)
    columns = columns or _usual([name for name in table.columns if name in table.filled], path)
    check_columns(table, columns)
    needed = {*columns.values(), "id"} & set(table.columns)
    root = path if path.is_dir() else path.parent
    for number, row in enumerate(table.rows(sorted(needed))):
        yield _item(row, number, columns, root)


def _from_stdin(columns: Mapping[str, str]) -> Iterator[Item]:
    objects = None
    for number, line in enumerate(Lines(sys.stdin.buffer, "standard input")):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        if objects is None:
            objects = _is_object(text)
        if objects:
            where = f"standard input, line {number + 1}"
            row = json_row(line, where)
            yield _item(
                row,
                number,
                columns or _usual([name for name in row if row[name] not in (None, "")], where),
                Path.cwd(),
            )
        else:
            yield _item({"text": text}, number, {"query.text": "text"}, Path.cwd())


def _pictures(root: Path) -> Iterator[Item]:
    closed: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=closed.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                place = Path(folder, name).relative_to(root)
                yield _item({"id": place.as_posix(), "image": place}, 0, {"query.image": "image"}, root)
    for error in closed:
        yield (
            Path(error.filename).relative_to(root).as_posix(),
            ImageError(f"folder {error.filename} cannot be read: {error.strerror}"),
        )


def _item(row: Row, number: int, columns: Mapping[str, str], root: Path) -> Item:
    try:
        return _id(row, number), only(row, columns, "query", root)
    except ContentError as error:
        return _id(row, number), error


def _id(row: Row, number: int) -> str:
    id = row.get("id")
    return str(number if id is None or id == "" else id)


def _usual(names: list[str], where: Path | str) -> dict[str, str]:
    return {f"query.{kind}": column for kind, column in guess_columns(names, where).items()}


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _shards(folder: Path) -> bool:
    return any(file.suffix.lower() in TABLE_SUFFIXES for file in folder.iterdir())
