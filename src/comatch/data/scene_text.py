"""What can be said of a scene: captions, and questions with exactly one true answer.

All text is lower case and uses the words of `vocabulary()` and the marks of PUNCTUATION. "Directly left of"
means the neighbouring quadrant of the same row, "directly above" that of the same column; "above" and "left
of" alone are asked only of objects in different rows or columns, whichever is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from comatch.data.scene_truth import (
    BACKGROUNDS,
    COLOURS,
    LETTERS,
    PLACES,
    SHAPES,
    SIZES,
    Dice,
    Thing,
)

Turn = tuple[str, str, str]
Things = tuple[Thing, ...]

PUNCTUATION: Final = (",", ".", ":", "?")
NOTHING: Final = "nothing"
DESCRIBE: Final = (
    "describe the picture.",
    "describe all objects in the picture.",
    "what is in the picture?",
    "what does the picture show?",
    "list everything in the picture.",
    "tell me what the picture shows.",
)
_PLURALS = {"cross": "crosses"} | {shape: f"{shape}s" for shape in SHAPES if shape != "cross"}
_GLUE = """
a above all an and are at background below colour describe directly does everything has have how in is left
letter letters list many me no nothing object objects of on picture right shape show shows size tell the there
what where which with yes 0 1 2 3 4
"""
_FORMS = (
    ("shape",), ("colour", "shape"), ("size", "shape"), ("size", "colour", "shape"),
    ("colour",), ("size", "colour"), ("place",),
)  # fmt: skip
_SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def vocabulary() -> list[str]:
    """All words that can appear in any text about a scene, sorted, without punctuation."""
    places = " ".join((*PLACES, *BACKGROUNDS)).split()
    return sorted({*_GLUE.split(), *places, *SHAPES, *_PLURALS.values(), *COLOURS, *SIZES, *LETTERS})


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def look(thing: Thing) -> str:
    """Size, colour and shape, such as "large red circle": unique within a scene."""
    return " ".join(thing.look)


def _full(thing: Thing) -> str:
    return article(look(thing)) + (f" with letter {thing.letter}" if thing.letter else "")


def dense_caption(background: str, things: Things) -> str:
    """Everything that is true of the scene in one fixed order: equal captions mean equal scenes."""
    listed = ", ".join(f"{_full(thing)} at the {thing.place}" for thing in things)
    return f"{article(background)} background with {len(things)} objects: {listed}"


def caption(background: str, things: Things, dice: Dice) -> str:
    """The same facts in a random order and wording, without the count."""
    deck = dice.shuffled(things)
    style = dice.below(5)
    if style < 3:
        parts = [f"{_full(thing)} at the {thing.place}" for thing in deck]
    else:
        parts = [f"at the {thing.place} {_full(thing)}" for thing in deck]
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}"
    ground = f"{article(background)} background"
    return (
        f"{listed} on {ground}",
        f"a picture of {listed}, on {ground}",
        f"{ground} with {listed}",
        f"{listed}, on {ground}",
        f"on {ground}, {listed}",
    )[style]


def _matching(things: Things, like: Thing, form: tuple[str, ...]) -> int:
    return sum(all(getattr(thing, name) == getattr(like, name) for name in form) for thing in things)


def _naming(thing: Thing, form: tuple[str, ...]) -> str:
    words = [getattr(thing, name) for name in form if name != "place"]
    noun = " ".join(words if "shape" in form else [*words, "object"])
    return f"the {noun} at the {thing.place}" if "place" in form else f"the {noun}"


def _refer(things: Things, thing: Thing, dice: Dice, *avoid: str) -> str:
    """A phrase that fits this object alone and does not use the attributes to avoid.

    One always exists: the place where it may be used, else size, colour and shape together.
    """
    forms = [form for form in _FORMS if not set(avoid) & set(form) and _matching(things, thing, form) == 1]
    return _naming(thing, dice.pick(forms))


def _ask_colour(things: Things, dice: Dice, thing: Thing) -> tuple[str, str]:
    return f"what colour is {_refer(things, thing, dice, 'colour')}?", thing.colour


def _ask_shape(things: Things, dice: Dice, thing: Thing) -> tuple[str, str]:
    if dice.chance(50):
        return f"what shape is at the {thing.place}?", thing.shape
    return f"what shape is {_refer(things, thing, dice, 'shape')}?", thing.shape


def _ask_size(things: Things, dice: Dice, thing: Thing) -> tuple[str, str]:
    return f"what size is {_refer(things, thing, dice, 'size')}?", thing.size


def _ask_place(things: Things, dice: Dice, thing: Thing) -> tuple[str, str]:
    return f"where is {_refer(things, thing, dice, 'place')}?", thing.place


def _ask_relation(things: Things, dice: Dice) -> tuple[str, str]:
    one, other = dice.shuffled(things)[:2]
    (row, column), (other_row, other_column) = (
        divmod(PLACES.index(thing.place), 2) for thing in (one, other)
    )
    if dice.chance(50):
        sides = [
            side
            for side, (down, across) in _SIDES.items()
            if row + down in (0, 1) and column + across in (0, 1)
        ]
        side = dice.pick(sides)
        place = PLACES[(row + _SIDES[side][0]) * 2 + column + _SIDES[side][1]]
        found = [article(f"{thing.colour} {thing.shape}") for thing in things if thing.place == place]
        return f"what is directly {side} {_refer(things, one, dice, 'place')}?", found[
            0
        ] if found else NOTHING
    pairs = []
    if row != other_row:
        pairs.append(("above", "below") if row < other_row else ("below", "above"))
    if column != other_column:
        pairs.append(("left of", "right of") if column < other_column else ("right of", "left of"))
    true, false = dice.pick(pairs)
    yes = dice.chance(50)
    names = (_refer(things, thing, dice, "place") for thing in (one, other))
    return f"is {next(names)} {true if yes else false} {next(names)}?", "yes" if yes else "no"


def _ask_count(things: Things, dice: Dice) -> tuple[str, str]:
    style = dice.below(4)
    if style == 0:
        return "how many objects are there?", str(len(things))
    if style == 1:
        size = dice.pick(SIZES)
        return f"how many {size} objects are there?", str(sum(thing.size == size for thing in things))
    present = dice.pick(things) if dice.chance(75) else None
    if style == 2:
        colour = present.colour if present else dice.pick(COLOURS)
        return f"how many {colour} objects are there?", str(sum(thing.colour == colour for thing in things))
    shape = present.shape if present else dice.pick(SHAPES)
    return f"how many {_PLURALS[shape]} are there?", str(sum(thing.shape == shape for thing in things))


def _ask_text(things: Things, dice: Dice) -> tuple[str, str]:
    lettered = [thing for thing in things if thing.letter]
    style = dice.below(4)
    if style == 0 or not lettered:
        return "how many letters are there?", str(len(lettered))
    if style == 1:
        yes = dice.chance(50)
        here = {thing.letter for thing in lettered}
        letter = dice.pick([letter for letter in LETTERS if (letter in here) == yes])
        return f"is there a letter {letter}?", "yes" if yes else "no"
    thing = dice.pick(lettered)
    if style == 2 and _matching(things, thing, ("letter",)) == 1:
        return f"what has letter {thing.letter}?", article(f"{thing.colour} {thing.shape}")
    return f"which letter does {_refer(things, thing, dice)} have?", thing.letter


def _ask_exists(things: Things, dice: Dice) -> tuple[str, str]:
    """Yes and no are equally likely for each wording; most false ones pair what is there with what is not."""
    yes = dice.chance(50)
    form = dice.pick(
        (("colour", "shape"), ("colour", "shape"), ("size", "colour", "shape"), ("shape",), ("colour",))
    )
    thing = dice.pick(things)
    while not yes and _matching(things, thing, form):
        name = dice.pick(form)
        options = {"shape": SHAPES, "colour": COLOURS, "size": SIZES}[name]
        thing = thing._replace(**{name: dice.pick(options)})
    noun = _naming(thing, form).removeprefix("the ")
    return f"is there {article(noun)}?", "yes" if yes else "no"


_ASK: dict[str, Callable[[Things, Dice], tuple[str, str]]] = {
    "relation": _ask_relation, "count": _ask_count, "text": _ask_text, "exists": _ask_exists,
}  # fmt: skip
_ASK_ABOUT: dict[str, Callable[[Things, Dice, Thing], tuple[str, str]]] = {
    "colour": _ask_colour, "shape": _ask_shape, "size": _ask_size, "place": _ask_place,
}  # fmt: skip
ATTRIBUTES: Final = tuple(_ASK_ABOUT)
KINDS: Final = (*ATTRIBUTES, *_ASK, "background")
# What a picture carries most of is asked most: these four come twice as often as the rest.
_DECK = (*KINDS, "colour", "shape", "text", "relation")


def ask(background: str, things: Things, dice: Dice, kind: str, about: Thing | None = None) -> tuple[str, str]:
    """One question of a kind of KINDS, and its answer. about: the object asked about, for ATTRIBUTES; None draws one."""
    if kind == "background":
        return dice.pick(("what colour is the background?", "what is the background?")), background
    if kind in _ASK_ABOUT:
        return _ASK_ABOUT[kind](things, dice, about or dice.pick(things))
    return _ASK[kind](things, dice)


def dialogue(background: str, things: Things, dice: Dice, turns: int) -> tuple[Turn, ...]:
    """`turns` different questions (question, answer, kind); the caller keeps `turns` within len(KINDS)."""
    asked: dict[str, tuple[str, str]] = {}
    deck: list[str] = []
    while len(asked) < turns:
        deck = deck or dice.shuffled(_DECK)
        kind = deck.pop()
        question, answer = ask(background, things, dice, kind)
        asked.setdefault(question, (answer, kind))
    return tuple((question, answer, kind) for question, (answer, kind) in asked.items())
