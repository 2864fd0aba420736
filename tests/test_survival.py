"""What survives the bottleneck is measured through it and nothing else, and equals answers computed the long way."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comatch.analysis import survival as module
from comatch.analysis.answers import accuracy, answer, looking
from comatch.analysis.survival import Question, scene_questions, survival
from comatch.backbones.base import Backbone
from comatch.content import Message, as_message
from comatch.core.packing import collate
from comatch.data.scene_text import KINDS
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ContentError, DataError, RecipeError
from comatch.recipe import Stage
from comatch.recipes import load_recipe

Folders = Callable[[str], Path]
QUESTIONS = scene_questions(27)
ASKED = [(question.context, question.question) for question in QUESTIONS]
MIXED = [*ASKED[:6], (as_message("a red circle beside a small star"), "what is red?"), (as_message(["two", ASKED[9][0], "three"]), "why?")]


def load(folder_of: Folders, family: str, recipe: str = "coma", tokens: int | None = 4) -> Encoder:
    """A tiny random model that has much to say: a random head on what differs between states, of which most is common to all."""
    encoder = Encoder.load(folder_of(family), recipe=load_recipe(recipe).with_tokens(tokens), device="cpu")
    stage, preparer = load_recipe("vlm").stage("answer"), encoder.preparer
    batch = collate([preparer.finish(preparer.renderer.question(*asked, stage)) for asked in ASKED])
    with torch.no_grad():
        hidden = encoder.backbone(batch, stage.visibility)[batch.example >= 0]
    words = torch.randn(encoder.dim, 300, generator=torch.Generator().manual_seed(1))
    encoder.backbone.head = lambda states: (states - hidden.mean(0)) @ words  # type: ignore[method-assign]
    return encoder


@torch.no_grad()
def the_long_way(encoder: Encoder, asked: Sequence[tuple[Message, str]], stage: Stage, longest: int) -> list[str]:
    """One question at a time, the whole row through the model again for every token, no cache, by the dense mask."""
    renderer, backbone, answers = encoder.preparer.renderer, encoder.backbone, []
    backbone.dense_mask = True
    for message, question in asked:
        row, tokens = renderer.question(message, question, stage), list[int]()
        while len(tokens) < longest and renderer.end not in tokens:
            batch = collate([encoder.preparer.finish(row)], pack=False)
            hidden = backbone(batch, stage.visibility)[0, len(row.ids) - 1]
            tokens.append(int(backbone.head(hidden[None]).argmax()))
            row.add(tokens[-1:], "dialogue")
        answers.append(backbone.tokenizer.decode([token for token in tokens if token != renderer.end]).strip())
    backbone.dense_mask = False
    return answers


# --- answers


@pytest.mark.parametrize("at_context", [False, True])
def test_answers_equal_those_computed_the_long_way(folder_of: Folders, family: str, at_context: bool) -> None:
    encoder = load(folder_of, family)
    stage = looking(encoder.recipe.stage("compress"), at_context)
    slow = the_long_way(encoder, MIXED, stage, 6)
    assert answer(encoder, MIXED, stage, longest=6) == slow
    assert answer(encoder, MIXED, stage, longest=6, batch_tokens=1) == slow, "passes do not matter"
    assert answer(encoder, MIXED[::-1], stage, longest=6) == slow[::-1]
    assert len(set(slow)) > 1 and answer(encoder, MIXED, looking(stage, not at_context), longest=6) != slow


def test_answers_of_a_plain_vlm_equal_the_long_way_and_are_right() -> None:
    recipe = load_recipe("vlm")
    encoder = Encoder(Backbone.load("comatch-nano", recipe).eval(), recipe)
    stage = recipe.stage("rehearse")
    said = answer(encoder, ASKED, stage)
    assert said == the_long_way(encoder, ASKED, stage, 16)
    assert accuracy(said, [q.answer for q in QUESTIONS], [q.kinds for q in QUESTIONS])["all"][0] > 0.8


def test_an_answer_ends_where_the_model_ends_it_or_at_the_longest(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(folder_of, "qwen2_5_vl")
    stage = encoder.recipe.stage("compress")
    full = [encoder.backbone.tokenizer.encode(words) for words in answer(encoder, ASKED[:3], stage, longest=5)]
    assert all(full) and answer(encoder, ASKED[:3], stage, longest=0) == ["", "", ""]
    end = encoder.preparer.renderer.end
    monkeypatch.setattr(encoder.backbone, "head", lambda hidden: torch.eye(end + 1)[[end] * len(hidden)])
    assert answer(encoder, ASKED[:3], stage) == ["", "", ""]
    assert answer(encoder, [], stage) == []


def test_an_answer_reads_a_context_once(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(folder_of, "qwen2_5_vl")
    pictures: list[int] = []
    real = Backbone.forward

    def counted(self: Backbone, batch: Any, *rest: Any, **more: Any) -> torch.Tensor:
        pictures.append(len(batch.grids))
        return real(self, batch, *rest, **more)

    monkeypatch.setattr(Backbone, "forward", counted)
    answer(encoder, ASKED, encoder.recipe.stage("compress"), longest=4)
    assert pictures == [3], "27 questions, 3 pictures, one pass"


def test_what_cannot_answer_says_so(folder_of: Folders) -> None:
    with pytest.raises(RecipeError, match="lacks \\['dialogue'\\]"):
        answer(load(folder_of, "qwen2_vl"), ASKED[:1], load_recipe("coma").stage("match"))
    with pytest.raises(RecipeError, match="lacks \\['compression'\\]"):
        looking(load_recipe("vlm").stage("answer"), at_context=False)
    with pytest.raises(ContentError, match="item 1"):
        answer(load(folder_of, "qwen2_vl"), [ASKED[0], (as_message(Path("none.png")), "what?")], load_recipe("coma").stage("compress"))


def test_an_answer_counts_in_each_of_its_kinds_and_once_in_all() -> None:
    assert accuracy(["a", "b", "c"], ["a", "b", "x"], ["k", ("k", "m"), ("m",)]) == {"all": (2 / 3, 3), "k": (1, 2), "m": (0.5, 2)}


# --- the bottleneck


@pytest.mark.parametrize("recipe", ["coma", "coma-released", "coma-no-bottleneck", "coma-full", "coma-joint"])
def test_only_the_compression_tokens_are_seen(folder_of: Folders, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the keys and values of the compression tokens zeroed, all contexts get the same answers; when looking they do not."""
    encoder = load(folder_of, "qwen2_5_vl", recipe)
    stage = module._speaking(encoder.recipe)
    same = [(message, "what is it?") for message in dict.fromkeys(message for message, _ in ASKED)]
    from comatch.analysis import answers

    right, compression = answers._slots, encoder.recipe.tokens

    def emptied(*args: Any) -> Any:
        cache, filled = right(*args)
        for layer in cache.layers:
            layer.keys[:, :, -compression:], layer.values[:, :, -compression:] = 0, 0
        return cache, filled

    def said(at_context: bool) -> int:
        return len(set(answer(encoder, same, looking(stage, at_context), longest=6)))

    slots = {at: right(encoder.backbone, [encoder.preparer.item(ASKED[0][0], encoder.recipe.stages[-1])], looking(stage, at).visibility,
                       torch.zeros(1, dtype=torch.long))[1].shape[1] for at in (False, True)}  # fmt: skip
    assert slots == {False: compression, True: compression + 11}, "nine visual tokens between two marks"
    assert said(False) > 1
    monkeypatch.setattr(answers, "_slots", emptied)
    assert said(False) == 1 and said(True) > 1


