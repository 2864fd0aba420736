"""The fast path is the dense oracle: outputs, gradients of inputs and of every weight, for all recipes, packings and backbones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import varlen_stand_in
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from comatch.backbones import attention
from comatch.backbones.base import Backbone
from comatch.content import Dialogue, as_message
from comatch.core.batch import ROLE_ID, Batch
from comatch.core.packing import collate
from comatch.core.segments import Segments, compile_segments
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.objectives.tokens import next_token
from comatch.recipe import Visibility
from comatch.recipes import RECIPES, load_recipe

Folders = Callable[[str], Path]
COMA = load_recipe("coma").with_tokens(3)
BRIDGE = ("context", "compression", "target")
COCOA = {
    "paper": Visibility(BRIDGE, ("ff.", "fff", ".ff")),
    "sealed": Visibility(BRIDGE, ("ff.", "ff.", ".ff")),
    "strict": Visibility(BRIDGE, ("f..", "ff.", ".ff")),
}
SHIPPED = {f"{r.name}-{s.name}": s.visibility for r in RECIPES.values() for s in r.stages}
TABLES = {visibility: name for name, visibility in (SHIPPED | COCOA).items()}  # one name for equal tables


@pytest.fixture(scope="module")
def encoder_of(folder_of: Folders) -> Callable[[str], Encoder]:
    """An encoder in float64 of each family, with trained-looking weights: fresh ones attend evenly to everything."""
    made: dict[str, Encoder] = {}

    def get(family: str) -> Encoder:
        if family not in made:
            encoder = Encoder.load(folder_of(family), recipe=COMA)
            encoder.backbone.double().requires_grad_(True)
            for name, parameter in encoder.backbone.named_parameters():
                if "q_proj.weight" in name or "k_proj.weight" in name:
                    parameter.data *= 8
            made[family] = encoder
        encoder = made[family]
        encoder.backbone.dense_mask = False
        return encoder

    return get


def batch_for(encoder: Encoder, visibility: Visibility, **how: Any) -> Batch:
    """Five examples of unequal length with the table's roles; the first four hold pictures."""
    stage = COMA.stage("compress")
    seen = [as_message(scene(1, j).draw()) for j in range(4)] + [as_message("words only")]
    talks = [tuple((q, a) for q, a, _ in scene(1, j).dialogue(j, 1 + j % 3)) for j in range(5)]
    examples = [encoder.preparer.dialogue(Dialogue(*both), stage) for both in zip(seen, talks, strict=True)]
    roles = visibility.roles
    rename = {"compression": roles[min(1, len(roles) - 1)], "dialogue": roles[-1]}
    ids = {ROLE_ID[old]: ROLE_ID[new] for old, new in rename.items()}
    if "compression" in roles and len(roles) == 2:  # a matching stage has no dialogue
        cut = [int((e.roles != ROLE_ID["dialogue"]).sum()) for e in examples]
        examples = [
            replace(e, **{name: getattr(e, name)[..., :n] for name in ("ids", "roles", "labels", "positions")})
            for e, n in zip(examples, cut, strict=True)
        ]
    batch = collate(examples, **how)
    new = batch.roles.clone()
    for old, role in ids.items():
        new[batch.roles == old] = role
    return replace(batch, roles=new)


@contextmanager
def leaf(backbone: Backbone) -> Iterator[list[torch.Tensor]]:
    """Catch the input embeddings of a pass as a leaf that still has its history for the weights below."""
    caught: list[torch.Tensor] = []

    def grab(_: Any, args: Any, kwargs: Any) -> None:
        kwargs["inputs_embeds"].retain_grad()
        caught.append(kwargs["inputs_embeds"])

    handle = backbone.text.register_forward_pre_hook(grab, with_kwargs=True)
    yield caught
    handle.remove()


