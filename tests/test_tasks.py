"""Tasks hold the truth and nothing but it, and their scores tell good encoders from lazy ones."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from comatch.content import Message
from comatch.data.scenes import Scene, scene
from comatch.errors import EvaluationError
from comatch.evaluation.metrics import hit_at_1
from comatch.evaluation.tasks import Task, _retrieval_pool, emoji_tasks, evaluate, scene_tasks

DIM = 64
N, CANDIDATES = 60, 320


def vector(key: object) -> np.ndarray:
    """A random direction for a key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    drawn = np.random.default_rng(seed).normal(size=DIM)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


class By:
    """An encoder that sees of a message what `look` sees; it counts what it encodes."""

    def __init__(self, look: Callable[[Message], object]) -> None:
        self.look, self.seen = look, list[Message]()

    def encode(self, items: list[Message]) -> np.ndarray:
        self.seen += items
        return np.stack([vector(self.look(item)) for item in items])


def pixels(message: Message) -> bytes:
    return b"".join(image.load().tobytes() for image in message.images)


def content(message: Message) -> object:
    return hashlib.sha256(pixels(message)).hexdigest(), message.text


@lru_cache
def tasks() -> dict[str, Task]:
    return {task.name: task for task in scene_tasks(N, CANDIDATES, seed=3)}


@lru_cache
def drawn() -> dict[bytes, Scene]:
    """The scene of each picture of the retrieval tasks, from its pixels."""
    scenes = [scene(3, i, "test") for i in range(N)]
    pool = _retrieval_pool(scenes, CANDIDATES, 3, "test")
    return {one.draw().tobytes(): one for one in (*pool, *(s.redrawn(1) for s in scenes))}


def test_all_tasks_are_well_formed_and_repeatable() -> None:
    again = {task.name: task for task in scene_tasks(N, CANDIDATES, seed=3)}
    assert again == tasks() and {t.name: t for t in scene_tasks(N, CANDIDATES, seed=4)} != again
    assert Counter(task.meta for task in again.values()) == {
        "classification": 3, "vqa": 1, "retrieval": 3, "grounding": 1,
    }  # fmt: skip
    for task in again.values():
        assert len(task.queries) == len(task.candidates) == len(task.gold) == N
        for listed, right in zip(task.candidates, task.gold, strict=True):
            assert right and set(right) < set(listed) <= set(range(len(task.pool)))
    assert len(again["scenes-t2i"].pool) == len(again["scenes-i2t"].pool) == CANDIDATES


def test_retrieval_gold_is_equal_truth_and_misses_are_graded() -> None:
    t2i, i2t, i2i = (tasks()[f"scenes-{name}"] for name in ("t2i", "i2t", "i2i"))
    truths = [drawn()[pixels(m)].dense_caption() for m in t2i.pool]
    for i in range(N):
        asked = scene(3, i, "test")
        assert t2i.queries[i].text == asked.caption(3)
        right = [j for j, truth in enumerate(truths) if truth == asked.dense_caption()]
        assert t2i.gold[i] == i2t.gold[i] == i2i.gold[i] == right
        assert i2t.pool[right[0]].text == asked.caption(3)
        assert pixels(i2t.queries[i]) == asked.draw().tobytes() != pixels(i2i.queries[i])
        assert drawn()[pixels(i2i.queries[i])].truth == asked.truth
    grades = Counter(drawn()[pixels(m)].difference for m in t2i.pool)
    assert grades[0] == N + (CANDIDATES - 5 * N) and grades[1] + grades[2] + grades[3] + grades[4] == 4 * N
    assert min(grades.values()) >= CANDIDATES - 5 * N


