"""Messages and dialogues become Examples: rendered, positioned, pictures cut. Runs in loader workers and needs no weights."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from comatch.content import Dialogue, Image, Message, as_message
from comatch.core.batch import IGNORE, ROLE_ID, Example
from comatch.core.corruption import Hiding, corrupt
from comatch.core.packing import Size
from comatch.core.positions import mrope
from comatch.data.images import ImageSettings, picture_key
from comatch.errors import ContentError
from comatch.recipe import Stage
from comatch.render import Renderer, Row

_MOST_THREADS = 16


class Cut(NamedTuple):
    """A picture's patches, their grid, and a hash of both or b""."""

    patches: np.ndarray
    grid: tuple[int, int, int]
    name: bytes


class Preparer:
    """One renderer and one set of image settings, shared by training, evaluation and encoding.

    `named`: give every picture its hash, by which a store of vision features knows it.
    """

    def __init__(self, renderer: Renderer, images: ImageSettings) -> None:
        self.renderer, self.images, self.named = renderer, images, False

    def item(self, message: Message, stage: Stage) -> Example:
        """One item to embed. Raises ContentError or ImageError."""
        return self.finish(self.renderer.item(message, stage))

    def dialogue(self, dialogue: Dialogue, stage: Stage, seed: int | None = None) -> Example:
        """One context with its supervised turns. seed: of what the stage hides, None hides nothing. Raises ContentError or ImageError."""
        return self._corrupted(self.finish(self.renderer.dialogue(dialogue, stage, seed)), stage, seed)

    def pair(self, query: Message, answer: Message, stage: Stage, seed: int | None = None) -> Example:
        """A query and its answer as one row, with what the stage hides of it by that seed. Raises ContentError or ImageError."""
        return self._corrupted(self.finish(self.renderer.pair(query, answer, stage, seed)), stage, seed)

    def _corrupted(self, example: Example, stage: Stage, seed: int | None) -> Example:
        if not stage.corruptions or seed is None:
            return example
        r, images = self.renderer, self.images
        hiding = Hiding(r.mask, r.protected, r.image_id, images.merge**2, images.mean, images.std)
        return corrupt(example, stage, hiding, seed)

    def size(self, row: Row) -> Size:
        """What a rendered row asks of a pass, from the headers of its pictures; nothing is decoded."""
        return Size(len(row.ids), sum(map(self.images.tokens, row.images)) * self.images.merge**2)

    def cut(self, image: Image, named: bool = False) -> Cut:
        """Decode and cut one picture. Raises ImageError."""
        patches, grid = self.images.cut(image)
        return Cut(patches, grid, picture_key(patches, grid) if named or self.named else b"")

    def finish(self, row: Row, cut: Callable[[Image], Cut] | None = None) -> Example:
        """Add labels, positions and patches to a rendered row. `cut`: where its pictures come from, if they were cut before."""
        ids = np.asarray(row.ids, dtype=np.int64)
        labels = np.full_like(ids, IGNORE)
        supervised = np.asarray(row.supervised, dtype=bool)
        labels[:-1][supervised[1:]] = ids[1:][supervised[1:]]
        pictures = [(cut or self.cut)(image) for image in row.images]
        grids = tuple(picture.grid for picture in pictures)
        numbered = grids if self.renderer.recipe.prompt.grid else ()
        roles = np.asarray([ROLE_ID[role] for role in row.roles], dtype=np.int8)
        positions = mrope(ids == self.renderer.image_id, numbered, self.images.merge)
        # Dialogue and target do not see one another: each counts on from what both see, so it stands as in a row of its own.
        positions -= (roles == ROLE_ID["dialogue"]) * (roles == ROLE_ID["target"]).sum()
        return Example(
            ids=ids,
            roles=roles,
            labels=labels,
            positions=positions,
            patches=tuple(picture.patches for picture in pictures),
            grids=grids,
            cut=row.cut,
            pictures=tuple(picture.name for picture in pictures),
        )