def outcome(backbone: Backbone, batch: Batch, visibility: Visibility) -> dict[str, torch.Tensor]:
    """Hidden states of valid places, and gradients of a random sum of them with respect to inputs and every weight."""
    backbone.zero_grad()
    with leaf(backbone) as caught:
        hidden = backbone(batch, visibility)
    valid = batch.example >= 0
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), dtype=hidden.dtype)
    (hidden * weights)[valid].sum().backward()
    found = {"hidden": hidden[valid].detach()}
    assert caught[0].grad is not None
    found["inputs"] = caught[0].grad[valid]
    return found | {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


def equal(fast: dict[str, torch.Tensor], slow: dict[str, torch.Tensor]) -> None:
    assert fast.keys() == slow.keys() and sum("visual" in name for name in slow) > 4 and sum("layers" in name for name in slow) > 20
    for name, value in slow.items():
        scale = value.abs().max()
        assert (fast[name] - value).abs().max() <= 1e-9 * scale + 1e-15, name
        if "k_proj.bias" not in name:  # softmax does not see what is added to all scores of a query
            assert scale > 0, name


@pytest.mark.parametrize("visibility", TABLES, ids=TABLES.get)
@pytest.mark.parametrize("how", [{}, {"pack": False}, {"pack": False, "side": "left"}], ids=["packed", "right", "left"])
def test_fast_is_dense(encoder_of: Any, family: str, visibility: Visibility, how: dict[str, Any]) -> None:
    encoder = encoder_of(family)
    backbone, batch = encoder.backbone, batch_for(encoder, visibility, **how)
    assert (batch.example < 0).any() and len(batch.ids) == (5 if how else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = outcome(backbone, batch, visibility)
    backbone.dense_mask = True
    equal(fast, outcome(backbone, batch, visibility))


@pytest.mark.parametrize("grouped_heads", [True, False], ids=["torch 2.13", "torch 2.11"])
@pytest.mark.parametrize("visibility", TABLES, ids=TABLES.get)
def test_the_gpu_path_is_dense(
    encoder_of: Any, family: str, visibility: Visibility, grouped_heads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gather, one launch per block, scatter: with torch's kernel written out as a loop (varlen_stand_in)."""
    encoder = encoder_of(family)
    backbone, batch = encoder.backbone, batch_for(encoder, visibility)
    backbone.dense_mask = True
    slow = outcome(backbone, batch, visibility)
    backbone.dense_mask = False
    calls = varlen_stand_in.install(monkeypatch, grouped_heads)
    equal(outcome(backbone, batch, visibility), slow)
    text, depth = backbone.text.config, len(backbone.vision_tower.blocks)
    heads = [call["key"].shape[1] for call in calls[depth:]]
    segments = compile_segments(batch.roles, batch.example, visibility)
    assert isinstance(segments, Segments)
    mixed = len(set("".join(visibility.table)) - {"."}) - 1
    assert len(segments.blocks) == 1 + mixed, "causal and full rows go apart"
    assert len(calls) == depth + text.num_hidden_layers * len(segments.blocks), "one launch per layer in both towers, two for a mixed table"
    assert set(heads) == {text.num_key_value_heads if grouped_heads else text.num_attention_heads}


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
@pytest.mark.parametrize("visibility", [v for v in TABLES if len(v.roles) > 1], ids=TABLES.get)
def test_the_table_matters(encoder_of: Any, family: str, visibility: Visibility) -> None:
    encoder = encoder_of(family)
    batch = batch_for(encoder, visibility)
    with torch.no_grad():
        right = encoder.backbone(batch, visibility)
        for letter in "cf":
            plain = Visibility(visibility.roles, tuple(letter * len(visibility.roles) for _ in visibility.roles))
            if any(visibility.sees(q, k) != plain.sees(q, k) for q in plain.roles for k in plain.roles):
                assert (encoder.backbone(batch, plain) - right)[batch.example >= 0].abs().max() > 1e-2


def test_the_vision_tower_launches_once_per_layer(encoder_of: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = encoder_of(family).backbone
    side, grids = backbone.processor.patch_size, torch.tensor([(1, 4, 6), (1, 18, 10), (1, 16, 16), (1, 4, 6)])
    if hasattr(backbone.vision_tower, "fullatt_block_indexes"):
        monkeypatch.setattr(backbone.vision_tower, "fullatt_block_indexes", [1])
    patches = torch.randint(256, (int(grids.prod(1).sum()), 3 * side * side), generator=torch.Generator().manual_seed(0)).byte()
    nothing = torch.zeros(1, 1, dtype=torch.long)
    batch = Batch(nothing, nothing, nothing, nothing, nothing.expand(3, 1, 1), patches, grids, 1)
    depth = len(backbone.vision_tower.blocks)
    stock: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        stock.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("test_counted", counted)
    monkeypatch.setattr(backbone.vision_tower.config, "_attn_implementation", "test_counted")
    plain, weights = seen(backbone, batch)
    monkeypatch.setattr(backbone.vision_tower.config, "_attn_implementation", attention.VISION)
    for way in ("groups", "varlen"):
        calls = varlen_stand_in.install(monkeypatch) if way == "varlen" else []
        found, ours = seen(backbone, batch)
        torch.testing.assert_close(found, plain, atol=1e-9, rtol=1e-9)
        for name, gradient in weights.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-9, rtol=1e-8)
    assert len(calls) == depth and len(stock) >= depth * len(grids)


def seen(backbone: Backbone, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    backbone.zero_grad()
    vision = backbone.see(batch)
    assert vision is not None
    sum(x.square().sum() for x in (vision.tokens, *vision.deep)).backward()  # type: ignore[union-attr]
    named = backbone.vision_tower.named_parameters()
    return vision.tokens.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_a_table_without_segments_runs_dense_and_warns_once(encoder_of: Any, family: str) -> None:
    encoder = encoder_of(family)
    odd = Visibility(("context", "compression"), ("cf", "cc"))
    batch = batch_for(encoder, odd)
    attention.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="slow dense mask, because 'context' sees itself causally") as told:
        first = encoder.backbone(batch, odd)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = encoder.backbone(batch, odd)
    encoder.backbone.dense_mask = True
    assert torch.equal(first, second) and torch.equal(first, encoder.backbone(batch, odd))


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_low_precision_reaches_the_kernel(folder_of: Folders, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.load(folder_of(family), recipe=COMA)
    visibility = COMA.stage("compress").visibility
    batch = batch_for(encoder, visibility)
    valid = batch.example >= 0
    with torch.no_grad():
        exact = encoder.backbone(batch, visibility)[valid]
        encoder.backbone.bfloat16()
        calls = varlen_stand_in.install(monkeypatch)
        low = encoder.backbone(batch, visibility)[valid].float()
    assert calls and all(call["query"].dtype == torch.bfloat16 for call in calls)
    assert F.cosine_similarity(low, exact, dim=-1).min() > 0.99


@pytest.mark.parametrize("family", ["qwen2_5_vl"])
def test_packing_does_not_change_the_loss(encoder_of: Any, family: str) -> None:
    """Every example weighs the same, however long it is and whatever it shares a row with."""
    encoder = encoder_of(family)
    visibility = COMA.stage("compress").visibility
    found = {}
    for name, how in {"packed": {}, "alone": {"pack": False}}.items():
        encoder.backbone.zero_grad()
        batch = batch_for(encoder, visibility, **how)
        losses, _ = next_token(encoder.backbone(batch, visibility), batch.labels, batch.example, batch.size, encoder.backbone.head)
        losses.sum().backward()
        found[name] = losses.detach(), [p.grad.clone() for p in encoder.backbone.text.parameters()]
    torch.testing.assert_close(found["packed"][0], found["alone"][0], atol=1e-9, rtol=1e-9)
    for packed, alone in zip(found["packed"][1], found["alone"][1], strict=True):
        torch.testing.assert_close(packed, alone, atol=1e-9, rtol=1e-8)
    losses, count = found["alone"][0], torch.bincount(batch.example[batch.labels >= 0], minlength=5)
    assert abs((losses * count).sum() / count.sum() - losses.mean()) > 1e-3, "the mean over tokens is another number"
