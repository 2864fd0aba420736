"""What compression tokens carry: the loss of plain loops, nothing where nothing can pass, something where they were trained to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from comatch.analysis.carried import Carried, carried
from comatch.content import Message, Text
from comatch.core.packing import collate
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import RecipeError
from comatch.recipes import load_recipe

ROWS = [open_source("scenes", split="test").dialogue(i) for i in range(5)]
PAIRS = [(group.query, group.positives[0]) for group in (open_source("scenes", split="test").group(i) for i in range(5))]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.load("comatch-nano", recipe=load_recipe("coma").with_tokens(2), device="cpu")


def by_hand(encoder: Encoder, rows: list, shift: int) -> float:  # type: ignore[type-arg]
    """Each row alone, each label alone."""
    stage = encoder.recipe.stage("compress")
    total = 0.0
    for i, row in enumerate(rows):
        example = encoder.preparer.dialogue(replace(row, context=rows[(i + shift) % len(rows)].context), stage)
        batch = collate([example], pack=False)
        with torch.no_grad():
            logits = encoder.backbone.head(encoder.backbone(batch, stage.visibility))[0].double().log_softmax(-1)
        places = [(place, int(label)) for place, label in enumerate(example.labels) if label >= 0]
        total -= sum(float(logits[place, label]) for place, label in places) / len(places)
    return total / len(rows)


def test_both_losses_are_those_of_plain_loops(encoder: Encoder) -> None:
    found = carried(encoder, encoder.recipe.stage("compress"), ROWS)
    assert found.own == pytest.approx(by_hand(encoder, ROWS, 0), rel=1e-4)
    assert found.other == pytest.approx(by_hand(encoder, ROWS, 1), rel=1e-4)
    assert found.nats == found.other - found.own and found.rows == 5


def test_equal_contexts_are_worth_nothing_and_an_open_dialogue_is_worth_much(encoder: Encoder) -> None:
    stage = encoder.recipe.stage("compress")
    same = [replace(row, context=ROWS[0].context) for row in ROWS]
    assert carried(encoder, stage, same).nats == pytest.approx(0, abs=1e-6)
    seeing = carried(encoder, load_recipe("coma-no-bottleneck").stage("compress"), ROWS)
    assert seeing.nats > 1 > abs(carried(encoder, stage, ROWS).nats), "untrained tokens carry next to nothing"


def test_a_rebuilt_text_is_measured_too() -> None:
    encoder = Encoder.load("comatch-nano", recipe=load_recipe("cocoa-sealed"), device="cpu")
    stage = encoder.recipe.stage("bridge")
    found = carried(encoder, stage, PAIRS, seed=3)
    assert found == carried(encoder, stage, PAIRS, seed=3) != carried(encoder, stage, PAIRS, seed=4)
    blank = [(Message((Text("nothing"),)), answer) for _, answer in PAIRS]
    assert carried(encoder, stage, blank, seed=3).nats == pytest.approx(0, abs=1e-6)


def test_stages_that_read_nothing_are_refused(encoder: Encoder) -> None:
    with pytest.raises(RecipeError, match="'match' has nothing that is read"):
        carried(encoder, encoder.recipe.stage("match"), ROWS)
    with pytest.raises(RecipeError, match="1 rows; at least 2"):
        carried(encoder, encoder.recipe.stage("compress"), ROWS[:1])
    assert Carried("x", 2, 1.0, 3.0).to_dict() == {"own": 1.0, "other": 3.0, "nats": 2.0}
