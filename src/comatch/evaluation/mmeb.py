"""MMEB-V1 (36 datasets) and MMEB-V2 (78) from a person's own folder or the hub, read to tasks.

A folder holds what the hub's repositories hold, under their names or side by side:

    DATA/[MMEB-eval/]<Dataset>/test-*.parquet           or MMEB_Test_Instruct, or .jsonl
    DATA/images/..., images.zip, images.tar             pictures by the paths in the tables; or image-tasks/, MMEB/
    DATA/[video-tasks/]<Dataset>/..., video-tasks/frames/...   or frames/*.tar
    DATA/[visdoc-tasks/]<Dataset>/{queries,corpus,qrels}/...

A dataset that cannot be read whole is an error with its name: nothing is skipped.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from comatch.content import Image, Message, Video
from comatch.data.tables import open_table
from comatch.errors import ComatchError, EvaluationError
from comatch.evaluation.archives import Pictures
from comatch.evaluation.building import Building
from comatch.evaluation.documents import PARTS, read_documents
from comatch.evaluation.hub import Fetched, fetch
from comatch.evaluation.layouts import read_images
from comatch.evaluation.protocols import Protocol, protocol_of
from comatch.evaluation.specs import Spec, specs
from comatch.evaluation.suites import places
from comatch.evaluation.tasks import Task
from comatch.evaluation.videos import read_videos

MODES = ("", "local", "global")
_SUFFIXES = (".parquet", ".jsonl")
_LARGE, _ENDS = 256 * 2**20, 2**20


def mmeb_tasks(
    data: str | Path,
    suite: str = "mmeb-v1",
    protocol: str | Protocol = "comatch",
    *,
    names: Sequence[str] | None = None,
    mode: str = "",
) -> list[Task]:
    """The tasks of a suite, written out by a protocol, in the order of the published tables.

    data: a folder, or "hub", or "hub@REVISION". names: some of the datasets, None for all 36 or 78. mode: "local" ranks each query's
    own list, "global" all candidates of the dataset, "" what the benchmark says. Raises EvaluationError, naming the dataset.
    """
    opened = Suite(data, suite, protocol, names=names, mode=mode)
    return [opened.task(name) for name in opened.names]


class Suite:
    """The datasets of a suite where they lie; `task` reads one."""

    def __init__(
        self,
        data: str | Path,
        suite: str = "mmeb-v1",
        protocol: str | Protocol = "comatch",
        *,
        names: Sequence[str] | None = None,
        mode: str = "",
        work: Path | None = None,
    ) -> None:
        self.name, self.specs = suite, specs(suite)
        self.protocol = protocol if isinstance(protocol, Protocol) else protocol_of(protocol)
        if mode not in MODES:
            raise EvaluationError(f"mode is {mode!r}; allowed: local, global, or '' for the benchmark's own")
        if unknown := [name for name in names or () if name not in self.specs]:
            raise EvaluationError(f"{suite} has no dataset {unknown[0]!r}; it has {', '.join(self.specs)}")
        self.mode = mode
        self.names = [name for name in self.specs if names is None or name in names]
        self.fetched = self._fetched(str(data), work)
        self._tasks: dict[str, Task] = {}
        self._files: dict[Path, str] = {}

    def task(self, name: str) -> Task:
        """One dataset, read once. Raises EvaluationError, naming it, where a file, column, list, picture or right answer is missing."""
        if name not in self._tasks:
            self._tasks[name] = self._read(name)
        return self._tasks[name]

    def _read(self, name: str) -> Task:
        spec, place = self.specs[name], places(self.name)[name]
        build = Building(spec, place, self.protocol, self.mode or spec.mode)
        try:
            if place.modality == "image":
                read_images(build, open_table(self._table(name)), self._pictures)
            elif place.modality == "video":
                tables = [(part, open_table(path)) for part, path in self._tables(spec).items()]
                read_videos(build, tables, self._frames, self._folder(spec) / "labels.txt")
            else:
                read_documents(build, {part: open_table(path) for part, path in self._tables(spec).items()}, self._pictures)
            return build.task()
        except (ComatchError, OSError) as error:
            raise EvaluationError(f"{name}: {error}") from error

    @property
    def revision(self) -> str:
        """A hash of the tables of all datasets that are there, behind the commit they were fetched at where they are the hub's."""
        digest = hashlib.blake2b(digest_size=16)
        for name, spec in self.specs.items():
            for file in self._files_of(spec):
                digest.update(f"{name} {file.name} {self._hash(file)}\n".encode())
        return f"{self.fetched.commit[:12]}:{digest.hexdigest()}" if self.fetched.commit else digest.hexdigest()

    def _fetched(self, data: str, work: Path | None) -> Fetched:
        hub, _, revision = data.partition("@")
        if hub == "hub" and not Path(data).is_dir():
            wanted = [self.specs[name] for name in self.names]
            return fetch(wanted, revision or None, work or Path.home() / ".cache" / "comatch" / "mmeb")
        if not Path(data).is_dir():
            raise EvaluationError(f"there is no folder {data}; pass the folder of MMEB, or hub")
        return Fetched((Path(data),))

    @cached_property
    def _pictures(self) -> Pictures:
        below = ("images", "MMEB-eval/images", "image-tasks", "MMEB", "images.zip", "images.tar", "MMEB-eval/images.zip")
        return Pictures(self._places(*below, "image-tasks/mmeb_v1.zip", "image-tasks/mmeb_v1.tar", "MMEB-eval", ""))

    @cached_property
    def _frames(self) -> Pictures:
        archives = [path for root in self._places("video-tasks/frames", "frames") for path in sorted(root.glob("*.tar"))]
        return Pictures([*self._places("video-tasks/frames", "frames"), *archives])

    def _places(self, *below: str) -> list[Path]:
        return [root / name for root in self.fetched.roots for name in below if (root / name).exists()]

    def _table(self, name: str) -> Path:
        """The table of an image dataset."""
        for place in self._places(name, f"MMEB-eval/{name}", f"MMEB_Test_Instruct/{name}", f"image-tasks/{name}"):
            if found := _shards(place, "test"):
                return found
        folders = ", ".join(map(str, self.fetched.roots))
        raise EvaluationError(f"there is no table {name}/test-*.parquet or .jsonl in {folders}, MMEB-eval or MMEB_Test_Instruct there")

    def _folder(self, spec: Spec) -> Path:
        """The folder of a video or document dataset."""
        if spec.repo in self.fetched.repos:
            return self.fetched.repos[spec.repo]
        below = [f"{room}{name}" for room in ("video-tasks/", "visdoc-tasks/", "") for name in dict.fromkeys((spec.folder, spec.name))]
        for place in self._places(*below):
            if place.is_dir():
                return place
        folders = ", ".join(map(str, self.fetched.roots))
        raise EvaluationError(f"there is no folder {spec.folder} in {folders}, nor in video-tasks or visdoc-tasks there")

    def _tables(self, spec: Spec) -> Mapping[str, Path]:
        """The tables of a video or document dataset: by subset, or by part of a BEIR triple."""
        folder = self._folder(spec)
        if spec.parser == "beir":
            found = {part: _shards(folder / part, spec.part) for part in PARTS}
        elif spec.parser == "mvbench":
            found = {below.name: _shards(below, spec.part) for below in sorted(folder.iterdir()) if below.is_dir()}
            found = {name: path for name, path in found.items() if path}
        else:
            found = {"": next(filter(None, (_shards(folder / below, spec.part) for below in (spec.config, "", "data"))), None)}
        if not found or not all(found.values()):
            lacking = [f"{name}/" for name, path in found.items() if path is None and name]
            raise EvaluationError(f"{folder} has no table {' '.join(lacking)}{spec.part}-*.parquet or .jsonl")
        return {name: path for name, path in found.items() if path}

    def _files_of(self, spec: Spec) -> Iterator[Path]:
        """The files of a dataset's tables that are there."""
        try:
            tables = self._tables(spec).values() if spec.repo else [self._table(spec.name)]
        except EvaluationError:
            return
        for table in tables:
            yield from [table] if table.is_file() else sorted(table.parent.glob(table.name))

    def _hash(self, file: Path) -> str:
        """Of the content; of a large file (a corpus of pages) of its size and both ends."""
        if file not in self._files:
            size = file.stat().st_size
            with file.open("rb") as stream:
                if size <= _LARGE:
                    self._files[file] = hashlib.file_digest(stream, "sha256").hexdigest()
                else:
                    head = stream.read(_ENDS)
                    stream.seek(-_ENDS, os.SEEK_END)
                    self._files[file] = f"{size} {hashlib.sha256(head + stream.read()).hexdigest()}"
        return self._files[file]


def pictures_of(message: Message) -> Iterator[Image]:
    """All pictures of a message, frames of videos among them."""
    for part in message.parts:
        if isinstance(part, Image):
            yield part
        elif isinstance(part, Video):
            yield from part.frames


def _shards(folder: Path, part: str) -> Path | None:
    """A table of one split: a file, or the pattern of its shards."""
    for suffix in _SUFFIXES:
        if (folder / f"{part}{suffix}").is_file():
            return folder / f"{part}{suffix}"
        if any(folder.glob(f"{part}-*{suffix}")):
            return folder / f"{part}-*{suffix}"
    return None


