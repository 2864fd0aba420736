"""WebDataset archives as tables: tar files whose members of one key, 0007.jpg and 0007.txt, make one row.

Nothing is ever written to disk, and nothing is read that a limit below does not allow. Opening an archive walks over its
headers alone; of each row only its place is kept. The columns of a row are the suffixes of its members, from the first dot of
the file name on:

- jpg, jpeg, png, webp, gif, bmp, tif, tiff: a picture, as bytes; where a row has exactly one, also as column `image`
- txt, text, caption, cls: UTF-8 text
- json: the parsed value; of an object also each key as a column of its own, json.caption

Members of other suffixes or none, and hidden files, are left alone. An archive is refused as a whole where `comatch.data.tar_headers`
refuses a member, where names are equal, and where the members of a row do not stand together.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from comatch.data.tar_headers import files
from comatch.data.text_tables import Row, cut_off
from comatch.errors import ContentError, DataError
from comatch.pictures import ImageLimits

PICTURES: Final = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
TEXTS: Final = ("txt", "text", "caption", "cls")
_LARGEST_PICTURE = ImageLimits().max_bytes
_LARGEST_TEXT = 16 * 2**20
_MOST_MEMBERS = 1_000  # of one row
_ROWS_ASKED = 4  # for the keys of their JSON


class Member(NamedTuple):
    """A file of a row: where its headers and its data start, and how many bytes it has."""

    key: str
    suffix: str
    start: int
    data: int
    size: int


class Tar:
    """One archive. A row is a dict of its members by suffix, beside `__key__` and `__tar__`."""

    def __init__(self, path: Path, allow_cut: bool = False) -> None:
        self.path, self.allow_cut = path, allow_cut
        self._starts = array("q")
        keys, suffixes = set[str](), dict[str, None]()
        with path.open("rb", buffering=0) as file:
            for members in self._groups(file, 0):
                key = members[0].key
                if key in keys:
                    raise DataError(
                        f"{path}: members of {key!r} stand in two places; all of one key must stand together (tar --sort=name)"
                    )
                keys.add(key)
                suffixes.update(dict.fromkeys(member.suffix for member in members if _kind(member.suffix)))
                self._starts.append(members[0].start)
        image = ["image"] if any(_kind(suffix) in PICTURES for suffix in suffixes) else []
        self.columns = tuple(dict.fromkeys((*image, *suffixes, *self._json_keys())))
        self.filled = frozenset(self.columns)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int) -> Row:
        return self._row(i, (*PICTURES, *TEXTS, "json"))

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[Row]:
        return map(self.__getitem__, range(len(self)))

    def type_of(self, column: str) -> None:
        return None

    def _row(self, i: int, kinds: Sequence[str]) -> Row:
        """Members of these kinds of a row. Raises ContentError for one that is too large, or not what its suffix says."""
        with self.path.open("rb", buffering=0) as file:
            members = next(self._groups(file, self._starts[i]), None)
            if members is None:
                raise ContentError(f"{self.path.name}: row {i} is gone; the archive has changed since it was opened")
            row: Row = {"__key__": members[0].key, "__tar__": self.path.name}
            for key, suffix, _, data, size in members:
                kind, where = _kind(suffix), f"{self.path.name}: member {key}.{suffix}"
                if kind not in kinds:
                    continue
                limit = _LARGEST_PICTURE if kind in PICTURES else _LARGEST_TEXT
                if size > limit:
                    raise ContentError(f"{where} has {size:,} bytes, allowed are {limit:,}")
                file.seek(data)
                row[suffix] = value = _value(file.read(size), kind, where)
                if isinstance(value, dict):
                    row.update({f"{suffix}.{name}": entry for name, entry in value.items()})
        pictures = [suffix for suffix in row if _kind(suffix) in PICTURES]
        if len(pictures) == 1:
            row["image"] = row[pictures[0]]
        return row

    def _json_keys(self) -> Iterator[str]:
        for i in range(min(_ROWS_ASKED, len(self))):
            try:
                yield from (name for name in self._row(i, ("json",)) if name[:2] != "__")
            except ContentError:  # told when the row itself is asked for
                continue

    def _groups(self, file: BinaryIO, start: int) -> Iterator[list[Member]]:
        """The members that stand together and have one key, from a place in the archive on."""
        for key, group in itertools.groupby(self._members(file, start), lambda member: member.key):
            members = list(itertools.islice(group, _MOST_MEMBERS + 1))
            if len(members) > _MOST_MEMBERS:
                raise DataError(f"{self.path}: more than {_MOST_MEMBERS} members of {key!r}; is this a WebDataset archive?")
            suffixes = [member.suffix for member in members]
            if len(set(suffixes)) < len(suffixes):
                twice = next(suffix for suffix in suffixes if suffixes.count(suffix) > 1)
                raise DataError(f"{self.path}: two members are called {key}.{twice}; names must differ")
            yield members

    def _members(self, file: BinaryIO, start: int) -> Iterator[Member]:
        for entry in files(file, self.path, start):
            if entry is None:
                return cut_off(f"{self.path}: the archive is cut off at its end", self.allow_cut)
            folder, _, base = entry.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if stem and suffix:
                key = f"{folder}/{stem}" if folder else stem
                yield Member(key, suffix.lower(), entry.start, entry.data, entry.size)


def _kind(suffix: str) -> str:
    """The last part of a suffix ("txt" of "neg.txt"), "" where we do not read such members."""
    last = suffix.rpartition(".")[2]
    return last if last in (*PICTURES, *TEXTS, "json") else ""


def _value(data: bytes, kind: str, where: str) -> Any:
    if kind in PICTURES:
        return data
    try:
        text = data.decode("utf-8-sig")
        return json.loads(text) if kind == "json" else text
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{where} is no {'JSON' if kind == 'json' else 'UTF-8 text'}: {error}") from None
