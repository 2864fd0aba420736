"""The pictures of a benchmark by the paths its tables name, wherever they lie: in folders, zip or tar archives, or cells of a table.

Archives are never unpacked: what a picture keeps is the place of its bytes. Paths are looked up as they stand and below the folders that
the published archives put around them; a path that leaves its folder is refused.
"""

from __future__ import annotations

import re
import struct
import threading
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from comatch.content import Image
from comatch.data.tables import Table, open_table
from comatch.data.tar_headers import files
from comatch.errors import DataError, EvaluationError, ImageError
from comatch.pictures import ImageLimits, Stored

SUFFIXES: Final = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LIMITS = ImageLimits(max_aspect=2_000)  # crops of one pixel's width occur; the image settings decide what becomes of them
_PREFIXES = ("", "MMEB/", "images/", "image-tasks/", "video-tasks/frames/")
_LOCAL = struct.Struct("<4s22xHH")  # a zip member's own header: signature, lengths of name and of extra field
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Member(Stored):
    """A file in an archive: `size` bytes from `start` on, deflated where `packed`; `stamp` is the archive's time of change."""

    archive: Path
    name: str
    start: int
    size: int
    packed: bool
    stamp: int

    def __str__(self) -> str:
        return f"{self.archive}:{self.name}"

    def read(self, limit: int) -> bytes:
        with self.archive.open("rb") as file:
            file.seek(self.start)
            if not self.packed:
                return file.read(min(self.size, limit + 1))
            try:
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(min(self.size, limit + 1)), limit + 1)
            except zlib.error as error:
                raise ImageError(f"is damaged inside its archive ({error}); fetch the archive again") from error


@dataclass(frozen=True)
class Cell(Stored):
    """A picture in a table: its row, and the column that holds {"bytes", "path"}; `stamp` is the table's, see `stamp_of`."""

    table: Path
    row: int
    column: str
    stamp: str

    def __str__(self) -> str:
        return f"{self.table}, row {self.row}, {self.column}"

    def read(self, limit: int) -> bytes:
        with _LOCK:  # pictures are cut by threads, and a table keeps the rows it read last
            cell = _table(self.table)[self.row][self.column]
        data = cell.get("bytes") if isinstance(cell, dict) else None
        if not isinstance(data, bytes):
            raise ImageError("holds no bytes")
        return data[: limit + 1]


class Pictures:
    """Pictures by path, in the first of some places that has them: folders, .zip and .tar archives."""

    def __init__(self, places: list[Path]) -> None:
        self.places = [place for place in places if place.exists()]
        self._archives = {place: _index(place) for place in self.places if place.is_file()}
        self._folders: dict[Path, dict[str, list[str]]] = {}

    def image(self, path: str) -> Image:
        """The picture of that path. Raises EvaluationError where no place has it, or the path is none."""
        source = self._find(_checked(path))
        if source is None:
            looked = ", ".join(map(str, self.places)) or "no place, as none is there"
            raise EvaluationError(f"there is no picture {path!r}; looked in {looked}")
        return Image(source, LIMITS)

    def listed(self, folder: str) -> tuple[str, ...]:
        """The names of pictures and folders in a folder, numbers in them counted as numbers; () where no place has it."""
        for place in self.places:
            for name in _names(_checked(folder), place):
                if place.is_file():
                    found = self._tree(place).get(name, [])
                else:
                    found = [entry.name for entry in (place / name).iterdir()] if (place / name).is_dir() else []
                if found:
                    return tuple(sorted(found, key=_counted))
        return ()

    def _find(self, path: str) -> Path | Member | None:
        for place in self.places:
            for name in _names(path, place):
                if place in self._archives:
                    if member := self._archives[place].get(name):
                        return _located(member) if member.start < 0 else member
                elif (place / name).is_file():
                    return place / name
        return None

    def _tree(self, archive: Path) -> dict[str, list[str]]:
        if archive not in self._folders:
            tree = defaultdict[str, dict[str, None]](dict)
            for name in self._archives[archive]:
                parts = name.split("/")
                for depth in range(1, len(parts)):
                    tree["/".join(parts[:depth])][parts[depth]] = None
            self._folders[archive] = {folder: list(names) for folder, names in tree.items()}
        return self._folders[archive]


def stamp_of(path: Path) -> str:
    """Size and time of change of a file, or of all files that a pattern such as test-*.parquet names."""
    found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
    return " ".join(f"{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in found)


@lru_cache(maxsize=4)
def _table(path: Path) -> Table:
    return open_table(path)


def _checked(path: str) -> str:
    parts = path.replace("\\", "/").split("/")
    if not path.strip() or path.startswith(("/", "\\")) or ".." in parts or "\0" in path or re.match("[A-Za-z]:", path):
        raise EvaluationError(f"{path!r} is no path below the pictures' folder; the table is damaged or hostile")
    return "/".join(part for part in parts if part not in ("", "."))


def _names(path: str, place: Path) -> list[str]:
    """How a path may be called in a place."""
    below = path.removeprefix(f"{place.name.partition('.')[0]}/")
    return [*(prefix + path for prefix in _PREFIXES), *([below] if below != path else [])]


def _counted(name: str) -> list[tuple[int, str]]:
    """frame_2 before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part.lower()) for part in re.split(r"(\d+)", name)]


def _index(archive: Path) -> dict[str, Member]:
    """The files of an archive by name. Raises EvaluationError for one that cannot be read in place."""
    stamp = archive.stat().st_mtime_ns
    if archive.suffix.lower() == ".zip":
        return _zipped(archive, stamp)
    if archive.suffix.lower() != ".tar":
        raise EvaluationError(f"{archive} is packed as a whole, so its pictures cannot be read in place; unpack it: gunzip {archive.name}")
    found = {}
    try:
        with archive.open("rb") as file:
            for entry in files(file, archive, 0):
                if entry is None:
                    raise EvaluationError(f"{archive} is cut off at its end; fetch it again")
                found[entry.name] = Member(archive, entry.name, entry.data, entry.size, False, stamp)
    except DataError as error:
        raise EvaluationError(str(error)) from error
    return found


def _zipped(archive: Path, stamp: int) -> dict[str, Member]:
    try:
        with zipfile.ZipFile(archive) as file:
            infos = [info for info in file.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError) as error:
        raise EvaluationError(f"{archive} is no readable zip archive ({error}); fetch it again") from error
    odd = [i.filename for i in infos if i.flag_bits & 1 or i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]
    if odd:
        raise EvaluationError(f"{archive}: member {odd[0]!r} is encrypted or packed by another method than deflate; pack it again")
    # A negative start is that of the member's own header: its length is not known until that is read.
    return {
        i.filename: Member(archive, i.filename, -1 - i.header_offset, i.compress_size, i.compress_type != zipfile.ZIP_STORED, stamp)
        for i in infos
    }


def _located(member: Member) -> Member:
    """A zip's member with the place of its data."""
    header = -1 - member.start
    with member.archive.open("rb") as file:
        file.seek(header)
        block = file.read(_LOCAL.size)
    signature, name, extra = _LOCAL.unpack(block) if len(block) == _LOCAL.size else (b"", 0, 0)
    if signature != b"PK\x03\x04":
        raise EvaluationError(f"{member} has no header where the archive says; fetch the archive again")
    return Member(member.archive, member.name, header + _LOCAL.size + name + extra, member.size, member.packed, member.stamp)
