"""Where training rows come from. A source is one record below: how rows are found, and what a row says.

A source is a map: `source.dialogue(i, epoch)` and `source.group(i, epoch)` depend on the seed and these two
numbers alone, so any order, any number of workers and any restart see the same training units.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from comatch.content import Dialogue, Group, Image, Message, Text
from comatch.data.columns import check_columns, guess_columns, only, side, turns
from comatch.data.scene_truth import Dice
from comatch.data.scenes import Scene, scene
from comatch.data.tables import Table, open_table
from comatch.data.text_tables import Row
from comatch.errors import ContentError, DataError

MODES: Final = ("multi-turn", "single-turn", "description", "caption", "mixed")
DIRECTIONS: Final = ("image-to-text", "text-to-image", "both")
SCENES: Final = 1_000_000
Turns = Sequence[tuple[str, str]]
Pair = tuple[Message, Sequence[Message], Sequence[Message]]


class Rows(Protocol):
    """Rows by number, of whatever type the record understands."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


@dataclass(frozen=True)
class Options:
    """What the caller of `open_source` asked for."""

    path: Path
    split: str
    limit: int | None
    seed: int
    columns: Mapping[str, str]
    dialogue: str

    @property
    def root(self) -> Path:
        """The folder that pictures named in a table must lie in."""
        return self.path if self.path.is_dir() else self.path.parent


@dataclass(frozen=True)
class Record:
    """One kind of source, as three functions.

    open      options -> rows, and the options as they hold from then on; DataError before any row is used
    dialogue  row, options, dice -> context and (question, answer) turns
    group     row, options, dice -> query, positives, hard negatives
    """

    open: Callable[[Options], tuple[Rows, Options]]
    dialogue: Callable[[Any, Options, Dice], tuple[Message, Turns]]
    group: Callable[[Any, Options, Dice], Pair]


@dataclass(frozen=True)
class Source:
    """Training units by number. A faulty row raises ContentError, and only when it is asked for."""

    name: str
    rows: Rows = field(repr=False)
    options: Options

    def __len__(self) -> int:
        return min(len(self.rows), self.options.limit or len(self.rows))

    def dialogue(self, i: int, epoch: int = 0) -> Dialogue:
        """Unit of the compression stage: a context and its (question, answer) turns."""
        context, spoken = SOURCES[self.name].dialogue(*self._unit("dialogue", i, epoch))
        return Dialogue(context, tuple(spoken), self.name)

    def group(self, i: int, epoch: int = 0) -> Group:
        """Unit of the matching stage: a query, its positives, its hard negatives."""
        query, positives, negatives = SOURCES[self.name].group(*self._unit("group", i, epoch))
        return Group(query, tuple(positives), tuple(negatives), self.name)

    def _unit(self, what: str, i: int, epoch: int) -> tuple[Any, Options, Dice]:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of source {self.name!r}, which has rows 0 to {len(self) - 1}")
        dice = Dice(self.name, what, self.options.seed, epoch, i)
        options = self.options
        if options.dialogue == "mixed":
            options = replace(options, dialogue=dice.pick(("multi-turn", "description")))
        return self.rows[i], options, dice


def open_source(
    name: str,
    *,
    path: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    columns: Mapping[str, str] | None = None,
    dialogue: str = "multi-turn",
) -> Source:
    """Open a source by the name of its record: "scenes", "emoji" or "table".

    path      the file or folder of a table, the emoji parquet; scenes need none
    split     scenes: train, dev or test; emoji: train or dev; tables: a value of the column that
              `columns["split"]` names
    limit     at most so many rows, the first ones; scenes have 1,000,000 unless told otherwise
    columns   tables: the column map of comatch.data.columns; without one the usual names are guessed. Scenes
              and emoji: "direction", one of image-to-text (the picture asks), text-to-image and both (drawn
              for each row and epoch)
    dialogue  multi-turn (3 to 5 questions; of a table all it has), single-turn (one of these), description
              (everything there is to say), caption (one sentence), mixed (multi-turn or description, drawn
              for each row and epoch)

    Raises DataError, naming what is allowed.
    """
    if name not in SOURCES:
        raise DataError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    if dialogue not in MODES:
        raise DataError(f"dialogue {dialogue!r} is unknown; allowed: {', '.join(MODES)}")
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; allowed: 1 or more, or none")
    if (path is None) != (name == "scenes"):
        raise DataError("scenes are generated and take no path" if path else f"source {name!r} needs a path")
    options = Options(Path(path or ""), split, limit, seed, dict(columns or {}), dialogue)
    return Source(name, *SOURCES[name].open(options))


# --- scenes: generated pictures with exact truth


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
    _check_direction(options)
    rows = _Scenes(options.seed, options.split, options.limit or SCENES)
    _ = rows[0]  # an unknown split is refused now
    return rows, options


def _scene_dialogue(row: Scene, options: Options, dice: Dice) -> tuple[Message, Turns]:
    picture, seed = Message((Image(row.draw()),)), dice.below(2**32)
    if options.dialogue == "description":
        return picture, [row.describe(seed)]
    if options.dialogue == "caption":
        return picture, [(row.describe(seed)[0], row.caption(seed))]
    spoken = row.dialogue(seed, 1 if options.dialogue == "single-turn" else 3 + dice.below(3))
    return picture, [(question, answer) for question, answer, _ in spoken]


def _scene_group(row: Scene, options: Options, dice: Dice) -> Pair:
    return _pair(Image(row.draw()), row.caption(dice.below(2**32)), options, dice)


# --- emoji: small real pictures with names and keywords

_DESCRIBE: Final = "describe the picture."


