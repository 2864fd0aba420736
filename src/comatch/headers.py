"""What a picture file says about itself, read by our own small parsers before any decoder runs.

The format, one of six, comes from magic bytes and never from a file name; width, height and orientation come
from a bounded walk over the chunks of the file. Nothing is decompressed, so a hostile file costs nothing.
Sources: PNG (W3C 2025), JPEG (ITU-T T.81), GIF89a, WebP (RFC 9649), TIFF 6.0, Exif 3.0.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

from comatch.errors import ImageError

ALLOWED = "JPEG, PNG, WebP, GIF, BMP or TIFF"
_MAX_STEPS = 100_000  # chunks walked in one header, so that a hostile file cannot keep us walking
_MAX_TILE_SIDE = 8_192  # TIFF tiles are allocated whole, however small the picture is

_MAGIC = (
    (0, b"\xff\xd8\xff", "JPEG"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (8, b"WEBP", "WEBP"),
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"),
    (0, b"MM\0*", "TIFF"),
)
_REFUSED = (
    (0, b"%PDF", "a PDF; render its pages to PNG first"),
    (0, b"%!PS", "PostScript (EPS); render it to PNG first"),
    (0, b"\xc5\xd0\xd3\xc6", "PostScript (EPS); render it to PNG first"),
    (4, b"ftyp", "HEIC, AVIF or a video; convert it to JPEG or PNG, or pass the frames of the video"),
    (0, b"SIMPLE  =", "FITS; scale it to 8 bits and save it as PNG first"),
    (0, b"8BPS", "PSD; flatten it and save it as PNG first"),
    (0, b"II+\0", "BigTIFF; save it as plain TIFF or PNG first"),
    (0, b"MM\0+", "BigTIFF; save it as plain TIFF or PNG first"),
    (0, b"\0\0\0\x0cjP  ", "JPEG 2000; convert it to JPEG or PNG first"),
    (0, b"\xffO\xffQ", "JPEG 2000; convert it to JPEG or PNG first"),
    (0, b"\xff\x0a", "JPEG XL; convert it to JPEG or PNG first"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL; convert it to JPEG or PNG first"),
    (0, b"version https://git-lfs", "a Git LFS pointer, not the file itself; run: git lfs pull"),
)


class Header(NamedTuple):
    """Format, stored width and height in pixels, and EXIF orientation (1 to 8)."""

    format: str
    width: int
    height: int
    orientation: int = 1

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as a person sees it: after EXIF orientation."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def parse_header(stream: BinaryIO) -> Header:
    """Read the header of a picture from a seekable stream; ImageError (without a file name) if refused."""
    stream.seek(0)
    kind = _format(stream.read(1024))
    try:
        return Header(kind, *_PARSERS[kind](stream))
    except (EOFError, LookupError, ValueError, struct.error) as error:
        raise ImageError(f"has a truncated or damaged {kind} header") from error


def exif_orientation(exif: bytes) -> int:
    """Orientation 1 to 8 of an EXIF block; 1 where the block is damaged, as viewers do."""
    try:
        return _orientation(_tags(io.BytesIO(exif.removeprefix(b"Exif\0\0"))))
    except (EOFError, LookupError, ValueError, struct.error):
        return 1


def _format(head: bytes) -> str:
    for at, magic, kind in _MAGIC:
        if head.startswith(magic, at):
            return kind
    for at, magic, hint in _REFUSED:
        if head.startswith(magic, at):
            raise ImageError(f"is {hint}; allowed: {ALLOWED}")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<"):
        xml = text.startswith((b"<?xml", b"<!--")) and b"<html" not in text
        svg = text.startswith((b"<svg", b"<!doctype svg")) or (xml and b"<svg" in text)
        hint = "SVG; render it to PNG first" if svg else "HTML or XML, often an error page saved as a picture"
        raise ImageError(f"is {hint}; allowed: {ALLOWED}")
    raise ImageError(f"is of no known picture format; allowed: {ALLOWED}")


def _take(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _png(stream: BinaryIO) -> tuple[int, int, int]:
    stream.seek(8)
    _, kind, width, height, depth, colour = struct.unpack(">I4sIIBB", _take(stream, 18))
    if kind != b"IHDR":
        raise ValueError("no IHDR")
    orientation = 1
    stream.seek(33)
    for _ in range(_MAX_STEPS):
        length, kind = struct.unpack(">I4s", _take(stream, 8))
        # Pillow compares the key colour with pixels that it has already brought to 8 bits.
        if kind == b"tRNS" and colour != 3 and depth not in (1, 8):
            raise ImageError(f"is a {depth}-bit PNG with a transparent key colour; convert it to RGBA first")
        if kind == b"eXIf":
            orientation = exif_orientation(_take(stream, length))
        else:
            stream.seek(length, io.SEEK_CUR)
        _take(stream, 4)  # the checksum, after IEND too: a cut behind the last pixel is a cut all the same
        if kind == b"IEND":
            return width, height, orientation
    raise ValueError("too many chunks")


def _jpeg(stream: BinaryIO) -> tuple[int, int, int]:
    stream.seek(2)
    size: tuple[int, int] | None = None
    orientation = 1
    for _ in range(_MAX_STEPS):
        lead, code = _take(stream, 2)
        if lead != 0xFF:
            raise ValueError("no marker")
        if code == 0xFF:  # a fill byte: read it again as the lead of the next marker
            stream.seek(-1, io.SEEK_CUR)
            continue
        if code == 0x01 or 0xD0 <= code <= 0xD7:  # markers without a body
            continue
        (length,) = struct.unpack(">H", _take(stream, 2))
        body = _take(stream, max(length - 2, 0))
        if code == 0xDA:  # the pixels start: all that a header can say has been said
            break
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            _, height, width = struct.unpack_from(">BHH", body)
            size = width, height
        elif code == 0xE1 and body.startswith(b"Exif\0"):
            orientation = exif_orientation(body)
    if size is None:
        raise ValueError("no frame header")
    return *size, orientation


def _gif(stream: BinaryIO) -> tuple[int, int]:
    stream.seek(6)
    width, height, flags, _, _ = struct.unpack("<HHBBB", _take(stream, 7))
    if flags & 0x80:
        stream.seek(3 << ((flags & 7) + 1), io.SEEK_CUR)
    inside_extension = False
    for _ in range(_MAX_STEPS):
        (byte,) = _take(stream, 1)
        if inside_extension:
            inside_extension = byte != 0
            stream.seek(byte, io.SEEK_CUR)
        elif byte == 0x21:
            inside_extension = True
            stream.seek(1, io.SEEK_CUR)
        elif byte == 0x2C:  # the first frame may be larger than the screen; decoders then enlarge the screen
            left, top, frame_width, frame_height = struct.unpack("<HHHH", _take(stream, 8))
            return max(width, left + frame_width), max(height, top + frame_height)
        else:
            break
    raise ValueError("no frame")


def _bmp(stream: BinaryIO) -> tuple[int, int]:
    stream.seek(14)
    (length,) = struct.unpack("<I", _take(stream, 4))
    if length == 12:
        width, height = struct.unpack("<HH", _take(stream, 4))
    else:
        width, height = struct.unpack("<ii", _take(stream, 8))
    return width, abs(height)  # a negative height means that rows run downwards


def _webp(stream: BinaryIO) -> tuple[int, int, int]:
    stream.seek(12)
    kind, length = struct.unpack("<4sI", _take(stream, 8))
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", _take(stream, 10), 6)
        return width & 0x3FFF, height & 0x3FFF, 1
    if kind == b"VP8L":
        bits = int.from_bytes(_take(stream, 5)[1:], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF), 1
    if kind != b"VP8X":
        raise ValueError("no VP8 chunk")
    body = _take(stream, 10)
    size = 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    for _ in range(_MAX_STEPS if body[0] & 0x08 else 0):  # this flag says that EXIF follows the pixels
        kind, length = struct.unpack("<4sI", _take(stream, 8))
        if kind == b"EXIF":
            return *size, exif_orientation(_take(stream, length))
        stream.seek(length + length % 2, io.SEEK_CUR)
    return *size, 1


def _tiff(stream: BinaryIO) -> tuple[int, int, int]:
    stream.seek(0)
    tags = _tags(stream)
    if max(tags.get(322, 0), tags.get(323, 0)) > _MAX_TILE_SIDE:
        raise ImageError(f"is a TIFF with tiles above {_MAX_TILE_SIDE:,} a side; save it as PNG first")
    return tags[256], tags[257], _orientation(tags)


def _tags(stream: BinaryIO) -> dict[int, int]:
    """Tags of the first directory: 256 width, 257 height, 274 orientation, 322 and 323 tile sides."""
    order = {b"II": "<", b"MM": ">"}[_take(stream, 2)]
    _, offset = struct.unpack(order + "HI", _take(stream, 6))
    stream.seek(offset)
    (count,) = struct.unpack(order + "H", _take(stream, 2))
    table = _take(stream, 12 * count)
    tags = {}
    for at in range(0, len(table), 12):
        tag, kind = struct.unpack_from(order + "HH", table, at)
        if tag in (256, 257, 274, 322, 323) and kind in (3, 4):
            (tags[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), table, at + 8)
    return tags


def _orientation(tags: dict[int, int]) -> int:
    value = tags.get(274, 1)
    return value if 1 <= value <= 8 else 1


_PARSERS: dict[str, Callable[[BinaryIO], tuple[int, ...]]] = {
    "JPEG": _jpeg, "PNG": _png, "GIF": _gif, "BMP": _bmp, "WEBP": _webp, "TIFF": _tiff,
}  # fmt: skip
