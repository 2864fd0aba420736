"""A run over MMEB scores what a loop would, whatever the batches, processes and order; lazy and broken encoders gain nothing by it."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.mmeb import QUERIES, meaning, remove, truncate, write_v1, write_v2

from comatch.content import Message
from comatch.errors import EvaluationError, ModelError
from comatch.evaluation.aggregate import summarise
from comatch.evaluation.metrics import TIE, judge
from comatch.evaluation.mmeb import Suite, pictures_of
from comatch.evaluation.records import SuiteResult
from comatch.evaluation.results import read_result
from comatch.evaluation.running import run_suite
from comatch.evaluation.specs import specs

DIM = 48
SOME = ("ImageNet-1K", "OK-VQA", "ChartQA", "WebQA", "RefCOCO-Matching", "CIRR")


def vector(key: object) -> np.ndarray:
    """A random direction for a key."""
    seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
    drawn = np.random.default_rng(seed).normal(size=DIM)
    return (drawn / np.linalg.norm(drawn)).astype(np.float32)


def seen(message: Message) -> tuple[str, tuple[bytes, ...]]:
    """Text and bytes of the pictures."""
    sources = [image.source for image in pictures_of(message)]
    return message.text, tuple(source.read_bytes() if isinstance(source, Path) else source.read(10**6) for source in sources)  # type: ignore[union-attr]


def about(message: Message) -> str:
    """What the drawn world means by it: the encoder that knows the answers."""
    centres = []
    for image in list(pictures_of(message))[:1]:
        picture = image.load()
        pixel = picture.getpixel((picture.width // 2, picture.height // 2))
        centres.append(tuple(map(int, pixel)))  # type: ignore[arg-type]
    text = message.text if "Options:" not in message.text and "\nA. " not in message.text and "?A. " not in message.text else ""
    return meaning("" if "(A) yes" in text else text.replace("Tell me.", ""), centres)


class By:
    """A model that sees of a message what `look` makes of it; counts what it encodes."""

    def __init__(self, look: Callable[[Message], np.ndarray], fingerprint: str = "f", stop_after: int | None = None) -> None:
        self.look, self.fingerprint, self.stop_after = look, fingerprint, stop_after
        self.counts = Counter[Message]()
        self.calls = list[list[Message]]()

    def encode(self, items: list[Message], **_: Any) -> np.ndarray:
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise ModelError("stopped")
        self.calls.append(items)
        self.counts.update(items)
        return np.stack([self.look(item) for item in items])


def hashing(**more: Any) -> By:
    return By(lambda message: vector(seen(message)), **more)


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v1(tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v2(write_v1(tmp_path_factory.mktemp("v2")))


@pytest.fixture(scope="module")
def hashed(v1: Path, tmp_path_factory: pytest.TempPathFactory) -> SuiteResult:
    return run_suite(hashing(), Suite(v1), tmp_path_factory.mktemp("out"))


def same(one: SuiteResult, other: SuiteResult) -> bool:
    """Equal but for the margins' last bits and the names of the pictures' folders."""
    margins = [[p.margin for task in result.tasks for p in task.predictions] for result in (one, other)]
    rest = [
        [(task.name, task.score, [(p.query, p.correct, p.rank, p.tie) for p in task.predictions]) for task in result.tasks]
        for result in (one, other)
    ]
    return rest[0] == rest[1] and np.allclose(*margins, atol=1e-6)


# --- the six encoders


def test_the_one_that_knows_finds_everything(both: Path, tmp_path: Path) -> None:
    result = run_suite(By(lambda message: vector(about(message))), Suite(both, "mmeb-v2"), tmp_path)
    assert len(result.tasks) == 78 and not result.missing
    wrong = {task.name: task.score.hit for task in result.tasks if task.score.hit < 1}
    assert wrong == {}
    assert all(p.rank == 1 and not p.tie and p.chosen == p.gold and p.margin > TIE for task in result.tasks for p in task.predictions)


def test_a_hash_scores_what_a_loop_over_the_tables_scores(v1: Path, hashed: SuiteResult) -> None:
    def shown(text: str, path: str) -> np.ndarray:
        text = text.replace("<|image_1|>\n", "", 1) if not path else text.replace("<|image_1|>", "", 1)
        return vector((text or "NULL", (((v1 / "images" / path).read_bytes(),) if path else ())))

    for task in hashed.tasks:
        right = []
        for row in pq.read_table(next((v1 / "MMEB-eval" / task.name).iterdir())).to_pylist():
            query = shown(row["qry_text"], row["qry_img_path"])
            pairs = list(zip(row["tgt_text"], row["tgt_img_path"], strict=True))
            gold = float(query @ shown(*pairs[0]))
            right.append(all(gold > float(query @ shown(*pair)) + TIE for pair in set(pairs) - {pairs[0]}))
        assert task.score.hits.tolist() == right, task.name
        assert task.score.n == QUERIES and task.score.invalid == 0
    mean = np.mean([task.score.hit for task in hashed.tasks])
    chance = np.mean([task.score.chance for task in hashed.tasks])
    assert abs(mean - chance) < 0.09 and 0.15 < chance < 0.3


def test_a_constant_gains_nothing(v1: Path, tmp_path: Path) -> None:
    result = run_suite(By(lambda _: vector("one")), Suite(v1), tmp_path)
    assert {task.score.hit for task in result.tasks} == {0.0}
    for task in result.tasks:
        assert task.score.expected == pytest.approx(task.score.chance) and task.score.ties == QUERIES
        assert all(p.margin == 0 and p.tie and p.chosen != p.gold for p in task.predictions)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda v: v * np.nan, r"has NaN or infinite numbers, and 1 of \d+ are unusable"),
        (lambda v: v * np.inf, "has NaN or infinite numbers"),
        (lambda v: v * 0, "has only zeros"),
        (lambda v: v * 3, "has length 3 instead of 1"),
    ],
)
def test_broken_vectors_end_the_run(v1: Path, tmp_path: Path, spoil: Callable[[np.ndarray], np.ndarray], told: str) -> None:
    def look(message: Message) -> np.ndarray:
        found = vector(seen(message))
        return spoil(found) if "What is this bird called?" in message.text else found

    with pytest.raises(EvaluationError, match=f"GQA: the vector of .*bird called.*{told}"):
        run_suite(By(look), Suite(v1), tmp_path, allow_missing=True)
    kept = read_result(tmp_path / "result.json")
    assert [task.name for task in kept.tasks] == list(specs("mmeb-v1"))[:18] and "GQA" in kept.missing


def test_lengths_that_vary_are_refused(v1: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not normalise"):
        run_suite(By(lambda message: vector(seen(message)) * (1 + len(message.text) % 7)), Suite(v1), tmp_path)
    with pytest.raises(EvaluationError, match=r"shape \[\d+, 0\]"):
        run_suite(By(lambda _: np.zeros(0)), Suite(v1), tmp_path)


# --- nothing else decides a score


@pytest.mark.parametrize("shard", [1, 7, 100_000])
def test_the_size_of_shards_changes_nothing(v1: Path, tmp_path: Path, hashed: SuiteResult, shard: int) -> None:
    found = run_suite(hashing(), Suite(v1, names=SOME), tmp_path, shard=shard)
    assert same(found, replace(hashed, tasks=tuple(task for task in hashed.tasks if task.name in SOME)))


def test_the_order_of_candidates_changes_nothing(v1: Path, tmp_path: Path, hashed: SuiteResult) -> None:
    shutil.copytree(v1, tmp_path / "data")
    rng = np.random.default_rng(0)
    for file in (tmp_path / "data" / "MMEB-eval").rglob("*.parquet"):
        rows = pq.read_table(file).to_pylist()
        for row in rows:
            order = [0, *(1 + rng.permutation(len(row["tgt_text"]) - 1))]
            for name in ("tgt_text", "tgt_img_path"):
                row[name] = [row[name][i] for i in order]
        pq.write_table(pa.Table.from_pylist(rows), file)
    found = run_suite(hashing(), Suite(tmp_path / "data"), tmp_path / "out")
    assert same(found, hashed) and found.revision != hashed.revision


def test_every_message_is_encoded_once_and_its_pictures_with_it(both: Path, tmp_path: Path) -> None:
    model, suite = hashing(), Suite(both, "mmeb-v2")
    run_suite(model, suite, tmp_path, shard=50)
    wanted = {message for name in suite.names for task in [suite.task(name)] for message in (*task.queries, *task.pool)}
    assert set(model.counts) == wanted and set(model.counts.values()) == {1}
    uses = sum(len(t.queries) + len(t.pool) for t in map(suite.task, suite.names))
    assert uses > len(wanted) + 50
    calls = Counter(image for call in model.calls for image in {image for message in call for image in pictures_of(message)})
    assert len(model.calls) > 10 and set(calls.values()) == {1}


def work(rank: int, ranks: int, port: int, data: Path, out: Path, fault: bool) -> None:
    os.environ |= {
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
    }  # fmt: skip
    from accelerate import PartialState

    state = PartialState(cpu=True)
    model = By(lambda message: vector(seen(message)) * (np.nan if fault and rank and len(message.text) % 5 == 0 else 1))
    try:
        result = run_suite(model, Suite(data, names=SOME), out, shard=4)
        told = repr([(task.score, task.predictions) for task in result.tasks])
    except EvaluationError as error:
        told = f"EvaluationError {error}"
    (out / f"{rank}.txt").write_text(f"{sum(model.counts.values())}\n{told}", encoding="utf-8")
    state.destroy_process_group()


def spawned(data: Path, out: Path, fault: bool = False) -> list[list[str]]:
    """What each of two processes encoded and told."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["comatch.evaluation.running", "torch.distributed", "pytest"])
    out.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, 2, port, data, out, fault)) for rank in range(2)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=120)
        if one.is_alive():
            one.kill()
    return [(out / f"{rank}.txt").read_text(encoding="utf-8").split("\n", 1) for rank in range(2)]


