"""Tables of text lines, CSV, TSV and JSON lines: read through once, then any row by its place in the file."""

from __future__ import annotations

import csv
import json
import warnings
from array import array
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

from comatch.errors import DataError

Row = dict[str, Any]


class Lines:
    """Lines of an open file as text, with number and offset of the next one; errors call the file `name`."""

    def __init__(self, file: BinaryIO, name: Path | str, offset: int = 0) -> None:
        self.file, self.name, self.number, self.offset = file, name, 1, offset

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        try:
            text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} at place {error.start + 1}"
            raise DataError(
                f"{self.name}, line {self.number}: {byte} is not UTF-8; save the file as UTF-8"
            ) from None
        self.number += 1
        self.offset += len(line)
        return text


class LineTable:
    """A table of text lines; what one record is, the subclasses know.

    `allow_cut`: where the file is cut off at its end, use what comes before, with a warning.
    """

    def __init__(self, path: Path, allow_cut: bool = False) -> None:
        self.path = path
        self.allow_cut = allow_cut
        self.columns: tuple[str, ...] = ()
        self._starts = array("q")
        filled: dict[str, bool] = {}
        for start, row in self._records():
            self._starts.append(start)
            for name, value in row.items():
                filled[name] = filled.get(name, False) or value not in (None, "")
        self.columns = self.columns or tuple(filled)
        self.filled = frozenset(name for name, some in filled.items() if some)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Row:
        with closing(self._records(self._starts[i])) as records:
            return next(records)[1]

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        return (row for _, row in self._records())

    def type_of(self, column: str) -> None:
        return None

    def _records(self, start: int = 0) -> Generator[tuple[int, Row]]:
        with self.path.open("rb") as file:
            file.seek(start)
            yield from self._parse(Lines(file, self.path, start))

    def _parse(self, lines: Lines) -> Iterator[tuple[int, Row]]:
        raise NotImplementedError


class JsonLines(LineTable):
    """One JSON object per line; blank lines are skipped."""

    def _parse(self, lines: Lines) -> Iterator[tuple[int, Row]]:
        start, number = lines.offset, lines.number
        for text in lines:
            where = f"{self.path}, line {number}"
            if not text.endswith("\n") and text.strip() and (error := json_fault(text)):
                return cut_off(f"{where}: the last line is cut off ({error})", self.allow_cut)
            if text.strip():
                yield start, json_row(text, where)
            start, number = lines.offset, lines.number


def json_row(text: str, where: str) -> Row:
    """One line of JSON lines; `where` opens the message of the DataError."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not text.endswith("\n"):
            raise DataError(f"{where}: the last line is cut off ({error}); write it again") from None
        raise DataError(f"{where}: {error}; each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: found {type(row).__name__}; each line must be one JSON object, such as {{"text": ...}}'
        )
    return row


def json_fault(text: str) -> Exception | None:
    """What is wrong with a text that should be JSON, if anything is."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return error
    return None


def cut_off(what: str, allowed: bool) -> None:
    """A file ends too early: a warning where that is allowed, else DataError."""
    if not allowed:
        raise DataError(f"{what}; write the file again, or set allow_cut to use what comes before")
    warnings.warn(f"{what}; what comes before is used", stacklevel=2)


class Csv(LineTable):
    """Comma-separated values with a header; quoted fields may span lines."""

    delimiter = ","

    def _parse(self, lines: Lines) -> Iterator[tuple[int, Row]]:
        reader = csv.reader(lines, strict=True, delimiter=self.delimiter)
        header = lines.offset == 0
        while True:
            start, number = lines.offset, lines.number
            where = f"{self.path}, line {number}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                where += f" to {lines.number - 1}" if lines.number - 1 > number else ""
                raise DataError(
                    f'{where}: {error}; a quote inside a quoted field is written twice ("")'
                ) from None
            if not fields:
                continue
            if header:
                self._name(fields, where)
                header = False
                continue
            if len(fields) != len(self.columns):
                raise DataError(
                    f"{where}: {len(fields)} fields, but {len(self.columns)} in the header; quote fields "
                    f"that hold {self.delimiter!r}"
                )
            yield start, dict(zip(self.columns, fields, strict=True))

    def _name(self, header: list[str], where: str) -> None:
        names = tuple(name.strip() for name in header)
        if len(set(names)) < len(names) or "" in names:
            raise DataError(
                f"{where}: column names {list(names)} must be there and differ; the first line is the header"
            )
        self.columns = names


class Tsv(Csv):
    """Tab-separated values with a header."""

    delimiter = "\t"
