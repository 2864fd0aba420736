"""What a person passes in, as one ordered list of parts: the only parser of user input.

A `str` is text, always: never a path, never an address. Pictures are typed:

- `pathlib.Path`, bytes, `PIL.Image.Image`, uint8 array [h, w], [h, w, 3] or [h, w, 4]
- `{"text": ..., "image": ..., "images": [...], "video": [...]}`: in any order, kept as order of the parts
- a list of such things (and of texts) is one interleaved item; lists do not nest
- chat: `{"role": "user", "content": text or parts}`, or a list of such turns (system and user are joined);
  parts: `{"type": "text", "text": ...}`, likewise image and video, `{"type": "image_url", "image_url": ...}`

In a picture's place (image, url, an entry of images or video) a string is a path or a `data:` URI, and the
datasets form `{"bytes": ..., "path": ...}` is understood. Nothing is ever fetched. Parsing opens no file: a
picture is checked by `Image.size` (its header) and by `Image.load` (all of it).

Text is kept as it is, except that NUL is dropped and lone surrogates, which UTF-8 cannot hold, become U+FFFD.
Blank texts are dropped beside other parts, refused alone. A key whose value is None or NaN counts as absent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from comatch.errors import ContentError, ImageError
from comatch.pictures import (
    PICTURES,
    ImageLimits,
    Pixels,
    Stored,
    decode,
    from_data_uri,
    is_picture,
    name_of,
    opened,
    read_header,
    source_of,
)

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

_LIMITS = ImageLimits()
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+:[/\\]|file:|//|\\\\)", re.IGNORECASE)
_SLOTS = ("text", "image", "images", "video")
_TYPES = ("text", "image", "image_url", "video")


@dataclass(frozen=True)
class Text:
    """A text part; NUL is dropped and lone surrogates become U+FFFD."""

    text: str

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise ContentError(f"text must be a str, not {_kind(self.text)}")
        # Through UTF-16, so that two surrogates that make one character are joined, not replaced.
        units = self.text.replace("\0", "").encode("utf-16-le", "surrogatepass")
        object.__setattr__(self, "text", units.decode("utf-16-le", "replace"))


@dataclass(frozen=True)
class Mark(Text):
    """A picture's mark without a picture, as in MMEB's WebQA and EDIS: the bare image token. `as_message` never makes one."""

    text: str = "<|image_1|>"


@dataclass(frozen=True, init=False, repr=False)
class Image:
    """A picture part: a path or bytes, decoded anew by each `load()`, or pixels that were passed in decoded.

    Takes a `Path`, bytes, a PIL image or a uint8 array; the latter two are copied to RGB at once, so later
    changes by the caller do not reach us. Formats, limits and colour rules: `comatch.pictures`.
    """

    source: Path | bytes | Stored | Pixels
    limits: ImageLimits = field(compare=False)

    def __init__(self, source: object, limits: ImageLimits = _LIMITS) -> None:
        object.__setattr__(self, "source", source_of(source, limits))
        object.__setattr__(self, "limits", limits)

    def __repr__(self) -> str:
        return f"Image({name_of(self.source)})"

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels after EXIF orientation, from the header alone; ImageError if refused."""
        if isinstance(self.source, Pixels):
            return self.source.width, self.source.height
        return read_header(self.source, self.limits).size

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the source bytes, or of mode, size and pixels if it came decoded."""
        if isinstance(self.source, Pixels):
            width, height, data = self.source
            return hashlib.sha256(f"RGB {width} {height} ".encode() + data).hexdigest()
        with opened(self.source, self.limits) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def load(self, at_least: tuple[int, int] | None = None) -> PILImage:
        """A new PIL image of mode RGB, which the caller owns; ImageError if refused, truncated or damaged.

        at_least: (width, height) that are enough, so that a large JPEG may be decoded at a fraction of its size.
        """
        return self.source.image() if isinstance(self.source, Pixels) else decode(self.source, self.limits, at_least)


@dataclass(frozen=True)
class Video:
    """A video part: its frames in order, at least one."""

    frames: tuple[Image, ...]

    def __post_init__(self) -> None:
        if not self.frames:
            raise ContentError("a video needs at least one frame")


@dataclass(frozen=True)
class Message:
    """An item as an ordered list of parts; blank texts are dropped, and nothing left is a ContentError.

    instruction: what the vector is for, for models that were trained with instructions; "" takes the model's own.
    """

    parts: tuple[Text | Image | Video, ...]
    instruction: str = ""

    def __post_init__(self) -> None:
        kept = tuple(p for p in self.parts if not (isinstance(p, Text) and not p.text.strip()))
        if not kept:
            raise ContentError("empty: there is neither a picture nor a text of more than white space")
        object.__setattr__(self, "parts", kept)
        object.__setattr__(self, "instruction", Text(self.instruction).text)

    @property
    def text(self) -> str:
        """All texts in order, one per line; for people and filters (the model sees the parts)."""
        return "\n".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        """All image parts in order; frames of videos are not among them."""
        return tuple(part for part in self.parts if isinstance(part, Image))


@dataclass(frozen=True)
class Group:
    """One training unit for matching: a query, its positives, its hard negatives, the name of its source."""

    query: Message
    positives: tuple[Message, ...]
    negatives: tuple[Message, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Dialogue:
    """One training unit for compression: a context and (question, answer) turns about it.

    target: a text that says what the context shows, for stages that rebuild one beside the dialogue.
    """

    context: Message
    turns: tuple[tuple[str, str], ...]
    source: str = ""
    target: str = ""


def as_message(x: object, *, root: Path | None = None, limits: ImageLimits = _LIMITS) -> Message:
    """Turn anything a person may pass into a Message; opens no file and makes no request.

    With `root` (for paths that come from data) every path must lie below it after resolving `..` and links,
    and relative ones start there. Raises ContentError, or its kind ImageError for pictures.
    """
    if isinstance(x, Message):
        return x
    return Message(tuple(_Parser(None if root is None else root.resolve(), limits).parts(x)))


def as_messages(
    xs: Iterable[object], *, root: Path | None = None, limits: ImageLimits = _LIMITS
) -> list[Message]:
    """Turn a list of items into Messages, in order; errors carry the item's position."""
    if isinstance(xs, (str, Mapping)) or is_picture(xs) or not isinstance(xs, Iterable):
        raise ContentError(f"expected a list of items, not one {_kind(xs)}; put it in a list")
    messages = []
    for position, x in enumerate(xs):
        try:
            messages.append(as_message(x, root=root, limits=limits))
        except ContentError as error:
            raise error.at(position) from error
    return messages


