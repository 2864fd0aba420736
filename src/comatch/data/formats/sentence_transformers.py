"""Columns as sentence-transformers reads them: anchor, positive, negative_1, ...; under other names their order decides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from comatch.content import Message, as_message
from comatch.data.columns import empty, fits
from comatch.data.record import Options, Pair, Record, Rows
from comatch.data.scene_truth import Dice
from comatch.data.tables import Table, open_table
from comatch.data.text_tables import Row
from comatch.errors import ContentError, DataError

if TYPE_CHECKING:
    import pyarrow as pa

_LABELS = ("label", "labels", "score", "scores")
_NEGATIVE = re.compile(r"negative(?:_(\d+))?")


def _open(options: Options) -> tuple[Rows, Options]:
    table = open_table(options.path, allow_cut=options.allow_cut)
    if labels := [name for name in _LABELS if name in table.columns]:
        raise DataError(
            f"{table.path} has a column {labels[0]!r}: pairs with labels are for other losses. Keep the pairs that match, and leave "
            "the column out"
        )
    names = _ordered(table)
    for name in names:
        declared = table.type_of(name)
        if declared is not None and not _cells_fit(declared):
            raise DataError(f"{table.path}: column {name!r} holds {declared}, but needs texts, pictures or structs of text and image")
    return table, replace(options, columns={str(place): name for place, name in enumerate(names)})


def _ordered(table: Table) -> list[str]:
    """Query, positive, then the negatives. Raises DataError where the names do not tell."""
    names = [name for name in table.columns if name in table.filled]
    asks = [name for name in ("anchor", "query") if name in names]
    if asks and "positive" in names:
        negatives = sorted((name for name in names if _NEGATIVE.fullmatch(name)), key=_number)
        known = [asks[0], "positive", *negatives]
        if other := [name for name in names if name not in known]:
            raise DataError(f"{table.path}: columns {', '.join(other)} are none of anchor (or query), positive, negative_1, ...; drop them")
        return known
    if len(names) < 2:
        raise DataError(f"{table.path} has the filled columns {', '.join(names)}; at least two are needed: anchor and positive")
    return names


def _number(name: str) -> int:
    found = _NEGATIVE.fullmatch(name)
    return int(found[1]) if found and found[1] else 0


def _cells_fit(declared: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(declared) and {declared.field(i).name for i in range(declared.num_fields)} <= {"text", "image"}:
        return True
    return fits(declared, "image")


def _group(row: Row, options: Options, dice: Dice) -> Pair:
    query, positives, *negatives = (_items(row.get(name), options.root) for name in options.columns.values())
    if len(query) != 1:
        raise ContentError(f"query has {len(query)} items, and must have one")
    return query[0], positives, [item for items in negatives for item in items]


def _items(cell: Any, root: Path) -> list[Message]:
    """The items in a cell: one, or one for each entry of a list. A text is text, always; a struct of bytes and path is a picture."""
    items = []
    for entry in cell if isinstance(cell, list) else [cell]:
        item = entry
        if isinstance(entry, Mapping):
            picture = set(entry) <= {"bytes", "path"}
            item = {key: value for key, value in ({"image": entry} if picture else entry).items() if not empty(value)}
        if not empty(item):
            items.append(as_message(item, root=root))
    return items


SENTENCE_TRANSFORMERS: Final = Record(_open, group=_group)
