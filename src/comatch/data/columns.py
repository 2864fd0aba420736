"""Which columns of a table are the query, the positives, the dialogue: from cells to messages.

A column map names them: {"query.image": "file", "positive.text": "caption", "dialogue.turns":
"conversations", ...}. A side may have an image column, a text column or both. Lists in positive and negative
cells are several items; empty cells and nulls are absent.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comatch.content import Message, as_message
from comatch.data.tables import Table
from comatch.data.text_tables import Row
from comatch.errors import ContentError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

ROLES = {
    "query.text": "text", "query.image": "image", "positive.text": "text", "positive.image": "image",
    "negative.text": "text", "negative.image": "image", "dialogue.text": "text", "dialogue.image": "image",
    "dialogue.turns": "turns", "dialogue.question": "text", "dialogue.answer": "text", "split": "text",
}  # fmt: skip
TEXT_NAMES = ("text", "caption", "label", "title")
IMAGE_NAMES = ("image", "file", "path", "image_path", "file_name")


def check_columns(table: Table, columns: Mapping[str, str]) -> None:
    """Refuse a column map: DataError for unknown roles and for columns missing, empty or of a wrong type."""
    for role, column in columns.items():
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"columns has the key {role!r}, allowed are {', '.join(ROLES)}{hint}")
        if column not in table.columns:
            raise DataError(
                f"{table.path} has no column {column!r} for {role}; its columns are "
                f"{', '.join(table.columns)}"
            )
        if column not in table.filled:
            raise DataError(f"{table.path}: column {column!r} for {role} is empty in all {len(table)} rows")
        declared = table.type_of(column)
        if declared is not None and not fits(declared, ROLES[role]):
            raise DataError(
                f"{table.path}: column {column!r} holds {declared}, but {role} needs {_WANTED[ROLES[role]]}"
            )


def side(
    row: Row, columns: Mapping[str, str], name: str, root: Path, parts: Callable[[dict[str, Any]], Any] = dict
) -> list[Message]:
    """The items of one side of a row ("query", "positive", "negative", "dialogue"); [] where it is empty.

    Lists give one item per entry; a single cell, which is no list, is part of every item. `parts` arranges the filled cells
    of an item, {"image": ..., "text": ...}, for `as_message`. Raises ContentError.
    """
    cells = {kind: row.get(columns.get(f"{name}.{kind}", "")) for kind in ("image", "text")}
    lists = {kind: cell for kind, cell in cells.items() if isinstance(cell, list) and cell}
    if len({len(cell) for cell in lists.values()}) > 1:
        raise ContentError(
            f"{name} has {len(lists['image'])} images and {len(lists['text'])} texts; lists must be of one length"
        )
    n = max((len(cell) for cell in lists.values()), default=1)
    items = (cells | {kind: cell[i] for kind, cell in lists.items()} for i in range(n))
    full = ({kind: entry for kind, entry in item.items() if not empty(entry)} for item in items)
    return [as_message(parts(item), root=root) for item in full if item]


def only(
    row: Row, columns: Mapping[str, str], name: str, root: Path, parts: Callable[[dict[str, Any]], Any] = dict
) -> Message:
    """The one item of a side; ContentError where there is none or more."""
    found = side(row, columns, name, root, parts)
    if len(found) != 1:
        raise ContentError(f"{name} has {len(found)} items, and must have one")
    return found[0]


def turns(row: Row, columns: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The (question, answer) pairs of a row, from its turns column or its question and answer columns.

    A turns cell is a list, or JSON of one: of {"question", "answer"}, of LLaVA's {"from": "human" or "gpt",
    "value"}, or of chat messages {"role": "user" or "assistant", "content"}. Raises ContentError.
    """
    if "dialogue.turns" not in columns:
        pairs = [(row.get(columns["dialogue.question"]), row.get(columns["dialogue.answer"]))]
    else:
        cell = row.get(columns["dialogue.turns"])
        try:
            entries = json.loads(cell) if isinstance(cell, str) else cell
        except (ValueError, RecursionError) as error:
            raise ContentError(f"turns are not understood ({error}); needed: {_WANTED['turns']}") from None
        pairs = spoken(entries)
    return checked_turns([(q.replace("<image>", "") if isinstance(q, str) else q, a) for q, a in pairs])