@dataclass(frozen=True)
class _Parser:
    root: Path | None
    limits: ImageLimits

    def parts(self, x: object) -> Iterator[Text | Image | Video]:
        """Parts of a whole item."""
        if _is_turn(x):
            x = [x]
        if not isinstance(x, (list, tuple)):
            yield from self.part(x)
        elif x and all(map(_is_turn, x)):
            roles = [turn["role"] for turn in x]
            if "assistant" in roles:
                raise ContentError("an assistant turn cannot be embedded; drop it, or say it in a user turn")
            if wrong := [role for role in roles if role not in ("system", "user")]:
                raise ContentError(f"role {_brief(wrong[0])} is unknown; allowed: system, user")
            if "user" not in roles:
                raise ContentError("a chat without a user turn is no item; pass its turns as one list")
            for turn in x:
                yield from self.turn(turn)
        else:
            for entry in x:
                yield from self.part(entry)

    def turn(self, turn: Mapping[Any, Any]) -> Iterator[Text | Image | Video]:
        _check_keys(turn, ("role", "content"))
        content = turn.get("content")
        if not isinstance(content, (str, list, tuple)):
            raise ContentError(f"content of a turn must be a text or a list of parts, not {_kind(content)}")
        for entry in [content] if isinstance(content, str) else content:
            yield from self.part(entry)

    def part(self, x: object) -> Iterator[Text | Image | Video]:
        """Parts of one entry of an item; entries do not nest, so hostile depth ends here."""
        if isinstance(x, str):
            yield Text(x)
        elif isinstance(x, (Text, Image, Video)):
            yield x
        elif isinstance(x, Message):
            if x.instruction:
                raise ContentError("a Message with an instruction is a whole item; it cannot stand among parts")
            yield from x.parts
        elif _is_turn(x):
            raise ContentError("a chat turn cannot stand among parts; pass its content instead")
        elif isinstance(x, Mapping):
            yield from self.typed(x) if "type" in x else self.slots(x)
        elif is_picture(x):
            yield self.picture(x)
        elif isinstance(x, (list, tuple)):
            raise ContentError("lists do not nest: one item is one flat list of texts and pictures")
        else:
            raise ContentError(
                f"{_kind(x)} cannot be embedded; allowed: str, {PICTURES}, chat turns, "
                f"a dict with {'/'.join(_SLOTS)}, or a list of these"
            )

    def typed(self, x: Mapping[Any, Any]) -> Iterator[Text | Image | Video]:
        kind = x["type"]
        if not isinstance(kind, str) or kind not in _TYPES:
            raise ContentError(f"part type {_brief(kind)} is unknown; allowed: {', '.join(_TYPES)}")
        _check_keys(x, ("type", kind))
        value = x.get(kind)
        if kind == "image_url":
            if isinstance(value, Mapping):
                _check_keys(value, ("url",))
                value = value.get("url")
            kind = "image"
        if _is_missing(value):
            raise ContentError(f"part of type {_brief(x['type'])} has no such key, or None in it")
        yield from self.slots({kind: value})

    def slots(self, x: Mapping[Any, Any]) -> Iterator[Text | Image | Video]:
        _check_keys(x, _SLOTS)
        for key, value in x.items():
            if _is_missing(value):
                continue
            if key == "text":
                yield Text(value)
            elif key == "image":
                yield self.picture(value)
            elif not isinstance(value, (list, tuple)):
                raise ContentError(f'"{key}" must be a list of pictures, not {_kind(value)}')
            elif key == "images":
                yield from map(self.picture, value)
            elif len(value) > self.limits.max_frames:
                raise ContentError(
                    f"a video of {len(value):,} frames, allowed are {self.limits.max_frames:,}; pass fewer"
                )
            else:
                yield Video(tuple(map(self.picture, value)))

    def picture(self, x: object) -> Image:
        """A picture in a picture's place, where a string is a path or a data URI."""
        if isinstance(x, Image):
            return x
        if isinstance(x, Mapping):
            _check_keys(x, ("bytes", "path"))
            if x.get("bytes") is not None:  # the path beside bytes is only their name
                return Image(x["bytes"], self.limits)
            x = x.get("path")
        if isinstance(x, str):
            if x[:5].lower() == "data:":
                return Image(from_data_uri(x, self.limits), self.limits)
            if _SCHEME.match(x.lstrip()):
                raise ImageError(f"{_brief(x)} is an address, and nothing is fetched; pass a path or bytes")
            if not x.strip():
                raise ImageError("the path of a picture is empty; leave out the key where there is none")
            x = Path(x)
        return Image(self.resolved(x) if isinstance(x, Path) else x, self.limits)

    def resolved(self, path: Path) -> Path:
        name = _brief(str(path))
        if "\0" in str(path):
            raise ImageError(f"{name} is not a path: it holds a NUL character")
        if self.root is None:
            return path
        try:
            full = (self.root / path).resolve()
        except (OSError, RuntimeError, ValueError) as error:  # loops of links, names that no path can hold
            raise ImageError(f"{name} cannot be resolved below {str(self.root)!r}") from error
        if not full.is_relative_to(self.root):
            raise ImageError(f"{name} lies outside of {str(self.root)!r}; move it there or pass another root")
        return full


def _check_keys(x: Mapping[Any, Any], allowed: tuple[str, ...]) -> None:
    if unknown := [key for key in x if key not in allowed]:
        raise ContentError(f"unknown key {_brief(unknown[0])}; allowed: {', '.join(allowed)}")


def _is_turn(x: object) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(x, Mapping) and "role" in x


def _is_missing(x: object) -> bool:
    return x is None or (isinstance(x, float) and x != x)


def _kind(x: object) -> str:
    if isinstance(x, float):
        return repr(x)
    return "None" if x is None else type(x).__name__


def _brief(x: object) -> str:
    text = repr(x[:80] if isinstance(x, str) else x)
    return text if len(text) <= 90 else f"{text[:87]}..."
