"""Encoding does no work twice: equal items, pictures that several items show, pictures decoded ahead; and every vector stays as it was."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from comatch.config import RunConfig
from comatch.content import Image, as_message
from comatch.core.batch import Example
from comatch.data.images import ImageSettings
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ContentError
from comatch.prepare import side_by_side, threads
from comatch.recipes import load_recipe
from comatch.training.loader import Sample
from comatch.training.loop import read_metrics, train
from comatch.training.parcel import Parcel

COMA = load_recipe("coma").with_tokens(4)


@pytest.fixture(scope="module")
def encoder(folder_of: Callable[[str], Path]) -> Encoder:
    return Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA)


def png(number: int, side: int = 112) -> bytes:
    stream = io.BytesIO()
    PILImage.fromarray(scene(4, number).draw()).resize((side, side)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def tower(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pictures of every run of the vision tower from now on."""
    tower, counts = encoder.backbone.vision_tower, list[int]()
    features = tower.forward

    def counting(pixels: torch.Tensor, grid_thw: torch.Tensor, **rest: Any) -> Any:
        counts.append(len(grid_thw))
        return features(pixels, grid_thw, **rest)

    monkeypatch.setattr(tower, "forward", counting)
    return counts


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[Image]:
    """Every picture decoded from now on."""
    seen: list[Image] = []
    cut = ImageSettings.cut

    def counting(self: ImageSettings, image: Image) -> Any:
        seen.append(image)
        return cut(self, image)

    monkeypatch.setattr(ImageSettings, "cut", counting)
    return seen


def test_equal_items_are_encoded_once_and_told(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, cuts: list[Image]) -> None:
    kinds: list[Any] = ["a", png(0), {"image": png(1), "text": "what is it?"}, "b", scene(4, 2).draw()]
    order = [0, 1, 2, 0, 3, 1, 4, 4, 2, 2, 0]
    alone = encoder.encode(kinds)
    cuts.clear()
    ran: list[int] = []
    forward = Encoder.forward

    def counting(self: Encoder, examples: list[Example], *rest: Any) -> torch.Tensor:
        ran.append(len(examples))
        return forward(self, examples, *rest)

    monkeypatch.setattr(Encoder, "forward", counting)
    tally: Counter[str] = Counter()
    done: list[int] = []
    vectors = encoder.encode([kinds[i] for i in order], tally=tally, progress=done.append)
    np.testing.assert_array_equal(vectors, alone[order])
    assert sum(ran) == 5 and len(cuts) == 3 and sum(done) == len(order)
    assert tally == {"items": 11, "distinct_items": 5, "pictures": 7, "distinct_pictures": 3}
    assert np.abs(alone[0] - alone[3]).max() > 1e-3
    encoder.encode([kinds[3]], tally=tally)
    assert tally["items"] == 12, "a tally adds up over calls"


def test_what_only_looks_equal_is_not(encoder: Encoder) -> None:
    tally: Counter[str] = Counter()
    picture = png(0)
    items = ["x", "x ", {"image": picture, "text": "x"}, ["x", picture], picture, png(1)]
    vectors = encoder.encode(items, tally=tally)
    assert tally["distinct_items"] == 6
    distances = 1 - vectors @ vectors.T
    assert distances[~np.eye(6, dtype=bool)].min() > 1e-6


def test_bad_duplicates_are_all_marked(encoder: Encoder) -> None:
    items = ["a", b"no picture", "a", b"no picture", png(0)[:300], png(0)]
    vectors, errors = encoder.encode(items, on_error="mark")
    assert sorted(errors) == [1, 3, 4] and not vectors[[1, 3, 4]].any()
    np.testing.assert_array_equal(vectors[[0, 2, 5]], encoder.encode(["a", "a", png(0)]))
    for workers in (0, 2):
        with pytest.raises(ContentError, match="item 1"):
            encoder.encode([items[0], items[4], items[1]], workers=workers)


