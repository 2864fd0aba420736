"""Tevatron's training rows, in both forms: with document ids and a corpus, and with the passages in the row.

    {"query_id": "1", "query_text": "...", "query_image": "q.png", "positive_document_ids": ["d1"], "negative_document_ids": []}
    corpus: {"docid": "d1", "text": "...", "title": "...", "image": "d1.png"}
    {"query_id": "1", "query": "...", "positive_passages": [{"docid": "d1", "title": "", "text": "..."}], "negative_passages": []}

Pictures lie below `root`, Tevatron's assets folder. Title and text are joined by a space. Source: specs/conventions.md 3.5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from comatch.content import Message, as_message
from comatch.data.columns import check_columns, empty, only
from comatch.data.record import Options, Pair, Record, Rows
from comatch.data.scene_truth import Dice
from comatch.data.tables import Table, open_table
from comatch.data.text_tables import Row
from comatch.errors import ContentError, DataError

_BY_ID = {"positive": "positive_document_ids", "negative": "negative_document_ids"}
_INLINE = {"positive": "positive_passages", "negative": "negative_passages"}
_UNREAD = ("query_video", "query_audio", "video", "audio", "document_video", "document_audio")


@dataclass(frozen=True)
class _Joined:
    """Training rows with their documents in place of the ids."""

    queries: Table
    corpus: Table
    places: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, i: int) -> Row:
        row = self.queries[i]
        return row | {_INLINE[side]: [self._document(id) for id in _listed(row, ids)] for side, ids in _BY_ID.items()}

    def _document(self, id: object) -> Row:
        if str(id) not in self.places:
            raise ContentError(f"document {id!r} is not in the corpus {self.corpus.path}")
        return self.corpus[self.places[str(id)]]


def _open(options: Options) -> tuple[Rows, Options]:
    table = open_table(options.path, allow_cut=options.allow_cut)
    usual = {"query.text": ("query_text", "query"), "query.image": ("query_image",)}
    columns = {role: name for role, names in usual.items() for name in names if name in table.filled}
    if not columns:
        raise DataError(f"{table.path} has no query_text, query or query_image with values; its columns are {', '.join(table.columns)}")
    check_columns(table, columns)
    by_id, inline = (form["positive"] in table.columns for form in (_BY_ID, _INLINE))
    if by_id == inline:
        raise DataError(f"{table.path} must have either positive_document_ids or positive_passages; it has {', '.join(table.columns)}")
    if by_id != bool(options.corpus):
        hint = "set corpus to the table of documents" if by_id else "its documents stand in the rows; leave out corpus"
        raise DataError(f"{table.path} has {'positive_document_ids' if by_id else 'positive_passages'}: {hint}")
    options = replace(options, columns=columns)
    return (_joined(table, options) if by_id else table), options


def _joined(table: Table, options: Options) -> _Joined:
    corpus = open_table(options.corpus or Path(), allow_cut=options.allow_cut)
    if "docid" not in corpus.columns:
        raise DataError(f"the corpus {corpus.path} has no column 'docid'; its columns are {', '.join(corpus.columns)}")
    places: dict[str, int] = {}
    for place, row in enumerate(corpus.rows(["docid"])):
        if places.setdefault(str(row.get("docid")), place) != place:
            raise DataError(f"the corpus {corpus.path} has the docid {row.get('docid')!r} twice; ids must differ")
    return _Joined(table, corpus, places)


def _group(row: Row, options: Options, dice: Dice) -> Pair:
    _check_read(row)
    positives, negatives = ([_item(entry, options.root) for entry in _listed(row, name)] for name in _INLINE.values())
    return only(row, options.columns, "query", options.root), positives, negatives


def _listed(row: Row, name: str) -> Sequence[Any]:
    entries = row.get(name) or []
    if not isinstance(entries, list):
        raise ContentError(f"{name} is {type(entries).__name__}; it must be a list")
    return entries


def _item(document: Row, root: Path) -> Message:
    if not isinstance(document, Mapping):
        raise ContentError(f"a document is {type(document).__name__}; it must be an object, such as {{docid: ..., text: ...}}")
    _check_read(document)
    text = document.get("text") or document.get("document_text") or ""
    if title := document.get("title"):
        text = f"{title} {text}".strip()
    picture = document.get("image")
    picture = document.get("document_image") if empty(picture) else picture
    return as_message({"text": text} if empty(picture) else {"image": picture, "text": text}, root=root)


def _check_read(row: Row) -> None:
    for name in _UNREAD:
        if not empty(row.get(name)):
            raise ContentError(f"{name} is set; only texts and pictures of this format are read")


TEVATRON: Final = Record(_open, group=_group, takes=("path", "root", "corpus", "allow_cut"))
