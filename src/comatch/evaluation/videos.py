"""The 18 video datasets of MMEB-V2: tables of VLM2Vec's hub folders, videos as folders of frames. Source: specs/mmeb.md 3.

    <Dataset>/[config/]test-*.parquet                       columns as below, one record for each parser
    frames/video_cls/K700/<video>/frame_0001.jpg            up to 64 a video, of which 8 are shown, evenly spread
    frames/video_mret/QVHighlight/<video>/query             the whole video; its clips are the folders positive*, negative* beside it

VLM2Vec's loader is followed: as candidates options lose their "A. " (Video-MME, EgoSchema), and clips of QVHighlight and Charades-STA
are described by "... the provided video.".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

from comatch.content import Video
from comatch.data.tables import Table
from comatch.data.text_tables import Row
from comatch.errors import EvaluationError
from comatch.evaluation.archives import SUFFIXES, Pictures
from comatch.evaluation.building import Building
from comatch.evaluation.layouts import check_columns
from comatch.evaluation.protocols import IMAGE, VIDEO

FRAMES: Final = 8
_BY_IMAGE = f"{IMAGE} Select the video clip that aligns with the given text and image: {{}}"
_BY_VIDEO = f"{VIDEO} Find the clip that corresponds to the given sentence and video segment: {{}}"


def read_videos(build: Building, tables: Sequence[tuple[str, Table]], pictures: Pictures, labels: Path) -> None:
    """All rows of a dataset. tables: with the name of their subset; labels: a file of all classes, one a line, where there is one.

    Raises EvaluationError for wrong columns, videos without frames, answers that are no option, and classes that are missing.
    """
    shown = Frames(build, pictures)
    if build.spec.parser == "video-class":
        _classes(build, labels, tables[0][1])
    read, columns = PARSERS[build.spec.parser]
    number = 0
    for subset, table in tables:
        needed = [build.spec.columns.get(name, name) for name in columns]
        for row in table.rows(check_columns(table, needed)):
            try:
                read(build, shown, {**row, "subset": subset, "row": number})
            except (EvaluationError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                told = error if isinstance(error, EvaluationError) else f"holds something else than needed, {error!r}"
                raise EvaluationError(f"{table.path}, row {number}: {told}") from error
            number += 1


class Frames:
    """The videos of a dataset by their folder of frames."""

    def __init__(self, build: Building, pictures: Pictures) -> None:
        self.root, self.pictures = build.spec.frames, pictures

    def video(self, folder: str) -> Video:
        """Eight frames, or all where there are fewer. Raises EvaluationError where there is none."""
        names = [name for name in self.pictures.listed(f"{self.root}/{folder}") if name.lower().endswith(SUFFIXES)]
        if not names:
            raise EvaluationError(f"there are no frames in {self.root}/{folder}")
        if len(names) >= FRAMES:
            names = [names[i * (len(names) - 1) // (FRAMES - 1)] for i in range(FRAMES)]
        return Video(tuple(self.pictures.image(f"{self.root}/{folder}/{name}") for name in names))

    def folders(self, folder: str) -> list[str]:
        """The folders in a folder."""
        return [name for name in self.pictures.listed(f"{self.root}/{folder}") if not name.lower().endswith(SUFFIXES)]


def _classes(build: Building, labels: Path, table: Table) -> None:
    """The pool of a classification: all classes, not only those that occur. Raises EvaluationError where some are missing."""
    if labels.is_file():
        names = [line.strip() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        names = sorted({str(row["pos_text"]) for row in table.rows(check_columns(table, ["pos_text"]))})
        if len(names) != build.spec.labels:
            raise EvaluationError(
                f"the rows name {len(names)} classes, all {build.spec.labels} are ranked; write them to {labels}, one a line"
            )
    for name in names:
        build.candidate(name, "", lambda name=name: build.spec.filled(name, target=True))  # type: ignore[misc]


def _class(build: Building, shown: Frames, row: Row) -> None:
    gold = build.known(str(row["pos_text"]), "", f"row {row['row']}")
    build.query(str(row["row"]), build.spec.filled("", (shown.video(str(row["video_id"])),)), (), [gold])


def _choice(build: Building, shown: Frames, row: Row) -> None:
    options, right = [str(option) for option in row["neg_text"]], str(row["pos_text"])
    if right not in options:
        raise EvaluationError(f"gold {right!r} is not among its {len(options)} candidates")
    _ask(build, row, build.spec.filled("", (shown.video(str(row["video_id"])),)), options, options.index(right))


def _question(options: Callable[[Row], tuple[str, str, list[str], int]]) -> Callable[[Building, Frames, Row], None]:
    """A reader of questions. `options` gives of a row the video's folder, the question with its options, the candidates, which is right."""

    def read(build: Building, shown: Frames, row: Row) -> None:
        folder, question, candidates, right = options(row)
        if not 0 <= right < len(candidates):
            raise EvaluationError(f"the answer is option {right}, there are {len(candidates)}")
        _ask(build, row, build.spec.filled(question, (shown.video(folder),)), candidates, right)

    return read