def test_questions_about_one_picture_run_the_tower_once(encoder: Encoder, tower: list[int], cuts: list[Image]) -> None:
    pictures = [png(i, side=112 + 28 * (i % 2)) for i in range(4)]
    items: list[Any] = [{"image": pictures[i % 4], "text": f"question {i} " * (1 + i % 3)} for i in range(24)]
    items += ["plain text", {"images": pictures[:2], "text": "which is larger?"}]
    tally: Counter[str] = Counter()
    together = encoder.encode(items, batch_tokens=120, tally=tally)
    assert sum(tower) == len(cuts) == 4 and len(tower) > 1, "once each, in more than one pass"
    assert tally["pictures"] == 26 and tally["distinct_pictures"] == 4
    tower.clear()
    apart = np.concatenate([encoder.encode([item]) for item in items])
    assert sum(tower) == 26
    np.testing.assert_allclose(together, apart, atol=2e-6)
    assert np.abs(apart[0] - apart[1]).max() > 1e-3


def test_a_small_memory_costs_time_and_nothing_else(encoder: Encoder, tower: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"image": png(i % 3), "text": f"question {i}"} for i in range(12)]
    wanted = encoder.encode(items, batch_tokens=60)
    assert sum(tower) == 3
    monkeypatch.setattr("comatch.encoder.MEMORY", 1)
    np.testing.assert_allclose(encoder.encode(items, batch_tokens=60), wanted, atol=2e-6)
    assert sum(tower) > 3 + 3


def test_those_that_share_a_picture_follow_one_another() -> None:
    z = np.zeros(0)

    def example(n: int, *names: bytes) -> Example:
        return Example(np.zeros(n), z, z, z, pictures=names)

    examples = [example(5, b"p"), example(9), example(3), example(8, b"p"), example(7, b"alone"), example(6, b"q"), example(6, b"q", b"p")]
    assert side_by_side(examples) == [2, 5, 6, 4, 0, 3, 1]
    assert side_by_side([example(n) for n in (3, 1, 2, 1)]) == [1, 3, 2, 0], "and without any, the order is by length as it was"


@pytest.mark.parametrize("workers", [0, 1, 3, None])
def test_threads_change_nothing(encoder: Encoder, workers: int | None) -> None:
    items = [png(i) if i % 3 else {"image": png(i), "text": f"text {i}"} for i in range(9)]
    np.testing.assert_array_equal(encoder.encode(items, workers=workers), encoder.encode(items))
    pairs = [(f"i{i}", item) for i, item in enumerate(items)]
    stretches = list(encoder.stream(iter(pairs), chunk=4, workers=workers))
    assert [len(part.ids) for part in stretches] == [4, 4, 1]
    for at, part in zip((0, 4, 8), stretches, strict=True):
        np.testing.assert_array_equal(part.vectors, encoder.encode(items[at : at + 4]))


def test_a_negative_number_of_workers_is_refused(encoder: Encoder) -> None:
    with pytest.raises(ContentError, match="workers is -1"):
        encoder.encode(["a"], workers=-1)


