"""Bring an index up to date with its input: only what is new is encoded, what vanished is removed.

After an update with `prune` the index holds of its folder what a fresh one would hold. Content counts, not
names or times: a renamed or copied picture takes the vector that is there, an edited one is encoded again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from comatch.content import Image, Message, Text
from comatch.data.items import Item
from comatch.encoder import CHUNK, Encoded, Encoder
from comatch.errors import ContentError, SearchError
from comatch.search.index import Index
from comatch.search.store import Floats, Record


@dataclass
class Report:
    """What an update did, counted in ids; of all these, `encoded` vectors are new.

    bad   (id, reason) of what cannot be embedded, and so is not in the index
    cut   ids of texts that were longer than the model's window
    """

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    encoded: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)


def update(
    index: Index,
    encoder: Encoder,
    items: Iterable[Item],
    *,
    source: str = "",
    labels: Mapping[str, str] | None = None,
    prune: bool = False,
    batch_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Add what `read_items` yields to an index of this encoder. Rows hold digest, source, text, image path, label.

    source: where the items come from. An id that belongs to another source, which still exists, is refused.
    labels: by id, what a person reads of an item, as from `read_labels`; it has no part in the vector.
    prune: also remove rows of this source that `items` does not name, as for a whole folder; those below a
    folder that cannot be read stay. progress: called with the number of items done.

    Raises SearchError, also where the encoder is not the index's. What was done until then stays, is valid,
    and is not done again.
    """
    if encoder.fingerprint != index.fingerprint:
        raise SearchError(
            f"the index was made by encoder {index.fingerprint}, this one is {encoder.fingerprint}: their "
            "vectors do not compare; load the encoder that made it, or make a new index in another folder"
        )
    run = _Update(index, source, labels or {}, progress or (lambda n: None))
    new = run.new(items)
    for found in encoder.stream(
        new, dim=index.dim, batch_tokens=batch_tokens, on_error="mark", progress=run.progress
    ):
        run.take(found)
    run.flush()
    run.remove(prune)
    return run.report


def digest(message: Message) -> str:
    """SHA-256 of an item: of texts and pictures' source bytes, in order. Raises ImageError."""
    whole = hashlib.sha256()
    for part in message.parts:
        if isinstance(part, Text):
            content = hashlib.sha256(part.text.encode()).hexdigest()
        else:
            images = (part,) if isinstance(part, Image) else part.frames
            content = " ".join(image.digest for image in images)
        whole.update(f"{type(part).__name__} {content}\n".encode())
    return whole.hexdigest()


class _Update:
    """One pass over the items.

    held      digest -> an id in the index that had it at some time
    waiting   digest being encoded -> ids and rows that get its vector
    ready     ids, rows and vectors to be stored
    """

    def __init__(self, index: Index, source: str, labels: Mapping[str, str], progress: Callable[[int], None]) -> None:
        self.index, self.labels, self.progress, self.report = index, labels, progress, Report()
        self.sources, self.source = {source}, source
        self.kept: set[str] = set()
        self.held = {index.get(id).get("digest"): id for id in index}
        self.waiting: dict[str, list[tuple[str, Record]]] = {}
        self.ready: list[tuple[str, Record, Floats]] = []

    def new(self, items: Iterable[Item]) -> Iterator[tuple[str, Message]]:
        """Digest and message of every content that the index does not hold."""
        for id, item in items:
            try:
                if isinstance(item, ContentError):
                    raise item
                # Before the encoder reads the file: should it change in between, the next update notices.
                content = digest(item)
            except ContentError as error:
                self.report.bad.append((id, error.reason))
                continue
            row = self._row(id, item, content)
            if content in self.waiting:
                self.waiting[content].append((id, row))
            elif id in self.index and self.index.get(id) == row:
                self.report.unchanged += 1
                self.kept.add(id)
            elif (vector := self._stored(content)) is not None:
                self.ready.append((id, row, vector))
            else:
                self.waiting[content] = [(id, row)]
                yield content, item
                continue
            self.progress(1)
            if len(self.ready) >= CHUNK:
                self.flush()

    def take(self, found: Encoded) -> None:
        """Store a stretch of new vectors."""
        for content, vector in zip(found.ids, found.vectors, strict=True):
            group = self.waiting.pop(content)
            self.ready += [(id, row, vector) for id, row in group]
            if content in found.cut:
                self.report.cut += [id for id, _ in group]
        for _, content, reason in found.bad:
            self.report.bad += [(id, reason) for id, _ in self.waiting.pop(content)]
        self.report.encoded += len(found.ids)
        self.flush()

    def flush(self) -> None:
        """Put on disk what is ready."""
        if not self.ready:
            return
        ids, rows, vectors = zip(*self.ready, strict=True)
        known = sum(id in self.index for id in ids)
        self.index.add(ids, np.stack(vectors), rows)
        self.report.changed += known
        self.report.added += len(ids) - known
        self.held |= {row["digest"]: id for id, row, _ in self.ready}
        self.kept.update(ids)
        self.ready = []

    def remove(self, prune: bool) -> None:
        """Forget rows that are bad now and, with `prune`, those that are gone."""
        bad = {id for id, _ in self.report.bad}
        unread = tuple("" if id == "." else f"{id}/" for id in bad)
        gone = [
            id
            for id in self.index
            if id in bad
            or (
                prune
                and id not in self.kept
                and self.index.get(id).get("source") in self.sources
                and not id.startswith(unread)
            )
        ]
        self.index.delete(gone)
        self.report.removed = len(gone)

    def _row(self, id: str, item: Message, content: str) -> Record:
        other = self.index.get(id).get("source", self.source) if id in self.index else self.source
        if other not in self.sources:
            if Path(other).exists():
                raise SearchError(
                    f"id {id!r} is in the index already, from {other}, and comes now from {self.source}; "
                    "make an index of its own for each"
                )
            self.sources.add(other)  # the input moved: its rows are ours now
        row = {"id": id, "digest": content, "source": self.source}
        if item.text:
            row["text"] = item.text
        if self.labels.get(id, item.text) != item.text:
            row["label"] = self.labels[id]
        paths = [image.source for image in item.images if isinstance(image.source, Path)]
        if paths:
            row["image"] = str(paths[0])
        return row

    def _stored(self, content: str) -> Floats | None:
        id = self.held.get(content)
        if id is None or id not in self.index or self.index.get(id).get("digest") != content:
            return None
        vector: Floats = self.index.vectors([id])[0]
        return vector
