"""Ranking tasks with known answers, over generated scenes and emoji, and the loop that scores an encoder.

A task has MMEB's shape (specs/mmeb.md 1): queries, a pool, for each query the pool entries it ranks, and
which of these are right. Whatever is as true as the right answer is right too: equal scenes, equal pictures,
equal crops.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from comatch.content import Image, Message, Text
from comatch.data.scene_text import article
from comatch.data.scene_truth import COLOURS, LETTERS, PLACES, SHAPES, SIZES, Dice, Thing
from comatch.data.scenes import Scene, class_options, scene
from comatch.data.sources import open_source
from comatch.errors import EvaluationError
from comatch.evaluation.metrics import Floats, Score, judge

_CHUNK = 256
_MISSES = 4


@dataclass(frozen=True)
class Task:
    """Queries that rank candidates.

    queries, pool   what is encoded
    candidates[i]   the places in the pool that query i ranks
    gold[i]         those among them that are right, at least one
    meta            classification, vqa, retrieval or grounding; of a published suite, the group within its modality
    relevance[i]    how relevant each of gold[i] is; () is 1 everywhere
    modality, split, metric   as in TaskResult
    ids, names      what people call the queries and the pool's entries; () is by place
    """

    name: str
    meta: str
    queries: Sequence[Message]
    pool: Sequence[Message]
    candidates: Sequence[Sequence[int]]
    gold: Sequence[Sequence[int]]
    relevance: Sequence[Sequence[float]] = ()
    modality: str = "image"
    split: str = ""
    metric: str = "hit@1"
    ids: Sequence[str] = ()
    names: Sequence[str] = ()


class Encodes(Protocol):
    """What `evaluate` needs of an encoder: messages to unit vectors [n, dim]."""

    def encode(self, items: list[Message], /) -> Any: ...


def evaluate(
    encoder: Encodes,
    tasks: Sequence[Task],
    *,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> list[Score]:
    """Score an encoder on tasks; each distinct message of all of them is encoded once.

    progress: called with messages encoded so far and in all. seed: of the intervals. Raises what the encoder
    raises for an item, and EvaluationError for vectors that cannot be scored.
    """
    places: dict[Message, int] = {}
    for task in tasks:
        for message in (*task.queries, *task.pool):
            places.setdefault(message, len(places))
    messages, parts = list(places), list[Floats]()
    for start in range(0, len(messages), _CHUNK):
        part = np.asarray(encoder.encode(messages[start : start + _CHUNK]), dtype=np.float32)
        wanted = len(messages[start : start + _CHUNK])
        if part.ndim != 2 or len(part) != wanted:
            raise EvaluationError(
                f"the encoder gave shape {list(part.shape)} for {wanted} items; expected [{wanted}, dim]"
            )
        parts.append(part)
        if progress:
            progress(start + wanted, len(messages))
    if not parts:
        raise EvaluationError(f"{len(tasks)} tasks without queries; there is nothing to score")
    vectors = np.concatenate(parts)
    scores = []
    for task in tasks:
        queries, pool = (vectors[[places[m] for m in side]] for side in (task.queries, task.pool))
        scores.append(
            judge(queries, pool, task.candidates, task.gold, task.relevance, name=task.name, meta=task.meta, seed=seed)[0]
        )
    return scores


# --- scenes


def scene_tasks(n: int = 200, candidates: int = 1000, seed: int = 0, split: str = "test") -> list[Task]:
    """Eight tasks over `n` generated scenes of a split.

    scenes-background, -count, -place   the picture and which of these is asked -> the label among all options
    scenes-vqa                          the picture and a question -> the answer among all of its kind
    scenes-t2i, -i2t                    caption <-> picture, among `candidates`: all scenes, and for each
                                        up to four near misses, one of each grade (Scene.near_misses)
    scenes-i2i                          the picture drawn anew -> the picture, among the same
    scenes-grounding                    the picture and a phrase for one object -> its crop, among all crops
    """
    if n < 1 or candidates < n:
        raise EvaluationError(
            f"{n} scenes with {candidates} candidates; allowed: 1 or more, and at least as many candidates"
        )
    scenes = [scene(seed, i, split) for i in range(n)]
    pool = _retrieval_pool(scenes, candidates, seed, split)
    return [
        *_scene_classes(scenes, seed),
        _scene_vqa(scenes, seed),
        *_scene_retrieval(scenes, pool, seed),
        _scene_grounding(scenes, seed),
    ]


def _scene_classes(scenes: list[Scene], seed: int) -> list[Task]:
    """The place asked about always holds an object: "nothing" is an option, and never right."""
    kinds = {
        "background": [("background", "what colour is the background?")] * len(scenes),
        "count": [("count", "how many objects are there?")] * len(scenes),
        "place": [
            (place, f"what is at the {place}?")
            for place in (Dice("place", seed, i).pick(one.things).place for i, one in enumerate(scenes))
        ],
    }  # fmt: skip
    tasks = []
    for name, asked in kinds.items():
        options = class_options(asked[0][0])
        gold = [[options.index(one.classes()[kind])] for one, (kind, _) in zip(scenes, asked, strict=True)]
        queries = [_shown(one, question) for one, (_, question) in zip(scenes, asked, strict=True)]
        pool = [_text(option) for option in options]
        tasks.append(Task(f"scenes-{name}", "classification", queries, pool, _all(pool, queries), gold))
    return tasks


def _scene_vqa(scenes: list[Scene], seed: int) -> Task:
    yes_no, numbers = ("yes", "no"), tuple("01234")
    looks = tuple(article(f"{colour} {shape}") for colour in COLOURS for shape in SHAPES)
    answers = {
        "colour": COLOURS, "shape": SHAPES, "size": SIZES, "place": PLACES, "count": numbers,
        "exists": yes_no, "relation": (*yes_no, "nothing", *looks),
        "text": (*yes_no, *numbers, *LETTERS, *looks),
        "background": tuple(class_options("background")),
    }  # fmt: skip
    pool = list(dict.fromkeys(answer for options in answers.values() for answer in options))
    asked = [one.question(seed) for one in scenes]
    return Task(
        "scenes-vqa", "vqa",
        [_shown(one, question) for one, (question, _, _) in zip(scenes, asked, strict=True)],
        [_text(answer) for answer in pool],
        [[pool.index(option) for option in answers[kind]] for _, _, kind in asked],
        [[pool.index(answer)] for _, answer, _ in asked],
    )  # fmt: skip


def _retrieval_pool(scenes: list[Scene], candidates: int, seed: int, split: str) -> list[Scene]:
    """The scenes, up to four near misses of each, and further scenes of the split to fill up."""
    pool = list(scenes)
    each = min(_MISSES, candidates // len(scenes) - 1)
    for one in scenes:
        pool += one.near_misses(seed, each)
    further = range(len(scenes), len(scenes) + candidates - len(pool))
    return [*pool, *(scene(seed, i, split) for i in further)]


def _scene_retrieval(scenes: list[Scene], pool: list[Scene], seed: int) -> list[Task]:
    gold = _equal([one.truth for one in scenes], [one.truth for one in pool])
    pictures = [_shown(one) for one in pool]
    captions = [_text(one.caption(seed)) for one in pool]
    redrawn = [_shown(one.redrawn(1)) for one in scenes]
    return [
        Task(f"scenes-{name}", "retrieval", queries, ranked, _all(ranked, queries), gold)
        for name, queries, ranked in (
            ("t2i", captions[: len(scenes)], pictures),
            ("i2t", pictures[: len(scenes)], captions),
            ("i2i", redrawn, pictures),
        )
    ]


def _scene_grounding(scenes: list[Scene], seed: int) -> Task:
    """All crops are candidates; two are equal where background, look and visible letter are."""
    pool, seen, queries, wanted = list[Message](), list[Hashable](), list[Message](), list[Hashable]()
    for i, one in enumerate(scenes):
        chosen = Dice("grounding", seed, i).below(len(one.things))
        for j, (thing, (phrase, box)) in enumerate(zip(one.things, one.regions(), strict=True)):
            pool.append(Message((Image(one.crop(box)),)))
            seen.append(_crop_truth(one, thing))
            if j == chosen:
                queries.append(_shown(one, f"find: {phrase}"))
                wanted.append(seen[-1])
    return Task("scenes-grounding", "grounding", queries, pool, _all(pool, queries), _equal(wanted, seen))


def _crop_truth(one: Scene, thing: Thing) -> Hashable:
    # The letter of a small object stands beside it, outside of its box.
    return one.background, thing.look, thing.letter if thing.size == "large" else ""


# --- emoji


def emoji_tasks(path: str | Path, split: str = "dev") -> list[Task]:
    """Four tasks over the emoji of a split: label, tags -> picture and picture -> label, group.

    Some pictures are the same to the pixel, some emoji have the same tags; any of them is right.
    """
    source = open_source("emoji", path=path, split=split)
    rows: list[dict[str, Any]] = [source.rows[i][0] for i in range(len(source))]
    pictures = [Message((Image(row["image"]["bytes"]),)) for row in rows]
    decoded = [picture.images[0].load() for picture in pictures]
    pixels = [(picture.size, picture.tobytes()) for picture in decoded]
    tags = [frozenset(row["tags"]) for row in rows]
    alike = _equal(pixels, pixels)
    fitting = [sorted({*same, *tagged}) for same, tagged in zip(alike, _equal(tags, tags), strict=True)]
    labels = [_text(row["label"]) for row in rows]
    keywords = [_text(", ".join(row["tags"])) for row in rows]
    groups = sorted({row["group"] for row in rows})
    group = [sorted({groups.index(rows[j]["group"]) for j in same}) for same in alike]
    return [
        Task(f"emoji-{name}", meta, queries, pool, _all(pool, queries), gold)
        for name, meta, queries, pool, gold in (
            ("label-to-picture", "retrieval", labels, pictures, alike),
            ("picture-to-label", "retrieval", pictures, labels, alike),
            ("tags-to-picture", "retrieval", keywords, pictures, fitting),
            ("group", "classification", pictures, [_text(g) for g in groups], group),
        )
    ]


# --- shared


def _text(words: str) -> Message:
    return Message((Text(words),))


def _shown(one: Scene, question: str = "") -> Message:
    return Message((Image(one.draw()), Text(question)))


def _all(pool: Sequence[Message], queries: Sequence[Message]) -> list[range]:
    return [range(len(pool))] * len(queries)


def _equal(wanted: Sequence[Hashable], pool: Sequence[Hashable]) -> list[list[int]]:
    """For each wanted truth, all places in the pool that hold it."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, truth in enumerate(pool):
        places[truth].append(place)
    return [places[truth] for truth in wanted]
