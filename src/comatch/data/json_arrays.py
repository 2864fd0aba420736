"""A JSON array of objects as a table: LLaVA's files are one such array of up to a gigabyte, read here in pieces."""

from __future__ import annotations

import codecs
import json
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

from comatch.data.text_tables import LineTable, Row, cut_off
from comatch.errors import DataError

_LARGEST_ROW = 64 * 2**20
_SPACE = " \t\r\n"
_DECODER = json.JSONDecoder()


class JsonArray(LineTable):
    """One JSON object per row, in one array."""

    def _records(self, start: int = 0) -> Generator[tuple[int, Row]]:
        with self.path.open("rb") as file:
            file.seek(start)
            text = _Text(file, self.path, start, 2**16 if start else 2**20)
            if start == 0 and text.next() != "[":
                raise DataError(f'{self.path}: found {text.next()!r}; a JSON table is one array of objects: [{{"text": ...}}, ...]')
            if start == 0 and text.skip() == "]":
                return
            while opening := text.next():
                if opening != "{":
                    raise DataError(f"{self.path}, line {text.line}: found {opening!r}; each entry of the array must be an object")
                place, row = text.place, text.object()
                if row is None:
                    break
                yield place, row
                after = text.next()
                if after == "]":
                    if text.skip():
                        raise DataError(f"{self.path}, line {text.line}: found {text.next()!r} after the end of the array; delete it")
                    return
                if after not in (",", ""):
                    raise DataError(f"{self.path}, line {text.line}: found {after!r}; entries of the array are separated by commas")
                text.skip()
            cut_off(f"{self.path}, line {text.line}: the last entry is cut off", self.allow_cut)


class _Text:
    """The text of a file from some byte on, held a piece at a time. `place` is the byte of the next character."""

    def __init__(self, file: BinaryIO, path: Path, place: int, piece: int) -> None:
        self.file, self.path, self.place, self.piece, self.line = file, path, place, piece, 1
        self._text, self._at, self._ended = "", 0, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig" if place == 0 else "utf-8")().decode
        self.place += 3 * (place == 0 and file.read(3) == codecs.BOM_UTF8)
        file.seek(self.place)

    def next(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._pass(self._at + 1)
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> str:
        """Pass one character, and return the next that is no white space."""
        self._pass(self._at + 1)
        return self.next()

    def object(self) -> Row | None:
        """The object that starts here; None where the file ends within it."""
        while True:
            try:
                row: Row
                row, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                # What cannot be parsed yet may be whole with the next piece; a fault at hand is one at once.
                fault = isinstance(error, json.JSONDecodeError) and error.pos < len(self._text) - 16 and "Unterminated" not in error.msg
                if fault or isinstance(error, RecursionError):
                    raise DataError(f"{self.path}, line {self.line}: {getattr(error, 'msg', error)}; the entry is no JSON") from None
                if not self._more():
                    return None
            else:
                self._pass(end)
                return row

    def _pass(self, end: int) -> None:
        passed = self._text[self._at : end]
        self.place += len(passed.encode())
        self.line += passed.count("\n")
        self._at = end

    def _more(self) -> bool:
        """Read on, in pieces that double while a row does not end. False at the end of the file."""
        rest = self._text[self._at :]
        if len(rest) > _LARGEST_ROW:
            raise DataError(f"{self.path}, line {self.line}: an entry of more than {_LARGEST_ROW:,} characters; is the file damaged?")
        data = self.file.read(max(self.piece, len(rest)))
        try:
            self._text, self._at = rest + self._decode(data, final=not data), 0
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x}"
            raise DataError(f"{self.path}, after line {self.line}: {byte} is not UTF-8; save the file as UTF-8") from None
        return bool(data)
