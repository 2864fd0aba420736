"""Tables with a column map: CSV, TSV, JSON lines or array, Parquet, and WebDataset archives."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from comatch.content import Message
from comatch.data.columns import check_columns, guess_columns, only, side, turns
from comatch.data.record import Options, Pair, Record, Rows, Turns, of_split, told
from comatch.data.scene_truth import Dice
from comatch.data.tables import Table, open_table
from comatch.data.tars import TEXTS
from comatch.data.text_tables import Row
from comatch.errors import ContentError, DataError


def _open_table(options: Options) -> tuple[Rows, Options]:
    table = open_table(options.path, allow_cut=options.allow_cut)
    return _mapped(table, options, dict(options.columns) or _guessed(table))


def _open_webdataset(options: Options) -> tuple[Rows, Options]:
    table = open_table(options.path, kinds=(".tar",), allow_cut=options.allow_cut)
    return _mapped(table, options, dict(options.columns) or _guessed_members(table))


def _mapped(table: Table, options: Options, columns: dict[str, str]) -> tuple[Rows, Options]:
    check_columns(table, columns)
    rows: Rows = table
    if "split" in columns:
        rows = of_split(table, columns["split"], options.split)
    elif options.split != "train":
        raise DataError(
            f"{options.path} has no split {options.split!r}: columns names no split column; its columns are "
            f"{', '.join(table.columns)}"
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


def _guessed_members(table: Table) -> dict[str, str]:
    """The picture asks, the text answers, and conversations are told, where there is one member of each kind."""
    texts = [name for name in (*TEXTS, "json.caption", "json.text") if name in table.columns]
    if "image" in table.columns and "json.conversations" in table.columns and not texts:
        return {"dialogue.image": "image", "dialogue.turns": "json.conversations"}
    if "image" not in table.columns or len(texts) != 1:
        raise DataError(
            f"{table.path}: which members are picture and text cannot be guessed; say columns, such as {{query.image: image, "
            f"positive.text: txt}}; there are {', '.join(table.columns) or 'none'}"
        )
    return {"query.image": "image", "positive.text": texts[0]}


def _dialogue(row: Row, options: Options, dice: Dice) -> tuple[Message, Turns]:
    _need(options, "a dialogue", ("dialogue.image", "dialogue.text"), ("dialogue.turns", "dialogue.answer"))
    context = only(row, options.columns, "dialogue", options.root)
    return context, told(turns(row, options.columns), options, dice)


def _group(row: Row, options: Options, dice: Dice) -> Pair:
    _need(options, "a pair", ("query.image", "query.text"), ("positive.image", "positive.text"))
    query = only(row, options.columns, "query", options.root)
    positives, negatives = (side(row, options.columns, name, options.root) for name in ("positive", "negative"))
    return query, positives, negatives


def _need(options: Options, what: str, *choices: tuple[str, str]) -> None:
    for choice in choices:
        if not set(choice) & set(options.columns):
            raise DataError(
                f"{options.path}: for {what}, columns must name {' or '.join(choice)}; it names "
                f"{', '.join(options.columns)}"
            )


def _members_there(row: Row, options: Options, sides: tuple[str, ...]) -> Row:
    """The row, or ContentError naming the member that it lacks; hard negatives may be missing."""
    for role, column in options.columns.items():
        if role.startswith(sides) and column not in row:
            there = ", ".join(name for name in row if name[:2] != "__") or "none that is read"
            raise ContentError(f"{row['__tar__']}: row {row['__key__']} has no member {column!r}; there are {there}")
    return row


def _archived_dialogue(row: Row, options: Options, dice: Dice) -> tuple[Message, Turns]:
    return _dialogue(_members_there(row, options, ("dialogue.",)), options, dice)


def _archived_group(row: Row, options: Options, dice: Dice) -> Pair:
    return _group(_members_there(row, options, ("query.", "positive.")), options, dice)


_TAKES = ("path", "root", "split", "columns", "allow_cut")
TABLE: Final = Record(_open_table, _dialogue, _group, _TAKES)
WEBDATASET: Final = Record(_open_webdataset, _archived_dialogue, _archived_group, _TAKES)