def test_blind_and_seeing_change_one_letter_each() -> None:
    coma, released = load_recipe("coma").stage("compress"), load_recipe("coma-released").stage("compress")
    assert looking(coma, False) == coma and looking(released, True) == released
    assert looking(coma, True).visibility == released.visibility and looking(released, False).visibility == coma.visibility
    assert looking(released, False).bottleneck is not None and looking(coma, True).bottleneck is None
    deaf = replace(coma.visibility, table=("c..", ".c.", "ccc"))
    with pytest.raises(RecipeError, match="does not carry"):
        looking(replace(released, visibility=deaf), False)


# --- survival


@pytest.mark.parametrize("recipe", ["coma", "coma-no-bottleneck"])
def test_survival_is_its_parts(folder_of: Folders, recipe: str) -> None:
    encoder = load(folder_of, "qwen2_5_vl", recipe)
    found = survival(encoder, QUESTIONS, seed=3, longest=4)
    stage = encoder.recipe.stage("compress")
    assert list(found.said) == answer(encoder, ASKED, looking(stage, False), longest=4)
    assert list(found.said_looking) == answer(encoder, ASKED, looking(stage, True), longest=4)
    others = zip(module._others([message for message, _ in ASKED], 3), ASKED, strict=True)
    assert list(found.said_another) == answer(encoder, [(o, q) for o, (_, q) in others], looking(stage, False), longest=4)
    assert len({found.said, found.said_looking, found.said_another}) == 3
    assert found.trained_looking == (recipe != "coma") and found.tokens == 4
    told = json.loads(json.dumps(found.to_dict()))
    assert list(told["by_kind"]) == ["all", *KINDS, "large object", "small object"] and told["stage"] == "compress"
    assert told["by_kind"]["all"]["n"] == 27 and all(told["by_kind"][kind]["n"] == 3 for kind in KINDS)