def test_equal_scenes_in_the_pool_are_all_gold(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(seed: int, i: int, split: str) -> Scene:
        one = scene(seed, i // 2, split)
        return one.redrawn(1) if i % 2 else one

    monkeypatch.setattr("comatch.evaluation.tasks.scene", twice)
    for task in scene_tasks(6, 30):
        if task.meta == "retrieval":
            assert [set(right) for right in task.gold] == [{i - i % 2, i - i % 2 + 1} for i in range(6)]


def test_classes_answers_and_crops_are_true() -> None:
    places = {"scenes-background": "background", "scenes-count": "count"}
    for i in range(N):
        one = scene(3, i, "test")
        for name in ("scenes-background", "scenes-count", "scenes-place"):
            task = tasks()[name]
            query, label = task.queries[i], task.pool[task.gold[i][0]].text
            place = places.get(name) or query.text.removeprefix("what is at the ").removesuffix("?")
            assert one.classes()[place] == label != "nothing"
            assert pixels(query) == one.draw().tobytes()
        vqa = tasks()["scenes-vqa"]
        question, answer, _ = one.question(3)
        assert vqa.queries[i].text == question and [vqa.pool[j].text for j in vqa.gold[i]] == [answer]
        crops = tasks()["scenes-grounding"]
        box = dict(one.regions())[crops.queries[i].text.removeprefix("find: ")]
        own = [j for j, crop in enumerate(crops.pool) if pixels(crop) == one.crop(box).tobytes()]
        assert own and set(own) <= set(crops.gold[i])
    assert len({tuple(row) for row in tasks()["scenes-vqa"].candidates}) > 5


def test_every_question_has_its_answer_among_the_candidates() -> None:
    for split in ("train", "dev"):
        task = scene_tasks(700, 700, seed=8, split=split)[3]
        assert task.name == "scenes-vqa" and all(
            right[0] in listed for right, listed in zip(task.gold, task.candidates, strict=True)
        )
    kinds = Counter(scene(8, i, "dev").question(8)[2] for i in range(700))
    assert len(kinds) == 9


def test_grounding_gold_is_what_no_eye_can_tell_apart() -> None:
    task = tasks()["scenes-grounding"]
    scenes = [scene(3, i, "test") for i in range(N)]
    objects = [(s, t) for s in scenes for t in s.things]
    for i, right in enumerate(task.gold):
        phrase = task.queries[i].text.removeprefix("find: ")
        target = next(t for t in scenes[i].things if phrase == f"the {t.size} {t.colour} {t.shape}")
        alike = [
            j for j, (s, t) in enumerate(objects)
            if (s.background, t.size, t.colour, t.shape) == (scenes[i].background, *target.look)
            and (t.size == "small" or t.letter == target.letter)
        ]  # fmt: skip
        assert right == alike
    assert max(map(len, task.gold)) > 1


def test_an_encoder_that_knows_the_truth_scores_one() -> None:
    def truth(message: Message) -> object:
        if message.images and pixels(message) in drawn():
            return drawn()[pixels(message)].dense_caption()
        return captions[message.text]

    t2i, i2t, i2i = (tasks()[f"scenes-{name}"] for name in ("t2i", "i2t", "i2i"))
    pool = [drawn()[pixels(m)] for m in t2i.pool]
    captions = {text.text: one.dense_caption() for text, one in zip(i2t.pool, pool, strict=True)}
    assert [score.hit for score in evaluate(By(truth), [t2i, i2t, i2i])] == [1, 1, 1]

    def words(message: Message) -> object:
        return sorted(str(truth(message)).replace(",", "").split())

    # Grade 1 near misses have the same words in another order: who counts words ties with them, and misses.
    fooled = evaluate(By(words), [t2i, i2t, i2i])
    assert all(score.hit < 0.7 and score.ties > 0.3 * N for score in fooled)


def test_lazy_encoders_stay_near_chance() -> None:
    everything = list(tasks().values())
    for score in evaluate(By(content), everything):
        assert abs(score.hit - score.chance) < 0.2 and score.invalid == 0, score
    for score in evaluate(By(lambda message: 0), everything):
        assert score.hit == 0 and score.ties == N and score.expected == pytest.approx(score.chance)
    blind = evaluate(By(lambda message: message.text), [t for t in everything if t.name == "scenes-place"])[0]
    assert abs(blind.hit - blind.chance) < 0.1


def test_each_message_is_encoded_once_whatever_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    everything, encoder, done = list(tasks().values()), By(content), list[tuple[int, int]]()
    scores = evaluate(encoder, everything, progress=lambda i, n: done.append((i, n)))
    distinct = {m for task in everything for m in (*task.queries, *task.pool)}
    assert len(encoder.seen) == len(set(encoder.seen)) == len(distinct)
    assert len(distinct) < sum(len(t.queries) + len(t.pool) for t in everything), "nothing was shared"
    assert done[-1] == (len(distinct),) * 2 and len(done) == -(-len(distinct) // 256)
    monkeypatch.setattr("comatch.evaluation.tasks._CHUNK", 7)
    assert evaluate(By(content), everything) == scores
    for task, score in zip(everything, scores, strict=True):
        vectors = [By(content).encode(list(side)) for side in (task.queries, task.pool)]
        alone = hit_at_1(*vectors, task.candidates, task.gold, name=task.name, meta=task.meta)
        assert alone == score and alone.hits.tolist() == score.hits.tolist()
    assert evaluate(By(content), everything, seed=1)[0].n == N


def test_faulty_encoders_are_refused_or_score_nothing() -> None:
    class Short(By):
        def encode(self, items: list[Message]) -> np.ndarray:
            return super().encode(items)[1:]

    class Nan(By):
        def encode(self, items: list[Message]) -> np.ndarray:
            return super().encode(items) * np.nan

    one = [tasks()["scenes-count"]]
    with pytest.raises(EvaluationError, match=r"shape \[\d+, 64\] for \d+ items"):
        evaluate(Short(content), one)
    assert evaluate(Nan(content), one)[0].hit == 0 and evaluate(Nan(content), one)[0].invalid == N
    with pytest.raises(EvaluationError, match="5 scenes with 4 candidates"):
        scene_tasks(5, 4)


@pytest.fixture
def emoji(tmp_path: Path) -> Path:
    """Ten emoji: 0 and 1 are equal pixels in different files, 2 and 3 have the same tags in another order."""

    def png(colour: int, level: int) -> bytes:
        out = io.BytesIO()
        PILImage.new("RGB", (9, 9), (colour, 0, 0)).save(out, "PNG", compress_level=level)
        return out.getvalue()

    tags = {2: ["a", "b"], 3: ["b", "a"]}
    rows = [
        {
            "id": str(i), "label": f"label {i}", "tags": tags.get(i, [f"t{i}"]), "group": f"g{i % 4}",
            "subgroup": "s", "split": "dev",
            "image": {"bytes": png(max(i, 1) * 9, i % 2 * 9), "path": "x"},
        }
        for i in range(10)
    ]  # fmt: skip
    assert rows[0]["image"] != rows[1]["image"]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    return tmp_path / "e.parquet"


def test_emoji_gold_equals_a_plain_double_loop(emoji: Path) -> None:
    rows = pq.read_table(emoji).to_pylist()
    look = [PILImage.open(io.BytesIO(row["image"]["bytes"])).tobytes() for row in rows]
    same = [[j for j in range(10) if look[i] == look[j]] for i in range(10)]
    tags = [set(row["tags"]) for row in rows]
    tagged = [[j for j in range(10) if j in same[i] or tags[i] == tags[j]] for i in range(10)]
    by_label, by_picture, by_tags, group = emoji_tasks(emoji)
    assert by_label.gold == by_picture.gold == same and same[0] == [0, 1]
    assert by_tags.gold == tagged and tagged[2] == [2, 3]
    assert (
        [m.text for m in by_label.queries]
        == [row["label"] for row in rows]
        == [m.text for m in by_picture.pool]
    )
    assert [pixels(m) for m in by_label.pool] == look == [pixels(m) for m in by_picture.queries]
    assert [m.text for m in group.pool] == ["g0", "g1", "g2", "g3"]
    assert group.gold == [[0, 1], [0, 1], *([i % 4] for i in range(2, 10))]
    assert [score.n for score in evaluate(By(content), emoji_tasks(emoji))] == [10] * 4
