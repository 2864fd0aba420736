"""Which sources and rows make up each global batch: pure functions of the seed and the step, equal on every rank.

A batch is made of units, each of one source: one sample (free mixing), a block, or the whole batch (homogeneous). Of the
first n units each source has a number that follows from n alone, never falls and stays near its share, so the samples a source
gave before any step are known without walking, and one integer is the whole position. Each source is walked by its own
permutation (`comatch.data.order`). Rows are found by number: what can only be read from its start to its end needs an index first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor

from comatch.config import DataConfig
from comatch.config.data import SourceConfig
from comatch.content import Dialogue, Group, Image, Message, Text, Video
from comatch.data.order import shuffled
from comatch.data.sources import Source, open_source
from comatch.errors import ConfigError, ContentError
from comatch.pictures import Pixels

_RESERVES = 20


@dataclass(frozen=True)
class Ingredient:
    """A source within a mixture. weight: its share beside the others'. prompt: a line before the text of each query."""

    name: str
    source: Source
    weight: Fraction = Fraction(1)
    prompt: str = ""

    def group(self, row: int, epoch: int) -> Group:
        """The row's query with its prompt, its positives and hard negatives. Raises ContentError."""
        group = self.source.group(row, epoch)
        return Group(prompted(group.query, self.prompt), group.positives, group.negatives, self.name) if self.prompt else group

    def dialogue(self, row: int, epoch: int, target: bool = False) -> Dialogue:
        """The row's dialogue; with a target that is the text of the row's pair, of a source without pairs that of its answers.

        Raises ContentError where the pair is not of a text and of what the dialogue is about.
        """
        told = self.source.dialogue(row, epoch)
        if not target:
            return told
        if not self.source.has_pairs:
            return replace(told, target="\n".join(answer for _, answer in told.turns))
        group = self.source.group(row, epoch)
        sides = [side for side in (group.query, group.positives[0]) if side != told.context]
        if len(sides) != 1 or not all(isinstance(part, Text) for part in sides[0].parts):
            raise ContentError("the row's pair is not of the dialogue's context and of a text, so there is no text of it to rebuild")
        return replace(told, target=sides[0].text)

    def pair(self, row: int, epoch: int) -> tuple[Message, Message]:
        """A query and one positive; of a source without pairs a dialogue's context and the text of its answers. Raises ContentError."""
        if self.source.has_pairs:
            group = self.group(row, epoch)
            return group.query, group.positives[0]
        told = self.source.dialogue(row, epoch)
        context = prompted(told.context, self.prompt) if self.prompt else told.context
        return context, Message(tuple(Text(answer) for _, answer in told.turns))


