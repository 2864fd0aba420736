"""Safe opening of pictures: our own header check first, then Pillow told exactly one format.

One rule for every kind of picture:

- formats: JPEG, PNG, WebP, GIF, BMP, TIFF, known by their first bytes; everything else is refused with a hint
- orientation: EXIF tag 274 is applied (JPEG, PNG, WebP, TIFF); orientation written in XMP is ignored
- animation and pages: the first frame or page; later ones are never decoded, only the first must be whole
- alpha (RGBA, LA, PA, palettes and key colours with transparency): laid on white
- 16 bits (I;16, I): divided by 256, rounded down; values outside 0..65535 are refused, and so are floats
- PNG of 2, 4 or 16 bits with a transparent key colour: refused, the key is lost on the way to 8 bits
- CMYK, YCbCr, HSV, L, 1, P: Pillow's `convert("RGB")`; colour profiles are ignored
- truncated files: refused, unless the cut took no pixel; nothing global is set in Pillow
"""

from __future__ import annotations

import base64
import io
import stat
import struct
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeGuard

from comatch.errors import ImageError
from comatch.headers import Header, exif_orientation, parse_header

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

    Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]

PICTURES = "pathlib.Path, bytes, PIL image, uint8 array"
# What Pillow and its decoders raise on damaged or hostile bytes. Their texts can hold addresses: never shown.
_DECODER_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, OSError, RuntimeError,
    SyntaxError, TypeError, ValueError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class ImageLimits:
    """What a picture may be at most; the defaults take any photograph and refuse bombs.

    max_pixels: width x height, checked before decoding
    max_bytes:  size of the file, or of the bytes passed
    max_frames: pictures passed as one video (an animated file is one picture: its first frame)
    max_aspect: long side / short side; the processors of vision-language models raise above 200
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 50_000_000
    max_frames: int = 1_000
    max_aspect: float = 200


class Pixels(NamedTuple):
    """A decoded picture that nobody can change: RGB, row by row from the top, 3 bytes a pixel."""

    width: int
    height: int
    data: bytes

    def image(self) -> PILImage:
        """The same pixels as a new PIL image of mode RGB."""
        from PIL import Image

        return Image.frombytes("RGB", (self.width, self.height), self.data)


class Stored(ABC):
    """The file of a picture that lies inside another one, such as an archive: read when it is needed, equal where its place is."""

    @abstractmethod
    def read(self, limit: int) -> bytes:
        """Its bytes; of more than `limit` only one byte more. Raises OSError or ImageError."""


def is_picture(x: object) -> bool:
    """Whether x is of a type that can only mean a picture."""
    return isinstance(x, (Path, bytes, bytearray)) or _is_pil(x) or _is_array(x)


def source_of(x: object, limits: ImageLimits) -> Path | bytes | Stored | Pixels:
    """What an Image keeps of a picture; decoded ones are copied, so that nobody can change them later."""
    if isinstance(x, (Path, bytes, Stored)):
        return x
    if isinstance(x, bytearray):
        return bytes(x)
    if _is_pil(x):
        return _from_pil(x, limits)
    if _is_array(x):
        return _from_array(x, limits)
    raise ImageError(f"{type(x).__name__} is no picture; allowed: {PICTURES}")


def from_data_uri(uri: str, limits: ImageLimits) -> bytes:
    """The bytes of `data:image/png;base64,...`, whatever type it names; ImageError if damaged or large."""
    head, _, payload = uri.partition(",")
    with _named("data URI"):
        if not head.lower().endswith(";base64"):
            raise ImageError("must look like data:image/png;base64,...")
        _check_bytes(len(payload) * 3 // 4, limits)
        try:
            return base64.b64decode(payload, validate=True)
        except ValueError as error:
            raise ImageError("has damaged base64") from error


def name_of(source: Path | bytes | Stored | Pixels) -> str:
    """How messages call a picture."""
    if isinstance(source, (Path, Stored)):
        return repr(str(source))
    if isinstance(source, bytes):
        return f"picture of {len(source):,} bytes"
    return f"picture of {source.width:,} x {source.height:,} pixels"


@contextmanager
def opened(source: Path | bytes | Stored, limits: ImageLimits) -> Iterator[io.BufferedReader | io.BytesIO]:
    """Open a regular file, or bytes, for reading; every ImageError raised meanwhile names the picture.

    ImageError if missing, unreadable, empty, not a regular file, or above `limits.max_bytes`.
    """
    with _named(name_of(source)):
        try:
            with _stream(source, limits) as stream:
                _check_bytes(stream.seek(0, io.SEEK_END), limits)
                stream.seek(0)
                yield stream
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or 'input/output error'}") from error


def read_header(source: Path | bytes | Stored, limits: ImageLimits) -> Header:
    """Format, size and orientation of a picture without decoding it; ImageError if refused."""
    with opened(source, limits) as stream:
        return _checked_header(stream, limits)


def decode(source: Path | bytes | Stored, limits: ImageLimits, at_least: tuple[int, int] | None = None) -> PILImage:
    """Decode a picture to RGB by the rules of this module; ImageError if refused, truncated or damaged.

    at_least: (width, height) that are enough; a JPEG then comes at 1/2, 1/4 or 1/8 of its size where that is no smaller.
    """
    from PIL import Image

    with opened(source, limits) as stream:
        data = stream.read(limits.max_bytes + 1)
        _check_bytes(len(data), limits)  # a file may grow while it is read
        header = _checked_header(io.BytesIO(data), limits)
        with _decoding(), Image.open(io.BytesIO(data), formats=[header.format]) as image:
            # A decoder that sees another size than we checked would allocate what we did not allow.
            if sorted(image.size) != sorted(header.size):
                raise ImageError("is damaged: its header and its data give two sizes")
            lying = image.size != header.size
            if at_least:
                image.draft(None, at_least[::-1] if lying else at_least)
            size = image.size[::-1] if lying else image.size
            image.load()
            # Pillow turns TIFF by itself while loading, and no other format.
            turned = image if header.format == "TIFF" else _turned(image, header.orientation)
            rgb = _to_rgb(turned)
        if rgb.size != size:
            raise ImageError("is damaged: its header and its data give two sizes")
        return rgb


# Whoever holds a PIL image or an array has imported its package: asking sys.modules imports nothing.
def _is_pil(x: object) -> TypeGuard[PILImage]:
    return "PIL.Image" in sys.modules and isinstance(x, sys.modules["PIL.Image"].Image)


def _is_array(x: object) -> TypeGuard[Array]:
    return "numpy" in sys.modules and isinstance(x, sys.modules["numpy"].ndarray)


def _from_pil(image: PILImage, limits: ImageLimits) -> Pixels:
    """RGB pixels of an image that the caller opened or made, by the same rules; ImageError if refused."""
    with _named(f"PIL image of mode {image.mode}"):
        _check_size(image.width, image.height, limits)
        with _decoding():
            image.load()
            exif = image.info.get("exif")
            return _pixels(_to_rgb(_turned(image, exif_orientation(exif) if isinstance(exif, bytes) else 1)))


def _from_array(array: Array, limits: ImageLimits) -> Pixels:
    """RGB pixels of a uint8 array [h, w], [h, w, 3] or [h, w, 4]; ImageError for any other."""
    import numpy as np
    from PIL import Image

    shape = array.shape
    with _named(f"array of {array.dtype} with shape {list(shape)}"):
        if array.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))):
            raise ImageError("is not a picture; allowed: uint8 with shape [h, w], [h, w, 3] or [h, w, 4]")
        _check_size(shape[1], shape[0], limits)
        return _pixels(_to_rgb(Image.fromarray(np.ascontiguousarray(array))))


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name} {error.reason}") from error


@contextmanager
def _decoding() -> Iterator[None]:
    from PIL.Image import DecompressionBombError

    try:
        yield
    except DecompressionBombError as error:
        raise ImageError("is above Pillow's own limit, twice PIL.Image.MAX_IMAGE_PIXELS") from error
    except _DECODER_ERRORS as error:
        raise ImageError("cannot be decoded: its data is truncated or damaged") from error


def _stream(source: Path | bytes | Stored, limits: ImageLimits) -> io.BufferedReader | io.BytesIO:
    if not isinstance(source, Path):
        return io.BytesIO(source if isinstance(source, bytes) else source.read(limits.max_bytes))
    try:
        # Asked before opening, because opening a pipe would wait for ever.
        if not stat.S_ISREG(source.stat().st_mode):
            raise ImageError("is not a regular file; pass the path of a picture")
        return source.open("rb")
    except ValueError as error:
        raise ImageError("is not a usable path: it holds characters that no path can hold") from error


def _check_bytes(count: int, limits: ImageLimits) -> None:
    if count == 0:
        raise ImageError("is empty (0 bytes)")
    if count > limits.max_bytes:
        raise ImageError(f"has {count:,} bytes, allowed are {limits.max_bytes:,}; make it smaller first")


def _checked_header(stream: BinaryIO, limits: ImageLimits) -> Header:
    header = parse_header(stream)
    _check_size(*header.size, limits)
    return header


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    size = f"is {width:,} x {height:,} pixels"
    if width < 1 or height < 1:
        raise ImageError(f"{size}: there is nothing to see")
    if width * height > limits.max_pixels:
        count = f"{width * height:,}, allowed are {limits.max_pixels:,}"
        raise ImageError(f"{size} = {count}; make it smaller first")
    aspect = max(width, height) / min(width, height)
    if aspect > limits.max_aspect:
        raise ImageError(f"{size}: aspect ratio {aspect:g}, allowed is {limits.max_aspect:g}; crop it first")


def _turned(image: PILImage, orientation: int) -> PILImage:
    from PIL.Image import Transpose as T

    turns = {
        2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE,
        6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90,
    }  # fmt: skip
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_rgb(image: PILImage) -> PILImage:
    from PIL import Image

    if image.mode == "F":
        raise ImageError("holds floats; scale them to 0..255 and pass uint8")
    if image.mode.startswith("I"):
        import numpy as np

        values = np.asarray(image)
        if "transparency" in image.info or values.min() < 0 or values.max() > 65_535:
            raise ImageError("holds more than plain 16-bit greys (0..65535); convert it to 8 bits first")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _pixels(image: PILImage) -> Pixels:
    return Pixels(image.width, image.height, image.tobytes())