def _ask(build: Building, row: Row, item: Any, options: Sequence[str], right: int) -> None:
    listed = build.listed(options, [""] * len(options), lambda text, _: build.spec.filled(text, target=True))
    build.query(str(row["row"]), item, listed, [listed[right]])


def _videomme(row: Row) -> tuple[str, str, list[str], int]:
    options = list(row["options"])
    return str(row["videoID"]), "\n".join([row["question"], *options]), [*map(_unlettered, options)], "ABCD".index(row["answer"])


def _egoschema(row: Row) -> tuple[str, str, list[str], int]:
    options = list(row["option"])
    return str(row["video_idx"]), row["question"] + " ".join(options), [*map(_unlettered, options)], int(row["answer"])


def _nextqa(row: Row) -> tuple[str, str, list[str], int]:
    options = [str(row[f"a{i}"]) for i in range(5)]
    return str(row["video"]), _lettered(row["question"], options)[0], options, int(row["answer"])


def _mvbench(row: Row) -> tuple[str, str, list[str], int]:
    options = list(row["candidates"])
    question, lettered = _lettered(row["question"], options)
    return f"{row['subset']}/{row['video']}", question, lettered, options.index(row["answer"])


def _activitynetqa(row: Row) -> tuple[str, str, list[str], int]:
    options = ["yes", "no"]
    return f"v_{row['video_name']}", f"{row['question']}? (A) yes; (B) no.", options, options.index(row["answer"])


def _lettered(question: str, options: Sequence[str]) -> tuple[str, list[str]]:
    lettered = [f"({chr(ord('A') + i)}) {option}" for i, option in enumerate(options)]
    return "\n".join([question, "Options:", *lettered]).rstrip(), lettered


def _unlettered(option: str) -> str:
    return option[option.find(". ") :].strip(". ") if ". " in option else option


def _text(build: Building, shown: Frames, row: Row) -> None:
    columns = build.spec.columns
    cell = row[columns["text"]]
    video = PurePosixPath(str(row[columns["video"]]))
    name = video.stem if video.suffix == ".mp4" else video.name
    place = build.candidate("", name, lambda: build.spec.filled("", (shown.video(name),), target=True))
    build.query(str(row["row"]), build.spec.filled(cell[0] if isinstance(cell, list) else cell), (), [place])


def _moments(build: Building, shown: Frames, row: Row) -> None:
    name = PurePosixPath(str(row["video_path"])).stem
    clips = [clip for clip in shown.folders(name) if clip != "query"]
    listed = _clips(build, shown, [f"{name}/{clip}" for clip in clips])
    gold = [place for place, clip in zip(listed, clips, strict=True) if clip.startswith("positive")]
    build.query(str(row["row"]), build.spec.filled(row["query"], (shown.video(f"{name}/query"),)), listed, gold)


def _momentseeker(build: Building, shown: Frames, row: Row) -> None:
    spec, given, text = build.spec, str(row["input_frames"] or ""), row["query"]
    if given.endswith(".mp4"):
        item = spec.filled(text, (shown.video(_flat(given)),), template=_BY_VIDEO)
    elif given.endswith(".jpg"):
        item = spec.filled(text, (shown.pictures.image(f"{shown.root}/query_{given}"),), template=_BY_IMAGE)
    else:
        item = spec.filled(text)
    right, wrong = ([_flat(entry["output_path"]) for entry in row[f"{kind}_frames"]] for kind in ("positive", "negative"))
    listed = _clips(build, shown, [*right, *wrong])
    build.query(str(row["row"]), item, listed, listed[: len(right)])


def _clips(build: Building, shown: Frames, folders: Sequence[str]) -> Sequence[int]:
    return build.listed([""] * len(folders), folders, lambda _, folder: build.spec.filled("", (shown.video(folder),), target=True))


def _flat(path: str) -> str:
    return "video_frames/" + path.replace("/", "_").split(".mp4")[0]


PARSERS: Final[dict[str, tuple[Callable[[Building, Frames, Row], None], Sequence[str]]]] = {
    "video-class": (_class, ("video_id", "pos_text")),
    "video-choice": (_choice, ("video_id", "pos_text", "neg_text")),
    "videomme": (_question(_videomme), ("videoID", "question", "options", "answer")),
    "egoschema": (_question(_egoschema), ("video_idx", "question", "option", "answer")),
    "nextqa": (_question(_nextqa), ("video", "question", "answer", "a0", "a1", "a2", "a3", "a4")),
    "mvbench": (_question(_mvbench), ("video", "question", "candidates", "answer")),
    "activitynetqa": (_question(_activitynetqa), ("video_name", "question", "answer")),
    "video-text": (_text, ("video", "text")),
    "moments": (_moments, ("query", "video_path")),
    "momentseeker": (_momentseeker, ("query", "input_frames", "positive_frames", "negative_frames")),
}