def _open_emoji(options: Options) -> tuple[Rows, Options]:
    _check_direction(options)
    table = open_table(options.path)
    roles = ("label", "tags", "group", "subgroup", "split")
    if missing := [column for column in (*roles, "image") if column not in table.columns]:
        raise DataError(
            f"{options.path} is not the emoji table: it has no {', '.join(missing)}, only "
            f"{', '.join(table.columns)}"
        )
    return _of_split(table, "split", options.split), options


def _emoji_dialogue(row: Row, options: Options, dice: Dice) -> tuple[Message, Turns]:
    picture = Message((Image(row["image"]["bytes"]),))
    if options.dialogue == "description":
        return picture, [(_DESCRIBE, f"{row['label']}: {', '.join(row['tags'])}")]
    if options.dialogue == "caption":
        return picture, [(_DESCRIBE, row["label"])]
    spoken = dice.shuffled(
        [
            ("what is shown?", row["label"]),
            ("which keywords fit?", ", ".join(row["tags"])),
            ("what kind of thing is it?", row["group"]),
            ("which subgroup?", row["subgroup"]),
        ]
    )
    return picture, spoken[: 1 if options.dialogue == "single-turn" else 3 + dice.below(2)]


def _emoji_group(row: Row, options: Options, dice: Dice) -> Pair:
    """The text is the name alone in one of two throws, else the name and some keywords."""
    some = dice.shuffled(row["tags"])[: 1 + dice.below(4)] if dice.chance(50) else []
    return _pair(Image(row["image"]["bytes"]), ", ".join((row["label"], *some)), options, dice)


# --- table: CSV, JSON lines or Parquet with a column map


def _open_table(options: Options) -> tuple[Rows, Options]:
    table = open_table(options.path)
    columns = dict(options.columns) or _guessed(table)
    check_columns(table, columns)
    rows: Rows = table
    if "split" in columns:
        rows = _of_split(table, columns["split"], options.split)
    elif options.split != "train":
        raise DataError(
            f"{options.path} has no split {options.split!r}: columns names no split column; its columns are "
            f"{', '.join(table.columns)}"
        )
    if options.dialogue not in ("multi-turn", "single-turn"):
        raise DataError(
            f"dialogue {options.dialogue!r} is for scenes and emoji; a table has turns of its own: "
            "multi-turn or single-turn"
        )
    return rows, replace(options, columns=columns)


def _guessed(table: Table) -> dict[str, str]:
    """The picture asks and the text answers, where a table has one column of each usual kind."""
    found = guess_columns([name for name in table.columns if name in table.filled], table.path)
    if len(found) < 2:
        raise DataError(
            f"{table.path}: only {found} can be guessed; say columns, such as {{query.image: ..., "
            "positive.text: ...}}"
        )
    return {"query.image": found["image"], "positive.text": found["text"]}


def _table_dialogue(row: Row, options: Options, dice: Dice) -> tuple[Message, Turns]:
    _need(options, "a dialogue", ("dialogue.image", "dialogue.text"), ("dialogue.turns", "dialogue.answer"))
    context, spoken = only(row, options.columns, "dialogue", options.root), turns(row, options.columns)
    return context, [dice.pick(spoken)] if options.dialogue == "single-turn" else spoken


def _table_group(row: Row, options: Options, dice: Dice) -> Pair:
    """Positives in a drawn order, so that over the epochs each comes first."""
    _need(options, "a pair", ("query.image", "query.text"), ("positive.image", "positive.text"))
    positives, negatives = (
        side(row, options.columns, name, options.root) for name in ("positive", "negative")
    )
    if not positives:
        raise ContentError("positive is empty; a pair needs at least one")
    return only(row, options.columns, "query", options.root), dice.shuffled(positives), negatives


def _need(options: Options, what: str, *choices: tuple[str, str]) -> None:
    for choice in choices:
        if not set(choice) & set(options.columns):
            raise DataError(
                f"{options.path}: for {what}, columns must name {' or '.join(choice)}; it names "
                f"{', '.join(options.columns)}"
            )


# --- shared by the records


def _check_direction(options: Options) -> None:
    if unknown := set(options.columns) - {"direction"}:
        raise DataError(
            f"columns has {sorted(unknown)}; for this source only direction may be set: "
            f"{', '.join(DIRECTIONS)}"
        )
    if options.columns.get("direction", DIRECTIONS[0]) not in DIRECTIONS:
        raise DataError(
            f"direction {options.columns['direction']!r} is unknown; allowed: {', '.join(DIRECTIONS)}"
        )


def _pair(image: Image, text: str, options: Options, dice: Dice) -> Pair:
    picture, words = Message((image,)), Message((Text(text),))
    direction = options.columns.get("direction", DIRECTIONS[0])
    asks = direction == "text-to-image" or (direction == "both" and dice.chance(50))
    return (words, [picture], []) if asks else (picture, [words], [])


class _Chosen:
    """Some rows of a table."""

    def __init__(self, table: Table, numbers: Sequence[int]) -> None:
        self.table, self.numbers = table, array("q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Row:
        return self.table[self.numbers[i]]


def _of_split(table: Table, column: str, split: str) -> Rows:
    values = [row[column] for row in table.rows([column])]
    chosen = [i for i, value in enumerate(values) if value == split]
    if not chosen:
        raise DataError(
            f"{table.path} has no row with {column} {split!r}; there are "
            f"{', '.join(sorted({str(v) for v in values})[:10])}"
        )
    return _Chosen(table, chosen)


SOURCES: Final[dict[str, Record]] = {
    "scenes": Record(_open_scenes, _scene_dialogue, _scene_group),
    "emoji": Record(_open_emoji, _emoji_dialogue, _emoji_group),
    "table": Record(_open_table, _table_dialogue, _table_group),
}
