"""The equalities that everything stands on, on tiny random models of all three Qwen-VL generations; each with proof that it can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AutoModelForImageTextToText

from comatch.backbones import adapters, attention
from comatch.content import Dialogue, as_message
from comatch.core.batch import IGNORE, ROLE_ID, Batch
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.core.pooling import pool
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.objectives.tokens import next_token
from comatch.recipe import Visibility
from comatch.recipes import load_recipe

K = 4
COMA = load_recipe("coma").with_tokens(K)
COMPRESS = COMA.stage("compress")
Folders = Callable[[str], Path]


def load(folder_of: Folders, family: str) -> Encoder:
    return Encoder.load(folder_of(family), recipe=COMA)


def items() -> list[Any]:
    return [
        "hello",
        scene(0, 0).draw(),
        {"text": "a red circle", "image": scene(0, 1).draw()},
        [scene(0, 2).draw()[:40], "and", scene(0, 3).draw()],
        "a much longer text " * 6,
    ]


def dialogues() -> list[Dialogue]:
    return [
        Dialogue(as_message(s.draw()), tuple((q, a) for q, a, _ in s.dialogue(i, 1 + 3 * (i % 3))))
        for i, s in enumerate(scene(1, j) for j in range(5))
    ]


def compress_batch(encoder: Encoder, **how: Any) -> Batch:
    return collate([encoder.preparer.dialogue(d, COMPRESS) for d in dialogues()], **how)


def test_batch_of_n_is_n_singles(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    together = encoder.encode(items())
    alone = np.concatenate([encoder.encode([item]) for item in items()])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-3, "different items must differ, or the equality says nothing"


def test_order_and_batch_size_do_not_matter(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    straight, reverse = encoder.encode(items()), encoder.encode(items()[::-1], batch_tokens=64)
    np.testing.assert_allclose(straight, reverse[::-1], atol=2e-6)


@pytest.mark.parametrize("stage", ["compress", "match"])
def test_packed_is_alone_and_left_is_right(folder_of: Folders, family: str, stage: str) -> None:
    encoder = load(folder_of, family)
    visibility = COMA.stage(stage).visibility
    if stage == "compress":
        examples = [encoder.preparer.dialogue(d, COMPRESS) for d in dialogues()]
    else:
        examples = [encoder.preparer.item(as_message(item), COMA.stage("match")) for item in items()]
    hidden = {}
    for name, how in {"packed": {}, "right": {"pack": False}, "left": {"pack": False, "side": "left"}}.items():
        batch = collate(examples, **how)  # type: ignore[arg-type]
        with torch.no_grad():
            states = encoder.backbone(batch, visibility)
        hidden[name] = [states[batch.example == i] for i in range(len(examples))]
        if name == "packed":
            assert len(batch.ids) < len(examples), "nothing was packed, so nothing is shown"
    for i in range(len(examples)):
        for name in ("packed", "left"):
            torch.testing.assert_close(hidden[name][i], hidden["right"][i], atol=2e-5, rtol=1e-4)


def test_packing_would_leak_without_owners(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    examples = [encoder.preparer.item(as_message(item), COMA.stage("match")) for item in items()]
    batch = collate(examples)
    blind = Batch(**{**batch.__dict__, "example": batch.example.clamp(max=0)})
    with torch.no_grad():
        right = encoder.backbone(batch, COMA.stage("match").visibility)
        wrong = encoder.backbone(blind, COMA.stage("match").visibility)
    assert (right - wrong)[batch.example >= 0].abs().max() > 1e-3


def test_save_load_gives_the_same_bits(folder_of: Folders, family: str, tmp_path: Path) -> None:
    encoder = load(folder_of, family)
    encoder.backbone.rows.data += 0.01 * torch.randn_like(encoder.backbone.rows)
    before, name = encoder.encode(items()), encoder.fingerprint
    again = Encoder.load(encoder.save(tmp_path / "model"))
    assert np.array_equal(before, again.encode(items()))
    assert again.fingerprint == name
    again.backbone.rows.data += 0.01
    assert again.fingerprint != name and not np.array_equal(before, again.encode(items()))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_is_merged(folder_of: Folders, family: str, kind: str, tmp_path: Path) -> None:
    encoder = load(folder_of, family)
    plain = encoder.encode(items())
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    adapters.attach(encoder.backbone, kind, r=4, alpha=8, dropout=0.0, targets=targets, train_vision=False)
    names = adapters.trainable(encoder.backbone)
    assert all("language_model" in n or n == "rows" for n in names), "adapters belong to the language model only"
    for name, parameter in names.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    encoder.backbone.eval()
    adapted = encoder.encode(items())
    assert np.abs(adapted - plain).max() > 1e-3, "the adapter must change the vectors"
    kept = Encoder.load(encoder.save(tmp_path / "adapter", merged=False))
    assert np.array_equal(adapted, kept.encode(items()))
    merged = Encoder.load(encoder.save(tmp_path / "merged"))
    np.testing.assert_allclose(adapted, merged.encode(items()), atol=1e-5)


def test_stock_forward_with_the_dense_mask_is_ours(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    backbone = encoder.backbone
    batch = compress_batch(encoder, pack=False)
    with torch.no_grad():
        ours = backbone(batch, COMPRESS.visibility)
    backbone.publish_rows()
    stock = AutoModelForImageTextToText.from_pretrained(folder_of(family), attn_implementation="sdpa").eval()
    stock.load_state_dict(backbone.hf.state_dict())
    side = backbone.processor.patch_size
    pixels = (batch.patches.unflatten(1, (3, 1, side, side)).float() / 255 - backbone.mean.view(3, 1, 1, 1)) / backbone.std.view(3, 1, 1, 1)
    inputs = {
        "input_ids": batch.ids,
        "pixel_values": pixels.expand(-1, -1, 2, -1, -1).flatten(1),
        "image_grid_thw": batch.grids,
        "use_cache": False,
    }
    positions, _ = stock.model.get_rope_index(
        batch.ids, (batch.ids == backbone.image_id).int(), image_grid_thw=batch.grids, attention_mask=(batch.example >= 0).long()
    )
    for i in range(batch.size):
        place = batch.example == i
        assert torch.equal(positions[:, place], batch.positions[:, place]), "our positions are the stock ones"
    mask = dense(batch.roles, batch.example, COMPRESS.visibility)
    with torch.no_grad():
        theirs = stock.model(**inputs, attention_mask=mask, position_ids=batch.positions).last_hidden_state
        causal = stock.model(**inputs, attention_mask=None, position_ids=batch.positions).last_hidden_state
    valid = batch.example >= 0
    torch.testing.assert_close(theirs[valid], ours[valid], atol=2e-5, rtol=1e-4)
    assert (causal - ours)[valid].abs().max() > 1e-3, "without the mask the stock model must differ"


def _gradient_reach(encoder: Encoder, visibility: Visibility, batch: Batch) -> torch.Tensor:
    """[roles, roles]: does the state of a role (row) depend on the input embedding of another (column), by gradient."""
    backbone = encoder.backbone
    inputs: list[torch.Tensor] = []

    def grab(_: Any, args: Any, kwargs: Any) -> Any:
        leaf = kwargs["inputs_embeds"].detach().requires_grad_(True)
        inputs.append(leaf)
        return args, {**kwargs, "inputs_embeds": leaf}

    handle = backbone.text.register_forward_pre_hook(grab, with_kwargs=True)
    hidden = backbone(batch, visibility)
    handle.remove()
    roles = visibility.roles
    reach = torch.zeros(len(roles), len(roles), dtype=torch.bool)
    for i, query in enumerate(roles):
        (gradient,) = torch.autograd.grad(hidden[batch.roles == ROLE_ID[query]].sum(), inputs[0], retain_graph=True)
        for j, key in enumerate(roles):
            reach[i, j] = bool((gradient[batch.roles == ROLE_ID[key]] != 0).any())
    return reach


ROLES = ("context", "compression", "dialogue")


@pytest.mark.parametrize(
    "table", [("c..", "cc.", ".cc"), ("c..", "cc.", "ccc"), ("f..", ".f.", "..c"), ("ff.", "ff.", ".fc"), ("c..", ".c.", ".cc")]
)
def test_mask_is_gradient_reach(folder_of: Folders, family: str, table: tuple[str, ...]) -> None:
    encoder = load(folder_of, family)
    visibility = Visibility(ROLES, table)
    reach = _gradient_reach(encoder, visibility, compress_batch(encoder))
    expected = torch.tensor([[visibility.reaches(q, k) for k in ROLES] for q in ROLES])
    assert torch.equal(reach, expected)
    assert not expected.all() and expected.any()


def test_answer_gradient_to_pixels_flows_only_through_compression(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    backbone = encoder.backbone
    backbone.requires_grad_(True)
    batch = compress_batch(encoder)

    def pixel_gradient(cut: bool) -> float:
        backbone.zero_grad()
        attention_name = backbone.text.config._attn_implementation
        if cut:
            backbone.text.config._attn_implementation = "test_cut"
        backbone.dense_mask = True
        try:
            hidden = backbone(batch, COMPRESS.visibility)
        finally:
            backbone.text.config._attn_implementation = attention_name
        losses, _ = next_token(hidden, batch.labels, batch.example, batch.size, backbone.head)
        losses.sum().backward()
        weight = next(p for n, p in backbone.vision_tower.named_parameters() if "patch_embed" in n)
        return 0.0 if weight.grad is None else float(weight.grad.abs().max())

    def detached(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        ours = (batch.roles == ROLE_ID["compression"])[:, None, :, None]
        key, value = (torch.where(ours, x.detach(), x) for x in (key, value))
        return attention.masked(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("test_cut", detached)
    assert pixel_gradient(cut=False) > 0
    assert pixel_gradient(cut=True) == 0


def test_frozen_compression_keys_and_values_hide_the_picture(folder_of: Folders, family: str) -> None:
    """Change the picture, keep K and V of the compression tokens: the answer logits stay equal to the bit (specs/coma.md section 10)."""
    encoder = load(folder_of, family)
    backbone = encoder.backbone
    turns = dialogues()[0].turns
    batches = [collate([encoder.preparer.dialogue(Dialogue(as_message(scene(5, i).draw()), turns), COMPRESS)]) for i in (0, 1)]
    assert not torch.equal(batches[0].patches, batches[1].patches)
    memory: list[tuple[torch.Tensor, torch.Tensor]] = []
    mode = {"replay": False}

    def replay(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        ours = (batches[0].roles == ROLE_ID["compression"])[:, None, :, None]
        if mode["replay"]:
            old_key, old_value = memory[module.layer_idx]
            key, value = torch.where(ours, old_key, key), torch.where(ours, old_value, value)
        else:
            memory.append((key, value))
        return attention.masked(module, query, key, value, mask, **kwargs)

    def logits(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return backbone.head(backbone(batch, COMPRESS.visibility)[batch.labels != IGNORE])

    AttentionInterface.register("test_replay", replay)
    backbone.dense_mask = True
    free = logits(batches[1])
    backbone.text.config._attn_implementation = "test_replay"
    first = logits(batches[0])
    mode["replay"] = True
    frozen = logits(batches[1])
    assert torch.equal(first, frozen)
    assert (free - first).abs().max() > 1e-4, "with its own keys and values the other picture must show"


def test_labels_stand_on_answers_only(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    dialogue = dialogues()[0]
    example = encoder.preparer.dialogue(dialogue, COMPRESS)
    tokenizer = encoder.backbone.tokenizer
    spans = "".join(tokenizer.decode([label]) for label in example.labels if label != IGNORE)
    assert spans == "".join(answer + "<|im_end|>" for _, answer in dialogue.turns)
    released = encoder.preparer.dialogue(dialogue, load_recipe("coma-released").stage("compress"))
    assert released.supervised == int((example.roles == ROLE_ID["dialogue"]).sum())
    assert released.supervised > example.supervised


def test_pooling_equals_plain_loops() -> None:
    torch.manual_seed(0)
    roles = torch.tensor([[0, 0, 1, 1, 0, 1, 1, -1], [-1, -1, 0, 1, 1, 0, 0, 1]], dtype=torch.int8)
    owner = torch.tensor([[0, 0, 0, 0, 2, 2, 2, -1], [-1, -1, 1, 1, 1, 3, 3, 3]])
    hidden = torch.randn(2, 8, 5)
    for how in ("mean_compression", "last_compression", "mean", "last"):
        got = pool(hidden, roles, owner, 4, how)
        for i in range(4):
            rows = [hidden[r, c] for r in range(2) for c in range(8) if owner[r, c] == i and (roles[r, c] == 1 or "compression" not in how)]
            want = rows[-1] if how.startswith("last") else torch.stack(rows).mean(0)
            torch.testing.assert_close(got[i], want / want.norm())