def test_two_processes_find_what_one_finds(v1: Path, tmp_path: Path) -> None:
    alone = run_suite(hashing(), Suite(v1, names=SOME), tmp_path / "one", shard=4)
    wanted = repr([(task.score, task.predictions) for task in alone.tasks])
    (first, told), (second, also) = spawned(v1, tmp_path / "two")
    assert told == also == wanted
    assert int(first) > 20 and int(second) > 20
    model = hashing()
    run_suite(model, Suite(v1, names=SOME), tmp_path / "three")
    assert int(first) + int(second) == len(model.counts)
    told = [text for _, text in spawned(v1, tmp_path / "fault", fault=True)]
    assert told[0] == told[1] and told[0].startswith("EvaluationError ImageNet-1K: the vector of")


# --- what is kept, and what never is


def test_a_stopped_run_goes_on(v1: Path, tmp_path: Path, hashed: SuiteResult) -> None:
    first = hashing(stop_after=12)
    with pytest.raises(ModelError, match="stopped"):
        run_suite(first, Suite(v1), tmp_path, shard=20)
    done = read_result(tmp_path / "result.json")
    assert 2 < len(done.tasks) < 30 and len(done.tasks) + len(done.missing) == 36
    assert any("Overall" in key for key in summarise(done).withheld) and summarise(done)["Overall"] is None
    second = hashing()
    assert same(run_suite(second, Suite(v1), tmp_path, shard=20), hashed)
    assert not set(first.counts) & set(second.counts)
    assert read_result(tmp_path / "result.json") == hashed == run_suite(hashing(stop_after=0), Suite(v1), tmp_path)


