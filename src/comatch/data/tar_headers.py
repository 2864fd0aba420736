"""The files in a tar archive, from its headers alone: our own small parser, because a hostile archive must cost nothing.

Refused with the archive: links, devices, pipes, sparse files, absolute names, names with `..`, damaged headers, and data
behind the end. Formats: POSIX.1-2001 (ustar, pax), and GNU's long names and sizes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from comatch.errors import DataError

_BLOCK = 512
_END = bytes(_BLOCK)
_LARGEST_NAME = 2**20  # of a pax header or a GNU long name
_LARGEST_PADDING = 2**20
_REFUSED = {
    "1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe", "S": "a sparse file",
}  # fmt: skip


class Entry(NamedTuple):
    """A regular file: its name, and the bytes of the archive at which its headers and its data start."""

    name: str
    start: int
    data: int
    size: int


def files(file: BinaryIO, path: Path, start: int) -> Iterator[Entry | None]:
    """The files from byte `start` on, at which headers must begin; None as the last where the archive is cut off.

    Raises DataError, naming the archive, for what is refused.
    """
    end = file.seek(0, 2)
    place, more = start, dict[str, str]()  # what a pax or GNU header says of the member after it
    while True:
        file.seek(place)
        block = file.read(_BLOCK)
        if block == _END:
            return _check_end(file, path, end)
        if len(block) < _BLOCK:
            yield None
            return
        try:
            name, size, kind = _header(block)
            if kind not in "xgLK":
                name, size = more.get("path", name), int(more.get("size", size))
            if size < 0:
                raise ValueError(f"size {size}")
        except ValueError as error:
            raise DataError(f"{path}: no tar header at byte {place:,} ({error}); is it damaged, or packed? Unpack .gz first") from None
        data = place + _BLOCK
        place = data + -(-size // _BLOCK) * _BLOCK
        if data + size > end:
            yield None
            return
        if kind in "xgLK":
            if size > _LARGEST_NAME:
                raise DataError(f"{path}: a name of {size:,} bytes, allowed are {_LARGEST_NAME:,}")
            more |= _said(file.read(size), kind, path)
            continue
        _check(name, kind, path)
        if kind != "5" and not name.endswith("/"):
            yield Entry("/".join(part for part in name.split("/") if part not in ("", ".")), start, data, size)
        start, more = place, {}


def _header(block: bytes) -> tuple[str, int, str]:
    """Name, size and type of a member. Raises ValueError."""
    if _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
        raise ValueError("wrong checksum")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return name, _number(block[124:136]), chr(block[156])


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's way to write sizes above 8 GiB
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.strip(b" \0") or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8")


def _said(data: bytes, kind: str, path: Path) -> dict[str, str]:
    """What a pax header ("x", for all members "g") or a GNU one ("L" long name, "K" long link) says that concerns us."""
    try:
        if kind in "LK":
            return {"path": _text(data)} if kind == "L" else {}
        said = {}
        while data.strip(b"\0"):
            length = int(data[: data.index(b" ")])
            if length < 5 or data[length - 1 : length] != b"\n":
                raise ValueError(f"a record of {length} bytes")
            key, _, value = data[data.index(b" ") + 1 : length - 1].partition(b"=")
            said[key.decode()] = value.decode() if key in (b"path", b"size") else ""
            data = data[length:]
    except ValueError as error:
        raise DataError(f"{path}: a damaged pax header ({error})") from None
    if any(key.startswith("GNU.sparse") for key in said):
        raise DataError(f"{path}: holds a sparse file, which is refused; pack it again with plain files")
    known = {key: value for key, value in said.items() if key in ("path", "size")}
    if kind == "g" and known:
        raise DataError(f"{path}: one header gives all members the same {', '.join(known)}; pack it again")
    return known


def _check(name: str, kind: str, path: Path) -> None:
    shown = repr(name if len(name) < 200 else f"{name[:200]}...")
    if kind not in "0\x007" and kind != "5":
        what = _REFUSED.get(kind, f"of unknown type {kind!r}")
        raise DataError(f"{path}: member {shown} is {what}, which is refused; pack it again with plain files")
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or parts[0] == "" or ".." in parts or re.match("[A-Za-z]:", name):
        raise DataError(f"{path}: member {shown} does not lie inside the archive; names must be relative, without '..'")


def _check_end(file: BinaryIO, path: Path, end: int) -> None:
    rest = end - file.tell()
    if rest > _LARGEST_PADDING or any(file.read(rest)):
        raise DataError(f"{path}: {rest:,} bytes behind the end of the archive; were archives joined? Keep them as files of their own")
