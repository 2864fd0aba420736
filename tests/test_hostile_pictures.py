"""Hostile, damaged and refused pictures: rows 1, 3, 4 and 6 of the fault table."""

from __future__ import annotations

import gc
import io
import os
import random
import resource
import struct
import threading
import tracemalloc
import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from handmade import NOISE, STILLS, chunk, encoded, png
from PIL import GifImagePlugin, ImageFile
from PIL import Image as PIL

from comatch import headers
from comatch.content import Image, as_message
from comatch.errors import ImageError
from comatch.headers import Header
from comatch.pictures import ImageLimits

USES: list[Callable[[Image], object]] = [lambda image: image.size, Image.load]


@contextmanager
def little_memory() -> Iterator[None]:
    """Python's own memory stays below 5 MB; the process, with Pillow's C memory, grows by less than 50 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


# Row 1: damaged files


@pytest.mark.parametrize("name", [name for name in STILLS if "animated" not in name and "pages" not in name])
def test_truncated_files_are_refused(name: str) -> None:
    data = STILLS[name]
    whole = len(data) - {"gif": 2, "tiff fax": 4}.get(name, 0)  # their last bytes belong to no pixel
    assert Image(data[:whole]).load().tobytes() == Image(data).load().tobytes()
    for cut in (1, 2, 7, 8, 11, 30, whole // 2, whole - 30, whole - 3, whole - 1):
        with pytest.raises(ImageError) as caught:
            Image(data[:cut]).load()
        assert "0x" not in str(caught.value)  # no addresses out of a decoder's message
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_of_an_animation_only_the_first_frame_must_be_whole() -> None:
    data = STILLS["gif animated"]
    assert Image(data[:-40]).load().tobytes() == Image(data).load().tobytes()


def test_missing_empty_and_special_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    reasons = {
        "zero.jpg": "is empty", "page.jpg": "is HTML or XML", "folder.png": "is not a regular file",
        "pipe.png": "is not a regular file", "none.png": "cannot be read: No such file",
        "loop.png": "cannot be read", "\0.png": "is not a usable path", "x" * 300: "cannot be read",
    }  # fmt: skip
    for name, reason in reasons.items():
        image = Image(tmp_path / name)
        for use in USES:
            with pytest.raises(ImageError, match=reason) as caught:
                use(image)
            assert repr(str(tmp_path / name)) in str(caught.value)
        assert caught.value.at(3).position == 3 and str(caught.value.at(3)).startswith("item 3: ")
    with pytest.raises(ImageError, match="No such file"):
        _ = Image(tmp_path / "none.png").digest


def test_a_caller_s_broken_image_is_refused() -> None:
    broken = PIL.open(io.BytesIO(STILLS["png"][:500]))  # lazy: Pillow has not noticed yet
    with pytest.raises(ImageError, match="PIL image of mode RGB cannot be decoded"):
        as_message(broken)


@pytest.mark.filterwarnings("ignore")
def test_bit_flips_never_escape_as_other_errors() -> None:
    rng = random.Random(0)
    decoded = refused = 0
    for _ in range(1500):
        data = bytearray(STILLS[rng.choice(sorted(STILLS))])
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(min(len(data), rng.choice((120, len(data)))))] = rng.randrange(256)
        try:
            image = Image(data).load()
        except ImageError:
            refused += 1
        else:
            decoded += 1
            assert image.mode == "RGB" and image.size == Image(data).size
    assert decoded > 100 and refused > 100


# Row 3: bombs


def bomb(side: int) -> bytes:
    """A whole grey PNG of side x side zeros: 400 MB become 400 KB."""
    deflate = zlib.compressobj(1)
    line = bytes(side + 1)
    packed = b"".join([*(deflate.compress(line) for _ in range(side)), deflate.flush()])
    return png(side, side, 8, 0, b"").replace(chunk(b"IDAT", zlib.compress(b"")), chunk(b"IDAT", packed))


def test_a_huge_png_is_refused_from_its_header() -> None:
    data = bomb(20_000)
    assert len(data) < 3_000_000
    for use in USES:
        with little_memory(), pytest.raises(ImageError, match=r"400,000,000, allowed are 64,000,000"):
            use(Image(data))
    assert Image(data, ImageLimits(max_pixels=10**9)).size == (20_000, 20_000)  # only the limit refuses it
    with pytest.raises(ImageError, match="above Pillow's own limit"):
        Image(data, ImageLimits(max_pixels=10**9)).load()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_pillow_would_still_decode_are_refused() -> None:
    data = bomb(10_000)
    with little_memory(), pytest.raises(ImageError, match=r"is 10,000 x 10,000 pixels = 100,000,000"):
        Image(data).load()
    lazy = PIL.open(io.BytesIO(data))
    with little_memory(), pytest.raises(ImageError, match="100,000,000"):
        as_message(lazy)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, 10_000, 20_000, 1) + b"\1\x11\0\xff\xda\0\2",
        b"BM" + bytes(12) + struct.pack("<Iii", 40, 20_000, -10_000) + bytes(28),
        b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\x1f\x4e\0\x0f\x27\0",
        b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"," + struct.pack("<HHHH", 0, 0, 20_000, 10_000),
        b"MM\0*\0\0\0\x08\0\2" + struct.pack(">HHIIHHII", 256, 4, 1, 20_000, 257, 4, 1, 10_000),
    ],
    ids=["JPEG", "BMP", "WebP", "GIF", "TIFF"],
)
def test_200_megapixels_are_refused_in_every_format(data: bytes) -> None:
    for use in USES:
        with little_memory(), pytest.raises(ImageError, match="is 20,000 x 10,000 pixels = 200,000,000"):
            use(Image(data))


def test_pillow_gets_one_format_and_must_see_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comatch.pictures.parse_header", lambda stream: Header("GIF", 20, 14))
    with pytest.raises(ImageError, match="cannot be decoded"):
        Image(STILLS["png"]).load()
    monkeypatch.setattr("comatch.pictures.parse_header", lambda stream: Header("PNG", 5, 5))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="its header and its data give two sizes"):
        Image(STILLS["png"]).load()


def test_a_tiff_with_huge_tiles_is_refused() -> None:
    entries = {256: 10, 257: 10, 322: 65_536, 323: 65_536}
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    with pytest.raises(ImageError, match="tiles above 8,192"):
        _ = Image(b"II*\0\x08\0\0\0\4\0" + table).size


def test_of_10_000_frames_only_the_first_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    one = encoded(PIL.new("P", (8, 8)), "GIF")
    frame = one[one.index(b",\0\0\0\0") : -1]
    data = one[:-1] + frame * 9_999 + b";"
    with PIL.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 10_000
    read: list[int] = []
    real = GifImagePlugin.GifImageFile._seek

    def counted(self: GifImagePlugin.GifImageFile, frame: int, update_image: bool = True) -> None:
        read.append(frame)
        real(self, frame, update_image)

    monkeypatch.setattr(GifImagePlugin.GifImageFile, "_seek", counted)
    with little_memory():
        assert Image(data).load().size == (8, 8)
    assert read == [0]


def test_a_header_cannot_keep_us_walking(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = headers._take
    monkeypatch.setattr(headers, "_take", lambda stream, count: (taken.append(count), real(stream, count))[1])
    endless = {
        "PNG": png(1, 1, 8, 0, b"\0\0")[:33] + chunk(b"zzzz", b"") * 400_000,
        "JPEG": b"\xff\xd8" + b"\xff" * 5_000_000,
        "GIF": b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + b"!\xfe" + b"\1x" * 2_000_000,
    }
    for kind, data in endless.items():
        assert len(data) < ImageLimits().max_bytes
        taken.clear()
        with pytest.raises(ImageError, match=f"{kind} header"):
            _ = Image(data).size
        assert 90_000 < len(taken) < 250_000


def test_too_many_bytes_are_refused_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    with path.open("wb") as stream:
        stream.write(STILLS["png"])
        stream.truncate(50_000_001)
    for use in (*USES, lambda image: image.digest):
        with little_memory(), pytest.raises(ImageError, match="50,000,001 bytes, allowed are 50,000,000"):
            use(Image(path))


# Row 4: small and long pictures


def test_small_pictures_pass_and_long_ones_are_refused_with_both_numbers() -> None:
    for size in ((1, 1), (1, 200), (400, 2)):
        assert as_message(PIL.new("RGB", size)).images[0].size == size
        assert Image(encoded(PIL.new("RGB", size), "PNG")).load().size == size
    for size, ratio in {(1, 400): "400", (2, 700): "350", (201, 1): "201", (2, 401): "200.5"}.items():
        message = rf"is {size[0]} x {size[1]} pixels: aspect ratio {ratio}, allowed is 200;"
        image = PIL.new("RGB", size)
        with pytest.raises(ImageError, match=message):
            as_message(image)
        for use in USES:
            with pytest.raises(ImageError, match=message):
                use(Image(encoded(image, "PNG")))


# Row 6: formats


@pytest.mark.parametrize(
    ("head", "hint"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG; render it to PNG"),
        (b"\xef\xbb\xbf\n<?xml version='1.0'?><!-- x --><SVG/>", "SVG"),
        (b"<!DOCTYPE html><html><svg/></html>", "HTML or XML"),
        (b"  <html></html>", "HTML or XML"),
        (b"%PDF-1.7", "PDF; render its pages"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC, AVIF"),
        (b"\0\0\0\x1cftypavif\0\0\0\0", "HEIC, AVIF"),
        (b"SIMPLE  =                    T", "FITS; scale it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "EPS"),
        (b"\xc5\xd0\xd3\xc6\x1e", "EPS"),
        (b"8BPS\0\1", "PSD; flatten it"),
        (b"II+\0\x08\0\0\0", "BigTIFF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"P6 1 1 255 abc", "no known picture format"),
        (b"hello", "no known picture format"),
    ],
)
def test_other_formats_are_refused_with_a_hint(head: bytes, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "innocent.jpg"
    path.write_bytes(head)
    for use in USES:
        with pytest.raises(ImageError, match=f"innocent.jpg' is .*{hint}.*; allowed: JPEG, PNG, WebP, GIF"):
            use(Image(path))


def test_formats_that_pillow_knows_stay_closed() -> None:
    for kind in ("PPM", "ICO", "PCX", "TGA", "EPS", "PDF", "AVIF", "JPEG2000", "SGI"):
        with pytest.raises(ImageError, match="allowed: JPEG"):
            Image(encoded(NOISE, kind)).load()


# Loading


def test_loading_keeps_no_pixels_alive() -> None:
    image = Image(STILLS["png"])
    held = dict(vars(image))
    first = image.load()
    assert image.load() is not first and image.load().tobytes() == first.tobytes() == NOISE.tobytes()
    alive = weakref.ref(first)
    del first
    gc.collect()
    assert alive() is None and vars(image) == held


def test_loading_from_many_threads() -> None:
    images = [Image(data) for data in STILLS.values()]
    expected = [image.load().tobytes() for image in images]
    found: list[list[bytes]] = []

    def load_all() -> None:
        found.append([image.load().tobytes() for image in images])

    work = [threading.Thread(target=load_all) for _ in range(4)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert found == [expected] * 4
