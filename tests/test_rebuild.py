"""Dialogue and a text to rebuild in one row: each is what it would be alone, reads compression tokens only, and has losses of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_family import reach

from comatch.backbones.decoder import PatchDecoder
from comatch.content import Dialogue, Message, Text, as_message
from comatch.core.batch import IGNORE, ROLE_ID, Example
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.core.segments import Segments, compile_segments
from comatch.data.mixture import Ingredient
from comatch.data.scenes import scene
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import ContentError, RecipeError
from comatch.recipe import Bottleneck, Corruption, Stage, Visibility
from comatch.recipes import load_recipe
from comatch.training.beside import Beside
from comatch.training.rows import token_step
from comatch.training.teacher import Teacher

K = 3
REBUILD = load_recipe("coma-rebuild").with_tokens(K)
BOTH = REBUILD.stage("compress")
SAID = load_recipe("coma").stage("compress")
ROLES = ("context", "compression", "target")
TOLD = Stage("told", Visibility(ROLES, ("c..", "cc.", ".cc")), {"masked_token": 1.0}, corruptions=BOTH.corruptions)
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def encoder(folder_of: Folders) -> Encoder:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=REBUILD)
    encoder.backbone.vision_tower.requires_grad_(False)
    return encoder


def talk(i: int = 0) -> Dialogue:
    s = scene(1, i)
    return Dialogue(as_message(s.draw()), tuple((q, a) for q, a, _ in s.dialogue(i, 1 + i % 3)), target=s.caption(i))


def rows(encoder: Encoder, i: int, seed: int = 0, stage: Stage = BOTH) -> tuple[Example, Example, Example]:
    """The joint row, the dialogue's own and the text's own."""
    both, make = talk(i), encoder.preparer
    told = make.pair(both.context, Message((Text(both.target),)), replace(TOLD, shift=stage.shift), seed)
    return make.dialogue(both, stage, seed), make.dialogue(both, SAID, seed), told


def places(example: Example, role: str) -> np.ndarray:
    return np.flatnonzero(example.roles == ROLE_ID[role])


@pytest.mark.parametrize("shift", [0, 1])
def test_a_row_is_both_rows(encoder: Encoder, shift: int) -> None:
    stage, bridged = replace(BOTH, shift=shift), 0
    for seed in range(8):
        joint, said, told = rows(encoder, 1, seed, stage)
        assert len(joint) == len(said) + len(places(told, "target"))
        order = joint.roles[np.flatnonzero(np.diff(joint.roles, prepend=-1))].tolist()
        assert order == [ROLE_ID[role] for role in BOTH.visibility.roles]
        for role, own in (("context", told), ("compression", told), ("target", told), ("dialogue", said)):
            for name in ("ids", "positions"):
                a, b = (getattr(e, name)[..., places(e, role)] for e in (joint, own))
                assert np.array_equal(a, b), (role, name)
            assert np.array_equal(joint.labels[places(joint, role)], own.labels[places(own, role)]), role
        last, masked = places(joint, "compression")[-1], joint.ids == encoder.preparer.renderer.mask
        assert masked.any() and (places(joint, "target")[0] == last + 1)
        assert (joint.labels[last] != IGNORE) == (shift == 1 and masked[last + 1]), "it says the first word"
        bridged += int(joint.labels[last] != IGNORE)
        first = joint.positions[:, places(joint, "dialogue")[0]]
        assert np.array_equal(first, joint.positions[:, places(joint, "target")[0]]) and (first == joint.positions[:, last] + 1).all()
    assert (bridged > 0) == (shift == 1)
    question = encoder.preparer.finish(encoder.preparer.renderer.question(talk(1).context, talk(1).turns[0][0], BOTH))
    n = len(question)
    assert np.array_equal(question.ids, said.ids[:n]) and np.array_equal(question.positions, said.positions[:, :n])


def test_states_are_those_of_both_rows_alone(encoder: Encoder) -> None:
    for i in range(3):
        joint, said, told = rows(encoder, i)
        with torch.no_grad():
            whole = encoder.backbone(collate([joint]), BOTH.visibility)[0]
            for own, stage in ((said, SAID), (told, TOLD)):
                alone = encoder.backbone(collate([own]), stage.visibility)[0]
                for role in stage.visibility.roles:
                    a, b = whole[places(joint, role)], alone[places(own, role)]
                    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
            # Without the positions, or with eyes for one another, they would differ.
            moved = collate([replace(joint, positions=np.broadcast_to(np.arange(len(joint)), joint.positions.shape))])
            nosy = Visibility(BOTH.visibility.roles, ("c...", "cc..", ".cc.", ".ccc"))
            for other, table in ((moved, BOTH.visibility), (collate([joint]), nosy)):
                assert (encoder.backbone(other, table)[0] - whole)[places(joint, "dialogue")].abs().max() > 1e-3


def loops(encoder: Encoder, some: list[Example], role: str | None) -> torch.Tensor:
    """Cross-entropy of the labels at places of a role (None: of all others), mean within an example and then over examples."""
    losses = []
    for example in some:
        hidden, found = encoder.backbone(collate([example]), BOTH.visibility)[0], []
        for place, label in enumerate(example.labels):
            if label != IGNORE and (example.roles[place] == ROLE_ID["dialogue"]) == (role == "dialogue"):
                found.append(-encoder.backbone.head(hidden[place][None]).log_softmax(-1)[0, label])
        losses.append(torch.stack(found).mean())
    return torch.stack(losses).mean()


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    encoder.backbone.zero_grad()
    return found


@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_the_step_is_the_sum_of_both_steps_and_of_plain_loops(encoder: Encoder, budget: int) -> None:
    stage = replace(BOTH, objectives={"next_token": 1.0, "masked_token": 0.5})
    joint, said, told = map(list, zip(*(rows(encoder, i, seed=i) for i in range(4)), strict=True))
    accelerator = Accelerator(cpu=True)
    result = token_step(accelerator, encoder.backbone, joint, stage, budget)
    got = gradients(encoder)
    alone = [token_step(accelerator, encoder.backbone, said, SAID, budget)]
    alone.append(token_step(accelerator, encoder.backbone, told, replace(TOLD, objectives={"masked_token": 0.5}), budget))
    want = gradients(encoder)
    by_hand = [loops(encoder, joint, "dialogue"), loops(encoder, joint, None)]
    (by_hand[0] + 0.5 * by_hand[1]).backward()
    slow = gradients(encoder)
    assert list(result.parts) == ["next_token", "masked_token"]
    assert np.allclose(list(result.parts.values()), [alone[0].parts["next_token"], alone[1].parts["masked_token"]], atol=1e-5)
    assert np.allclose(list(result.parts.values()), [float(loss.detach()) for loss in by_hand], atol=1e-5)
    assert abs(result.loss - alone[0].loss - alone[1].loss) < 1e-5 and abs(result.parts["next_token"] - result.parts["masked_token"]) > 1e-3
    scale = max(float(g.abs().max()) for g in want.values())
    assert got.keys() == want.keys() == slow.keys() and scale > 0
    for name in want:
        assert float((got[name] - want[name]).abs().max()) < 1e-4 * scale and float((got[name] - slow[name]).abs().max()) < 1e-4 * scale
    labels = sum(e.supervised for e in joint)
    right = sum(round(one.accuracy * sum(e.supervised for e in some)) for one, some in zip(alone, (said, told), strict=True))
    assert abs(result.accuracy - right / labels) < 1e-6


def test_an_example_counts_for_what_it_has(encoder: Encoder) -> None:
    some = [rows(encoder, i)[0] for i in range(2)]
    some.append(encoder.preparer.dialogue(replace(talk(2), target=""), BOTH, 0))
    assert some[2].untouched == 1 and not len(places(some[2], "target"))
    result = token_step(Accelerator(cpu=True), encoder.backbone, some, BOTH, 200)
    gradients(encoder)
    assert abs(result.parts["masked_token"] - float(loops(encoder, some[:2], None).detach())) < 1e-5
    assert abs(result.parts["next_token"] - float(loops(encoder, some, "dialogue").detach())) < 1e-5


def test_the_bottleneck_holds_for_both_at_every_depth(folder_of: Folders, family: str) -> None:
    encoder = Encoder.load(folder_of(family), recipe=REBUILD)
    short = Dialogue(Message((Text("red circle"),)), (("is it?", "yes"),), target="a circle")
    example = encoder.preparer.dialogue(short, BOTH, 0)
    batch = collate([example], multiple=1)
    want = one = dense(batch.roles, batch.example, BOTH.visibility)[0, 0]
    at = {role: places(example, role) for role in BOTH.visibility.roles}
    for depth, got in enumerate(reach(encoder.backbone, batch, BOTH.visibility), 1):
        assert torch.equal(got, want), depth
        for reader, other in (("dialogue", "target"), ("target", "dialogue")):
            assert not got[at[reader]][:, at[other]].any(), "they never learn of one another"
            assert got[at[reader]][:, at["compression"]].any()
            assert bool(got[at[reader]][:, at["context"]].any()) == (depth > 1), "of the context only through the tokens"
        for role in ("context", "compression"):
            assert not got[at[role]][:, np.concatenate([at["target"], at["dialogue"]])].any(), "what is compressed knows no reader"
        want = (want.float() @ one.float()) > 0
    cut = Visibility(BOTH.visibility.roles, ("c...", ".c..", ".cc.", ".c.c"))
    with pytest.raises(RecipeError, match="does not carry"):
        replace(BOTH, visibility=cut)
    for got in reach(encoder.backbone, batch, cut):
        assert not got[np.concatenate([at["target"], at["dialogue"]])][:, at["context"]].any()


@pytest.mark.parametrize("how", [{}, {"pack": False}, {"pack": False, "side": "left"}], ids=["packed", "right", "left"])
@pytest.mark.parametrize("letter", ["c", "f"])
def test_fast_is_dense(encoder: Encoder, how: dict[str, Any], letter: str) -> None:
    table = Visibility(BOTH.visibility.roles, ("c...", "cc..", f".c{letter}.", ".c.c"))
    some = [rows(encoder, i, i)[0] for i in range(4)]
    batch, found = collate(some, **how), []
    segments = compile_segments(batch.roles, batch.example, table)
    assert isinstance(segments, Segments) and len(segments.blocks) == (1 if letter == "c" else 2)
    for slow in (False, True):
        encoder.backbone.dense_mask = slow
        hidden = encoder.backbone(batch, table)[batch.example >= 0]
        (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        found.append((hidden.detach(), gradients(encoder)))
    encoder.backbone.dense_mask = False
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-5, rtol=1e-4)
    scale = max(float(g.abs().max()) for g in found[1][1].values())
    for name, gradient in found[1][1].items():
        assert float((found[0][1][name] - gradient).abs().max()) < 1e-4 * scale, name


def test_a_teacher_is_the_plain_model_for_the_dialogue(encoder: Encoder) -> None:
    stage = replace(BOTH, objectives={"distillation": 1.0, "masked_token": 1.0})
    plain = replace(load_recipe("vlm").stages[0], layout="raw")
    joint, simple = collate([rows(encoder, i)[0] for i in range(3)]), collate([encoder.preparer.dialogue(talk(i), plain) for i in range(3)])
    at, of = (batch.roles == ROLE_ID["dialogue"] for batch in (joint, simple))
    with torch.no_grad():
        want = encoder.backbone(simple, plain.visibility)
        taught = Teacher(encoder.backbone)(joint, None)
    torch.testing.assert_close(taught[at & (joint.labels >= 0)], want[of & (simple.labels >= 0)], atol=2e-5, rtol=1e-4)
    beside = Beside(teacher=Teacher(encoder.backbone))
    result = token_step(Accelerator(cpu=True), encoder.backbone, [rows(encoder, i)[0] for i in range(3)], stage, 200, beside=beside)
    gradients(encoder)
    assert abs(result.parts["masked_token"] - float(loops(encoder, [rows(encoder, i)[0] for i in range(3)], None).detach())) < 1e-5


def test_masked_patches_beside_a_dialogue(encoder: Encoder) -> None:
    """Joint with pixels: the decoder rebuilds what is hidden of the picture while the dialogue is answered from it."""
    hidden = (Corruption("context", patches=0.5),)
    stage = replace(SAID, objectives={"next_token": 1.0, "masked_patch": 0.5}, corruptions=hidden)
    some = [encoder.preparer.dialogue(talk(i), stage, i) for i in range(3)]
    assert all(len(e.targets) for e in some) and [e.supervised for e in some] == [rows(encoder, i)[1].supervised for i in range(3)]
    beside = Beside(decoder=PatchDecoder.of(encoder.backbone, 1))
    result = token_step(Accelerator(cpu=True), encoder.backbone, some, stage, 200, beside=beside)
    gradients(encoder)
    assert abs(result.parts["next_token"] - float(loops(encoder, some, "dialogue").detach())) < 1e-5 and result.parts["masked_patch"] > 0


def test_tables_and_stages_that_are_refused() -> None:
    roles = BOTH.visibility.roles

    def table(*rows: str, order: tuple[str, ...] = roles) -> dict[str, Any]:
        return {"visibility": Visibility(order, rows)}

    for change, said in [
        (table("c...", "cc..", "ccc.", ".c.c"), "'target' reaches 'context' without"),
        (table("c...", "cc..", ".cc.", "cc.c"), "'dialogue' reaches 'context' without"),
        (table("c...", "cc..", ".cc.", ".ccc"), "one learns of the other"),
        (table("c...", "ccf.", ".cc.", ".c.c"), "one learns of the other"),
        (table("c...", "cc..", ".cc.", ".c.c", order=("context", "compression", "dialogue", "target")), "put 'target' first"),
        ({"corruptions": (), "objectives": {"next_token": 1.0}}, "a corruption of the target's text"),
        ({"corruptions": (Corruption("dialogue", text=0.2), *BOTH.corruptions)}, "a place has one label"),
        ({"supervise": "dialogue"}, "a place has one label"),
        ({"objectives": {"masked_token": 1.0}}, "next_token or distillation for the one"),
    ]:
        with pytest.raises(RecipeError) as error:
            replace(BOTH, **change)
        assert said in str(error.value), change
    assert BOTH.bottleneck == Bottleneck(), "one promise for both readers"


def test_the_text_is_of_the_same_row_and_of_what_is_talked_of(tmp_path: Path) -> None:
    for direction in ("image-to-text", "text-to-image", "both"):
        source = open_source("scenes", limit=30, columns={"direction": direction})
        part = Ingredient("scenes", source)
        for i in range(5):
            told, group = part.dialogue(i, 2, target=True), source.group(i, 2)
            assert told.target in (group.query.text, group.positives[0].text) and told.target
            assert all(thing.colour in told.target and thing.place in told.target for thing in source.rows[i].things)
            assert replace(told, target="") == part.dialogue(i, 2) == source.dialogue(i, 2)
    with pytest.raises(ContentError, match="no text of it to rebuild"):
        Ingredient("scenes", open_source("scenes", limit=30, subset="questions")).dialogue(0, 0, target=True)
    turns = [{"from": "human", "value": "<image>\nq?"}, {"from": "gpt", "value": "a b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns, "image": "a.png"}) + "\n")
    assert Ingredient("llava", open_source("llava", path=tmp_path / "a.jsonl")).dialogue(0, 0, target=True).target == "a b"