def checked_turns(pairs: Sequence[tuple[Any, Any]]) -> tuple[tuple[str, str], ...]:
    """Questions and answers without white space around them. Raises ContentError unless all are texts, and there are some."""
    for pair in pairs:
        for text in pair:
            if not isinstance(text, str) or not text.strip():
                raise ContentError(f"a question or an answer is {text!r}; both must be texts")
    if not pairs:
        raise ContentError("a dialogue without turns; at least one question and answer are needed")
    return tuple((str(q).strip(), str(a).strip()) for q, a in pairs)


def guess_columns(names: Collection[str], where: Path | str) -> dict[str, str]:
    """{"text": column, "image": column}, those that are there by their usual names.

    Raises DataError where there is none, or two of one kind.
    """
    found = {}
    for kind, usual in (("text", TEXT_NAMES), ("image", IMAGE_NAMES)):
        likely = [name for name in usual if name in names]
        if len(likely) > 1:
            raise DataError(
                f"{where}: the {kind} may be in {' or '.join(likely)}; say which with {kind}_column"
            )
        if likely:
            found[kind] = likely[0]
    if not found:
        raise DataError(
            f"{where} has {', '.join(names)}, and none of the usual names "
            f"{', '.join(TEXT_NAMES + IMAGE_NAMES)}; say text_column or image_column"
        )
    return found


_WANTED = {
    "text": "texts (strings, or lists of strings)",
    "image": "pictures (bytes, paths, or structs of bytes and path)",
    "turns": 'lists of {"question", "answer"}, of LLaVA conversations or of chat messages, or JSON of these',
}


def fits(declared: pa.DataType, kind: str) -> bool:
    """Whether a column declared so can hold "text", "image" or "turns"; lists of these too."""
    from pyarrow import types

    dtype = declared
    while types.is_dictionary(dtype) or types.is_list(dtype) or types.is_large_list(dtype):
        dtype = dtype.value_type
    string: bool = types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype)
    if kind == "turns":
        return string or bool(types.is_struct(dtype))
    if kind == "image" and types.is_struct(dtype):
        return {dtype.field(i).name for i in range(dtype.num_fields)} <= {"bytes", "path"}
    return string or (kind == "image" and bool(types.is_binary(dtype) or types.is_large_binary(dtype)))


def empty(entry: object) -> bool:
    """Whether a cell counts as absent: None, no characters, bytes or entries, or a struct of such."""
    if isinstance(entry, Mapping):
        return not any(entry.values())
    return entry is None or (isinstance(entry, str | bytes | list) and not entry)


def spoken(entries: Any) -> list[tuple[Any, Any]]:
    """(question, answer) as they stand in a list of turns of a usual form; system turns are left out. Raises ContentError."""
    try:
        return _pairs(entries)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ContentError(f"turns are not understood ({error}); needed: {_WANTED['turns']}") from None


def _pairs(entries: Any) -> list[tuple[Any, Any]]:
    if not isinstance(entries, list):
        raise TypeError(f"found {type(entries).__name__}")
    if all("question" in entry for entry in entries):
        return [(entry["question"], entry["answer"]) for entry in entries]
    keys = ("from", "value") if "from" in entries[0] else ("role", "content")
    said = [(entry[keys[0]], entry[keys[1]]) for entry in entries if entry[keys[0]] != "system"]
    asked, answered = said[::2], said[1::2]
    speakers = {who for who, _ in asked} <= {"human", "user"} and {who for who, _ in answered} <= {"gpt", "assistant"}
    if not speakers or len(asked) != len(answered):
        raise ValueError(f"question and answer must take turns, found {[who for who, _ in said[:6]]}")
    return [(asks, says) for (_, asks), (_, says) in zip(asked, answered, strict=True)]
