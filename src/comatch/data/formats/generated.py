"""Worlds of our own with exact truth: generated scenes, and emoji with their names and keywords."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

from comatch.content import Image, Message, Text
from comatch.data.record import MODES, Options, Pair, Record, Rows, Turns, of_split
from comatch.data.scene_items import ITEMS, shown
from comatch.data.scene_truth import Dice
from comatch.data.scenes import Scene, scene
from comatch.data.tables import open_table
from comatch.data.text_tables import Row
from comatch.errors import DataError

DIRECTIONS: Final = ("image-to-text", "text-to-image", "both")
SCENE_PAIRS: Final = ("captions", "questions", "dialogues")
EMOJI_PAIRS: Final = ("names", "groups")
COUNT: Final = 1_000_000
_DESCRIBE: Final = "describe the picture."
_GROUP: Final = "what kind of thing is it?"


@dataclass(frozen=True)
class _Scenes:
    seed: int
    split: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Scene:
        return scene(self.seed, i, self.split)


def _open_scenes(options: Options) -> tuple[Rows, Options]:
    _check(options, SCENE_PAIRS, ITEMS)
    rows = _Scenes(options.seed, options.split, options.limit or COUNT)
    _ = rows[0]  # an unknown split is refused now
    return rows, options


def _scene_dialogue(row: Scene, options: Options, dice: Dice) -> tuple[Message, Turns]:
    item, seed = shown(row, options.subset), dice.below(2**32)
    if options.dialogue == "description":
        return item.message, [item.describe(seed)]
    if options.dialogue == "caption":
        return item.message, [(item.describe(seed)[0], item.caption(seed))]
    return item.message, item.turns(seed, 1 if options.dialogue == "single-turn" else 3 + dice.below(3))


def _scene_group(row: Scene, options: Options, dice: Dice) -> Pair:
    """The negatives of a caption are near misses of the scene, told in the same order and wording; the others have none.

    What a text is matched with is the dense caption, which is never worded like the text.
    """
    seed = dice.below(2**32)
    if options.subset in (*ITEMS, "dialogues"):
        item = shown(row, options.subset)
        if options.subset == "dialogues":
            text = " ".join(f"{question} {answer}" for question, answer in item.turns(seed, 3 + dice.below(3)))
        else:
            text = item.describe(seed)[1] if options.subset == "texts" else item.caption(seed)
        sides = item.message, Message((Text(text),))
        query, positive = reversed(sides) if _asks(options, dice) else sides
        return query, [positive], []
    picture = Image(row.draw())
    if options.subset == "questions":
        question, answer, _ = row.question(seed)
        return Message((picture, Text(question))), [Message((Text(answer),))], []
    asks = _asks(options, dice)
    near = row.near_misses(seed, options.negatives) if options.negatives else []
    return _pair(picture, row.caption(seed), asks, [Image(s.draw()) for s in near] if asks else [s.caption(seed) for s in near])


@dataclass(frozen=True)
class _Emoji:
    """Rows with the numbers of their kin: those of the same subgroup that do not have the same name or picture."""

    rows: Rows
    families: dict[str, list[int]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Row, _Emoji]:
        return self.rows[i], self

    def kin(self, row: Row, n: int, dice: Dice) -> list[Row]:
        """At most `n` of them, drawn."""
        own = (row["label"], row["image"]["bytes"])
        others = (self.rows[i] for i in dice.shuffled(self.families[row["subgroup"]]))
        return list(islice((o for o in others if o["label"] != own[0] and o["image"]["bytes"] != own[1]), n))


def _open_emoji(options: Options) -> tuple[Rows, Options]:
    _check(options, EMOJI_PAIRS)
    table = open_table(options.path)
    needed = ("label", "tags", "group", "subgroup", "split", "image")
    if missing := [column for column in needed if column not in table.columns]:
        there = ", ".join(table.columns)
        raise DataError(f"{options.path} is not the emoji table: it has no {', '.join(missing)}, only {there}")
    rows = of_split(table, "split", options.split)
    families = defaultdict[str, list[int]](list)
    for i in range(len(rows)):
        families[rows[i]["subgroup"]].append(i)
    return _Emoji(rows, dict(families)), options


def _emoji_dialogue(found: tuple[Row, _Emoji], options: Options, dice: Dice) -> tuple[Message, Turns]:
    row, _ = found
    picture = Message((Image(row["image"]["bytes"]),))
    if options.dialogue == "description":
        return picture, [(_DESCRIBE, f"{row['label']}: {', '.join(row['tags'])}")]
    if options.dialogue == "caption":
        return picture, [(_DESCRIBE, row["label"])]
    spoken = dice.shuffled(
        [
            ("what is shown?", row["label"]),
            ("which keywords fit?", ", ".join(row["tags"])),
            (_GROUP, row["group"]),
            ("which subgroup?", row["subgroup"]),
        ]
    )
    return picture, spoken[: 1 if options.dialogue == "single-turn" else 3 + dice.below(2)]


def _emoji_group(found: tuple[Row, _Emoji], options: Options, dice: Dice) -> Pair:
    """The text is the name alone in one of two throws, else the name and some keywords. Negatives are of the same subgroup."""
    row, emoji = found
    picture = Image(row["image"]["bytes"])
    if options.subset == "groups":
        return Message((picture, Text(_GROUP))), [Message((Text(row["group"]),))], []
    some = dice.shuffled(row["tags"])[: 1 + dice.below(4)] if dice.chance(50) else []
    asks = _asks(options, dice)
    kin = emoji.kin(row, options.negatives, dice) if options.negatives else []
    return _pair(picture, ", ".join((row["label"], *some)), asks, [Image(k["image"]["bytes"]) if asks else k["label"] for k in kin])


def _check(options: Options, pairs: tuple[str, ...], items: tuple[str, ...] = ()) -> None:
    allowed = ", ".join(DIRECTIONS)
    if unknown := set(options.columns) - {"direction"}:
        raise DataError(f"columns has {sorted(unknown)}; for this source only direction may be set: {allowed}")
    if options.columns.get("direction", DIRECTIONS[0]) not in DIRECTIONS:
        raise DataError(f"direction {options.columns['direction']!r} is unknown; allowed: {allowed}")
    if options.subset not in (None, *pairs, *items):
        raise DataError(f"subset {options.subset!r} is unknown; allowed: {', '.join((*pairs, *items))}")
    if options.subset in (pairs[1], "texts") and options.columns:
        raise DataError(f"direction has no effect on {options.subset}, where the same side always asks; remove it")


def _asks(options: Options, dice: Dice) -> bool:
    """Whether the text is the query."""
    direction = options.columns.get("direction", DIRECTIONS[0])
    return direction == "text-to-image" or (direction == "both" and dice.chance(50))


def _pair(image: Image, text: str, asks: bool, negatives: Sequence[Image | str]) -> Pair:
    picture, words = Message((image,)), Message((Text(text),))
    wrong = [Message((Text(n) if isinstance(n, str) else n,)) for n in negatives]
    return (words, [picture], wrong) if asks else (picture, [words], wrong)


SCENES: Final = Record(_open_scenes, _scene_dialogue, _scene_group, takes=("split", "columns", "subset"), modes=MODES)
EMOJI: Final = Record(_open_emoji, _emoji_dialogue, _emoji_group, takes=("path", "split", "columns", "subset"), modes=MODES)