def test_vectors_of_another_model_protocol_or_picture_are_never_taken(v1: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(v1, data)
    first = hashing()
    run_suite(first, Suite(data, names=SOME), out)
    with pytest.raises(EvaluationError, match="is of another model with fingerprint 'f', this run has 'g'; take another folder"):
        run_suite(hashing(fingerprint="g"), Suite(data, names=SOME), out)
    with pytest.raises(EvaluationError, match="protocol 'comatch', this run has 'coma'"):
        run_suite(hashing(), Suite(data, protocol="coma", names=SOME), out)
    (out / "result.json").unlink()
    for other, protocol in ((hashing(fingerprint="g"), "comatch"), (hashing(), "vlm2vec-v2")):
        run_suite(other, Suite(data, protocol=protocol, names=SOME), out)
        assert len(other.counts) == len(first.counts)
        (out / "result.json").unlink()
    picture = next((data / "images" / "CIRR").glob("q-0.*"))
    picture.write_bytes(next((data / "images" / "CIRR").glob("q-1.*")).read_bytes())
    again = hashing()
    run_suite(again, Suite(data, names=SOME), out)
    assert [[image.source for image in pictures_of(message)] for message in again.counts] == [[picture]]


def test_datasets_that_fail_end_the_run_or_are_missing(v1: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(v1, data)
    cut, gone = truncate(data), remove(data)
    with pytest.raises(EvaluationError, match=f"NIGHTS: .*{gone.name}"):
        run_suite(Sighted(), Suite(data), tmp_path / "a")
    (tmp_path / "a").mkdir(exist_ok=True)
    shutil.rmtree(data / "MMEB-eval" / "NIGHTS")
    with pytest.raises(EvaluationError, match=f"CIRR: item .*{cut.name}.* truncated or damaged"):
        run_suite(Sighted(), Suite(data, names=["GQA", "CIRR", "EDIS"]), tmp_path / "a")
    kept = read_result(tmp_path / "a" / "result.json")
    assert [task.name for task in kept.tasks] == ["GQA"]
    with pytest.warns(UserWarning, match=r"left out, so there will be no Overall: (NIGHTS|CIRR)"):
        result = run_suite(Sighted(), Suite(data), tmp_path / "a", allow_missing=True)
    assert result.missing == ("CIRR", "NIGHTS") and len(result.tasks) == 34
    summary = summarise(result)
    assert summary["Overall"] is None and summary["CLS"] is not None and "CIRR" in summary.withheld["Overall"]


class Sighted(By):
    """Decodes its pictures, as a real model does."""

    def __init__(self) -> None:
        super().__init__(lambda message: vector((message.text, [image.load().tobytes() for image in pictures_of(message)])))

    def encode(self, items: list[Message], **_: Any) -> np.ndarray:
        from comatch.errors import ContentError

        for position, item in enumerate(items):
            try:
                self.look(item)
            except ContentError as error:
                raise error.at(position) from error
        return super().encode(items)


# --- graded relevance


def test_ndcg_is_linear_in_relevance_and_never_lucky() -> None:
    rng = np.random.default_rng(3)
    queries, pool = (rng.normal(size=(n, DIM)).astype(np.float32) for n in (40, 12))
    queries, pool = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, pool))
    gold = [rng.choice(12, size=3, replace=False).tolist() for _ in queries]
    grades = [[3.0, 2.0, 1.0]] * 40
    score, verdicts = judge(queries, pool, [range(12)] * 40, gold, grades)
    wanted = []
    for query, right in zip(queries, gold, strict=True):
        order = np.argsort(-(pool @ query))
        gains = [dict(zip(right, (3, 2, 1), strict=True)).get(int(i), 0) / np.log2(place + 2) for place, i in enumerate(order[:5])]
        wanted.append(sum(gains) / (3 + 2 / np.log2(3) + 1 / 2))
    np.testing.assert_allclose(score.ndcgs, wanted, atol=1e-6)
    flat = judge(queries, pool, [range(12)] * 40, gold)[0]
    assert abs(flat.ndcg5 - score.ndcg5) > 1e-3 and flat.hits.tolist() == score.hits.tolist()
    assert [v.rank for v in verdicts] == [
        1 + int(np.argsort(-(pool @ query)).tolist().index(max(right, key=lambda i, q=query: pool[i] @ q)))  # type: ignore[misc]
        for query, right in zip(queries, gold, strict=True)
    ]
    equal = np.repeat(pool[:1], 12, axis=0)
    worst = judge(queries[:1], equal, [range(12)], [[0, 1]], [[1.0, 2.0]])[0]
    assert worst.ndcg5 == 0  # ten rivals stand before both
    alone = judge(queries[:1], equal, [[0, 1]], [[0, 1]], [[1.0, 2.0]])
    assert alone[0].ndcg5 == pytest.approx((1 + 2 / np.log2(3)) / (2 + 1 / np.log2(3))) and alone[1][0].margin == 2
    with pytest.raises(EvaluationError, match="relevance"):
        judge(queries[:1], pool, [range(12)], [[0, 1]], [[1.0, 0.0]])
