"""Compression tokens that specialise: any first few of them are what a model of so few would have, and alike ones cost something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from comatch.content import Dialogue, as_message
from comatch.core.batch import IGNORE, ROLE_ID, Example
from comatch.core.nested import kept
from comatch.core.packing import collate
from comatch.data.mixture import Ingredient, Mixture
from comatch.data.scenes import scene
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import RecipeError
from comatch.objectives.orthogonality import orthogonality
from comatch.recipe import Recipe, Stage, Visibility
from comatch.recipes import load_recipe
from comatch.training.loader import StageData, batches
from comatch.training.rows import token_step
from comatch.training.teacher import Teacher

K = 8
NESTED = load_recipe("coma-nested").with_tokens(K)
COMPRESS = NESTED.stage("compress")
APART = load_recipe("coma-apart").with_tokens(K)
C = ROLE_ID["compression"]
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def encoder(folder_of: Folders) -> Encoder:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=NESTED)
    encoder.backbone.vision_tower.requires_grad_(False)
    return encoder


def talk(i: int = 0) -> Dialogue:
    return Dialogue(as_message(scene(1, i).draw()), tuple((q, a) for q, a, _ in scene(1, i).dialogue(i, 1 + i % 3)))


def length(example: Example) -> int:
    return int((example.roles == C).sum())


def of_length(encoder: Encoder, k: int, i: int = 0, stage: Stage = COMPRESS) -> Example:
    """The row of a dialogue that keeps k tokens."""
    seed = next(seed for seed in range(1000) if kept(K, stage.nested, seed) == k)
    return encoder.preparer.dialogue(talk(i), stage, seed)


WAYS = [(8, "any", range(1, 9)), (8, "doubling", (1, 2, 4, 8)), (6, "doubling", (1, 2, 4, 6)), (6, "none", (6,))]


def test_how_many_are_kept() -> None:
    for tokens, nested, ladder in WAYS:
        drawn = Counter(kept(tokens, nested, seed) for seed in range(2000))
        assert sorted(drawn) == list(ladder)
        assert max(abs(n / 2000 - 1 / len(ladder)) for n in drawn.values()) < 0.03, "each equally often"
        assert [kept(tokens, nested, seed) for seed in range(50)] == [kept(tokens, nested, seed) for seed in range(50)]


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_a_row_of_the_first_tokens_is_that_of_a_model_of_so_few(encoder: Encoder, k: int) -> None:
    few = Encoder(encoder.backbone, NESTED.with_tokens(k) if k > 1 else replace(load_recipe("coma"), tokens=1))
    short, own = of_length(encoder, k), few.preparer.dialogue(talk(), load_recipe("coma").stage("compress"))
    for name in ("ids", "roles", "labels", "positions"):
        assert np.array_equal(getattr(short, name), getattr(own, name)), name
    whole = encoder.preparer.dialogue(talk(), COMPRESS)
    assert length(short) == k and length(whole) == K
    n = int((short.roles != ROLE_ID["dialogue"]).sum())
    for table, same in ((COMPRESS.visibility, True), (load_recipe("coma-full").stage("compress").visibility, k == K)):
        with torch.no_grad():
            a, b = (encoder.backbone(collate([e]), table)[0, :n] for e in (short, whole))
        assert (float((a - b).abs().max()) < 1e-5) == same, "causal tokens do not know how many follow, full ones do"


def test_a_vector_of_the_first_tokens_is_their_mean(encoder: Encoder) -> None:
    picture = as_message(scene(2, 0).draw())
    item = encoder.preparer.item(picture, encoder.stage)
    assert length(item) == K, "items to match keep all"
    with torch.no_grad():
        states = encoder.backbone(collate([item]), encoder.stage.visibility)[0, np.flatnonzero(item.roles == C)]
    found = [Encoder(encoder.backbone, NESTED.with_tokens(k)).encode([picture])[0] for k in (2, 4, 8)]
    for k, vector in zip((2, 4, 8), found, strict=True):
        want = torch.nn.functional.normalize(states[:k].mean(0), dim=0)
        torch.testing.assert_close(torch.from_numpy(vector), want, atol=1e-5, rtol=1e-4)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_a_draw_is_of_the_row_for_any_number_of_workers_and_ranks(encoder: Encoder) -> None:
    mixture = Mixture((Ingredient("scenes", open_source("scenes", limit=20)),))
    data = StageData(mixture, encoder.preparer, COMPRESS, seed=3, batch=4)
    seen = {w: [[e.labelled.ids.tolist() for e in batch] for batch in batches(data, 0, 12, w)] for w in (0, 2)}
    assert seen[0] == seen[2]
    halves = [StageData(mixture, encoder.preparer, COMPRESS, seed=3, batch=4, rank=r, ranks=2) for r in (0, 1)]
    costly = [replace_cost(half) for half in halves]
    assert [s.labelled.ids.tolist() for pair in zip(*(h[0] for h in halves), strict=True) for s in pair] == seen[0][0]
    assert sorted(s.labelled.ids.tolist() for half in costly for s in half[0]) == sorted(seen[0][0])
    drawn = Counter(length(s.labelled) for step in range(12) for s in data[step])
    assert sorted(drawn) == [1, 2, 4, 8]
    by_row = {(s.row, length(s.labelled)) for step in range(12) for s in data[step]}
    assert len(by_row) > len({row for row, _ in by_row}), "another epoch draws another number"


def replace_cost(data: StageData) -> StageData:
    """The same data dealt out by length; each length told must be that of the row that is made."""
    weighed = StageData(data.mixture, data.preparer, data.stage, seed=3, batch=4, rank=data.rank, ranks=2, cost=lambda size: size.tokens)
    for place in data.mixture.places(0, 4):
        row = next(data.mixture.rows(*place, 3))
        (rendered,) = data._told_rows(place[0], *row)
        assert len(rendered.ids) == len(data._told(data.preparer, place[0], *row).ids)
    return weighed


def test_dropped_tokens_learn_nothing_and_the_loss_is_that_of_the_rows(encoder: Encoder) -> None:
    some = [of_length(encoder, k, i) for i, k in enumerate((1, 2, 4, 4))]
    total = torch.zeros(())
    for example in some:
        hidden = encoder.backbone(collate([example]), COMPRESS.visibility)[0]
        places = [j for j, label in enumerate(example.labels) if label != IGNORE]
        logits = encoder.backbone.head(hidden[places]).log_softmax(-1)
        total = total - torch.stack([logits[n, example.labels[j]] for n, j in enumerate(places)]).mean() / 4
    result = token_step(Accelerator(cpu=True), encoder.backbone, some, COMPRESS, 100_000)
    assert abs(result.loss - float(total.detach())) < 1e-5
    slope = encoder.backbone.rows.grad
    assert slope is not None and (slope[:4].abs().amax(1) > 0).all() and (slope[4:] == 0).all()
    encoder.backbone.zero_grad()


def test_a_teacher_closes_gaps_of_unequal_length(encoder: Encoder) -> None:
    batch = collate([of_length(encoder, k, i) for i, k in enumerate((1, 8, 4))])
    stage = replace(load_recipe("vlm").stages[0], layout="raw")
    plain = collate([encoder.preparer.dialogue(talk(i), stage) for i in range(3)])
    with torch.no_grad():
        want = encoder.backbone(plain, stage.visibility)[plain.labels != IGNORE]
        assert torch.equal(plain.labels[plain.labels != IGNORE], batch.labels[batch.labels != IGNORE])
        torch.testing.assert_close(Teacher(encoder.backbone)(batch, None)[batch.labels != IGNORE], want, atol=2e-5, rtol=1e-4)


def test_what_cannot_be_nested_is_refused() -> None:
    roles = COMPRESS.visibility.roles
    for change, said in [
        ({"nested": "some"}, "doubling"),
        ({"visibility": Visibility(roles, ("c..", "cf.", ".cc"))}, "depend on later"),
        ({"visibility": Visibility(roles, ("ff.", "fc.", ".cc"))}, "depend on later"),
        ({"visibility": Visibility(("context", "dialogue"), ("c.", "cc")), "bottleneck": None}, "no rows with labels and compression"),
    ]:
        with pytest.raises(RecipeError, match=said):
            replace(COMPRESS, **change)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no rows with labels"):
        replace(NESTED.stage("match"), nested="any")
    with pytest.raises(RecipeError, match="orthogonality is of"):
        replace(NESTED.stage("match"), objectives={"contrastive": 1.0, "orthogonality": 1.0})
    for recipe in (NESTED, APART):
        with pytest.raises(RecipeError, match="2 or more"):
            recipe.with_tokens(1)
        assert Recipe.from_json(recipe.to_json()) == recipe
    assert '"nested": "doubling"' in NESTED.to_json() and "nested" not in load_recipe("coma").to_json()


# --- orthogonality


def by_hand(states: torch.Tensor) -> torch.Tensor:
    """[K, dim] -> mean over pairs of different states of their squared cosine."""
    pairs = [(a, b) for i, a in enumerate(states) for j, b in enumerate(states) if i != j]
    found = [(a @ b / a.norm() / b.norm()) ** 2 for a, b in pairs]
    return torch.stack(found).mean() if found else torch.zeros(())


def test_orthogonality_in_plain_loops() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, 6)
    example = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1], [3, 3, 3, 2, 2, 2, 2, -1, -1]])
    chosen = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0]]).bool()
    leaf = hidden.clone().requires_grad_(True)
    got = orthogonality(leaf, chosen, example, 4)
    got.sum().backward()
    other = hidden.clone().requires_grad_(True)
    want = torch.stack([by_hand(other[chosen & (example == i)]) for i in range(4)])
    want.sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(leaf.grad, other.grad)
    assert want[2] == want[3] == 0 and want[:2].min() > 0 and leaf.grad is not None and leaf.grad.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(orthogonality(hidden, chosen, example, 4), want.detach())
    nobody = orthogonality(hidden, torch.zeros_like(chosen), example, 4)
    assert nobody.tolist() == [0.0] * 4


def test_orthogonality_from_alike_to_apart() -> None:
    example, chosen = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool)
    alike, apart = torch.ones(1, 5, 7) * torch.arange(1, 6)[None, :, None], torch.eye(7)[None, :5] * 3
    assert abs(float(orthogonality(alike, chosen, example, 1)) - 1) < 1e-6
    assert float(orthogonality(apart, chosen, example, 1)) == 0
    assert float(orthogonality(-apart + 2 * alike, chosen, example, 1)) > 0.5, "a mean that all share counts as alike"


def test_a_step_of_both_losses(encoder: Encoder) -> None:
    """A row with one token has no pair of them, so it is not in the mean."""
    stage = replace(COMPRESS, objectives={"next_token": 1.0, "orthogonality": 0.3})
    some, pairs, words = [of_length(encoder, k, i) for i, k in enumerate((1, 2, 8))], [], []
    for example in some:
        hidden = encoder.backbone(collate([example]), COMPRESS.visibility)[0, : len(example)]
        pairs += [by_hand(hidden[torch.from_numpy(example.roles == C)])] * (length(example) > 1)
        places = [j for j, label in enumerate(example.labels) if label != IGNORE]
        logits = encoder.backbone.head(hidden[places]).log_softmax(-1)
        words.append(-torch.stack([logits[n, example.labels[j]] for n, j in enumerate(places)]).mean())
    assert len(pairs) == 2
    loss = torch.stack(words).mean() + 0.3 * torch.stack(pairs).mean()
    loss.backward()
    want = {name: p.grad.clone() for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    encoder.backbone.zero_grad()
    for budget in (1, 100_000):
        result = token_step(Accelerator(cpu=True), encoder.backbone, some, stage, budget)
        assert abs(result.loss - float(loss.detach())) < 1e-5
        penalty = result.parts["orthogonality"]
        assert abs(penalty - float(torch.stack(pairs).mean().detach())) < 1e-5 and penalty > 0.01
        scale = max(float(g.abs().max()) for g in want.values())
        for name, gradient in want.items():
            got = encoder.backbone.get_parameter(name).grad
            assert got is not None and float((got - gradient).abs().max()) < 1e-4 * scale, name
        encoder.backbone.zero_grad()


def test_the_penalty_lets_tokens_differ(encoder: Encoder) -> None:
    """A few steps with the penalty make the cosines of this batch small, the same steps without do not."""
    found = {}
    start = {name: p.detach().clone() for name, p in encoder.backbone.named_parameters()}
    some = [encoder.preparer.dialogue(talk(i), COMPRESS) for i in range(3)]
    for weight in (1e-9, 3.0):
        stage = replace(COMPRESS, objectives={"next_token": 1.0, "orthogonality": weight})
        optimizer = torch.optim.AdamW([p for p in encoder.backbone.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(12):
            result = token_step(Accelerator(cpu=True), encoder.backbone, some, stage, 100_000)
            optimizer.step()
            optimizer.zero_grad()
        found[weight] = result.parts["orthogonality"]
        with torch.no_grad():
            for name, p in encoder.backbone.named_parameters():
                p.copy_(start[name])
    assert found[3.0] < 0.5 * found[1e-9]
