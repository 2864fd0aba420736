"""Safe opening: sizes read from headers, and a golden pixel for every colour rule (row 5 of the faults)."""

from __future__ import annotations

import hashlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import NOISE, STILLS, chunk, encoded, exif, png
from PIL import Image as PIL

from comatch.content import Image, as_message
from comatch.errors import ImageError
from comatch.pictures import ImageLimits, read_header

EMOJI = Path(__file__).parents[1] / ".." / "shared" / "data" / "emoji" / "emoji.parquet"


def row(source: object) -> list[Any]:
    image = Image(source).load()
    assert image.mode == "RGB" and image.size == Image(source).size
    return [image.getpixel((x, 0)) for x in range(image.width)]


@pytest.mark.parametrize("name", STILLS)
def test_header_agrees_with_pillow(name: str, tmp_path: Path) -> None:
    data = STILLS[name]
    path = tmp_path / "wrong.extension"
    path.write_bytes(data)
    with PIL.open(io.BytesIO(data)) as opened:
        assert Image(data).size == Image(path).size == opened.size == (20, 14)
        assert read_header(data, ImageLimits()).format == opened.format
    assert Image(data).load().size == (20, 14)
    assert Image(data).digest == Image(path).digest == hashlib.sha256(data).hexdigest()
    assert name != "tiff big endian" or data.startswith(b"MM")


def test_header_parsers_on_forms_that_pillow_does_not_write() -> None:
    core = b"BM" + struct.pack("<IHHI", 32, 0, 0, 26) + struct.pack("<IHHHH", 12, 1, 1, 1, 24) + b"\0\0\xff\0"
    assert Image(core).size == (1, 1) and row(core) == [(255, 0, 0)]
    bmp = bytearray(encoded(NOISE, "BMP"))
    bmp[22:26] = struct.pack("<i", -14)  # rows run downwards
    assert Image(bmp).size == (20, 14)
    assert np.array_equal(Image(bmp).load(), np.asarray(NOISE)[::-1])
    jpeg = STILLS["jpeg"]
    assert Image(jpeg[:2] + b"\xff" * 50 + jpeg[2:]).size == (20, 14)  # fill bytes
    screen = bytearray(STILLS["gif"])
    screen[6:10] = struct.pack("<HH", 1, 1)  # the first frame is larger than the screen
    assert Image(screen).size == (20, 14) == Image(screen).load().size
    turned = chunk(b"eXIf", exif(6).tobytes().removeprefix(b"Exif\0\0"))
    late = STILLS["png"][:-12] + turned + STILLS["png"][-12:]
    assert Image(late).size == (14, 20) == Image(late).load().size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_to_size_and_pixels(kind: str) -> None:
    # Four flat corners survive JPEG: red green / blue white, in 16-pixel blocks.
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24], upright[:16, 24:], upright[16:, :24], upright[16:, 24:] = (
        (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255),
    )  # fmt: skip
    turns = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }  # fmt: skip
    for orientation, stored in turns.items():
        options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
        image = PIL.fromarray(np.ascontiguousarray(stored))
        data = encoded(image, kind, exif=exif(orientation), **options)
        assert Image(data).size == (48, 32)
        loaded = Image(data).load()
        assert np.abs(np.asarray(loaded)[8::16, 12::24].astype(int) - upright[8::16, 12::24]).max() < 12
        assert Image(PIL.open(io.BytesIO(data))).load().tobytes() == loaded.tobytes()  # decoded by the caller
    wrong = encoded(NOISE, "JPEG", exif=exif(9))
    assert Image(wrong).size == (20, 14) == Image(wrong).load().size


# Row 5: one golden pixel for each rule

