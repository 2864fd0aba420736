"""The contrastive loss against plain loops over plain numbers, every addition alone and many together; each with proof that it acts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from comatch.config import LossConfig, OptimConfig
from comatch.core.batch import ROLE_ID
from comatch.core.pooling import group_means, pool
from comatch.objectives.contrastive import Pairing, group, info_nce, similarity
from comatch.objectives.temperature import Temperature

K, DIM, GUIDE = 4, 6, 5


@dataclass
class Item:
    states: list[list[float]]  # K states of the compression tokens
    key: int
    guide: list[float]


@dataclass
class Sample:
    query: Item
    positives: list[Item]
    negatives: list[Item] = field(default_factory=list)


def world(seed: int = 0) -> list[Sample]:
    """Seven queries, one to three positives each, none to two negatives; some items are equal on purpose."""
    generator = torch.Generator().manual_seed(seed)
    known: dict[int, Item] = {}

    def item(key: int) -> Item:
        if key < 0 or key not in known:
            guide = F.normalize(torch.randn(GUIDE, generator=generator, dtype=torch.float64), dim=0)
            made = Item(torch.randn(K, DIM, generator=generator, dtype=torch.float64).tolist(), key, guide.tolist())
            if key < 0:
                return made
            known[key] = made
        return known[key]

    return [
        Sample(item(1), [item(101)], [item(201), item(-1)]),
        Sample(item(2), [item(102), item(103), item(104)], [item(202)]),
        Sample(item(3), [item(101)], []),  # the positive of the first query
        Sample(item(4), [item(105)], [item(102), item(105)]),  # another's positive, and its own
        Sample(item(1), [item(106)], [item(203)]),  # the first query again
        Sample(item(107), [item(107)], [item(204)]),  # positive equal to query
        Sample(item(-1), [item(-1), item(105)], [item(205), item(206)]),  # unknown keys equal nothing
    ]


# The reference: no tensors below, every rule spelled out once.


def unit(vector: list[float]) -> list[float]:
    norm = math.sqrt(sum(x * x for x in vector))
    return [x / norm for x in vector]


def vectors(item: Item, count: int, dim: int) -> list[list[float]]:
    size = K // count
    means = [[sum(item.states[g * size + t][d] for t in range(size)) / size for d in range(DIM)] for g in range(count)]
    return [unit(mean[:dim]) for mean in means]


def maxsim(query: Item, candidate: Item, count: int, dim: int) -> float:
    mine, theirs = vectors(query, count, dim), vectors(candidate, count, dim)
    return sum(max(sum(a * b for a, b in zip(x, y, strict=True)) for y in theirs) for x in mine) / count


def agreement(query: Item, candidate: Item) -> float:
    return sum(a * b for a, b in zip(query.guide, candidate.guide, strict=True))


def equal(a: Item, b: Item) -> bool:
    return a.key >= 0 and a.key == b.key


def term(own: float, others: list[tuple[float, float]], judged: float, config: LossConfig, guided: bool) -> tuple[float, bool]:
    """Loss of one term, and whether its target ranks first. others: (similarity, opinion of the guide)."""
    total, best = math.exp(own / config.temperature), True
    for sim, opinion in others:
        limit = (judged if guided else own) + (config.mask_margin or 0.0)
        if (guided or config.mask_margin is not None) and (opinion if guided else sim) > limit:
            continue
        weight = math.exp(config.strength * sim) if config.hardness == "llave" else 1.0
        total += weight * math.exp(sim / config.temperature)
        best = best and sim < own
    loss = math.log(total) - own / config.temperature
    if config.hardness == "focal":
        loss *= (1 - math.exp(-loss)) ** config.strength
    return loss, best


def reference(samples: list[Sample], config: LossConfig, guided: bool = False) -> tuple[float, float]:
    total, weights, first = 0.0, 0.0, None
    for count in config.vectors:
        for dim, weight in [(DIM, 1.0), *zip(config.dims, config.dim_weights or [1.0] * len(config.dims), strict=True)]:
            loss, hits = reference_of(samples, config, count, dim, guided)
            total, weights = total + weight * loss, weights + weight
            first = hits if first is None else first
    assert first is not None
    return total / weights, first


def reference_of(samples: list[Sample], config: LossConfig, count: int, dim: int, guided: bool) -> tuple[float, float]:
    forth, back, hits = [], [], []
    for i, sample in enumerate(samples):
        for positive in sample.positives:
            own, judged = maxsim(sample.query, positive, count, dim), agreement(sample.query, positive)
            others = []
            for j, other in enumerate(samples):
                pool_ = [(c, True) for c in other.positives] + [(c, False) for c in other.negatives]
                for candidate, given in pool_:
                    if i == j and given:
                        continue
                    if i != j and not given and config.negatives == "own":
                        continue
                    answers = [sample.query, *sample.positives]
                    if config.mask_duplicates and any(equal(candidate, answer) for answer in answers):
                        continue
                    others.append((maxsim(sample.query, candidate, count, dim), agreement(sample.query, candidate)))
            loss, hit = term(own, others, judged, config, guided)
            forth.append(loss)
            hits.append(hit)
            others = []
            for j, other in enumerate(samples):
                twin = equal(other.query, sample.query) or any(equal(positive, answer) for answer in [other.query, *other.positives])
                if i == j or (config.mask_duplicates and twin):
                    continue
                others.append((maxsim(other.query, positive, count, dim), agreement(other.query, positive)))
            back.append(term(own, others, judged, config, guided)[0])
    loss = sum(forth) / len(forth)
    if config.symmetric:
        loss = (loss + sum(back) / len(back)) / 2
    return loss, sum(hits) / len(hits)


# What is tested, fed from the same samples.


def tensors(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, Pairing, tuple[torch.Tensor, torch.Tensor]]:
    candidates = [(i, c, n < len(s.positives)) for i, s in enumerate(samples) for n, c in enumerate([*s.positives, *s.negatives])]
    pairing = Pairing(
        torch.tensor([i for i, _, _ in candidates]),
        torch.tensor([given for _, _, given in candidates]),
        torch.tensor([s.query.key for s in samples]),
        torch.tensor([c.key for _, c, _ in candidates]),
    )
    double = torch.float64
    queries = torch.tensor([s.query.states for s in samples], dtype=double, requires_grad=True)
    others = torch.tensor([c.states for _, c, _ in candidates], dtype=double, requires_grad=True)
    guide = torch.tensor([s.query.guide for s in samples], dtype=double), torch.tensor([c.guide for _, c, _ in candidates], dtype=double)
    return queries, others, pairing, guide


CASES: dict[str, dict[str, Any]] = {
    "plain": {"mask_duplicates": False},
    "symmetric": {"symmetric": True, "mask_duplicates": False},
    "own negatives": {"negatives": "own"},
    "duplicates": {"symmetric": True},
    "margin": {"mask_margin": 0.05},
    "negative margin": {"mask_margin": -0.1, "symmetric": True},
    "llave": {"hardness": "llave"},
    "llave weak": {"hardness": "llave", "hardness_strength": 2.0, "symmetric": True},
    "focal": {"hardness": "focal", "symmetric": True},
    "focal strong": {"hardness": "focal", "hardness_strength": 2.0},
    "dims": {"dims": [2, 4]},
    "dims weighted": {"dims": [1, 3], "dim_weights": [0.5, 2.0], "symmetric": True},
    "vectors": {"vectors": [4], "symmetric": True},
    "nested vectors": {"vectors": [1, 2, 4]},
    "everything": {"vectors": [2, 4], "dims": [3], "hardness": "llave", "mask_margin": 0.1, "negatives": "own", "symmetric": True},
}


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("case", CASES)
def test_loss_equals_plain_loops(case: str, guided: bool) -> None:
    config = LossConfig(temperature=0.2, **CASES[case])
    samples = world()
    queries, candidates, pairing, guide = tensors(samples)
    got, accuracy = info_nce(queries, candidates, pairing, config, guide=guide if guided else None)
    want, hits = reference(samples, config, guided)
    assert abs(float(got.detach()) - want) < 1e-9
    assert float(accuracy) == pytest.approx(hits)
    plain = LossConfig(temperature=0.2, mask_duplicates=False)
    if case != "plain":
        assert abs(want - reference(samples, plain)[0]) > 1e-4, "the addition must change the loss, or its equality says nothing"
    if guided:
        assert abs(want - reference(samples, config)[0]) > 1e-4


@pytest.mark.parametrize("case", CASES)
def test_chunks_change_nothing(case: str) -> None:
    config = LossConfig(temperature=0.2, **CASES[case])
    found = []
    for cells in (1, 40, 1 << 24):
        queries, candidates, pairing, guide = tensors(world())
        loss, accuracy = info_nce(queries, candidates, pairing, config, guide=guide, cells=cells)
        gradients = torch.autograd.grad(loss, [queries, candidates])
        found.append((loss, accuracy, *gradients))
    for other in found[:2]:
        for a, b in zip(other, found[2], strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)
    assert found[2][2].abs().max() > 1e-3


@pytest.mark.parametrize("case", ["plain", "everything", "duplicates", "nested vectors"])
def test_gradient_is_that_of_the_plain_loops(case: str) -> None:
    # Weights that depend on the cosine carry no gradient, so plain differences are of a loss without them.
    config = LossConfig(temperature=0.2, **{key: value for key, value in CASES[case].items() if key != "hardness"})
    samples = world()
    queries, candidates, pairing, _ = tensors(samples)
    loss, _ = info_nce(queries, candidates, pairing, config)
    gradient = torch.autograd.grad(loss, queries)[0]
    step = 1e-6
    for i, t, d in ((0, 0, 0), (3, 2, 5), (6, 3, 1)):
        twin = world()
        twin[i].query = Item([list(row) for row in twin[i].query.states], twin[i].query.key, twin[i].query.guide)
        values = []
        for sign in (1, -1):
            twin[i].query.states[t][d] = samples[i].query.states[t][d] + sign * step
            values.append(reference(twin, config)[0])
        assert float(gradient[i, t, d]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("hardness", ["llave", "focal"])
def test_hardness_weights_have_no_gradient(hardness: Any) -> None:
    config = LossConfig(temperature=0.2, hardness=hardness, mask_duplicates=False)
    plain = LossConfig(temperature=0.2, mask_duplicates=False)
    queries, candidates, pairing, _ = tensors([Sample(s.query, s.positives[:1]) for s in world()])
    gradient = torch.autograd.grad(info_nce(queries, candidates, pairing, config)[0], queries)[0]
    unit_q, unit_c = (F.normalize(x.mean(1), dim=-1) for x in (queries, candidates))
    sims = unit_q @ unit_c.T
    with torch.no_grad():
        off = ~torch.eye(len(sims), dtype=torch.bool)
        bonus = config.strength * sims * off if hardness == "llave" else torch.zeros_like(sims)
    losses = F.cross_entropy(sims / 0.2 + bonus, torch.arange(len(sims)), reduction="none")
    weights = (1 - (-losses.detach()).exp()) ** config.strength if hardness == "focal" else torch.ones_like(losses)
    want = torch.autograd.grad((losses * weights).mean(), queries)[0]
    torch.testing.assert_close(gradient, want)
    without = torch.autograd.grad(info_nce(queries, candidates, pairing, plain)[0], queries)[0]
    assert (gradient - without).abs().max() > 1e-4


def test_one_vector_is_mean_pooling_and_all_are_the_tokens() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 2 * K + 3, DIM)
    roles = torch.full((1, 2 * K + 3), ROLE_ID["context"], dtype=torch.int8)
    roles[:, 1 : 1 + K] = roles[:, 2 + K : 2 + 2 * K] = ROLE_ID["compression"]
    example = torch.tensor([[0] * (K + 1) + [1] * (K + 1) + [-1]])
    tokens = torch.stack([hidden[0, 1 : 1 + K], hidden[0, 2 + K : 2 + 2 * K]])
    means = group_means(hidden, roles, example, 2, "mean_compression", K)
    assert torch.equal(means, tokens)
    one = pool(hidden, roles, example, 2, "mean_compression")
    torch.testing.assert_close(F.normalize(group(means, 1).squeeze(1), dim=-1), one)
    two = pool(hidden, roles, example, 2, "mean_compression", 2)
    torch.testing.assert_close(two, F.normalize(tokens.view(2, 2, 2, DIM).mean(2), dim=-1))
    torch.testing.assert_close(two, F.normalize(group(means, 2), dim=-1))
    assert (two[:, 0] - two[:, 1]).abs().max() > 0.1
    with pytest.raises(ValueError, match="4 groups of tokens do not make 3 vectors"):
        group(means, 3)


def test_maxsim_of_equal_items_is_one_and_bounds_hold() -> None:
    torch.manual_seed(0)
    a, b = (F.normalize(torch.randn(5, 4, DIM), dim=-1) for _ in range(2))
    sims = similarity(a, b)
    torch.testing.assert_close(similarity(a, a).diagonal(), torch.ones(5))
    assert sims.abs().max() < 1
    assert not torch.allclose(sims, similarity(b, a).T), "MaxSim has a direction"


def test_similarities_are_never_held_whole() -> None:
    """The largest tensor saved for the gradient stays below the matrix of similarities."""
    n = 64
    queries, candidates = (torch.randn(n, DIM, requires_grad=True) for _ in range(2))
    pairing = Pairing(torch.arange(n), torch.ones(n, dtype=torch.bool), torch.full((n,), -1), torch.full((n,), -1))

    def largest(cells: int) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            info_nce(queries, candidates, pairing, LossConfig(), cells=cells)
        return max(sizes)

    assert largest(n * n) >= n * n > largest(n * 8)


def test_a_learned_temperature_learns_and_stays_in_range() -> None:
    config = LossConfig(temperature=0.5, learn_temperature=True, temperature_range=(0.3, 0.6), temperature_lr=0.5)
    module = Temperature(config)
    queries, candidates, pairing, _ = tensors(world())
    loss, _ = info_nce(queries, candidates, pairing, config, module())
    loss.backward()
    assert module.log is not None and module.log.grad is not None
    step = 1e-4
    up, down = (info_nce(queries, candidates, pairing, config, 0.5 * math.exp(s))[0] for s in (step, -step))
    assert float(module.log.grad) == pytest.approx(float((up - down).detach()) / (2 * step), rel=1e-3)
    weights = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weights], lr=0.1, weight_decay=0.1)
    module.join(optimizer, OptimConfig())
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.1), (0.5, 0.0)]
    for _ in range(20):
        module.log.grad = torch.ones(())
        optimizer.step()
        assert 0.3 - 1e-6 <= float(torch.as_tensor(module()).detach()) <= 0.6 + 1e-6
    assert float(module().detach()) == pytest.approx(0.3)  # type: ignore[union-attr]
    again = Temperature(config)
    again.load_state_dict(module.state_dict())
    assert again.log is not None and torch.equal(again.log, module.log)
    fixed = Temperature(LossConfig(temperature=0.07))
    assert fixed() == 0.07 and not fixed.state_dict()


def test_chance_level_is_the_logarithm_of_the_candidates() -> None:
    n = 4
    same = torch.ones(n, DIM)
    pairing = Pairing(torch.arange(n).repeat(2), torch.arange(2 * n) < n, torch.full((n,), -1), torch.full((2 * n,), -1))
    for negatives, expected in (("batch", 2 * n), ("own", n + 1)):
        loss, _ = info_nce(same, same.repeat(2, 1), pairing, LossConfig(negatives=negatives))  # type: ignore[arg-type]
        assert float(loss) == pytest.approx(math.log(expected), rel=1e-6)


def test_settings_that_cannot_be_are_refused() -> None:
    queries, candidates, pairing, _ = tensors(world())
    with pytest.raises(ValueError, match=r"loss.dims \[6\]: the model's vectors have 6 numbers"):
        info_nce(queries, candidates, pairing, LossConfig(dims=[6]))
    for wrong, said in (
        ({"hardness_strength": 2.0}, "no effect without hardness"),
        ({"temperature_lr": 0.1}, "no effect without learn_temperature"),
        ({"temperature": 2.0, "learn_temperature": True}, "outside temperature_range"),
        ({"dims": [2, 2]}, "stand there once"),
        ({"vectors": [0]}, "at least 1"),
        ({"dims": [2], "dim_weights": [1.0, 2.0]}, "one number above 0 for each of dims"),
    ):
        with pytest.raises(ValueError, match=said):
            LossConfig(**wrong)  # type: ignore[arg-type]
    assert LossConfig(hardness="llave").strength == 9.0 and LossConfig(hardness="focal").strength == 0.5
