"""What is true of a drawn scene: its words, its objects, and the dice that choose them.

Everything random in the generated world comes from `Dice`, a hash of a key and a counter, so a scene is the
same on every machine and with every version of Python and numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeVar

SHAPES: Final = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "orange", "black", "cyan")
SIZES: Final = ("large", "small")
LETTERS: Final = ("a", "e", "h", "k", "l", "o", "t", "x")
PLACES: Final = ("top left", "top right", "bottom left", "bottom right")
BACKGROUNDS: Final = ("pale grey", "pale yellow", "pale pink", "pale green")
SPLITS: Final = ("train", "dev", "test")

_Item = TypeVar("_Item")


class Dice:
    """Random numbers that depend on the key alone: 32 bits at a time from blake2b(key, counter)."""

    def __init__(self, *key: int | str) -> None:
        self._key = ":".join(map(str, key)).encode()
        self._blocks = 0
        self._bits = 0
        self._left = 0

    def below(self, n: int) -> int:
        """A whole number in 0..n-1; n is at most 2**32."""
        if not self._left:
            block = hashlib.blake2b(b"%d:%b" % (self._blocks, self._key)).digest()
            self._bits, self._left = int.from_bytes(block, "little"), 16
            self._blocks += 1
        word = self._bits & 0xFFFFFFFF
        self._bits >>= 32
        self._left -= 1
        return word * n >> 32

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 throws."""
        return self.below(100) < percent

    def pick(self, items: Sequence[_Item]) -> _Item:
        """One of the items, all equally likely."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[_Item]) -> list[_Item]:
        """The items in a random order."""
        deck = list(items)
        for last in range(len(deck) - 1, 0, -1):
            other = self.below(last + 1)
            deck[last], deck[other] = deck[other], deck[last]
        return deck


class Thing(NamedTuple):
    """One object of a scene; `letter` is "" where it has none."""

    place: str
    shape: str
    colour: str
    size: str
    letter: str = ""

    @property
    def look(self) -> tuple[str, str, str]:
        """Size, colour and shape; unique in its scene, so an object can be named without its place."""
        return self.size, self.colour, self.shape


def canonical(background: str, things: tuple[Thing, ...]) -> str:
    """The truth as one string; splits hash it, so its form must never change."""
    return ";".join((background, *map(",".join, things)))


def split_of(truth: str) -> str:
    """The split a canonical truth belongs to: 10 % test, 10 % dev, the rest train, by its own hash."""
    share = int.from_bytes(hashlib.sha256(truth.encode()).digest()[:8], "big") / 2**64
    return "test" if share < 0.1 else "dev" if share < 0.2 else "train"


def roll(dice: Dice) -> tuple[str, tuple[Thing, ...]]:
    """A background and 2 to 4 objects in the order of PLACES.

    An object takes the colour, or the shape, of the one before it in one case of five each, so that counting
    and telling apart are worth asking about.
    """
    places = dice.shuffled(PLACES)[: 2 + dice.below(3)]
    things: list[Thing] = []
    for place in sorted(places, key=PLACES.index):
        while True:
            shape, colour = dice.pick(SHAPES), dice.pick(COLOURS)
            kinship = dice.below(5) if things else 4
            if kinship == 0:
                colour = things[-1].colour
            elif kinship == 1:
                shape = things[-1].shape
            letter = dice.pick(LETTERS) if dice.chance(50) else ""
            thing = Thing(place, shape, colour, dice.pick(SIZES), letter)
            if all(thing.look != other.look for other in things):
                things.append(thing)
                break
    return dice.pick(BACKGROUNDS), tuple(things)
