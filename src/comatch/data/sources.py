"""Where training rows come from. A source is one record in SOURCES: how rows are found, and what a row says.

A source is a map: `source.dialogue(i, epoch)` and `source.group(i, epoch)` depend on the seed and these two
numbers alone, so any order, any number of workers and any restart see the same training units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from comatch.content import Dialogue, Group
from comatch.data.formats.chat import LLAVA, MS_SWIFT
from comatch.data.formats.generated import EMOJI, SCENES
from comatch.data.formats.mmeb_train import MMEB_TRAIN
from comatch.data.formats.sentence_transformers import SENTENCE_TRANSFORMERS
from comatch.data.formats.table import TABLE, WEBDATASET
from comatch.data.formats.tevatron import TEVATRON
from comatch.data.record import MODES, Options, Pair, Record, Rows
from comatch.data.scene_truth import Dice
from comatch.errors import ContentError, DataError

SOURCES: Final[dict[str, Record]] = {
    "scenes": SCENES,
    "emoji": EMOJI,
    "table": TABLE,
    "webdataset": WEBDATASET,
    "mmeb-train": MMEB_TRAIN,
    "sentence-transformers": SENTENCE_TRANSFORMERS,
    "tevatron": TEVATRON,
    "ms-swift": MS_SWIFT,
    "llava": LLAVA,
}


@dataclass(frozen=True)
class Source:
    """Training units by number. A faulty row raises ContentError, and only when it is asked for."""

    name: str
    rows: Rows = field(repr=False)
    options: Options

    def __len__(self) -> int:
        return min(len(self.rows), self.options.limit or len(self.rows))

    @property
    def has_pairs(self) -> bool:
        """Whether rows are pairs, or can be read as such; the others are dialogues only."""
        return SOURCES[self.name].group is not None

    @property
    def endless(self) -> bool:
        """Whether the number of rows means nothing: they are generated, and no limit was set."""
        return "path" not in SOURCES[self.name].takes and self.options.limit is None

    def dialogue(self, i: int, epoch: int = 0) -> Dialogue:
        """Unit of the compression stage: a context and its (question, answer) turns."""
        read = SOURCES[self.name].dialogue
        if read is None:
            raise DataError(f"source {self.name!r} has pairs, no dialogues; for this stage use {_able('dialogue')}")
        context, turns = read(*self._unit("dialogue", i, epoch))
        return Dialogue(context, tuple(turns), self.name)

    def group(self, i: int, epoch: int = 0) -> Group:
        """Unit of the matching stage: a query, its positives, its hard negatives.

        Positives come in a drawn order, so that over the epochs each comes first. A row that contradicts itself, with a positive
        equal to the query or a negative equal to a positive, is a faulty one.
        """
        read = SOURCES[self.name].group
        if read is None:
            raise DataError(f"source {self.name!r} has dialogues, no pairs; for this stage use {_able('group')}")
        row, options, dice = self._unit("group", i, epoch)
        query, positives, negatives = _consistent(read(row, options, dice))
        return Group(query, tuple(dice.shuffled(positives)), tuple(negatives), self.name)

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
    subset: str | None = None,
    root: str | Path | None = None,
    corpus: str | Path | None = None,
    allow_cut: bool = False,
    negatives: int = 0,
) -> Source:
    """Open a source by the name of its record in SOURCES; docs/data.md shows each with an example.

    path       a file, a folder of files of one kind, or a pattern such as "train-*.parquet"; scenes need none
    split      scenes: train, dev or test; emoji: train or dev; mmeb-train: original or diverse_instruction; table and webdataset:
               a value of the column that `columns["split"]` names
    limit      at most so many rows, the first ones; scenes have 1,000,000 unless told otherwise
    columns    table, webdataset: the column map of comatch.data.columns; without one the usual names are guessed. Scenes
               and emoji: "direction", one of image-to-text (the picture asks), text-to-image and both (drawn
               for each row and epoch)
    dialogue   multi-turn (3 to 5 questions; of a file all it has), single-turn (one of these), description
               (everything there is to say), caption (one sentence), mixed (multi-turn or description, drawn
               for each row and epoch)
    subset     mmeb-train: the config, such as CIRR; emoji: names or groups; scenes: captions, questions or dialogues (pairs of one
               picture), or what stands in the place of the picture, also in dialogues: texts, pictures (two of them) or frames (a
               video of four)
    root       folder that the pictures named in the data must lie below; None is the folder of the data
    corpus     tevatron: the table of documents
    negatives  scenes, emoji: how many hard negatives to make for a pair (near misses; others of the subgroup)
    allow_cut  use JSON lines, a JSON array or a tar that is cut off at its end as far as it goes, with a warning

    Raises DataError, naming what is allowed.
    """
    record = _record(name, dialogue)
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; allowed: 1 or more, or none")
    given = {
        "path": path, "split": split != "train", "columns": columns, "subset": subset, "root": root, "corpus": corpus,
        "allow_cut": allow_cut,
    }  # fmt: skip
    for setting, value in given.items():
        if value and setting not in record.takes:
            raise DataError(f"source {name!r} takes no {setting}; of its kind it takes {', '.join(record.takes)}")
    if "path" in record.takes and not path:
        raise DataError(f"source {name!r} needs a path")
    place = Path(path or "")
    options = Options(
        path=place, root=Path(root) if root else place if place.is_dir() else place.parent, split=split, limit=limit, seed=seed,
        columns=dict(columns or {}), dialogue=dialogue, subset=subset, corpus=Path(corpus) if corpus else None, allow_cut=allow_cut,
        negatives=negatives,
    )  # fmt: skip
    if root and not options.root.is_dir():
        raise DataError(f"root is {str(root)!r}, which is no folder; it is the one that pictures named in the data must lie below")
    return Source(name, *record.open(options))


def _record(name: str, dialogue: str) -> Record:
    if name not in SOURCES:
        raise DataError(f"no source {name!r}; there are {', '.join(SOURCES)}")
    if dialogue not in MODES:
        raise DataError(f"dialogue {dialogue!r} is unknown; allowed: {', '.join(MODES)}")
    if dialogue not in SOURCES[name].modes:
        own = " or ".join(SOURCES[name].modes)
        raise DataError(f"dialogue {dialogue!r} is for scenes and emoji; rows of {name!r} say their own: {own}")
    return SOURCES[name]


def _consistent(pair: Pair) -> Pair:
    """The pair, or ContentError where training on it would contradict itself."""
    query, positives, negatives = pair
    if not positives:
        raise ContentError("positive is empty; a pair needs at least one")
    if query in positives:
        raise ContentError("a positive equals its query; there is nothing to learn from it")
    if any(negative in positives for negative in negatives):
        raise ContentError("a hard negative equals a positive; the row contradicts itself")
    return pair


def _able(what: str) -> str:
    return ", ".join(name for name, record in SOURCES.items() if getattr(record, what))
