"""How an item of MMEB becomes what a model is asked to embed: one declared record per way that somebody published scores with.

A protocol writes the message, puts its own text and markers around it, and bounds the pictures. Its name stands in every result;
numbers of two protocols do not compare. Sources: specs/mmeb.md 1.3 to 1.5 and 5, specs/coma.md 1.3 and 6, specs/cocoa.md 3 and 5.

Three things no protocol here copies: ties are misses everywhere (the reference evaluators count them as hits), rows are packed instead
of padded (so `padding` is a fact about the reference, which no vector here depends on), and frames of a video are pictures in a row
(VLM2Vec-V2 merges two at a time).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from comatch.content import Image, Mark, Message, Text, Video
from comatch.encoder import Encoder
from comatch.errors import EvaluationError
from comatch.recipe import Prompt
from comatch.released.records import release_of

IMAGE, VIDEO = "<|image_1|>", "<|video|>"
BLANK: Final = "NULL"
"""Stands for a candidate without any character (one in OK-VQA): every item needs a finite vector. Qwen3-VL-Embedding's word for it."""


@dataclass(frozen=True)
class Item:
    """One side of a pair, before a protocol writes it.

    text         all of it as MMEB publishes it, with the marker `<|image_1|>` or `<|video|>` where the picture stands
    instruction  what of it the task says, None where the text does not begin with the task's own; body: what the row says
    target       whether it is a candidate
    """

    text: str
    pictures: tuple[Image | Video, ...] = ()
    instruction: str | None = ""
    body: str = ""
    target: bool = False


@dataclass(frozen=True)
class Protocol:
    """How items are written and pictures bounded.

    prompt     what stands around an item; None keeps the model's own, and so does a chat template that the model brought itself
    apart      instructions stand in the prompt's place for them, and candidates have none
    collapse   a blank before a line break is dropped in texts with a picture, as VLM2Vec's second loader does
    dangling   a marker without a picture (WebQA, EDIS): "remove" it with its line break, or "keep" it as a bare image token
    pooling    the poolings that make vectors of this protocol; () leaves it to the model
    pixels     least and most pixels of a picture; square, small: as in ImageSettings
    padding    of the reference code; ties: how they count here
    """

    name: str
    prompt: Prompt | None = None
    apart: bool = False
    collapse: bool = False
    dangling: str = "remove"
    pooling: tuple[str, ...] = ()
    pixels: tuple[int, int] | None = None
    square: int = 0
    small: str = "raise"
    padding: str = "none"
    ties: str = "miss"

    def message(self, item: Item) -> Message:
        """The message of an item. Raises EvaluationError where its instruction must stand apart and is not known."""
        if self.apart:
            return self._apart(item)
        text = item.text
        if self.collapse and item.pictures:
            text = text.replace(" \n", "\n")
        return _message(_in_place(text, item.pictures, self.dangling))

    def ready(self, encoder: Any) -> Any:
        """The encoder with this protocol's prompt and limits; one that is not ours decides these itself.

        Raises EvaluationError where the model pools otherwise.
        """
        if not isinstance(encoder, Encoder):
            return encoder
        pooling = encoder.stage.pooling
        if self.pooling and pooling not in self.pooling:
            allowed = " or ".join(self.pooling)
            raise EvaluationError(f"protocol {self.name} pools by {allowed}, this model by {pooling}; evaluate it by protocol comatch")
        brought = encoder.recipe.prompt
        prompt = brought if self.prompt is None or (self.apart and brought.takes_instruction) else self.prompt
        recipe = replace(encoder.recipe, prompt=prompt)
        images = replace(encoder.images, square=self.square, small=self.small)
        if self.pixels is not None:
            images = images.limited(*self.pixels)
        return Encoder(encoder.backbone, recipe, images)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for results and for the names of cached vectors."""
        return asdict(self)

    def _apart(self, item: Item) -> Message:
        if item.instruction is None:
            raise EvaluationError(
                f"protocol {self.name} takes instruction and text apart, but {item.text[:80]!r} begins with another instruction; "
                "use the data set of split instructions (ziyjiang/MMEB_Test_Instruct)"
            )
        body = item.body.strip() if item.target and item.pictures else item.body
        parts = [*item.pictures, *([Text(body)] if body.strip() else [])]
        return _message(parts, "" if item.target else item.instruction)


def _message(parts: list[Text | Image | Video], instruction: str = "") -> Message:
    if all(isinstance(part, Text) and not part.text.strip() for part in parts):
        parts = [Text(BLANK)]
    return Message(tuple(parts), instruction)


def _in_place(text: str, pictures: tuple[Image | Video, ...], dangling: str) -> list[Text | Image | Video]:
    """The text with its pictures where their markers stand; a picture without a marker comes first."""
    marker = VIDEO if any(isinstance(picture, Video) for picture in pictures) else IMAGE
    before, found, after = text.partition(marker)
    if pictures:
        return [Text(before), *pictures, Text(after)] if found else [*pictures, Text(text)]
    if not found or dangling == "keep":
        return [Text(before), *([Mark()] if found else []), Text(after)]
    return [Text(before + after.removeprefix("\n"))]


def _of_release(name: str, **rules: Any) -> Protocol:
    """A released model's own way: around and inside its pictures as its record says, its texts by `rules`."""
    release = release_of(name)
    stage = release.recipe.encoding
    known = {"prompt": release.recipe.prompt, "pixels": release.pixels, "square": release.square, "padding": "right"}
    return Protocol(name, pooling=(stage.pooling,) if stage and stage.pooling else (), **(known | rules))


_CHAT = replace(
    release_of("qwen3-vl-embedding").recipe.prompt,
    before="<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n",
)

PROTOCOLS: Final = {
    protocol.name: protocol
    for protocol in (
        Protocol("comatch"),
        _of_release("vlm2vec-v1", dangling="keep", small="square"),
        _of_release("vlm2vec-v2", dangling="keep", small="square", collapse=True),
        _of_release("moca"),
        _of_release("coma", small="square", collapse=True),
        _of_release("cocoa"),
        _of_release("qwen3-vl-embedding", prompt=_CHAT, apart=True),
    )
}


def protocol_of(name: str) -> Protocol:
    """The protocol of that name. Raises EvaluationError, naming those there are."""
    if name not in PROTOCOLS:
        raise EvaluationError(f"no protocol {name!r}; allowed: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
