"""A seeded world of drawn scenes with exact truth, to train nano models on and to test retrieval with.

A scene is a pale background with two to four objects, each in its own quadrant. `scene(seed, index)` is a
pure function. The truth decides the split, so no scene of one split is in another. Jitter and clutter come
from a noise number outside the truth: `redrawn` changes the picture and nothing that can be said of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from comatch.data import scene_text as text
from comatch.data.scene_pixels import SIZE, Box, Pixels, blank, boxes, paint
from comatch.data.scene_text import vocabulary
from comatch.data.scene_truth import (
    BACKGROUNDS,
    COLOURS,
    LETTERS,
    PLACES,
    SHAPES,
    SIZES,
    SPLITS,
    Dice,
    Thing,
    canonical,
    roll,
    split_of,
)
from comatch.errors import DataError

__all__ = ["SIZE", "Scene", "Thing", "class_options", "scene", "vocabulary"]

_CROP: Final = 56
_GRADES: Final = 4
_TRIES: Final = 50
_ATTRIBUTES: Final = {
    "shape": SHAPES,
    "colour": COLOURS,
    "size": SIZES,
    "letter": ("", *LETTERS),
    "place": PLACES,
}


@dataclass(frozen=True)
class Scene:
    """A scene; `things` stand in the order of PLACES, and no two share size, colour and shape.

    `noise` decides jitter and clutter. `difference` grades a near miss (see `near_misses`), 0 for any other
    scene. Texts depend on the truth and on the seed passed, so a redrawn scene is described in the same
    words. Raises DataError for objects that contradict this.
    """

    background: str
    things: tuple[Thing, ...]
    noise: int = 0
    difference: int = 0

    def __post_init__(self) -> None:
        ranks = [PLACES.index(thing.place) for thing in self.things]
        if (
            ranks != sorted(set(ranks))
            or len({thing.look for thing in self.things}) < len(ranks)
            or len(ranks) < 2
        ):
            raise DataError(
                f"not a scene: {self.key}; it needs 2 to 4 objects in the order {', '.join(PLACES)}, "
                "no two of the same size, colour and shape"
            )

    @property
    def truth(self) -> tuple[str, tuple[Thing, ...]]:
        """All that is true of the scene: equal for two scenes exactly if their dense captions are."""
        return self.background, self.things

    @property
    def key(self) -> str:
        """The truth as one string."""
        return canonical(self.background, self.things)

    @property
    def split(self) -> str:
        """The split that holds this truth: "train", "dev" or "test"."""
        return split_of(self.key)

    def draw(self) -> Pixels:
        """The picture, uint8 [84, 84, 3] RGB."""
        return paint(self.background, self.things, Dice("pixels", self.noise))

    def redrawn(self, k: int) -> Scene:
        """The same truth under other jitter and clutter, other ones for each k."""
        return replace(self, noise=Dice("redrawn", self.noise, k).below(2**32))

    def dense_caption(self) -> str:
        """Every object with all its attributes and its place, in one fixed order."""
        return text.dense_caption(self.background, self.things)

    def caption(self, seed: int) -> str:
        """All objects in a random order and wording; it still tells the scene from all its near misses."""
        return text.caption(self.background, self.things, Dice("caption", seed, self.key))

    def dialogue(self, seed: int, turns: int) -> tuple[text.Turn, ...]:
        """`turns` (1 to 9) different questions as (question, answer, kind), kinds from scene_text.KINDS."""
        if not 1 <= turns <= len(text.KINDS):
            raise DataError(f"{turns} turns asked of a scene; pass a number from 1 to {len(text.KINDS)}")
        return text.dialogue(self.background, self.things, Dice("dialogue", seed, self.key), turns)

    def question(self, seed: int) -> text.Turn:
        """One (question, answer, kind)."""
        return self.dialogue(seed, 1)[0]

    def ask(self, kind: str, seed: int, about: Thing | None = None) -> tuple[str, str]:
        """One (question, answer) of a kind of scene_text.KINDS; of an ATTRIBUTES kind, about one object of the scene if it is given."""
        allowed = text.KINDS if about is None else text.ATTRIBUTES
        if kind not in allowed or (about is not None and about not in self.things):
            raise DataError(f"cannot ask {kind!r} about {about or 'a scene'}; allowed: {', '.join(allowed)}, about an object of the scene")
        return text.ask(self.background, self.things, Dice("ask", kind, seed, self.key), kind, about)

    def describe(self, seed: int) -> tuple[str, str]:
        """A request to describe the picture, and the dense caption."""
        return Dice("describe", seed, self.key).pick(text.DESCRIBE), self.dense_caption()

    def classes(self) -> dict[str, str]:
        """The true label of each kind: "count", "background", and of each place "red circle" or "nothing"."""
        labels = {"count": f"{len(self.things)} objects", "background": self.background}
        labels |= dict.fromkeys(PLACES, text.NOTHING)
        return labels | {thing.place: f"{thing.colour} {thing.shape}" for thing in self.things}

    def regions(self) -> list[tuple[str, Box]]:
        """A phrase that fits one object alone, such as "the large red circle", and its box, for each object.

        A box is (left, top, right, bottom) in pixels, right and bottom excluded. It holds the shape: a letter
        beside a small object lies outside.
        """
        found = boxes(self.things, Dice("pixels", self.noise))
        return [(f"the {text.look(thing)}", box) for thing, box in zip(self.things, found, strict=True)]

    def crop(self, box: Box) -> Pixels:
        """The pixels of the box in the middle of a square of plain background, uint8 [side, side, 3].

        The side is at least 56 px, whole tokens of 28, so that a later resize does not hide an object's size.
        Raises DataError for a box that is empty or not within the picture.
        """
        left, top, right, bottom = box
        if not (0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE):
            raise DataError(
                f"box {box} is not (left, top, right, bottom) within 0..{SIZE}; take one from Scene.regions()"
            )
        width, height = right - left, bottom - top
        side = max(width, height, _CROP)
        square = blank(self.background, side)
        x, y = (side - width) // 2, (side - height) // 2
        square[y : y + height, x : x + width] = self.draw()[top:bottom, left:right]
        return square

    def near_misses(self, seed: int, n: int) -> list[Scene]:
        """`n` scenes that are almost this one, all of different truth, hardest first.

        Their `difference` is 1: two objects traded places or one attribute, so the dense caption has the same
        words in another order; 2: one attribute of one object, or the background, is another; 3: an object
        left or came; 4: an object gave way to one of another shape, colour and size. Grades come equally
        often as far as the scene has them. Near misses of a train scene are train scenes. Raises DataError
        where there are fewer than `n`.
        """
        dice = Dice("near misses", seed, self.key)
        allowed = ("train",) if self.split == "train" else SPLITS
        seen, found = {self.truth}, list[Scene]()
        for attempt in range(20 * n + 1000):
            if len(found) == n:
                return sorted(found, key=lambda scene: scene.difference)
            # Each attempt, not each success, moves on: a grade can be used up (two objects have few swaps).
            grade = attempt % _GRADES + 1
            candidate = self._changed(grade, dice)
            if candidate is None or candidate.truth in seen or candidate.split not in allowed:
                continue
            seen.add(candidate.truth)
            found.append(candidate)
        raise DataError(f"only {len(found)} of {n} near misses found for one scene; ask for fewer")

    def afterwards(self, seed: int) -> Scene:
        """The scene after an object left or came; of a train scene another train scene, or where there is none the scene itself."""
        dice, allowed = Dice("afterwards", seed, self.key), ("train",) if self.split == "train" else SPLITS
        found = (self._changed(3, dice) for _ in range(_TRIES))
        return next((s for s in found if s is not None and s.split in allowed), self)

    def _changed(self, grade: int, dice: Dice) -> Scene | None:
        """One random change of a grade, or None where it gave no valid scene."""
        things, background = list(self.things), self.background
        i, j = dice.shuffled(range(len(things)))[:2]
        free = [place for place in PLACES if all(thing.place != place for thing in things)]
        if grade == 1:
            name = dice.pick(tuple(_ATTRIBUTES))
            one, other = getattr(things[i], name), getattr(things[j], name)
            things[i], things[j] = things[i]._replace(**{name: other}), things[j]._replace(**{name: one})
        elif grade == 2:
            name = dice.pick((*_ATTRIBUTES, "background"))
            if name == "background":
                background = dice.pick(BACKGROUNDS)
            else:
                options = free if name == "place" else _ATTRIBUTES[name]
                if not options:
                    return None
                things[i] = things[i]._replace(**{name: dice.pick(options)})
        elif grade == 3:
            if len(things) == 4 or (len(things) == 3 and dice.chance(50)):
                del things[i]
            else:
                things.append(_other(things[i], dice)._replace(place=dice.pick(free)))
        else:
            things[i] = _other(things[i], dice)
        if len({thing.look for thing in things}) < len(things):
            return None
        things.sort(key=lambda thing: PLACES.index(thing.place))
        return Scene(background, tuple(things), dice.below(2**32), grade)


def _other(thing: Thing, dice: Dice) -> Thing:
    """An object in the same place with another shape, colour and size, and any letter."""
    shape, colour, size = (
        dice.pick([option for option in options if option != own])
        for options, own in ((SHAPES, thing.shape), (COLOURS, thing.colour), (SIZES, thing.size))
    )
    return Thing(thing.place, shape, colour, size, dice.pick(("", *LETTERS)))


def scene(seed: int, index: int, split: str = "train") -> Scene:
    """Scene number `index` of a split: a pure function. Raises DataError for an unknown split."""
    if split not in SPLITS:
        raise DataError(f'no split "{split}"; the splits are {", ".join(SPLITS)}')
    dice = Dice("scene", seed, index, split)
    while True:
        background, things = roll(dice)
        if split_of(canonical(background, things)) == split:
            return Scene(background, things, dice.below(2**32))


def class_options(kind: str) -> list[str]:
    """All labels that `Scene.classes()[kind]` can take; raises DataError for an unknown kind."""
    if kind in PLACES:
        return [text.NOTHING, *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)]
    options = {"count": [f"{n} objects" for n in (2, 3, 4)], "background": list(BACKGROUNDS)}
    if kind not in options:
        raise DataError(f'no classes of kind "{kind}"; the kinds are {", ".join((*options, *PLACES))}')
    return options[kind]
