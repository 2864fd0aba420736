"""MMEB-train as TIGER-Lab publishes it, and its relatives with mined negatives (mmE5, MoCa). Source: specs/mmeb.md section 2.

    MMEB-train/CIRR/original-00000-of-00001.parquet     columns qry, qry_image_path, pos_text, pos_image_path
    MMEB-train/CIRR/diverse_instruction-*.parquet       and mostly neg_text, neg_image_path
    MMEB-train/images/CIRR/Train/*.jpg                  paths in the columns start at MMEB-train, or at `root`

Texts are whole prompts and are kept to the letter: the picture takes the place of `<|image_1|>`. A marker without a picture
(WebQA) is removed with its line break, as MoCa and Qwen do; a picture without a marker (VisDial's negatives) comes first.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from comatch.data.columns import check_columns, only, side
from comatch.data.literals import texts_of
from comatch.data.placeholders import MMEB_IMAGE
from comatch.data.record import Options, Pair, Record, Rows
from comatch.data.scene_truth import Dice
from comatch.data.tables import open_table
from comatch.data.text_tables import Row
from comatch.errors import DataError

COLUMNS: Final = {
    "query.text": "qry", "query.image": "qry_image_path", "positive.text": "pos_text", "positive.image": "pos_image_path",
    "negative.text": "neg_text", "negative.image": "neg_image_path",
}  # fmt: skip
_SUFFIXES = (".parquet", ".jsonl")


def _open(options: Options) -> tuple[Rows, Options]:
    table = open_table(_shards(options), allow_cut=options.allow_cut)
    needed = [name for role, name in COLUMNS.items() if not role.startswith("negative")]
    if missing := [name for name in needed if name not in table.columns]:
        raise DataError(f"{table.path} has no column {', '.join(missing)}; MMEB-train has {', '.join(COLUMNS.values())}")
    columns = {role: name for role, name in COLUMNS.items() if name in table.filled}
    for end in ("query", "positive"):
        if not any(role.startswith(end) for role in columns):
            raise DataError(f"{table.path}: {COLUMNS[f'{end}.text']} and {COLUMNS[f'{end}.image']} are empty in all {len(table)} rows")
    check_columns(table, columns)
    return table, replace(options, columns=columns)


def _shards(options: Options) -> Path:
    """The pattern of the files of one config and split. Raises DataError, naming what there is."""
    if not options.path.is_dir():
        raise DataError(f"there is no folder {options.path}; path is the folder of MMEB-train, the configs lie in it")
    configs = sorted(
        folder.name for folder in options.path.iterdir() if folder.is_dir() and any(f.suffix in _SUFFIXES for f in folder.iterdir())
    )
    if options.subset not in configs:
        near = difflib.get_close_matches(options.subset or "", configs, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"subset is {options.subset!r}, a config is needed; {hint}{options.path} has {', '.join(configs) or 'none'}")
    files = [file for file in (options.path / options.subset).iterdir() if file.suffix in _SUFFIXES]
    splits = sorted({file.stem.split("-")[0] for file in files})
    if options.split not in splits:
        raise DataError(f"{options.path / options.subset} has no split {options.split!r}; set split to {' or '.join(splits)}")
    kind = next(file.suffix for file in files if file.stem.split("-")[0] == options.split)
    exact = options.path / options.subset / f"{options.split}{kind}"
    return exact if exact.exists() else exact.with_name(f"{options.split}-*{kind}")


def _group(row: Row, options: Options, dice: Dice) -> Pair:
    query = only(row, options.columns, "query", options.root, _parts)
    cells = {name: _listed(row.get(name)) for role, name in options.columns.items() if role.startswith("negative")}
    positives, negatives = (side(row | cells, options.columns, name, options.root, _parts) for name in ("positive", "negative"))
    return query, positives, negatives


def _listed(cell: Any) -> Any:
    """The list that a negative's cell spells out, else the cell itself."""
    spelt = isinstance(cell, str) and cell.strip()[:1] == "[" and cell.strip()[-1:] == "]"
    return texts_of(cell) if spelt else cell


def _parts(item: Mapping[str, Any]) -> list[Any]:
    text, mark = item.get("text", ""), MMEB_IMAGE.mark
    marks = MMEB_IMAGE.count([text])
    if "image" not in item:
        return [text.replace(f"{mark}\n", "").replace(mark, "")]
    if not marks:
        text = mark + text
    return MMEB_IMAGE.parts([text], [item["image"]])[0]


MMEB_TRAIN: Final = Record(_open, group=_group, takes=("path", "root", "split", "subset", "allow_cut"))
