"""The exact index equals a plain loop, and survives everything that can happen to its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from comatch.errors import SearchError
from comatch.search.index import Index
from comatch.search.store import Store

DIM = 16


def unit(n: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(n, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def filled(path: Path, n: int = 50) -> Index:
    index = Index.create(path, "fp-a", DIM, prompt="find: ")
    index.add(
        [f"r{i}" for i in range(n)], unit(n), [{"text": f"row {i}", "digest": f"d{i}"} for i in range(n)]
    )
    return index


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with filled(tmp_path / "index") as made:
        yield made


def test_search_equals_a_plain_loop(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, queries = unit(50), unit(5, seed=1)
    monkeypatch.setattr("comatch.search.index._ROW_BLOCK", 7)
    monkeypatch.setattr("comatch.search.index._QUERY_BLOCK", 2)
    for query, hits in zip(queries, index.search_many(queries, k=6), strict=True):
        scores = [float(np.dot(query, v)) for v in vectors]
        order = sorted(range(50), key=lambda i: -scores[i])
        assert [h.id for h in hits] == [f"r{i}" for i in order[:6]]
        assert [h.rank for h in hits] == [1, 2, 3, 4, 5, 6]
        for rank, hit in enumerate(hits):
            assert hit.score == pytest.approx(scores[order[rank]], abs=1e-6)
            assert hit.margin == pytest.approx(scores[order[rank]] - scores[order[rank + 1]], abs=1e-6)
            assert hit.percentile == pytest.approx(100 * (50 - 1 - rank) / 50)
            assert json.dumps([hit.score, hit.margin]) == json.dumps([round(hit.score, 6), round(hit.margin or 0, 6)]), "float noise"
            assert hit.row["text"] == f"row {order[rank]}"
    assert len({tuple(h.id for h in hits) for hits in index.search_many(queries)}) > 1, (
        "all queries found the same"
    )


def test_k_larger_than_the_index_returns_what_exists(index: Index, tmp_path: Path) -> None:
    hits = index.search(unit(1, seed=2), k=1000)
    assert len(hits) == 50 and hits[-1].margin is None and hits[-1].percentile == 0
    assert Index.create(tmp_path / "empty", "fp", DIM).search(unit(1)) == []


def test_equal_vectors_come_in_order_of_arrival(tmp_path: Path) -> None:
    index = Index.create(tmp_path / "i", "fp", DIM)
    index.add(["b", "a", "c"], np.repeat(unit(1), 3, axis=0))
    hits = index.search(unit(1), k=2)
    assert [h.id for h in hits] == ["b", "a"] and hits[0].margin == 0 and hits[0].percentile == 0


def test_adding_an_id_again_replaces_it(index: Index) -> None:
    new = unit(1, seed=9)
    index.add(["r3"], new, [{"text": "new"}])
    assert len(index) == 50 and index.get("r3")["text"] == "new"
    assert index.search(new, k=1)[0].id == "r3"
    assert "r3" not in [h.id for h in index.search(unit(50)[3], k=1)], "the old vector is still found"
    np.testing.assert_array_equal(index.vectors(["r3"]), new)
    again = Index.open(index._store.folder)
    assert len(again) == 50 and again.get("r3")["text"] == "new"


def test_deleted_rows_never_come_back_and_leave_the_disk(index: Index, tmp_path: Path) -> None:
    index.delete(["r7"])
    for reopened in (index, Index.open(tmp_path / "index")):
        assert "r7" not in [h.id for h in reopened.search(unit(50)[7], k=50)] and len(reopened) == 49
    assert index.stats()["dead"] == 1
    index.delete([f"r{i}" for i in range(20, 50)])
    assert index.stats()["dead"] == 0 and index.stats()["generation"] == 1, "half dead, and not compacted"
    assert index.stats()["bytes"] < 19 * (DIM * 4 + 80)
    np.testing.assert_array_equal(index.vectors(["r0", "r19"]), unit(50)[[0, 19]])
    np.testing.assert_array_equal(Index.open(tmp_path / "index").vectors(["r8"]), unit(50)[[8]])
    with pytest.raises(SearchError, match="r7"):
        index.delete(["r7"])


def test_many_batches_equal_one(index: Index, tmp_path: Path) -> None:
    parts = Index.create(tmp_path / "parts", "fp-a", DIM)
    for i in range(0, 50, 8):
        ids = [f"r{j}" for j in range(i, min(i + 8, 50))]
        parts.add(ids, unit(50)[i : i + 8], [dict(index.get(j)) for j in ids])
    assert parts.search_many(unit(3, 4), k=9) == index.search_many(unit(3, 4), k=9)
    assert list(parts) == list(index)


def test_known_digests_need_no_encoding(index: Index) -> None:
    assert index.known(["d1", "d49", "new"]) == {"d1": "r1", "d49": "r49"}
    index.delete(["r1"])
    assert index.known(["d1"]) == {}


@pytest.mark.parametrize(
    "given", [{"fingerprint": "fp-b"}, {"dim": 8}, {"prompt": "other"}], ids=["fingerprint", "dim", "prompt"]
)
def test_another_encoder_is_refused_with_both_names(index: Index, given: dict[str, object]) -> None:
    (key, value), folder = next(iter(given.items())), index._store.folder
    with pytest.raises(SearchError) as caught:
        Index.open(folder, **given)  # type: ignore[arg-type]
    own = {"fingerprint": "fp-a", "dim": DIM, "prompt": "find: "}[key]
    assert repr(value) in str(caught.value) and repr(own) in str(caught.value)
    assert len(Index.open(folder, fingerprint="fp-a", dim=DIM, prompt="find: ")) == 50


@pytest.mark.parametrize("fault", ["nan", "inf", "zero", "long"])
def test_broken_vectors_are_neither_stored_nor_searched(index: Index, fault: str) -> None:
    vectors = unit(3, seed=5)
    vectors[1] = {"nan": np.nan, "inf": np.inf, "zero": 0, "long": 2 * vectors[1]}[fault]
    for call in (lambda: index.add(["x", "y", "z"], vectors), lambda: index.search_many(vectors)):
        with pytest.raises(SearchError, match=r"(vector|query) 1 has length"):
            call()
    assert len(index) == 50 == len(Index.open(index._store.folder))


def test_wrong_calls_are_refused(index: Index, tmp_path: Path) -> None:
    for k in (0, -1):
        with pytest.raises(SearchError, match=f"k is {k}"):
            index.search(unit(1), k=k)
    with pytest.raises(SearchError, match=r"\[n, 16\]"):
        index.search(np.ones(3) / np.sqrt(3))
    with pytest.raises(SearchError, match="search_many"):
        index.search(unit(2))
    with pytest.raises(SearchError, match="'a'"):
        index.add(["a", "a"], unit(2))
    with pytest.raises(SearchError, match="must be equal"):
        index.add(["a"], unit(2))
    with pytest.raises(SearchError, match="JSON"):
        index.add(["a"], unit(1), [{"text": object()}])
    with pytest.raises(SearchError, match="already holds an index"):
        Index.create(tmp_path / "index", "fp", DIM)
    with pytest.raises(SearchError, match="comatch index"):
        Index.open(tmp_path / "nothing")
    with pytest.raises(SearchError, match="'q'"):
        index.get("q")
    assert len(Index.open(tmp_path / "index")) == 50


@pytest.mark.parametrize("step", ["vectors", "rows", "manifest"])
def test_a_killed_write_leaves_the_index_as_it_was(
    index: Index, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = index._store.folder
    real, calls = os.fsync, {"left": ["vectors", "rows", "manifest"].index(step)}

    def full(descriptor: int) -> None:
        if calls["left"] == 0:
            raise OSError(28, "No space left on device")
        calls["left"] -= 1
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SearchError, match="No space left"):
        index.add(["new"], unit(1, seed=3))
    monkeypatch.undo()
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", "lock", "rows.0.jsonl", "vectors.0.f32"]
    assert len(index) == 50 and "new" not in Index.open(folder)
    index.add(["later"], unit(1, seed=4))
    assert Index.open(folder).search(unit(1, seed=4), k=1)[0].id == "later"
    assert len(Index.open(folder)) == 51


def test_two_writers_take_turns(index: Index) -> None:
    other = Index.open(index._store.folder)
    other.add(["from other"], unit(1, seed=6))
    index.add(["from one"], unit(1, seed=7))
    other.delete(["from other"])
    for seen in (other, Index.open(index._store.folder)):
        assert "from one" in seen and "from other" not in seen and len(seen) == 51
        assert seen.search(unit(1, seed=7), k=1)[0].id == "from one"


def test_sigkill_while_writing_never_tears_a_batch(tmp_path: Path) -> None:
    script = f"""