RED, WHITE = (255, 0, 0), (255, 255, 255)
PALETTE = (b"PLTE", bytes([255, 0, 0, 0, 255, 0, 0, 0, 255]))
GOLDEN: dict[str, tuple[bytes, list[tuple[int, int, int]]]] = {
    "1": (png(2, 1, 1, 0, b"\0\x40"), [(0, 0, 0), WHITE]),
    "L": (png(2, 1, 8, 0, b"\0\x05\x09"), [(5, 5, 5), (9, 9, 9)]),
    "L 4 bits": (png(2, 1, 4, 0, b"\0\x35"), [(51, 51, 51), (85, 85, 85)]),
    "P": (png(3, 1, 8, 3, b"\0\0\1\2", PALETTE), [RED, (0, 255, 0), (0, 0, 255)]),
    "P alpha": (
        png(3, 1, 8, 3, b"\0\0\1\2", PALETTE, (b"tRNS", b"\xff\x80\0")),
        [RED, (127, 255, 127), WHITE],
    ),
    "P one clear": (
        png(3, 1, 8, 3, b"\0\0\1\2", PALETTE, (b"tRNS", b"\xff\0\xff")),
        [RED, WHITE, (0, 0, 255)],
    ),
    "P 4 bits": (png(2, 1, 4, 3, b"\0\x12", PALETTE, (b"tRNS", b"\xff\0\xff")), [WHITE, (0, 0, 255)]),
    "LA": (png(3, 1, 8, 4, b"\0\x0a\xff\x0a\x80\x0a\0"), [(10, 10, 10), (132, 132, 132), WHITE]),
    "RGBA": (png(3, 1, 8, 6, b"\0\xff\0\0\xff\xff\0\0\x80\xff\0\0\0"), [RED, (255, 127, 127), WHITE]),
    "1 key": (png(2, 1, 1, 0, b"\0\x40", (b"tRNS", b"\0\0")), [WHITE, WHITE]),
    "L key": (png(2, 1, 8, 0, b"\0\x05\x09", (b"tRNS", b"\0\x05")), [WHITE, (9, 9, 9)]),
    "RGB key": (png(2, 1, 8, 2, b"\0\5\6\7\1\2\3", (b"tRNS", b"\0\5\0\6\0\7")), [WHITE, (1, 2, 3)]),
    "I;16": (png(3, 1, 16, 0, b"\0\x12\x34\xff\xff\0\xff"), [(18, 18, 18), WHITE, (0, 0, 0)]),
    "RGB 16": (png(1, 1, 16, 2, b"\0\x12\x34\xff\xff\0\xff"), [(18, 255, 0)]),
    "LA 16": (png(2, 1, 16, 4, b"\0\x12\x34\xff\xff\0\xff\0\0"), [(18, 18, 18), WHITE]),
    "I": (encoded(PIL.fromarray(np.array([[0x1234, 65535]], np.int32)), "TIFF"), [(18, 18, 18), WHITE]),
    "CMYK": (encoded(PIL.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
    "I;16B": (encoded(PIL.frombytes("I;16B", (2, 1), b"\x12\x34\xff\0"), "TIFF"), [(18, 18, 18), WHITE]),
    "first of animated WebP": (
        encoded(PIL.new("RGBA", (1, 1), (255, 0, 0, 128)), "WEBP", lossless=True, exact=True, save_all=True,
                append_images=[PIL.new("RGBA", (1, 1), "blue")]),
        [(255, 127, 127)],
    ),
    "first of animated GIF": (
        encoded(PIL.new("RGB", (1, 1), "red"), "GIF", save_all=True,
                append_images=[PIL.new("RGB", (1, 1), "blue")]),
        [RED],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_pixels(name: str) -> None:
    data, pixels = GOLDEN[name]
    assert row(data) == pixels
    assert row(PIL.open(io.BytesIO(data))) == pixels  # decoded by the caller: the same rules


def test_golden_pixels_of_images_that_no_file_holds() -> None:
    assert row(PIL.new("PA", (1, 1))) == [WHITE]
    assert row(PIL.new("HSV", (1, 1), (0, 255, 255))) == [RED]
    assert row(PIL.new("RGBa", (1, 1), (0, 0, 0, 0))) == [WHITE]
    assert row(PIL.fromarray(np.array([[0x1234]], np.uint16))) == [(18, 18, 18)]
    assert row(np.array([[[255, 0, 0, 128]]], np.uint8)) == [(255, 127, 127)]
    assert row(np.array([[5, 6]], np.uint8)) == [(5, 5, 5), (6, 6, 6)]
    assert row(np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::-2]) == [(9, 10, 11), (3, 4, 5)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (PIL.new("F", (1, 1)), "holds floats; scale them to 0..255"),
        (encoded(PIL.new("F", (1, 1)), "TIFF"), "holds floats"),
        (PIL.new("I", (1, 1), 70_000), r"more than plain 16-bit greys"),
        (PIL.new("I", (1, 1), -1), r"more than plain 16-bit greys"),
        (png(1, 1, 16, 0, b"\0\0\1", (b"tRNS", b"\0\1")), "a 16-bit PNG with a transparent key colour"),
        (png(2, 1, 4, 0, b"\0\x35", (b"tRNS", b"\0\3")), "a 4-bit PNG with a transparent key colour"),
    ],
)
def test_what_has_no_rule_is_refused(source: object, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Image(source).load()


def test_real_emoji_follow_the_rule_of_alpha() -> None:
    if not EMOJI.exists():
        pytest.skip("the emoji table (shared/data/emoji beside the repository) is absent")
    parquet = pytest.importorskip("pyarrow.parquet")
    seen: dict[str, int] = {}
    for entry in parquet.read_table(EMOJI, columns=["image", "label"]).slice(0, 1615).to_pylist():
        raw = PIL.open(io.BytesIO(entry["image"]["bytes"]))
        if seen.setdefault(raw.mode, 0) >= 5:
            continue
        seen[raw.mode] += 1
        loaded = as_message({"text": entry["label"], "image": entry["image"]}).images[0].load()
        rgba = np.asarray(raw.convert("RGBA")).astype(float)
        alpha = rgba[..., 3:] / 255
        expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
        assert np.abs(np.asarray(loaded) - expected).max() <= 0.51
    assert set(seen) == {"P", "LA", "RGBA"}