@dataclass(frozen=True)
class Mixture:
    """Sources and how batches are made of them.

    unit: samples in a row that one source gives; 0 is the whole global batch. positives, negatives: how many a sample carries at most.
    """

    ingredients: tuple[Ingredient, ...]
    unit: int = 0
    positives: int = 1
    negatives: int = 0

    def __len__(self) -> int:
        """Rows of all sources."""
        return sum(len(ingredient.source) for ingredient in self.ingredients)

    @property
    def name(self) -> str:
        """The names of the sources, for messages."""
        return ", ".join(ingredient.name for ingredient in self.ingredients)

    def given(self, step: int, batch: int) -> list[int]:
        """How many samples each source gave before `step`."""
        unit = self.unit or batch
        return [n * unit for n in apportioned([i.weight for i in self.ingredients], step * batch // unit)]

    def places(self, step: int, batch: int) -> list[tuple[int, int]]:
        """(source, position) of each sample of global batch `step`, source by source; positions count on over the epochs of a source.

        Ranks that take every n-th of them have equally many of each source, give or take one.
        """
        spans = zip(self.given(step, batch), self.given(step + 1, batch), strict=True)
        return [(i, position) for i, span in enumerate(spans) for position in range(*span)]

    def rows(self, source: int, position: int, seed: int) -> Iterator[tuple[int, int]]:
        """(row, epoch) of a position, then those of its reserves. Within an epoch no row stands at two positions."""
        n = len(self.ingredients[source].source)
        for reserve in range(_RESERVES):
            # An order of its own for each source, or two views of one table would meet in every batch; and for each reserve, or
            # places side by side would reach for the same rows.
            yield shuffled(position, n, seed + source * 1_000_003 + reserve * 15_485_863)

    def steps(self, epochs: float, batch: int) -> int:
        """Whole batches in so many times all rows. Raises ConfigError for endless sources and for less than one batch."""
        if endless := [i.name for i in self.ingredients if i.source.endless]:
            raise ConfigError(f"epochs={epochs:g}: {endless} are generated without end; give them a limit, or say steps instead")
        steps = int(Fraction(str(epochs)) * len(self) / batch)
        if not steps:
            raise ConfigError(f"epochs={epochs:g} of {len(self):,} rows fill no batch of {batch:,}; lower batch or raise epochs")
        return steps

    def try_out(self, pairs: bool, target: bool = False) -> None:
        """Read the first row of each source. Raises DataError where a source cannot serve a stage of pairs, or one of dialogues.

        target: the dialogues need one.
        """
        for ingredient in self.ingredients:
            with suppress(ContentError):  # a faulty row is no fault of the source; it is counted when it is met
                if pairs:
                    ingredient.source.group(0, 0)
                else:
                    ingredient.dialogue(0, 0, target)

    def check(self, steps: int, batch: int) -> None:
        """Raise ConfigError where a batch is not made of whole blocks, or a source would never have its turn."""
        if batch % (self.unit or batch):
            raise ConfigError(f"batch={batch} is not a multiple of block={self.unit}; change one of them")
        given = self.given(steps, batch)
        if idle := [i.name for i, n in zip(self.ingredients, given, strict=True) if not n]:
            way_out = "raise their weights, the temperature or the steps, or remove them"
            raise ConfigError(f"{idle} would not be seen in {steps} steps of {batch}; {way_out}")


def open_mixture(data: DataConfig, seed: int) -> Mixture:
    """Open all sources that a config names. Raises DataError."""
    if data.mixture is None:
        alone = Ingredient(data.source, _opened(data, seed, data.negatives), prompt=data.prompt)
        return Mixture((alone,), 0, data.positives, data.negatives)
    ingredients = []
    # By name, because the order of keys in a file means nothing, and the order of sources decides the order of samples.
    for name, part in sorted(data.mixture.items()):
        source = _opened(part, seed, data.negatives)
        if part.weight is None and source.endless:
            raise ConfigError(f"mixture.{name} is generated without end, so rows are no weight; give it a limit, or all sources a weight")
        share = (part.weight or len(source)) ** (1 / data.temperature)
        # Rounded, because machines may differ in the last digit of a power.
        ingredients.append(Ingredient(name, source, Fraction(f"{share:.12g}"), part.prompt))
    unit = {"free": 1, "homogeneous": 0, "blocks": data.block or 0}[data.compose]
    return Mixture(tuple(ingredients), unit, data.positives, data.negatives)


def apportioned(weights: Sequence[Fraction], n: int) -> list[int]:
    """Split n by weights, exactly: the parts add up to n, and no part falls as n rises.

    Each source in turn takes its share, rounded, of what those before it left; exact arithmetic keeps the distance from the
    true share from growing with n.
    """
    parts, left, rest = [], n, sum(weights, Fraction())
    for weight in weights:
        parts.append(floor(left * weight / rest + Fraction(1, 2)))
        left -= parts[-1]
        rest -= weight
    return parts


def key(message: Message) -> int:
    """63-bit hash of an item's parts, without opening a file: equal items have equal keys.

    A picture is known by its path, its bytes or its pixels; texts that differ only in outer white space are equal.
    """
    state = hashlib.blake2b(digest_size=8)
    for kind, data in _pieces(message.parts):
        state.update(b"%b%d:" % (kind, len(data)) + data)
    return int.from_bytes(state.digest(), "little") >> 1


def prompted(message: Message, prompt: str) -> Message:
    """The message with a prompt on a line of its own before its first text, or after its pictures where it has no text."""
    parts = message.parts
    for i, part in enumerate(parts):
        if isinstance(part, Text):
            return Message((*parts[:i], Text(f"{prompt}\n{part.text}"), *parts[i + 1 :]))
    return Message((*parts, Text(prompt)))


def _pieces(parts: Iterable[Text | Image | Video]) -> Iterator[tuple[bytes, bytes]]:
    for part in parts:
        if isinstance(part, Text):
            yield b"t", part.text.strip().encode()
        elif isinstance(part, Video):
            yield b"v", str(len(part.frames)).encode()
            yield from _pieces(part.frames)
        elif isinstance(part.source, Pixels):
            yield b"x", f"{part.source.width} {part.source.height} ".encode() + part.source.data
        elif isinstance(part.source, bytes):
            yield b"b", part.source
        else:
            yield b"p", str(part.source).encode("utf-8", "surrogateescape")


def _opened(data: SourceConfig, seed: int, negatives: int) -> Source:
    fields = data.model_dump(include=set(SourceConfig.model_fields) - {"source", "prompt"})
    return open_source(data.source, seed=seed, negatives=negatives, **fields)
