"""WebDataset archives: the rows that tarfile finds, by headers alone; hostile ones refused by name, and nothing on disk."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import tarfile
import time
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from reader_files import packed, shapes
from table_files import png

from comatch.data.sources import Source, open_source
from comatch.data.tar_headers import files
from comatch.data.tars import Tar
from comatch.errors import ContentError, DataError

GOOD = [("0.png", png(0)), ("0.txt", b"a cat"), ("1.png", png(40)), ("1.txt", "日本".encode()), ("2.jpg", png(80)), ("2.txt", b"bird")]


def opened(path: Path, **options: object) -> Source:
    return open_source("webdataset", path=path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_say_what_tarfile_reads(form: int, tmp_path: Path) -> None:
    dice = random.Random(form)
    names = ["a.txt", "./b.txt", "deep/er/c.x.txt", "ü/日本.txt", "d" * 90 + ".txt", "/".join(["long" * 5] * 9) + "/e.txt", "README", ".x"]
    if form != tarfile.USTAR_FORMAT:
        names += ["n" * 140 + ".txt", "/".join(["very" * 40] * 5) + ".txt"]
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = dice.choice((0, 1, 511, 512, 513, 5_000))
            info.mtime = dice.random() * 1e9  # a pax header of its own
            tar.addfile(info, io.BytesIO(dice.randbytes(info.size)))
        tar.add(tmp_path, "folder", recursive=False)
    with tarfile.open(path) as tar:
        wanted = [(m.name.removeprefix("./"), m.offset_data, m.size) for m in tar if m.isfile()]
    with path.open("rb") as file:
        found = [entry for entry in files(file, path, 0) if entry is not None]
        assert [(entry.name, entry.data, entry.size) for entry in found] == wanted and len(found) == len(names)
        # Each may be found again from where its own headers start.
        assert [next(files(file, path, entry.start)) for entry in found] == found


def test_members_of_a_key_are_a_row(tmp_path: Path) -> None:
    about = json.dumps({"caption": "x", "n": 2}).encode()
    more = [("sub/3.PNG", png(3)), ("sub/3.neg.txt", b"no"), ("sub/3.json", about), ("sub/3.npy", b"?")]
    table = Tar(packed(tmp_path / "t.tar", [*GOOD, *more, ("sub/README", b"?"), ("4.cls", b"7")]))
    assert len(table) == 5 and table.columns == (
        "image", "png", "txt", "jpg", "neg.txt", "json", "cls", "json.caption", "json.n",
    )  # fmt: skip
    assert table[1] == {"__key__": "1", "__tar__": "t.tar", "png": png(40), "txt": "日本", "image": png(40)}
    assert table[3] == {
        "__key__": "sub/3", "__tar__": "t.tar", "png": png(3), "image": png(3), "neg.txt": "no", "json": {"caption": "x", "n": 2},
        "json.caption": "x", "json.n": 2,
    }  # fmt: skip
    assert table[4] == {"__key__": "4", "__tar__": "t.tar", "cls": "7"}
    assert list(table.rows()) == [table[i] for i in range(5)] and pickle.loads(pickle.dumps(table))[2] == table[2]  # noqa: S301
    assert [p.name for p in tmp_path.iterdir()] == ["t.tar"], "nothing is extracted"


def test_the_usual_members_need_no_columns(tmp_path: Path) -> None:
    source = opened(packed(tmp_path / "t.tar", GOOD))
    assert [shapes(source.group(i))[1] for i in range(3)] == [[("a cat",)], [("日本",)], [("bird",)]]
    assert all(source.group(i).query.images for i in range(3)), "pictures of any suffix are column image"
    both = packed(tmp_path / "both.tar", [("0.png", png(0)), ("0.txt", b"a"), ("0.cls", b"1")])
    with pytest.raises(DataError, match=r"cannot be guessed; .*there are image, png, txt, cls"):
        opened(both)
    columns = {"query.image": "image", "positive.text": "text"}
    with pytest.raises(DataError, match=r"no column 'text' for positive\.text; its columns are image, png, txt, cls"):
        opened(both, columns=columns)
    folder = tmp_path / "shards"
    packed(folder / "1.tar", [("0.webp", png(9)), ("0.txt", b"second")])
    packed(folder / "0.tar", [("0.png", png(8)), ("0.txt", b"first")])
    (folder / "info.json").write_text("{}")
    shards = opened(folder)
    assert [shards.group(i).positives[0].text for i in range(2)] == ["first", "second"], "archives have no schema to agree on"
    assert len(opened(folder / "*.tar")) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("1.txt", b"x")], "t.tar: row 1 has no member 'image'; there are txt"),
        ([("1.png", png(1))], "t.tar: row 1 has no member 'txt'; there are png, image"),
        ([("1.png", png(1)), ("1.b.jpg", png(2)), ("1.txt", b"x")], "row 1 has no member 'image'; there are png, b.jpg, txt"),
        ([("1.png", png(1)), ("1.txt", b"\xff\xfe")], "member 1.txt is no UTF-8 text"),
        ([("1.png", png(1)), ("1.json", b"{"), ("1.txt", b"x")], "member 1.json is no JSON"),
        ([("1.png", png(1)), ("1.json", b"[" * 100_000), ("1.txt", b"x")], "member 1.json is no JSON"),
        ([("1.png", png(1)), ("1.txt", b"x" * 3_000)], "member 1.txt has 3,000 bytes, allowed are 2,000"),
        ([("1.png", bytes(5_000)), ("1.txt", b"x")], "member 1.png has 5,000 bytes, allowed are 4,000"),
        ([("1.png", b""), ("1.txt", b"x")], "query has 0 items"),
    ],
)
def test_a_faulty_member_is_a_fault_of_its_row_alone(
    members: list[tuple[str, bytes]], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comatch.data.tars._LARGEST_TEXT", 2_000)
    monkeypatch.setattr("comatch.data.tars._LARGEST_PICTURE", 4_000)
    if any(name == "1.json" and len(data) > 2_000 for name, data in members):
        monkeypatch.setattr("comatch.data.tars._LARGEST_TEXT", 200_000)
    source = opened(packed(tmp_path / "t.tar", [*GOOD[:2], *members, *GOOD[4:]]), columns={"query.image": "image", "positive.text": "txt"})
    assert source.group(0) != source.group(2)
    with pytest.raises(ContentError, match=message):
        source.group(1)


def test_hard_negatives_may_be_missing_from_a_row(tmp_path: Path) -> None:
    columns = {"query.image": "png", "positive.text": "txt", "negative.text": "neg.txt", "negative.image": "neg.png"}
    members = [*GOOD[:2], ("0.neg.txt", b"no"), ("0.neg.png", png(5)), *GOOD[2:4]]
    source = opened(packed(tmp_path / "t.tar", members), columns=columns)
    assert [len(m.images) for m in source.group(0).negatives] == [1] and source.group(1).negatives == ()


# --- hostile archives


def info(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def holding(*members: tarfile.TarInfo) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, data in GOOD:
                tar.addfile(info(name, size=len(data)), io.BytesIO(data))
            for member in members:
                tar.addfile(member, io.BytesIO(bytes(member.size)))

    return write


def patched(edit: Callable[[bytearray], object], sums: bool = True) -> Callable[[Path], None]:
    """An archive whose first header is edited, its checksum made good again."""

    def write(path: Path) -> None:
        packed(path, GOOD)
        data = bytearray(path.read_bytes())
        edit(data)
        if sums:
            data[148:156] = b" " * 8
            data[148:156] = b"%06o\0 " % sum(data[:512])
        path.write_bytes(data)

    return write


def cells(start: int, value: bytes) -> Callable[[bytearray], object]:
    return lambda data: data.__setitem__(slice(start, start + len(value)), value)


def pax(text: bytes) -> Callable[[Path], None]:
    """An archive that opens with a pax header of this text."""

    def write(path: Path) -> None:
        header = info("pax", b"x", size=len(text)).tobuf(tarfile.USTAR_FORMAT)
        packed(path, GOOD)
        path.write_bytes(header + text.ljust(-(-len(text) // 512) * 512, b"\0") + path.read_bytes())

    return write


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "absolute": (holding(info("/etc/3.txt")), "'/etc/3.txt' does not lie inside the archive"),
    "above": (holding(info("a/../../3.txt")), r"'a/\.\./\.\./3\.txt' does not lie inside"),
    "windows": (holding(info("C:\\3.txt")), "does not lie inside"),
    "backslashes": (holding(info("a\\..\\..\\3.txt")), "does not lie inside"),
    "symbolic link": (holding(info("3.png", tarfile.SYMTYPE, linkname="/etc/passwd")), "'3.png' is a symbolic link"),
    "hard link": (holding(info("3.png", tarfile.LNKTYPE, linkname="0.png")), "is a hard link"),
    "device": (holding(info("3.png", tarfile.CHRTYPE)), "is a device"),
    "block device": (holding(info("3.png", tarfile.BLKTYPE)), "is a device"),
    "pipe": (holding(info("3.png", tarfile.FIFOTYPE)), "is a pipe"),
    "sparse": (holding(info("3.png", tarfile.GNUTYPE_SPARSE)), "is a sparse file"),
    "unknown": (holding(info("3.png", b"Z")), "of unknown type 'Z'"),
    "pax sparse": (pax(b"22 GNU.sparse.major=1\n"), "sparse file"),
    "pax path above": (pax(b"21 path=../../2.png \n"), "does not lie inside"),
    "pax negative size": (pax(b"13 size=-512\n"), "size -512"),
    "pax size of no number": (pax(b"10 size=x\n"), "no tar header at byte 1,024"),
    "pax damaged": (pax(b"no length\n"), "damaged pax header"),
    "pax endless": (pax(b"0 a=b\n"), "a record of 0 bytes"),
    "long pax": (pax(b"x" * 1_100_000), "a name of 1,100,000 bytes, allowed are 1,048,576"),
    "global path": (lambda path: (pax(b"9 path=a\n")(path), path.write_bytes(_global(path.read_bytes())))[0], "all members the same path"),
    "equal names": (holding(info("2.txt")), "two members are called 2.txt"),
    "equal names apart": (holding(info("3.txt"), info("0.txt")), "members of '0' stand in two places"),
    "a row apart": (holding(info("0.cls")), "members of '0' stand in two places"),
    "large key": (holding(*(info(f"3.{i}.txt") for i in range(1_001))), "more than 1000 members of '3'"),
    "negative size": (patched(cells(124, b"-0000000010\0")), "size -8"),
    "negative GNU size": (patched(cells(124, b"\xff" * 12)), "size -1"),
    "size of no number": (patched(cells(124, b"9" * 11)), "no tar header at byte 0"),
    "flipped bit": (patched(cells(3, b"\x01"), sums=False), "wrong checksum"),
    "name of no text": (patched(cells(0, b"\xff\xfe.txt")), "no tar header at byte 0"),
    "a gigabyte that is not there": (patched(cells(124, b"10000000000\0")), "cut off at its end"),
    "an exabyte that is not there": (patched(cells(124, b"\x80\0\0\0\x10" + bytes(7))), "cut off at its end"),
    "joined": (lambda path: (holding()(path), path.write_bytes(path.read_bytes() * 2))[0], "behind the end of the archive"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 9_999)) and None, "cut off|Unpack .gz first"),
    "gzip of an archive": (lambda path: (holding()(path), path.write_bytes(gzip.compress(path.read_bytes(), 0)))[0], "Unpack .gz first"),
    "empty": (lambda path: path.write_bytes(b"") and None, "cut off at its end"),
    "no members": (lambda path: path.write_bytes(bytes(1_024)) and None, "holds no rows"),
    "no rows": (lambda path: packed(path, [("README", b"x")]) and None, "holds no rows"),
}  # fmt: skip


def _global(data: bytes) -> bytes:
    block = bytearray(data[:512])
    block[156:157], block[148:156] = b"g", b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data[512:]


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_archive_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    write, message = HOSTILE[fault]
    write(tmp_path / "t.tar")
    tracemalloc.start()
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path / "t.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "t.tar" in str(caught.value) and peak < 8_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]


def test_the_makers_of_hostile_archives_make_good_ones_too(tmp_path: Path) -> None:
    makers = (holding(), patched(lambda data: None), pax(b"18 comment=hello!\n"), holding(info("3.png"), info("3.txt")))
    for make in makers:
        make(tmp_path / "t.tar")
        assert opened(tmp_path / "t.tar").group(0).positives[0].text == "a cat"
    packed(tmp_path / "t.tgz", GOOD)
    with pytest.raises(DataError, match=r"gunzip t\.tgz"):
        opened(tmp_path / "t.tgz")


def test_a_cut_archive_is_refused_or_used_as_far_as_it_goes(tmp_path: Path) -> None:
    path = packed(tmp_path / "t.tar", GOOD)
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [member.offset_data + member.size for member in tar]
    for length in range(100, ends[-1] + 100, 100):
        path.write_bytes(data[:length])
        with pytest.raises(DataError, match=r"t\.tar: the archive is cut off at its end.*allow_cut"):
            opened(path)
        pairs = sum(length >= end for end in ends[1::2])
        if not pairs:
            continue
        with pytest.warns(UserWarning, match="cut off at its end"):
            source = opened(path, allow_cut=True)
        assert pairs <= len(source) <= pairs + 1
        with warnings.catch_warnings(action="ignore"):
            assert [source.group(i).positives[0].text for i in range(pairs)] == ["a cat", "日本", "bird"][:pairs]
            if len(source) > pairs:
                with pytest.raises(ContentError, match="has no member 'txt'"):
                    source.group(pairs)
    path.write_bytes(data[: -(-ends[-1] // 512) * 512 + 512])
    assert len(opened(path)) == 3, "one block of zeros is an end"


def test_an_archive_opens_by_its_headers_alone(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(10_000):
            for suffix, data in (("png", b"x" * 3_000), ("txt", b"words")):
                tar.addfile(info(f"{i:06}.{suffix}", size=len(data)), io.BytesIO(data))
    start = time.process_time()
    assert len(Tar(tmp_path / "t.tar")) == 10_000
    assert time.process_time() - start < 2
    tracemalloc.start()
    table = Tar(tmp_path / "t.tar")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 400_000 and peak < 4_000_000 < (tmp_path / "t.tar").stat().st_size
    assert table[9_999]["txt"] == "words"