def test_right_answers_are_counted_where_they_belong(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers rightly from its own tokens, and what another scene would answer from another's."""
    encoder, questions = load(folder_of, "qwen2_5_vl"), scene_questions(900)
    truth = {(question.context, question.kinds[0]): question.answer for question in questions}
    kinds = {question.question: question.kinds[0] for question in questions}

    def oracle(_: Encoder, asked: Any, stage: Stage, **__: Any) -> list[str]:
        return ["wrong" if stage.visibility.sees("dialogue", "context") else truth[context, kinds[question]] for context, question in asked]

    monkeypatch.setattr(module, "answer", oracle)
    found = survival(encoder, questions).by_kind
    assert all(row.kept == 1 and row.looking == 0 and row.another < 0.75 for row in found.values())
    assert found["background"].another == pytest.approx(0.25, abs=0.12) and 0.25 <= found["background"].commonest < 0.4
    assert found["exists"].another == pytest.approx(0.5, abs=0.15) and found["colour"].another < 0.3
    assert found["all"].commonest == pytest.approx(sum(found[kind].commonest for kind in KINDS) / len(KINDS))
    assert found["small object"].n + found["large object"].n == 300, "colour, shape and place, on each of a hundred scenes"


def test_the_commonest_answer_is_told_for_each_first_kind_within_a_row() -> None:
    truth = ["red", "red", "blue", "ring", "star", "ring"]
    kinds = [("colour", "small"), ("colour",), ("colour", "small"), ("shape", "small"), ("shape",), ("shape", "small")]
    assert module._commonest(truth, kinds) == {"all": 4 / 6, "colour": 2 / 3, "shape": 2 / 3, "small": 3 / 4}


def test_another_item_is_never_the_same_and_serves_all_its_questions() -> None:
    contexts = [message for message, _ in ASKED]
    found = module._others(contexts, 0)
    pairs = set(zip(contexts, found, strict=True))
    assert len(pairs) == 3 and all(own != other for own, other in pairs) and {other for _, other in pairs} == set(contexts)
    with pytest.raises(ContentError, match="1 contexts"):
        module._others(contexts[:9], 0)


@pytest.mark.parametrize(("recipe", "tokens"), [("cocoa", 1), ("matching", 4), ("matching-last", None), ("moca", None)])
def test_a_recipe_that_never_spoke_names_the_next_step(folder_of: Folders, recipe: str, tokens: int | None) -> None:
    with pytest.raises(RecipeError, match=f"{recipe}.*never learned to answer.*--probes"):
        survival(load(folder_of, "qwen2_5_vl", recipe, tokens), QUESTIONS)


def test_a_bridge_can_be_asked_in_another_recipes_words(folder_of: Folders) -> None:
    encoder = load(folder_of, "qwen2_5_vl", "cocoa", 1)
    found = survival(encoder, QUESTIONS, stage=load_recipe("coma").stage("compress"), longest=3)
    assert found.tokens == 1 and found.recipe == "cocoa" and any(found.said)


# --- questions


def test_questions_are_true_of_their_scene_and_of_every_kind() -> None:
    assert [question.kinds[0] for question in QUESTIONS[:9]] == list(KINDS)
    assert scene_questions(27) == QUESTIONS and scene_questions(27, seed=1) != QUESTIONS
    assert len(scene_questions(28)) == 36 and len(scene_questions(1)) == 18
    for i in range(40):
        one = scene(0, i, "test")
        for thing in one.things:
            for seed in range(6):
                assert one.ask("colour", seed, thing)[1] == thing.colour and one.ask("place", seed, thing)[1] == thing.place
                question, true = one.ask("shape", seed, thing)
                assert true == thing.shape and thing.shape not in question
        assert one.ask("background", 0)[1] == one.background


def test_objects_of_other_scenes_and_unknown_kinds_are_refused() -> None:
    one, other = scene(0, 0), scene(0, 1)
    with pytest.raises(DataError, match="relation"):
        one.ask("relation", 0, one.things[0])
    with pytest.raises(DataError, match="allowed"):
        one.ask("weight", 0)
    with pytest.raises(DataError, match="object of the scene"):
        one.ask("colour", 0, next(thing for thing in other.things if thing not in one.things))


def test_a_dialogue_is_what_it_was_before_questions_could_be_asked_apart() -> None:
    told = scene(0, 0).dialogue(0, 9)
    assert Question(as_message("x"), *told[0][:2], (told[0][2],)).kinds[0] in KINDS
    assert [turn[2] for turn in told].count("count") >= 1 and len(told) == 9
