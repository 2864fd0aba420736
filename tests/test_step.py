"""The contrastive step on one process: cached is one big batch, under any budget; what is shared, skipped, refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from matching import LOSS, MATCH, Folders, assert_equal, gradients, load, one_big_batch, run, samples

from comatch.config import StageRun
from comatch.core.packing import Size, best_fit, greedy
from comatch.encoder import Encoder
from comatch.errors import ConfigError, RecipeError, TrainingError
from comatch.objectives.temperature import Temperature
from comatch.training.loader import Sample
from comatch.training.passes import Pass, plan_passes
from comatch.training.step import StepResult, contrastive_step


def flat(some: Sequence[Sample]) -> list[Any]:
    return [example for sample in some for example in sample.examples]


def plan(encoder: Encoder, examples: list[Any], tokens: int, patches: int | None = None) -> list[Pass]:
    return plan_passes(Accelerator(cpu=True), encoder.backbone, examples, tokens, patches)


def step(encoder: Encoder, some: list[Sample], how: StageRun, seed: int = 5, **more: Any) -> tuple[StepResult, dict[str, torch.Tensor]]:
    result = contrastive_step(Accelerator(cpu=True), encoder.backbone, some, MATCH, how, seed=seed, **more)
    return result, gradients(encoder)


WAYS = {
    "one pass": {},
    "many passes": {"tokens": 60},
    "few patches": {"patches_per_pass": 20},
    "kept": {"tokens": 60, "keep_passes": 3},
    "all kept": {"tokens": 60, "keep_passes": 99},
}


@pytest.mark.parametrize(("kind", "vision"), [("lora", False), ("full", True)], ids=["lora", "full"])
def test_cached_is_one_big_batch(folder_of: Folders, family: str, kind: str, vision: bool) -> None:
    encoder = load(folder_of(family), kind, vision=vision)
    some = samples(encoder)
    assert {len(s.examples) for s in some} == {2, 3, 4} and len({k for s in some for k in s.keys}) < sum(len(s.keys) for s in some)
    want, expected = one_big_batch(encoder, some, run().loss)
    assert any(".visual." in name for name in expected) == vision
    for name, how in WAYS.items():
        passes = plan(encoder, flat(some), run(**how).tokens_per_pass, run(**how).patches_per_pass)
        assert (len(passes) == 1) == (name == "one pass")
        result, found = step(encoder, some, run(**how))
        assert abs(result.loss - want) < 1e-5, name
        assert_equal(found, expected)
    others, _ = one_big_batch(encoder, [some[0], *some[2:]], run().loss)
    assert abs(others - want) > 1e-3, "a batch with other items must have another loss"


def test_dropout_is_replayed(folder_of: Folders) -> None:
    encoder = load(folder_of("qwen2_5_vl"), dropout=0.3)
    some = samples(encoder)
    plain, expected = step(encoder, some, run(60, keep_passes=99))  # every graph kept: nothing is cached
    cached, found = step(encoder, some, run(60))
    assert cached.loss == plain.loss and cached.repeated == 0
    assert_equal(found, expected, 1e-6)
    other, elsewhere = step(encoder, some, run(60), seed=6)
    assert other.loss != plain.loss
    with pytest.raises(AssertionError):
        assert_equal(elsewhere, expected, 1e-2)


def test_equal_items_are_encoded_once(folder_of: Folders) -> None:
    encoder = load(folder_of("qwen2_5_vl"))
    some = samples(encoder)
    items = sum(len(s.examples) for s in some)
    distinct = len({key for s in some for key in s.keys})
    unmasked = run(60, loss=LOSS | {"mask_duplicates": False})
    result, found = step(encoder, some, unmasked)
    assert result.repeated == pytest.approx(1 - distinct / items) and distinct < items
    alone, expected = step(encoder, [replace(s, keys=()) for s in some], unmasked)
    assert alone.repeated == 0
    assert abs(result.loss - alone.loss) < 1e-5
    assert_equal(found, expected)


def test_the_frozen_tower_runs_once_a_picture_and_a_trained_one_twice(folder_of: Folders) -> None:
    counts = {}
    for kind, vision in (("lora", False), ("full", True)):
        encoder = load(folder_of("qwen2_5_vl"), kind, vision=vision)
        some = samples(encoder)
        seen = []
        encoder.backbone.vision_tower.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        step(encoder, some, run(60))
        pictures = sum(len(part.batch.grids) > 0 for part in plan(encoder, flat(some), 60))
        assert pictures > 1
        counts[kind] = len(seen) / pictures
    assert counts == {"lora": 1, "full": 2}


def test_kept_passes_run_once(folder_of: Folders) -> None:
    encoder = load(folder_of("qwen2_5_vl"))
    some = samples(encoder)
    found = {}
    for keep in (1, 2, 99):
        calls: list[int] = []
        handle = encoder.backbone.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        step(encoder, some, run(60, keep_passes=keep))
        handle.remove()
        found[keep] = len(calls)
    passes = found[99]
    assert passes > 3
    assert found == {1: 2 * passes - 1, 2: 2 * passes - 2, 99: passes}


def test_passes_part_texts_from_pictures_within_budgets(folder_of: Folders) -> None:
    encoder = load(folder_of("qwen2_5_vl"))
    examples = flat(samples(encoder, 8))
    planned = plan(encoder, examples, 100, 60)
    assert sorted(i for p in planned for i in p.members) == list(range(len(examples)))
    kinds = [{bool(examples[i].grids) for i in p.members} for p in planned]
    pictures = kinds.count({True})
    assert kinds == [{True}] * pictures + [{False}] * (len(kinds) - pictures) and 0 < pictures < len(kinds)
    for kind in (True, False):
        sizes = [Size.of(e) for e in examples if bool(e.grids) == kind]
        assert kinds.count({kind}) == len(best_fit(sizes, Size(100, 60)).groups) <= len(greedy(sizes, Size(100, 60)).groups)
    for p in planned:
        assert len(p.members) == 1 or (p.batch.tokens <= 100 and len(p.batch.patches) <= 60)
    assert len(plan(encoder, examples, 100_000)) == 1


def test_a_learned_temperature_gets_its_gradient(folder_of: Folders) -> None:
    encoder = load(folder_of("qwen2_5_vl"))
    some = samples(encoder)
    how = run(60, loss=LOSS | {"learn_temperature": True})
    module = Temperature(how.loss)
    result, _ = step(encoder, some, how, temperature=module)
    assert result.temperature == pytest.approx(0.1) and module.log is not None and module.log.grad is not None
    losses = []
    for sign in (1, -1):
        there = run(60, loss=LOSS | {"temperature": 0.1 * float(np.exp(sign * 0.01))})
        losses.append(step(encoder, some, there)[0].loss)
    assert float(module.log.grad) == pytest.approx((losses[0] - losses[1]) / 0.02, rel=1e-2)
    with pytest.raises(ConfigError, match="got none to train"):
        step(encoder, some, how)


def test_a_guide_masks_what_it_holds_for_equal(folder_of: Folders) -> None:
    encoder = load(folder_of("qwen2_5_vl"))
    some = samples(encoder)
    items = sum(len(s.examples) for s in some)
    guide = torch.nn.functional.normalize(torch.randn(items, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    plain = step(encoder, some, run())[0].loss
    guided = step(encoder, some, run(), guide=guide)[0].loss
    alike = step(encoder, some, run(loss=LOSS | {"mask_margin": -0.1}), guide=torch.ones(items, 1))[0].loss
    assert guided < plain, "fewer negatives, smaller loss"
    assert alike == 0, "where every candidate is masked, nothing is left to tell apart"


def test_what_cannot_be_matched_is_refused(folder_of: Folders) -> None:
    encoder = load(folder_of("qwen2_5_vl"))
    some = samples(encoder)
    with pytest.raises(TrainingError, match=r"rows \[2\] have no positive"):
        step(encoder, [*some[:2], replace(some[2], positives=0), *some[3:]], run())
    with pytest.raises(RecipeError, match=r"4 compression tokens do not make 3 vectors of equally many; allowed: \[1, 2, 4\]"):
        step(encoder, some, run(loss={"vectors": [1, 3]}))
    with pytest.raises(ConfigError, match=r"loss.dims \[32\]"):
        step(encoder, some, run(loss={"dims": [32]}))
    encoder.backbone.rows.data[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="vectors became NaN"):
        step(encoder, some, run())
    assert not gradients(encoder)


def test_a_rank_without_pictures_gets_one_that_counts_nothing(folder_of: Folders) -> None:
    encoder = load(folder_of("qwen2_5_vl"), "full", vision=True)
    texts = [example for example in flat(samples(encoder)) if not example.grids]
    several: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    for tokens in (60, 100_000):
        first, *rest = plan_passes(several, encoder.backbone, texts, tokens)
        assert first.members == [] and first.batch.grids.tolist() == [[1, 2, 2]]
        assert sorted(i for part in rest for i in part.members) == list(range(len(texts)))
        assert all(part.members for part in plan(encoder, texts, tokens)), "alone, no rank waits"
    assert all(part.members for part in plan_passes(several, load(folder_of("qwen2_5_vl")).backbone, texts, 60)), "nor for a frozen tower"