class Ahead:
    """Items on their way to Examples: rendered at once, and their pictures cut by threads in the meantime.

    Equal items become one Example, and equal pictures are cut once; those that more than one item shows are named.
    """

    def __init__(self, preparer: Preparer, items: Sequence[Any], stage: Stage, pool: Executor | None) -> None:
        self._preparer = preparer
        self._messages = [_caught(item, as_message) for item in items]
        self._rows: dict[Message, Row | ContentError] = {}
        for message in self._messages:
            if isinstance(message, Message) and message not in self._rows:
                self._rows[message] = _caught(message, partial(preparer.renderer.item, stage=stage))
        shown = Counter(image for row in self._rows.values() if isinstance(row, Row) for image in set(row.images))
        self._cuts: dict[Image, Callable[[], Cut]] = {}
        for image, times in shown.items():
            work = partial(preparer.cut, image, times > 1)
            self._cuts[image] = pool.submit(work).result if pool else cache(work)

    def examples(self, stop: bool) -> tuple[dict[int, Example], dict[int, str]]:
        """Examples by the place of their item, and why the others are bad; with `stop` the first bad item raises its ContentError."""
        made: dict[Message, Example | ContentError] = {}
        good: dict[int, Example] = {}
        bad: dict[int, str] = {}
        for i, message in enumerate(self._messages):
            one = message if isinstance(message, ContentError) else made.get(message)
            if one is None:
                one = made[message] = _caught(self._rows[message], lambda row: self._preparer.finish(row, self._cut))
            if isinstance(one, Example):
                good[i] = one
            elif stop:
                raise one.at(i) from one
            else:
                bad[i] = one.reason
        return good, bad

    def _cut(self, image: Image) -> Cut:
        return self._cuts[image]()


@contextmanager
def threads(count: int | None) -> Iterator[Executor | None]:
    """A pool of so many threads that ends with the block; None takes one for each core that is ours, 0 has no pool.

    Threads and not processes, because Pillow and numpy let go of the interpreter while they decode, resize and copy.
    """
    if count is None:
        count = min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if count < 0:
        raise ContentError(f"workers is {count}; allowed: 0 or more, or None for one thread a core")
    pool = ThreadPoolExecutor(count, "comatch-cut") if count else None
    try:
        yield pool
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)


def distinct(examples: Mapping[int, Example]) -> list[list[int]]:
    """The places of each distinct Example."""
    places: dict[int, list[int]] = {}
    for i, example in examples.items():
        places.setdefault(id(example), []).append(i)
    return list(places.values())


def tell_work(examples: Mapping[int, Example], tally: Counter[str]) -> None:
    """Count `items` and `pictures` shown by them, and `distinct_items` and `distinct_pictures`, which is what has to be computed."""
    cut = [id(patches) for example in examples.values() for patches in example.patches]
    tally.update(items=len(examples), distinct_items=len(distinct(examples)), pictures=len(cut), distinct_pictures=len(set(cut)))


def side_by_side(examples: Sequence[Example]) -> list[int]:
    """An order by length in which those that show the same named picture follow one another."""
    shown = Counter(name for example in examples for name in set(example.pictures))
    leads = [next((name for name in example.pictures if name and shown[name] > 1), b"") for example in examples]
    longest: dict[bytes, int] = {}
    for example, lead in zip(examples, leads, strict=True):
        longest[lead] = max(longest.get(lead, 0), len(example))
    return sorted(range(len(examples)), key=lambda i: (longest[leads[i]] if leads[i] else len(examples[i]), leads[i], len(examples[i])))


def _caught(value: Any, make: Callable[[Any], Any]) -> Any:
    """What `make` makes of a value, or the ContentError that it raises or that the value is already."""
    if isinstance(value, ContentError):
        return value
    try:
        return make(value)
    except ContentError as error:
        return error
