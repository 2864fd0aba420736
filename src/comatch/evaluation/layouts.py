"""The two published layouts of MMEB's image tasks, read to equal items. Source: specs/mmeb.md 1.2 and 1.3.

    MMEB-eval           qry_text, qry_img_path, tgt_text[], tgt_img_path[]                      texts are whole prompts
    MMEB_Test_Instruct  qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text[], tgt_img_path[]  instructions apart

Candidate 0 is the right one; "" stands for no text or no picture. The second layout is put together by the rules of VLM2Vec's
loader, which give the first one's strings; blanks before line breaks inside a row's own text are left to the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comatch.content import Image
from comatch.data.tables import Table
from comatch.data.text_tables import Row
from comatch.errors import EvaluationError
from comatch.evaluation.archives import Pictures
from comatch.evaluation.building import Building
from comatch.evaluation.protocols import IMAGE, Item
from comatch.evaluation.specs import Spec

WHOLE = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
SPLIT = ("qry_inst", "qry_text", "qry_img_path", "tgt_inst", "tgt_text", "tgt_img_path")


def read_images(build: Building, table: Table, pictures: Pictures) -> None:
    """All rows of a dataset. Raises EvaluationError for wrong columns, lists of two lengths, and pictures that are not there."""
    columns = check_columns(table, WHOLE)
    split = "qry_inst" in table.columns
    if split:
        columns = check_columns(table, SPLIT)
    last: tuple[Any, ...] = ()
    listed: Sequence[int] = ()
    for number, row in enumerate(table.rows(columns)):
        where = f"{table.path}, row {number}"
        texts, paths = _listed(row, "tgt_text", where), _listed(row, "tgt_img_path", where)
        if len(texts) != len(paths) or not texts:
            raise EvaluationError(f"{where}: {len(texts)} texts and {len(paths)} pictures of candidates; need equally many, at least 1")
        # Most datasets rank one list for all queries: millions of equal entries.
        if (texts, paths, row.get("tgt_inst")) != last:
            last = texts, paths, row.get("tgt_inst")
            listed = _candidates(build, row, texts, paths, pictures, where)
        build.query(str(number), _query(build.spec, row, split, pictures, where), listed, [listed[0]])


def check_columns(table: Table, needed: Sequence[str]) -> list[str]:
    """The columns, if a table has them. Raises EvaluationError, naming those it lacks."""
    if missing := [name for name in needed if name not in table.columns]:
        there = ", ".join(table.columns)
        raise EvaluationError(f"{table.path} has no column {', '.join(missing)}; it has {there}, needed are {', '.join(needed)}")
    return list(needed)


def text_of(row: Row, column: str, where: str | Path) -> str:
    """A cell's text, "" for an empty one. Raises EvaluationError where it holds something else."""
    cell = row.get(column)
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise EvaluationError(f"{where}: {column} holds {type(cell).__name__}, needed is a text")
    return cell


def _candidates(build: Building, row: Row, texts: Sequence[str], paths: Sequence[str], pictures: Pictures, where: str) -> Sequence[int]:
    spec = build.spec
    split = "tgt_inst" in row and spec.target != "{}"
    instruction = text_of(row, "tgt_inst", where) if split else ""
    captioned = bool(texts[0].strip())

    def item(text: str, path: str) -> Item:
        shown = _shown(path, pictures, where)
        if not split:
            return spec.item(text, shown, target=True)
        whole = _target(spec, instruction, text if captioned else "", captioned)
        return Item(whole, shown, instruction.replace(IMAGE, "").strip(), text, True)

    return build.listed(texts, paths, item)


def _query(spec: Spec, row: Row, split: bool, pictures: Pictures, where: str) -> Item:
    text = text_of(row, "qry_text", where)
    shown = _shown(text_of(row, "qry_img_path", where), pictures, where)
    if not split:
        return spec.item(text, shown)
    instruction = text_of(row, "qry_inst", where)
    return Item(_asked(spec, instruction, text), shown, instruction.replace(IMAGE, "").strip(), text)


def _asked(spec: Spec, instruction: str, text: str) -> str:
    """A query of the split layout, put together."""
    if spec.parser == "t2i":
        breaks = len(spec.query) - len(spec.query.rstrip("\n"))  # VisDial ends with two
        return f"{instruction} {text}" + "\n" * breaks
    bare = instruction.replace(IMAGE, "")
    if spec.parser in ("qa", "vg"):
        bare = "\n" + bare.strip()
    return _headed(bare) + (f" {text}" if text else "") + "\n"


def _target(spec: Spec, instruction: str, text: str, captioned: bool) -> str:
    """A candidate with a picture of the split layout, put together; where none has a caption, vg's instruction brings its own end."""
    head = _headed(instruction.replace(IMAGE, ""))
    if captioned:
        return f"{head} {text}\n"
    return head + ("\n" if spec.parser == "t2i" else "")


def _headed(bare: str) -> str:
    return f"{IMAGE} {bare}".replace(" \n", "\n")


def _shown(path: str, pictures: Pictures, where: str) -> tuple[Image, ...]:
    if not path:
        return ()
    try:
        return (pictures.image(path),)
    except EvaluationError as error:
        raise EvaluationError(f"{where}: {error}") from error


def _listed(row: Row, column: str, where: str) -> list[str]:
    cell = row.get(column)
    if not isinstance(cell, list) or not all(isinstance(entry, str) for entry in cell):
        raise EvaluationError(f"{where}: {column} holds {type(cell).__name__}, needed is a list of texts")
    return cell