def test_a_stream_decodes_the_next_stretch_while_the_model_runs(
    encoder: Encoder, cuts: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    forward = Encoder.forward

    def looking(self: Encoder, examples: list[Example], *rest: Any) -> torch.Tensor:
        with threads(1) as pool:
            assert pool is not None
            pool.submit(wait_for, 4 * min(3, len(decoded) + 2)).result(timeout=20)
        decoded.append(len(cuts))
        return forward(self, examples, *rest)

    def wait_for(count: int) -> None:
        while len(cuts) < count:
            pass

    monkeypatch.setattr(Encoder, "forward", looking)
    list(encoder.stream(((str(i), png(i)) for i in range(12)), chunk=4, workers=2))
    assert decoded == [8, 12, 12]


def test_an_abandoned_stream_ends_its_threads(encoder: Encoder) -> None:
    stream = encoder.stream(((str(i), png(i)) for i in range(12)), chunk=4, workers=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(stream)


# --- the benchmark for a GPU


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/gpu/encode.py as a module."""
    place = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu" / "encode.py"
    spec = importlib.util.spec_from_file_location("gpu_encode", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec.loader.exec_module(module)
    return module


def test_wrong_vectors_get_no_ratio(script: ModuleType, encoder: Encoder) -> None:
    items = script.make_items("mixed", 4, dry=True)
    right = partial(script.streamed, encoder)
    ways = {"comatch": lambda some: encoder.encode(list(some)), "stream": right, "wrong": lambda some: -right(some)}
    found = script.measure(encoder, ways, items, 1)["ways"]
    assert "ratio" in found["stream"] and "ratio" not in found["wrong"] and found["wrong"]["min_cosine"] < -0.9


# --- the way from a loader worker


def test_a_parcel_opens_to_what_was_packed(encoder: Encoder) -> None:
    items = [png(0), "text", {"images": [png(1), png(2, 84)], "text": "two"}]
    examples = [encoder.preparer.item(as_message(item), encoder.stage) for item in items]
    samples = [Sample(1, "s", (examples[0], examples[1]), 1, (3, 4)), Sample(2, "s", (examples[2], examples[1]), 1)]
    parcel = Parcel.packed(samples)
    assert parcel.patches.dtype == torch.uint8 and len(parcel.patches) == 64 + 64 + 36
    assert all(not example.patches for sample in parcel.samples for example in sample.examples)
    for sample, opened in zip(samples, parcel.opened(), strict=True):
        assert (sample.row, sample.positives, sample.keys) == (opened.row, opened.positives, opened.keys)
        for one, other in zip(sample.examples, opened.examples, strict=True):
            assert one.grids == other.grids and len(one.patches) == len(other.patches)
            assert all(map(np.array_equal, one.patches, other.patches)) and np.array_equal(one.ids, other.ids)
    assert Parcel.packed([]).opened() == []
    texts = Parcel.packed([Sample(3, "s", (examples[1],))]).opened()
    assert texts[0].examples[0].patches == ()


# --- a store in a training run


def config(folder: Path, out: Path, **images: Any) -> RunConfig:
    stage = {"batch": 3, "tokens_per_pass": 300, "optim": {"lr": 0.01}, "log_every": 1, "steps": 3}
    values: dict[str, Any] = {"name": "tiny", "model": str(folder), "recipe": "coma", "tokens": 4, "precision": "fp32", "device": "cpu"}
    values |= {"output": str(out), "stages": {"compress": stage, "match": stage}, "images": images, "adapter": {"r": 4}}
    return RunConfig.model_validate(values | {"data": {"limit": 4}})


def test_a_run_with_a_store_learns_the_same(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder, store = folder_of("qwen2_5_vl"), str(tmp_path / "store")
    runs = {"plain": {}, "cold": {"store": store}, "warm": {"store": store}}
    losses = {}
    for name, images in runs.items():
        rows = read_metrics(train(config(folder, tmp_path / name, **images), quiet=True) / "metrics.jsonl")
        losses[name] = [row["loss"] for row in rows if "loss" in row]
    assert losses["cold"] == losses["warm"], "to the bit, however much of it was stored before"
    np.testing.assert_allclose(losses["plain"], losses["cold"], rtol=1e-4)
    assert len(list((tmp_path / "store").rglob("*.features"))) == 4, "one entry a picture, over all epochs and both stages"
    cold, warm = (Encoder.load(tmp_path / name).encode([scene(5, 0).draw()]) for name in ("cold", "warm"))
    np.testing.assert_array_equal(cold, warm)


def test_a_store_beside_a_tower_that_trains_is_refused(tmp_path: Path) -> None:
    values = config(tmp_path, tmp_path).model_dump()
    with pytest.raises(ValueError, match=r"images\.store is 's'.*train_vision"):
        RunConfig.model_validate(values | {"images": {"store": "s"}, "adapter": {"train_vision": True}})
    with pytest.raises(ValueError, match=r"store_gigabytes is 5.* no effect without a store"):
        RunConfig.model_validate(values | {"images": {"store_gigabytes": 5.0}})
