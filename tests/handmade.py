"""Pictures made by hand or by Pillow, for the tests of safe opening."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image as PIL

NOISE = PIL.fromarray(np.random.default_rng(0).integers(0, 256, (14, 20, 3), dtype=np.uint8))


def encoded(image: PIL.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def exif(orientation: int) -> PIL.Exif:
    tags = PIL.Exif()
    tags[274] = orientation
    return tags


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, lines: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, from scan lines that have their filter byte already."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    middle = b"".join(chunk(kind, data) for kind, data in extra)
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


STILLS = {
    "png": encoded(NOISE, "PNG"),
    "png interlaced palette": encoded(NOISE.quantize(16), "PNG"),
    "jpeg": encoded(NOISE, "JPEG"),
    "jpeg progressive": encoded(NOISE, "JPEG", progressive=True),
    "jpeg grey": encoded(NOISE.convert("L"), "JPEG", comment=b"hello"),
    "jpeg cmyk": encoded(NOISE.convert("CMYK"), "JPEG"),
    "jpeg with profile": encoded(NOISE, "JPEG", icc_profile=b"x" * 200_000, exif=exif(1)),
    "webp lossy": encoded(NOISE, "WEBP"),
    "webp lossless": encoded(NOISE, "WEBP", lossless=True),
    "webp alpha": encoded(NOISE.convert("RGBA"), "WEBP", exact=True, icc_profile=b"x" * 100),
    "webp animated": encoded(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(180)]),
    "gif": encoded(NOISE.quantize(16), "GIF"),
    "gif animated": encoded(NOISE, "GIF", save_all=True, append_images=[NOISE.rotate(180)], comment=b"hi"),
    "bmp": encoded(NOISE, "BMP"),
    "bmp palette": encoded(NOISE.quantize(16), "BMP"),
    "tiff": encoded(NOISE, "TIFF"),
    "tiff lzw": encoded(NOISE, "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encoded(NOISE, "TIFF", compression="jpeg"),
    "tiff fax": encoded(NOISE.convert("1"), "TIFF", compression="group4"),
    "tiff pages": encoded(NOISE, "TIFF", save_all=True, append_images=[NOISE.resize((3, 3))]),
    "tiff big endian": encoded(NOISE.convert("I;16B"), "TIFF"),
}