import numpy as np, sys
from comatch.search.index import Index
index = Index.create({str(tmp_path / "k")!r}, "fp", {DIM})
print("ready", flush=True)
for batch in range(100000):
    index.add([f"{{batch}}-{{i}}" for i in range(20)], np.eye({DIM})[np.arange(20) % {DIM}])
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.kill()
    index = Index.open(tmp_path / "k")
    assert len(index) > 0 and len(index) % 20 == 0
    index.add(["after"], unit(1))
    assert "after" in Index.open(tmp_path / "k")


@pytest.mark.parametrize("name", ["vectors.0.f32", "rows.0.jsonl", "index.json"])
def test_a_damaged_file_is_named(index: Index, name: str) -> None:
    path = index._store.folder / name
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SearchError, match=name):
        Index.open(index._store.folder)


def test_an_index_of_another_format_is_refused(index: Index) -> None:
    path = index._store.folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(SearchError, match="format 1"):
        Index.open(index._store.folder)


def test_reading_while_another_process_compacts(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real, raced = index._store.folder, Store.records, []

    def records(store: Store) -> object:
        if not raced:
            raced.append(True)
            index.compact()
        return real(store)

    monkeypatch.setattr(Store, "records", records)
    # The reader has seen the old manifest when the files are swapped.
    reader = Index.open(folder)
    assert raced and len(reader) == 50
