"""The store of vision features: stored = computed, a change of weights or settings finds nothing old, damage is computed again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from store_writer import CPU, filled, on_disk, work

from comatch.backbones.base import Backbone, Vision
from comatch.backbones.store import Memory, recall
from comatch.content import as_message
from comatch.core.batch import Batch
from comatch.core.packing import collate
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ModelError
from comatch.recipes import load_recipe

COMA = load_recipe("coma").with_tokens(4)
GB = 2**30


@pytest.fixture
def encoder(folder_of: Callable[[str], Path]) -> Encoder:
    return Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA)


def batch_of(encoder: Encoder, *numbers: int) -> Batch:
    """A batch of drawn scenes, every picture with its name."""
    encoder.preparer.named = True
    return collate([encoder.preparer.item(as_message(scene(3, i).draw()), encoder.stage) for i in numbers])


def ran(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pictures of every run of the vision tower from now on."""
    tower, counts = backbone.vision_tower, list[int]()
    features = tower.forward

    def counting(pixels: torch.Tensor, grid_thw: torch.Tensor, **rest: Any) -> Any:
        counts.append(len(grid_thw))
        return features(pixels, grid_thw, **rest)

    monkeypatch.setattr(tower, "forward", counting)
    return counts


def seen(backbone: Backbone, batch: Batch) -> Vision:
    with torch.no_grad():
        vision = backbone.see(batch)
    assert vision is not None
    return vision


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_stored_is_computed_to_the_bit_in_the_models_dtype(
    folder_of: Callable[[str], Path], family: str, low: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.load(folder_of(family), recipe=COMA, dtype=low)
    batch, backbone = batch_of(encoder, 0, 1), encoder.backbone
    plain = seen(backbone, batch)
    counts, store = ran(backbone, monkeypatch), encoder.keep_features(tmp_path, max_bytes=GB)
    cold, warm = seen(backbone, batch), seen(backbone, batch)
    assert counts == [2] and store.counts == {"miss": 2, "written": 2, "hit": 2}
    for vision in (cold, warm):
        assert vision.tokens.dtype == plain.tokens.dtype and torch.equal(vision.tokens, plain.tokens)
        assert len(vision.deep) == len(plain.deep) and all(map(torch.equal, vision.deep, plain.deep))
    assert bool(plain.deep) == (family == "qwen3_vl"), "the case of several layers is among them"
    other = seen(backbone, batch_of(encoder, 1, 0))
    assert counts == [2] and not torch.equal(other.tokens, plain.tokens), "another order is other features, from the same entries"
    assert torch.equal(other.tokens.roll(len(other.tokens) // 2, 0), plain.tokens)


def test_bf16_is_within_its_rounding_and_a_cold_store_gives_what_a_warm_one_does(encoder: Encoder, tmp_path: Path) -> None:
    batch, backbone = batch_of(encoder, 0, 1, 2), encoder.backbone
    plain = seen(backbone, batch).tokens
    store = backbone.keep_features(tmp_path, max_bytes=GB, dtype=torch.bfloat16)
    cold, warm = seen(backbone, batch).tokens, seen(backbone, batch).tokens
    assert store.counts["hit"] == 3 and torch.equal(cold, warm)
    assert torch.equal(cold, plain.bfloat16()) and not torch.equal(cold.float(), plain)
    torch.testing.assert_close(cold.float(), plain, rtol=2**-8, atol=0)


def test_equal_pictures_run_once_and_get_equal_gradients(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing inside a batch holds for a tower that trains, too."""
    batch, backbone = batch_of(encoder, 0, 1, 0), encoder.backbone
    weight = backbone.vision_tower.merger.mlp[0].weight
    apart = collate([encoder.preparer.item(as_message(scene(3, i).draw()), encoder.stage) for i in (0, 1, 0)])
    object.__setattr__(apart, "pictures", ())
    counts, found = ran(backbone, monkeypatch), []
    for one in (batch, apart):
        vision = backbone.see(one)
        assert vision is not None
        (gradient,) = torch.autograd.grad((vision.tokens * torch.arange(len(vision.tokens)).unsqueeze(1)).sum(), weight)
        found.append((vision.tokens.detach(), gradient))
    assert counts == [2, 3]
    for shared, single in zip(*found, strict=True):
        torch.testing.assert_close(shared, single, rtol=1e-4, atol=1e-4)
    assert found[0][1].abs().max() > 0.1


def test_changed_weights_find_nothing_old(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, backbone = batch_of(encoder, 0), encoder.backbone
    store, counts = encoder.keep_features(tmp_path, max_bytes=GB), ran(backbone, monkeypatch)
    before = seen(backbone, batch).tokens
    weight, name = backbone.vision_tower.merger.mlp[0].weight, store.tower
    with torch.no_grad():
        weight.mul_(2)
    after = seen(backbone, batch).tokens
    assert counts == [1, 1] and store.tower != name and not torch.equal(before, after)
    with torch.no_grad():
        weight.div_(2)
    assert torch.equal(seen(backbone, batch).tokens, before) and counts == [1, 1], "the old weights find the old entry"
    backbone.text.layers[0].mlp.up_proj.weight.data.mul_(2)
    assert store.tower == name, "the language model has no part in it"


@pytest.mark.parametrize("change", ["image_std", "autocast", "dtype"])
def test_changed_settings_find_nothing_old(encoder: Encoder, change: str, tmp_path: Path) -> None:
    backbone = encoder.backbone
    store = backbone.keep_features(tmp_path, max_bytes=GB)
    name = store.tower
    assert backbone.keep_features(tmp_path, max_bytes=1).tower == name
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast"):
        if change == "image_std":
            backbone.processor.image_std = [0.5, 0.5, 0.5]
        low = torch.bfloat16 if change == "dtype" else None
        assert backbone.keep_features(tmp_path, max_bytes=GB, dtype=low).tower != name


def test_a_picture_read_otherwise_has_another_name(encoder: Encoder) -> None:
    """Image settings need no place of their own in the key: what they change is in the pixels or the grid."""
    picture = as_message(scene(3, 0).draw()).images[0]
    names = {encoder.preparer.cut(picture, named=True).name for _ in range(2)}
    encoder.preparer.images = encoder.images.limited(784, 784)
    names.add(encoder.preparer.cut(picture, named=True).name)
    assert len(names) == 2 and encoder.preparer.cut(picture).name == b""


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foreign"])
def test_a_damaged_entry_is_found_counted_and_computed_again(encoder: Encoder, damage: str, tmp_path: Path) -> None:
    batch, backbone = batch_of(encoder, 0, 1), encoder.backbone
    store = encoder.keep_features(tmp_path, max_bytes=GB)
    plain = seen(backbone, batch).tokens
    first, second = sorted(tmp_path.rglob("*.features"))
    data = bytearray(first.read_bytes())
    data[-3] ^= 1
    content = {"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b"", "foreign": second.read_bytes()[1:]}
    first.write_bytes(content[damage])
    with pytest.warns(UserWarning, match="damaged"):
        again = seen(backbone, batch).tokens
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    assert (store.counts["corrupt"], store.counts["hit"], store.counts["written"]) == (1, 1, 3)
    assert torch.equal(seen(backbone, batch).tokens, again) and store.counts["hit"] == 3


def test_the_bound_holds_and_the_last_used_stay(tmp_path: Path) -> None:
    store, value = filled(tmp_path, 1000, max_bytes=50_000, dtype=None)
    for i in range(40):
        store.put(b"%d" % i, value(i))
        if i:  # used again and again, so it must outlive all others
            for path in tmp_path.rglob("*.features"):
                os.utime(path, (1, 1))
            assert b"0" in store.get([b"0"], CPU), i
        assert on_disk(tmp_path) <= 50_000
    assert store.counts["deleted"] > 20 and on_disk(tmp_path) > 30_000
    assert torch.equal(store.get([b"0"], CPU)[b"0"], value(0))
    other, _ = filled(tmp_path, 1000, max_bytes=10_000, dtype=None)
    assert on_disk(tmp_path) <= 10_000 and other.counts["deleted"] > 0, "a store of another process is trimmed when it is opened"


def test_what_cannot_be_stored_is_counted_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, value = filled(tmp_path, 1000, max_bytes=1000, dtype=None)
    with pytest.warns(UserWarning, match="max_bytes=1,000"):
        assert torch.equal(store.put(b"a", value(1)), value(1))
    store, value = filled(tmp_path, 10, max_bytes=10_000, dtype=None)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        store.put(b"a", value(1))
    assert store.counts == {"unwritten": 1} and not on_disk(tmp_path)


def test_a_store_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="max_bytes=0"):
        filled(tmp_path, 1, max_bytes=0)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="cannot be made"):
        filled(tmp_path / "file", 1)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    workers = [context.Process(target=work, args=(tmp_path, seed, 250, answers)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    told = [answers.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    for wrong, counts, size in told:
        assert wrong == 0 and counts["written"] > 10 and counts["hit"] > 10 and counts["deleted"] > 0
        assert counts.get("corrupt", 0) == counts.get("unwritten", 0) == 0
        assert size <= 300_000 * (1 + 2 / 16)
    assert not list(tmp_path.rglob("*.part"))


def test_a_tower_that_trains_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    batch = batch_of(encoder, 0)
    encoder.keep_features(tmp_path, max_bytes=GB)
    with pytest.raises(ModelError, match="the vision tower trains"):
        encoder.backbone.see(batch)
    encoder.backbone.vision_tower.requires_grad_(False)
    vision = encoder.backbone.see(batch)
    assert vision is not None and not vision.tokens.requires_grad


def test_encode_takes_features_from_the_store(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [scene(3, i).draw() for i in range(4)]
    plain, name = encoder.encode(items), encoder.fingerprint
    counts = ran(encoder.backbone, monkeypatch)
    encoder.keep_features(tmp_path, max_bytes=GB)
    assert np.array_equal(encoder.encode(items), plain) and sum(counts) == 4
    assert np.array_equal(encoder.encode(items), plain) and sum(counts) == 4
    assert encoder.fingerprint == name


def test_memory_keeps_the_last_used_up_to_its_bound() -> None:
    memory = Memory(1000)
    for i in range(5):
        memory.put(b"%d" % i, torch.full((1, 100, 1), float(i)))
        assert memory.get([b"0"], CPU) or i > 3
    assert memory.bytes <= 1000 and set(memory.get([b"%d" % i for i in range(5)], CPU)) == {b"0", b"4"}


def test_recall_asks_in_order_and_fills_what_lacked() -> None:
    near, far = Memory(GB), Memory(GB)
    far.put(b"b", torch.tensor([2.0]))
    asked: list[list[int]] = []

    def compute(places: Any) -> list[torch.Tensor]:
        asked.append(list(places))
        return [torch.tensor([10.0 + place]) for place in places]

    keys = [b"a", b"b", b"", b"a", b""]
    found = recall(keys, [near, far], CPU, compute)
    assert [found[i].item() for i in range(5)] == [10, 2, 12, 10, 14] and asked == [[0, 2, 4]]
    assert set(near.get([b"a", b"b"], CPU)) == set(far.get([b"a", b"b"], CPU)) == {b"a", b"b"}
    recall(keys, [near], CPU, compute)
    assert asked[1:] == [[2, 4]], "only pictures without a name are computed again"
