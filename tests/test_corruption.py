"""What is hidden of a row: the right share, the right tokens, whole visual tokens, and the same for every worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comatch.content import Message, Text, as_message
from comatch.core.batch import IGNORE, ROLE_ID, Example
from comatch.core.corruption import Hiding, corrupt
from comatch.data.images import ImageSettings
from comatch.data.mixture import Ingredient, Mixture
from comatch.data.scenes import scene
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import ContentError, RecipeError
from comatch.recipe import Corruption, Stage, Visibility
from comatch.recipes import load_recipe
from comatch.training.loader import Quarantine, Sample, StageData, batches

COCOA = load_recipe("cocoa")
WARMUP, BRIDGE, _ = COCOA.stages
CAPTION = Message((Text("a large red circle, a small blue square and <|im_end|> nothing else"),))


@pytest.fixture(scope="module")
def encoder(folder_of: Callable[[str], Path]) -> Encoder:
    return Encoder.load(folder_of("qwen2_5_vl"), recipe=COCOA)


def pair(encoder: Encoder, stage: Stage, seed: int = 0, picture: int = 0) -> Example:
    return encoder.preparer.pair(as_message(scene(0, picture).draw()), CAPTION, stage, seed)


def plain(encoder: Encoder, stage: Stage) -> Example:
    """The same row with nothing hidden."""
    return encoder.preparer.finish(encoder.preparer.renderer.pair(as_message(scene(0, 0).draw()), CAPTION, stage))


def hidden(encoder: Encoder, example: Example) -> np.ndarray:
    return example.ids == encoder.preparer.renderer.mask


def only(role: str, **values: Any) -> tuple[Corruption, ...]:
    return (Corruption(role, **values),)


@pytest.mark.parametrize("stage", [WARMUP, BRIDGE], ids=lambda s: s.name)
def test_rates_and_what_is_protected(encoder: Encoder, stage: Stage) -> None:
    whole, role = plain(encoder, stage), stage.corruptions[0].role
    drawn = [pair(encoder, stage, seed) for seed in range(300)]
    words = (whole.roles == ROLE_ID[role]) & (whole.ids < encoder.backbone.tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    assert words.sum() > 10 and not words[0]
    share = np.mean([hidden(encoder, e)[words].mean() for e in drawn])
    assert abs(share - stage.corruptions[0].text) < 0.02
    ever = np.any([hidden(encoder, e) for e in drawn], axis=0)
    assert np.array_equal(ever, words), "every word of the role and no special, vision or compression token is hidden some time"
    for e in drawn:
        masked = hidden(encoder, e)
        assert np.array_equal(e.ids[~masked], whole.ids[~masked]) and np.array_equal(e.positions, whole.positions)


@pytest.mark.parametrize("shift", [0, 1])
def test_the_label_at_one_place_before_is_the_token(encoder: Encoder, shift: int) -> None:
    stage = replace(BRIDGE, shift=shift)
    whole = plain(encoder, stage)
    for seed in range(20):
        example = pair(encoder, stage, seed)
        masked = hidden(encoder, example).nonzero()[0]
        assert np.array_equal((example.labels != IGNORE).nonzero()[0], masked - shift)
        assert np.array_equal(example.labels[masked - shift], whole.ids[masked])


def test_the_bridge_predicts_the_first_target_token(encoder: Encoder) -> None:
    every = replace(BRIDGE, corruptions=only("target", text=1.0))
    example, whole = pair(encoder, every), plain(encoder, BRIDGE)
    bridge, first = (example.roles == ROLE_ID["compression"]).nonzero()[0], (example.roles == ROLE_ID["target"]).nonzero()[0][0]
    assert len(bridge) == 1 and bridge[0] == first - 1
    assert example.labels[bridge[0]] == whole.ids[first] and example.ids[first] == encoder.preparer.renderer.mask
    assert example.supervised == (example.roles == ROLE_ID["target"]).sum()


def test_at_least_one_and_the_case_where_nothing_can_be_hidden(encoder: Encoder) -> None:
    rare = replace(WARMUP, corruptions=only("context", text=1e-9, patches=0.5))
    found = [hidden(encoder, pair(encoder, rare, seed)) for seed in range(40)]
    assert all(one.sum() == 1 for one in found) and len({int(one.argmax()) for one in found}) > 5
    loose = replace(WARMUP, corruptions=only("context", text=1e-9, patches=0.5, at_least_one=False))
    assert not any(hidden(encoder, pair(encoder, loose, seed)).any() for seed in range(40))
    picture = as_message(scene(0, 0).draw())
    bare = encoder.preparer.pair(picture, picture, WARMUP, 0)
    assert (bare.untouched, bare.supervised) == (1, 0) and len(bare.target_places)
    assert pair(encoder, WARMUP).untouched == 0
    account = Quarantine(0.001, 10)
    for example in (bare, pair(encoder, WARMUP)):
        account.add(Sample(0, "test", (example,)))
    assert account.metrics()["nothing_to_hide"] == 1


def test_a_draw_depends_on_its_seed_alone(encoder: Encoder) -> None:
    one, again, other = pair(encoder, WARMUP, 3), pair(encoder, WARMUP, 3), pair(encoder, WARMUP, 4)
    for name in ("ids", "labels", "targets", "target_places"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert all(map(np.array_equal, one.patches, again.patches))
    assert not np.array_equal(one.ids, other.ids) and not np.array_equal(one.target_places, other.target_places)
    text = replace(WARMUP, corruptions=only("context", text=0.2), objectives={"masked_token": 1.0})
    assert np.array_equal(pair(encoder, text, 3).ids, one.ids), "what pictures hide does not change which words are hidden"


def test_a_hidden_visual_token_is_one_group_of_four_patches(encoder: Encoder) -> None:
    whole, example = plain(encoder, WARMUP), pair(encoder, WARMUP, 5)
    before, after = whole.patches[0], example.patches[0]
    pads = (whole.ids == encoder.backbone.image_id).nonzero()[0]
    chosen = np.isin(pads, example.target_places)
    assert 0 < chosen.sum() < len(chosen) and len(after) == 4 * len(pads)
    changed = (before != after).any(1).reshape(-1, 4)
    assert np.array_equal(changed.any(1), chosen) and changed[chosen].all(), "all four patches of a hidden token, none of another"
    assert np.array_equal(example.targets, before[np.repeat(chosen, 4)])
    assert example.pictures == () and example.grids == whole.grids


def test_a_group_of_four_is_the_square_at_its_tokens_position(encoder: Encoder) -> None:
    """A picture that is white under one token only: the four patches that are white are those of the token at that position."""
    settings = ImageSettings.from_processor(encoder.backbone.processor)
    side = settings.patch * settings.merge
    for row, column in ((0, 0), (1, 2), (2, 1)):
        pixels = np.zeros((3 * side, 3 * side, 3), np.uint8)
        pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] = 255
        example = encoder.preparer.pair(as_message(pixels), CAPTION, BRIDGE, 0)
        white = (example.patches[0] == 255).all(1).reshape(-1, 4).all(1).nonzero()[0]
        pads = (example.ids == encoder.backbone.image_id).nonzero()[0]
        assert len(white) == 1
        place = example.positions[1:, pads[white[0]]] - example.positions[1:, pads[0]]
        assert place.tolist() == [row, column]


@pytest.mark.parametrize("how", ["noise", "mean", "zero"])
def test_fills(how: str) -> None:
    hiding = Hiding(9, (), 1, 4, (0.5, 0.4, 0.3), (0.25, 0.25, 0.25))
    pixels = np.random.default_rng(0).integers(0, 256, (400, 3 * 196), dtype=np.uint8)
    ids = np.ones(100, np.int64)
    row = Example(ids, ids.astype(np.int8) * 0, ids * IGNORE, np.zeros((3, 100), np.int64), (pixels,), ((1, 20, 20),))
    stage = Stage("a", Visibility(("context",), ("f",)), {"masked_patch": 1.0}, corruptions=only("context", patches=0.5, fill=how))
    done = corrupt(row, stage, hiding, 0)
    filled = done.patches[0][np.repeat(np.isin(np.arange(100), done.target_places), 4)].reshape(-1, 3, 196).astype(float)
    assert abs(len(done.target_places) / 100 - 0.5) < 0.15
    if how == "zero":
        assert not filled.any()
    elif how == "mean":
        assert np.array_equal(filled[0, :, 0], np.round(np.array(hiding.mean) * 255)) and filled.std((0, 2)).max() == 0
    else:
        assert np.allclose(filled.mean((0, 2)) / 255, hiding.mean, atol=0.02)  # cut at black, so not quite
        assert np.allclose(filled.std((0, 2)) / 255, 0.25, atol=0.05)
        assert not np.array_equal(filled[0], filled[1]), "each patch has noise of its own"


def test_a_step_is_the_same_for_any_number_of_workers_and_ranks(encoder: Encoder) -> None:
    source = open_source("scenes", limit=40)
    data = StageData(Mixture((Ingredient("scenes", source),)), encoder.preparer, WARMUP, seed=3, batch=4)

    def told(examples: Any) -> list[Any]:
        keep = ("ids", "labels", "targets", "target_places")
        return [[getattr(e, name).tolist() for name in keep] + [p.tolist() for p in e.patches] for e in examples]

    seen = {w: [told(e for s in batch for e in s.everything) for batch in batches(data, 0, 12, w)] for w in (0, 1, 2)}
    assert seen[0] == seen[1] == seen[2]
    halves = [StageData(data.mixture, data.preparer, WARMUP, seed=3, batch=4, rank=r, ranks=2)[0] for r in (0, 1)]
    assert told(s.labelled for pair in zip(*halves, strict=True) for s in pair) == seen[0][0]
    rows = [s.row for s in data[0]]
    step = next(n for n in range(10, 12) if set(rows) & {s.row for s in data[n]})
    again = next(s for s in data[step] if s.row in rows)
    first = next(s for s in data[0] if s.row == again.row)
    assert not np.array_equal(first.labelled.ids, again.labelled.ids), "another epoch hides other words"


def test_sides_of_a_pair_that_can_be_the_target(encoder: Encoder) -> None:
    picture = as_message(scene(0, 0).draw())
    straight, swapped = (encoder.preparer.pair(*sides, BRIDGE, 1) for sides in ((picture, CAPTION), (CAPTION, picture)))
    assert np.array_equal(straight.ids, swapped.ids) and np.array_equal(straight.labels, swapped.labels)
    with pytest.raises(ContentError, match="both show pictures"):
        encoder.preparer.pair(picture, picture, BRIDGE, 0)
    long = Message((Text("red circle " * 2000),))
    row = encoder.preparer.renderer.pair(picture, long, BRIDGE)
    window = encoder.preparer.renderer.window
    assert row.roles.count("target") == window // 2 and len(row.ids) <= window and row.cut > 0


def test_corruptions_that_do_not_fit() -> None:
    for change, said in [
        ({"corruptions": ()}, "nothing to predict"),
        ({"corruptions": only("context", text=0.2)}, "masked_patch has nothing"),
        ({"corruptions": only("target", text=0.2)}, "each of its roles"),
        ({"corruptions": WARMUP.corruptions, "objectives": {"masked_patch": 1.0}}, "nobody predicts"),
        ({"shift": 2}, "0 or 1"),
        ({"patch_target": "blurred"}, "normalised"),
        ({"decoder_layers": -1}, "0 or more"),
        ({"kl_temperature": 0.0}, "above 0"),
    ]:
        with pytest.raises(RecipeError) as error:
            replace(WARMUP, **change)  # type: ignore[arg-type]
        assert said in str(error.value), change
    for values, said in [
        ({"role": "context", "text": 1.5}, "from 0 to 1"),
        ({"role": "context"}, "hides nothing"),
        ({"role": "target", "patches": 0.5}, "stand in the context"),
        ({"role": "picture", "text": 0.5}, "allowed"),
        ({"role": "context", "patches": 0.5, "fill": "grey"}, "noise"),
    ]:
        with pytest.raises(RecipeError) as error:
            Corruption(**values)  # type: ignore[arg-type]
        assert said in str(error.value), values
