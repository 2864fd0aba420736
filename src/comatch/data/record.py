"""What a data source is made of: what its caller asked for, and the functions that turn a row into training units."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from comatch.content import Message
from comatch.data.scene_truth import Dice
from comatch.data.tables import Table
from comatch.data.text_tables import Row
from comatch.errors import DataError

TOLD_MODES: Final = ("multi-turn", "single-turn")
MODES: Final = (*TOLD_MODES, "description", "caption", "mixed")
Turns = Sequence[tuple[str, str]]
Pair = tuple[Message, Sequence[Message], Sequence[Message]]


class Rows(Protocol):
    """Rows by number, of whatever type the record understands."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


@dataclass(frozen=True)
class Options:
    """What the caller of `open_source` asked for. `root` is the folder that pictures named in the data must lie below.

    `negatives` is how many hard negatives a generated world makes for each pair; data at rest have what they have.
    """

    path: Path
    root: Path
    split: str
    limit: int | None
    seed: int
    columns: Mapping[str, str]
    dialogue: str
    subset: str | None = None
    corpus: Path | None = None
    allow_cut: bool = False
    negatives: int = 0


@dataclass(frozen=True)
class Record:
    """One kind of source, as functions.

    open      options -> rows, and the options as they hold from then on; DataError before any row is used
    dialogue  row, options, dice -> context and (question, answer) turns; None where the format has no dialogues
    group     row, options, dice -> query, positives, hard negatives; None where the format has no pairs
    takes     the settings of `open_source` that mean something here; others are refused
    modes     the values of `dialogue` that mean something here
    """

    open: Callable[[Options], tuple[Rows, Options]]
    dialogue: Callable[[Any, Options, Dice], tuple[Message, Turns]] | None = None
    group: Callable[[Any, Options, Dice], Pair] | None = None
    takes: tuple[str, ...] = ("path", "root", "allow_cut")
    modes: tuple[str, ...] = TOLD_MODES


def told(turns: Turns, options: Options, dice: Dice) -> Turns:
    """All turns of a row, or a drawn one for single-turn dialogues."""
    return [dice.pick(turns)] if options.dialogue == "single-turn" else turns


class _Chosen:
    """Some rows of a table."""

    def __init__(self, table: Table, numbers: Sequence[int]) -> None:
        self.table, self.numbers = table, array("q", numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> Row:
        return self.table[self.numbers[i]]


def of_split(table: Table, column: str, split: str) -> Rows:
    """The rows that have this value in the column. Raises DataError, naming the values there are, if none has."""
    values = [row[column] for row in table.rows([column])]
    chosen = [i for i, value in enumerate(values) if value == split]
    if not chosen:
        there = ", ".join(sorted({str(v) for v in values})[:10])
        raise DataError(f"{table.path} has no row with {column} {split!r}; there are {there}")
    return _Chosen(table, chosen)
