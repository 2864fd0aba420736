"""The recipes of the family: who reaches whom at which depth, and what recipes look like that were there before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comatch.backbones.base import Backbone
from comatch.content import Message, Text, as_message
from comatch.core.batch import ROLE_ID, Batch, Example
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.core.segments import Segments, compile_segments
from comatch.data.mixture import Ingredient
from comatch.data.scenes import scene
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import RecipeError
from comatch.recipe import Corruption, Recipe, Stage, Visibility
from comatch.recipes import RECIPES, load_recipe

BRIDGES = ("cocoa", "cocoa-sealed", "cocoa-strict")
Folders = Callable[[str], Path]
# SHA-256 of the JSON that these recipes had before there were corruptions: saved models carry it in their fingerprint.
OLD = {
    "coma": "39930c33ff8540988da4f32d7d189be1cdf02e2df9ce89deb0130bb227280e5e",
    "coma-released": "8863647464629988be769fd49175e9a549ba0dd3999c6434652f4d3f055a4f5b",
    "coma-no-bottleneck": "af8cc220b3f752f0ebdbb143fe47552c3504afaa08ae143b9a027f4489aba767",
    "matching": "1e8a8a4d0dd8dadc7ccc9887a90885a076c00e3cff955a096d806b3277406be5",
    "matching-last": "434847e69be1fc93454e6ae66e24bb8c24363e0f8683180b3869997bbcdde799",
    "vlm": "4db75612fce293d05d347830bff9d0ec07a25e36ed606e6c19be247e57b12aad",
}


def pairs(encoder: Encoder, stage: Stage, n: int = 5) -> list[Example]:
    source = Ingredient("scenes", open_source("scenes"))
    return [encoder.preparer.pair(*source.pair(i, 0), stage, seed=i) for i in range(n)]


def test_the_published_tables() -> None:
    told = {name: [(s.name, s.visibility.table, dict(s.objectives), s.pooling) for s in load_recipe(name).stages] for name in RECIPES}
    denoise = {"masked_token": 1.0, "masked_patch": 0.5}
    for name, bridge, match in (
        ("cocoa", ("ff.", "fff", ".ff"), ("ff", "ff")),
        ("cocoa-sealed", ("ff.", "ff.", ".ff"), ("ff", "ff")),
        ("cocoa-strict", ("f..", "ff.", ".ff"), ("f.", "ff")),
    ):
        assert told[name] == [
            ("warmup", ("f",), denoise, None),
            ("bridge", bridge, {"masked_token": 1.0}, None),
            ("match", match, {"contrastive": 1.0}, "last_compression"),
        ]
        recipe = load_recipe(name)
        assert (recipe.tokens, recipe.masks, len(recipe.token_names)) == (1, True, 2)
        assert [c for s in recipe.stages for c in s.corruptions] == [Corruption("context", 0.2, 0.5), Corruption("target", 0.7)]
        assert {s.shift for s in recipe.stages} == {1}
    assert told["moca"] == [("denoise", ("f",), denoise, None), ("match", ("f",), {"contrastive": 1.0}, "mean")]
    assert load_recipe("moca").stage("denoise").corruptions == (Corruption("context", 0.4, 0.5, "noise"),)
    assert told["matching-bidirectional"] == told["moca"][1:]
    coma = {name: load_recipe(name).stages for name in told if name.startswith("coma-")}
    assert coma["coma-full"][0].visibility.table == ("c..", "cf.", ".cc") and coma["coma-full"][1].visibility.table == ("c.", "cf")
    assert coma["coma-kl"][0].objectives == {"distillation": 1.0} and coma["coma-all-tokens"][0].supervise == "dialogue"
    assert coma["coma-joint"][0].objectives == {"next_token": 1.0, "contrastive": 1.0} and len(coma["coma-joint"]) == 1
    assert all(stages[0].bottleneck for name, stages in coma.items() if name not in ("coma-released", "coma-no-bottleneck"))


@pytest.mark.parametrize("tokens", [1, 2, 4, 8, 16, 32, 64])
def test_every_number_of_tokens_fits_the_shipped_model(tokens: int) -> None:
    for name in ("coma", "cocoa"):
        encoder = Encoder.load("comatch-nano", recipe=load_recipe(name).with_tokens(tokens))
        assert encoder.backbone.tokens == tokens == len(encoder.preparer.renderer.compression)
        assert len(encoder.backbone.rows) == tokens + (name == "cocoa")
    match = encoder.preparer.item(as_message("a red circle"), encoder.stage)
    assert (match.roles == ROLE_ID["compression"]).sum() == tokens and encoder.preparer.renderer.mask not in match.ids


def test_older_recipes_keep_their_text_and_all_round_trip() -> None:
    for name, recipe in RECIPES.items():
        assert Recipe.from_json(recipe.to_json()) == recipe
        if name in OLD:
            assert hashlib.sha256(recipe.to_json().encode()).hexdigest() == OLD[name], name
    assert set(OLD) < set(RECIPES)
    data = json.loads(load_recipe("cocoa").to_json())
    assert data["stages"][0]["corruptions"][0]["patches"] == 0.5 and "shift" not in data["stages"][0]
    data["stages"][0] |= {"shift": 0, "decoder_layers": 2, "patch_target": "normalised"}
    changed = Recipe.from_dict(data)
    assert (changed.stages[0].shift, changed.stages[0].decoder_layers) == (0, 2) and Recipe.from_json(changed.to_json()) == changed
    data["stages"][0]["corruptions"][0]["colour"] = "grey"
    with pytest.raises(RecipeError, match="colour"):
        Recipe.from_dict(data)


def reach(backbone: Backbone, batch: Batch, visibility: Visibility) -> list[torch.Tensor]:
    """After each layer, which place depends on which input by gradient: bool [seq, seq]."""
    inputs: list[torch.Tensor] = []
    states: list[torch.Tensor] = []

    def grab(_: Any, args: Any, kwargs: Any) -> Any:
        inputs.append(kwargs["inputs_embeds"].detach().requires_grad_(True))
        return args, {**kwargs, "inputs_embeds": inputs[0]}

    handles = [backbone.text.register_forward_pre_hook(grab, with_kwargs=True)]
    handles += [layer.register_forward_hook(lambda _, args, out: states.append(out)) for layer in backbone.text.layers]
    backbone(batch, visibility)
    for handle in handles:
        handle.remove()
    found = []
    for hidden in states:
        rows = [torch.autograd.grad(hidden[0, i].sum(), inputs[0], retain_graph=True)[0][0] for i in range(hidden.shape[1])]
        found.append(torch.stack([(row != 0).any(-1) for row in rows]))
    return found


@pytest.mark.parametrize("name", BRIDGES)
def test_reach_of_every_depth_is_the_power_of_the_table(folder_of: Folders, family: str, name: str) -> None:
    recipe = load_recipe(name)
    encoder, stage = Encoder.load(folder_of(family), recipe=recipe), recipe.stage("bridge")
    short = Message((Text("red circle"),)), Message((Text("a red circle"),))
    batch = collate([encoder.preparer.pair(*short, stage, seed) for seed in (0, 1)])
    owner = batch.example[0][batch.example[0] >= 0]  # padding reaches anything, and nothing reads it
    n, places = len(owner), {role: batch.roles[0] == ROLE_ID[role] for role in stage.visibility.roles}
    want = one = dense(batch.roles, batch.example, stage.visibility)[0, 0, :n, :n]
    leaks = []
    for depth, got in enumerate(reach(encoder.backbone, batch, stage.visibility), 1):
        assert torch.equal(got[:n, :n], want), depth
        leaks.append({(q, k): bool(got[places[q]][:, places[k]].any()) for q in places for k in places})
        want = (want.float() @ one.float()) > 0
    assert len(leaks) == 3 and all(leak["compression", "context"] and leak["target", "compression"] for leak in leaks)
    assert not leaks[0]["context", "target"] and not leaks[0]["target", "context"], "one layer keeps the two apart in every bridge"
    assert leaks[1]["target", "context"], "through the bridge the target learns of the context from the second layer on"
    polluted = [leak["compression", "target"] for leak in leaks], [leak["context", "target"] for leak in leaks]
    assert polluted == (([True] * 3, [False, True, True]) if name == "cocoa" else ([False] * 3, [False] * 3))
    assert [leak["context", "compression"] for leak in leaks] == [name != "cocoa-strict"] * 3
    if name == "cocoa":
        assert torch.equal(got[:n, :n], owner[:, None] == owner), "from some depth on everything reaches everything"


@pytest.mark.parametrize("name", ["cocoa-sealed", "cocoa-strict", "cocoa"])
def test_a_sealed_bridge_is_the_matching_stage(folder_of: Folders, name: str) -> None:
    recipe = load_recipe(name)
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=recipe)
    bridge, match = recipe.stage("bridge"), recipe.stage("match")
    picture = as_message(scene(0, 3).draw())
    whole, item = encoder.preparer.pair(picture, as_message("a red circle"), bridge), encoder.preparer.item(picture, match)
    n = len(item)
    assert np.array_equal(whole.ids[:n], item.ids) and np.array_equal(whole.positions[:, :n], item.positions)
    with torch.no_grad():
        a, b = (encoder.backbone(collate([e]), s.visibility)[0, :n] for e, s in ((whole, bridge), (item, match)))
    assert ((a - b).abs().max() < 2e-5) == (name != "cocoa")


@pytest.mark.parametrize("name", ["moca", *BRIDGES])
def test_bidirectional_rows_packed_alone_left_and_right(folder_of: Folders, family: str, name: str) -> None:
    recipe = load_recipe(name)
    encoder = Encoder.load(folder_of(family), recipe=recipe)
    for stage in recipe.stages:
        if stage.tells:
            examples = pairs(encoder, stage)
        else:
            items = ["hello", scene(0, 0).draw(), {"text": "a red circle", "image": scene(0, 1).draw()}, "longer " * 9]
            examples = [encoder.preparer.item(as_message(item), stage) for item in items]
        hidden = {}
        for form, how in {"packed": {}, "right": {"pack": False}, "left": {"pack": False, "side": "left"}}.items():
            batch = collate(examples, **how)  # type: ignore[arg-type]
            assert isinstance(compile_segments(batch.roles, batch.example, stage.visibility), Segments), "no table needs the dense mask"
            with torch.no_grad():
                fast = encoder.backbone(batch, stage.visibility)
                encoder.backbone.dense_mask = True
                slow = encoder.backbone(batch, stage.visibility)
                encoder.backbone.dense_mask = False
            hidden[form] = [fast[batch.example == i] for i in range(len(examples))]
            torch.testing.assert_close(fast[batch.example >= 0], slow[batch.example >= 0], atol=2e-5, rtol=1e-4)
            if len(batch.target_places):
                flat = batch.ids.flatten()[batch.target_places]
                assert (flat == encoder.backbone.image_id).all(), "hidden tokens are found in every layout"
                side = encoder.backbone.processor.merge_size**2
                assert len(batch.targets) == side * len(flat) == sum(len(e.targets) for e in examples)
        for i in range(len(examples)):
            for form in ("packed", "left"):
                torch.testing.assert_close(hidden[form][i], hidden["right"][i], atol=2e-5, rtol=1e-4)
        causal = Visibility(stage.visibility.roles, tuple(row.replace("f", "c") for row in stage.visibility.table))
        with torch.no_grad():
            other = encoder.backbone(batch, causal)
        assert (other - fast)[batch.example >= 0].abs().max() > 1e-3, "causal attention must differ, or full is not shown"


def test_positions_are_the_same_on_every_forward(folder_of: Folders, family: str) -> None:
    """The reference keeps M-RoPE of the first batch and counts plainly afterwards (specs: CoCoA's fourth weakness)."""
    recipe = load_recipe("cocoa")
    encoder = Encoder.load(folder_of(family), recipe=recipe)
    stage, seen = recipe.stage("bridge"), list[torch.Tensor]()
    encoder.backbone.text.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    first, other = (collate(part) for part in (pairs(encoder, stage)[:2], pairs(encoder, stage)[2:]))
    with torch.no_grad():
        states = [encoder.backbone(batch, stage.visibility) for batch in (first, other, first)]
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[0], first.positions) and torch.equal(seen[1], other.positions)
    assert torch.equal(states[0], states[2])
    assert (seen[0][1] != seen[0][2]).any(), "a picture has rows and columns"
