"""DoRA with a stored norm is PEFT's DoRA; recomputed layers and the counted memory; LoRA without dropout by default."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from measure import peak_bytes
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from comatch.backbones import adapters, memory
from comatch.backbones.dora import DoraLinear, FactoredDora, row_norms, with_dora
from comatch.backbones.memory import Demand, recompute
from comatch.backbones.shapes import config_of
from comatch.config import AdapterConfig, RunConfig, StageRun
from comatch.core.batch import Batch
from comatch.core.flops import Shape, Trains
from comatch.core.packing import collate
from comatch.encoder import Encoder
from comatch.objectives.tokens import next_token
from comatch.recipes import load_recipe
from comatch.training import fit

COMA = load_recipe("coma").with_tokens(4)
COMPRESS = COMA.stages[0]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYTHING = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
Folders = Callable[[str], Path]


class Toy(nn.Module):
    """Two linear layers, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.o(torch.tanh(self.q(x)))
        return out


def settings(dropout: float = 0.0) -> LoraConfig:
    return LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, use_dora=True, init_lora_weights="gaussian", target_modules=["q", "o"], bias="none"
    )


def twins(dtype: torch.dtype, dropout: float = 0.0) -> tuple[Any, Any]:
    """PEFT's DoRA and ours with the same random weights, no part of which is at its start."""
    torch.manual_seed(0)
    base = Toy().to(dtype)
    ours = get_peft_model(copy.deepcopy(base), with_dora(settings(dropout)))
    theirs = get_peft_model(copy.deepcopy(base), settings(dropout))
    with torch.no_grad():
        for p in adapters.trainable(ours).values():
            p += 0.3 * torch.randn_like(p)
    theirs.load_state_dict(ours.state_dict())
    assert type(theirs.base_model.model.q) is not DoraLinear is type(ours.base_model.model.q)
    return ours.train(), theirs.train()


def outcome(model: Any, seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 24, generator=generator, dtype=torch.float64).to(next(model.parameters()).dtype)
    torch.manual_seed(seed)
    out = model(x)
    out.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), found


def assert_same(ours: Any, theirs: Any, tolerance: float, seed: int = 0) -> None:
    (a, grads), (b, wanted) = outcome(ours, seed), outcome(theirs, seed)
    assert (a - b).abs().max() < tolerance * b.abs().max()
    assert grads.keys() == wanted.keys() and any("magnitude" in name for name in grads)
    for name in wanted:
        assert (grads[name] - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max(), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-5)])
def test_dora_is_pefts_in_output_and_gradient(dtype: torch.dtype, tolerance: float, dropout: float) -> None:
    ours, theirs = twins(dtype, dropout)
    assert_same(ours, theirs, tolerance)
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, tolerance)
    plain = copy.deepcopy(ours)
    with torch.no_grad():
        plain.base_model.model.q.lora_magnitude_vector["default"].weight *= 1.01
    assert (outcome(plain, 0)[0] - outcome(theirs, 0)[0]).abs().max() > 1e-4, "magnitudes matter"


def test_norms_by_the_factored_form() -> None:
    torch.manual_seed(0)
    weight, a, b = (torch.randn(n, m, dtype=torch.float64) for n, m in ((40, 24), (4, 24), (40, 4)))
    found = row_norms(weight.square().sum(1), weight, a, b, 1.7)
    torch.testing.assert_close(found, torch.linalg.norm(weight + 1.7 * b @ a, dim=1))


OPTIMISERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_norms_follow_every_step_and_are_computed_once_for_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("comatch.backbones.dora.row_norms", lambda *args: calls.append(1) or row_norms(*args))
    ours, theirs = twins(torch.float64)
    ours.train()  # forgets what the making of the twins stored
    steppers = [OPTIMISERS[name](list(adapters.trainable(model).values())) for model in (ours, theirs)]
    for step in range(3):
        calls.clear()
        for _ in range(4):  # four passes of one step
            assert_same(ours, theirs, 1e-12, seed=step)
        assert len(calls) == 2, "once for each of the two layers"
        for model, stepper in zip((ours, theirs), steppers, strict=True):
            outcome(model, step)
            model(torch.ones(1, 24, dtype=torch.float64)).sum().backward()
            stepper.step()
            stepper.zero_grad()


class Hidden(torch.optim.Optimizer):
    """An optimiser that writes through `.data`, which no version counter sees."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.data.add_(0.1)


CHANGES: dict[str, Callable[[Any], object]] = {
    "load": lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}),
    "assign": lambda m: m.load_state_dict({k: v * 0.9 for k, v in m.state_dict().items()}, assign=True),
    "in place": lambda m: [p.mul_(0.9) for p in m.parameters()],
    "base": lambda m: m.base_model.model.q.base_layer.weight.add_(0.1),
    "replaced data": lambda m: [setattr(p, "data", p.data * 0.9) for p in m.parameters()],
    "scale": lambda m: m.base_model.model.q.set_scale("default", 3.0),
    "merge and back": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
    "hidden optimiser": lambda m: Hidden([p for p in m.parameters() if p.requires_grad], {}).step(),
    "data, then train": lambda m: ([p.data.mul_(0.9) for p in m.parameters()], m.train()),
    "other type": lambda m: m.to(torch.float32),
}


@pytest.mark.parametrize("name", CHANGES)
def test_norms_are_never_stale(name: str) -> None:
    ours, theirs = twins(torch.float64)
    before = outcome(ours, 1)[0]
    for model in (ours, theirs):
        with torch.no_grad():
            CHANGES[name](model)
    assert_same(ours, theirs, 2e-5 if name == "other type" else 1e-12, seed=1)
    if name not in ("merge and back", "other type"):
        assert (outcome(ours, 1)[0] - before).abs().max() > 1e-3


def test_new_adapters_change_nothing_also_in_bf16() -> None:
    torch.manual_seed(0)
    base = Toy().bfloat16()
    x = torch.randn(7, 24).bfloat16()
    wanted = base(x)
    assert torch.equal(get_peft_model(base, with_dora(settings()))(x), wanted)
    ratio = outcome_ratio(get_peft_model(Toy().bfloat16(), with_dora(settings())))
    assert (ratio - 1).abs().max() < 1e-6, "magnitudes are the norms in float32, not rounded to bf16"


def outcome_ratio(model: Any) -> torch.Tensor:
    layer: FactoredDora = model.base_model.model.q.lora_magnitude_vector["default"]
    model(torch.ones(1, 24).bfloat16())
    assert layer.norm is not None
    return layer.weight.detach() / layer.norm


def test_merging_is_pefts() -> None:
    ours, theirs = twins(torch.float64)
    x = torch.randn(5, 24, dtype=torch.float64)
    wanted = ours.eval()(x)
    for model in (ours, theirs):
        torch.testing.assert_close(model.merge_and_unload()(x), wanted)


def opened(folder: Path, kind: str, targets: tuple[str, ...] = ATTENTION, dropout: float = 0.0, r: int = 4) -> Encoder:
    """A tiny encoder whose adapter is not at its start."""
    torch.manual_seed(1)
    encoder = Encoder.load(folder, recipe=COMA)
    adapters.attach(encoder.backbone, kind, r=r, alpha=8, dropout=dropout, targets=targets, train_vision=False)
    encoder.backbone.rows.requires_grad_(True)
    adapters.cast_trainable(encoder.backbone)
    with torch.no_grad():
        for name, p in encoder.backbone.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn_like(p)
    return encoder


def test_saved_adapters_load_here_and_in_plain_peft(folder_of: Folders, family: str, tmp_path: Path) -> None:
    encoder = opened(folder_of(family), "dora")
    batch = collate([encoder.preparer.dialogue(scene_source().dialogue(0), COMPRESS)])
    wanted = encoder.backbone(batch, COMPRESS.visibility)
    encoder.backbone.hf.save_pretrained(tmp_path)
    again = Encoder.load(folder_of(family), recipe=COMA)
    with torch.no_grad():
        again.backbone.rows.copy_(encoder.backbone.rows)
    assert not torch.allclose(again.backbone(batch, COMPRESS.visibility), wanted, atol=1e-3)
    adapters.load_adapter(again.backbone, tmp_path)
    torch.testing.assert_close(again.backbone(batch, COMPRESS.visibility), wanted)
    assert any(isinstance(m, FactoredDora) for m in again.backbone.modules())
    stock = Encoder.load(folder_of(family), recipe=COMA)
    with torch.no_grad():
        stock.backbone.rows.copy_(encoder.backbone.rows)
    stock.backbone.hf = PeftModel.from_pretrained(stock.backbone.hf, str(tmp_path))
    assert not any(isinstance(m, DoraLinear) for m in stock.backbone.modules())
    torch.testing.assert_close(stock.backbone(batch, COMPRESS.visibility), wanted, rtol=1e-4, atol=1e-4)


def test_lora_without_dropout_is_the_default() -> None:
    default = AdapterConfig()
    assert (default.kind, default.dropout) == ("lora", 0.0)


def scene_source() -> Any:
    from comatch.data.sources import open_source

    return open_source("scenes")


def loss_of(encoder: Encoder, batch: Batch) -> torch.Tensor:
    hidden = encoder.backbone(batch, COMPRESS.visibility)
    return next_token(hidden, batch.labels, batch.example, batch.size, encoder.backbone.head)[0].sum()


def gradients(encoder: Encoder, batch: Batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    loss_of(encoder, batch).backward()
    found = {name: p.grad.clone() for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    encoder.backbone.zero_grad()
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputed_layers_give_the_same_gradients(folder_of: Folders, family: str, dropout: float) -> None:
    encoder = opened(folder_of(family), "dora", dropout=dropout)
    batch = collate([encoder.preparer.dialogue(scene_source().dialogue(i), COMPRESS) for i in range(3)])
    encoder.backbone.train()
    wanted = gradients(encoder, batch)
    runs: list[int] = []
    first = encoder.backbone.text.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    for layers in (1, 3):
        recompute(encoder.backbone, layers)
        runs.clear()
        found = gradients(encoder, batch)
        assert len(runs) == 2, "forward, and again in the backward pass"
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    recompute(encoder.backbone, 0)
    runs.clear()
    assert gradients(encoder, batch).keys() == wanted.keys() and len(runs) == 1
    first.remove()


def kept_bytes(encoder: Encoder, batch: Batch, low: bool) -> int:
    """What autograd holds on to after a forward pass through the language model, its weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in encoder.backbone.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            held[x.untyped_storage().data_ptr()] = x
        return x

    vision = encoder.backbone.see(batch)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=low):
        hidden = encoder.backbone(batch, COMPRESS.visibility, vision)
    assert hidden.requires_grad
    return sum(x.untyped_storage().nbytes() for x in held.values())


@pytest.mark.parametrize("low", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING, ()], ids=["attention", "everything", "all weights"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_estimate_is_what_autograd_keeps(folder_of: Folders, kind: str, targets: tuple[str, ...], low: bool) -> None:
    if (kind == "full") == bool(targets):
        return
    encoder = opened(folder_of("qwen2_5_vl"), kind, targets or ATTENTION)
    if low and kind != "full":
        for p in encoder.backbone.parameters():
            p.data = p.data if p.requires_grad else p.data.bfloat16()
    encoder.backbone.train()
    source = scene_source()
    batches = [collate([encoder.preparer.dialogue(source.dialogue(i), COMPRESS) for i in range(n)]) for n in (2, 12)]
    few, many = (batch.ids.numel() for batch in batches)
    shape = Shape.of(encoder.backbone.stock.config)
    trains = Trains(full=not targets, rank=4 if targets else 0, targets=targets)
    demand = Demand.of(shape, trains, kind, low)
    # Between two batches, so that what does not depend on the number of tokens falls out of account.
    measured = kept_bytes(encoder, batches[1], low) - kept_bytes(encoder, batches[0], low)
    ends = (many - few) * shape.width * (4 + 4 + 4)  # embeddings, the first layer's input, the final norm's
    assert measured == pytest.approx(demand.bytes(shape, many - few) + ends, rel=0.12)


def test_memory_falls_with_every_recomputed_layer(folder_of: Folders) -> None:
    encoder = opened(folder_of("qwen2_5_vl"), "lora")
    batch = collate([encoder.preparer.dialogue(scene_source().dialogue(i), COMPRESS) for i in range(12)])
    vision = encoder.backbone.see(batch)
    encoder.backbone.train()
    peaks = []
    for layers in range(4):
        recompute(encoder.backbone, layers)
        peaks.append(peak_bytes(lambda: encoder.backbone(batch, COMPRESS.visibility, vision).square().sum().backward()))
    demand = Demand.of(Shape.of(encoder.backbone.stock.config), Trains(rank=4, targets=ATTENTION), "lora", False)
    saved = (demand.layer - demand.input) * batch.ids.numel()
    # The first one recomputed is at work in full when its turn comes, so that nothing is won before the second.
    # The last one whole is at work when its turn comes, so that recomputing it too wins nothing.
    assert [round((x - y) / saved, 1) for x, y in pairwise(peaks)] == [1.0, 1.0, 0.0]


def test_as_many_layers_as_do_not_fit() -> None:
    shape = Shape.of(config_of("Qwen/Qwen2.5-VL-3B-Instruct"))
    shape = replace(shape, layers=3)
    demand = Demand(layer=100.0, input=10.0)
    assert shape.layers == 3 and demand.bytes(shape, 7) == 2100
    assert [demand.layers(shape, 7, free) for free in (2100, 2099, 1470, 1400, 0)] == [0, 1, 1, 2, 3]


def test_auto_asks_for_what_does_not_fit_and_numbers_are_obeyed(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = opened(folder_of("qwen2_5_vl"), "lora")
    run = StageRun(steps=1, batch=2, tokens_per_pass=1000)
    values = {"name": "a", "model": "x", "recipe": "coma", "precision": "fp32", "stages": {"compress": run}, "adapter": {"r": 4}}
    accelerator = Accelerator(cpu=True)

    def chosen(free: float, checkpointing: str | int) -> int:
        monkeypatch.setattr(fit, "free_memory", lambda device: free)
        config = RunConfig.model_validate(values | {"checkpointing": checkpointing})
        found = fit.fit_layers(accelerator, config, encoder.backbone, COMPRESS, run)
        assert found == sum(layer.gradient_checkpointing for layer in encoder.backbone.text.layers)
        return found

    shape = Shape.of(encoder.backbone.stock.config)
    need = memory.head_bytes(shape, False) + 12 * sum(p.numel() for p in adapters.trainable(encoder.backbone).values())
    need = (need + Demand.of(shape, Trains(rank=4, targets=ATTENTION), "lora", False).bytes(shape, 1000)) / (1 - memory.RESERVE)
    assert [chosen(free, "auto") for free in (1e12, need + 1e3, need - 1e3, 0)] == [0, 0, 1, 3]
    assert [chosen(0, told) for told in ("none", "all", 0, 2, 99)] == [0, 3, 0, 2, 3]
    assert memory.free_memory(torch.device("cpu")) > 1e6


@pytest.mark.parametrize("chunk", [128, 256, 4096])
def test_chunked_head_is_the_plain_one(chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(2, 300, 8, dtype=torch.float64, requires_grad=True)
    weight = nn.Parameter(torch.randn(50, 8, dtype=torch.float64))
    labels, owner = torch.randint(-20, 50, (2, 300)), torch.randint(0, 5, (2, 300))
    shapes: list[int] = []

    def head(x: torch.Tensor) -> torch.Tensor:
        shapes.append(len(x))
        return x @ weight.T

    losses, counts = next_token(hidden, labels, owner, 5, head, chunk=chunk)
    scale = torch.rand(5, dtype=torch.float64)
    found = torch.autograd.grad((losses * scale).sum(), [hidden, weight])
    assert set(shapes) <= {128 * k for k in range(1, 33)} and max(shapes) <= chunk
    chosen = labels >= 0
    each = F.cross_entropy(hidden[chosen] @ weight.T, labels[chosen], reduction="none")
    wanted = torch.stack([each[owner[chosen] == i].mean() for i in range(5)])
    torch.testing.assert_close(losses, wanted, rtol=1e-12, atol=0)
    for ours, theirs in zip(found, torch.autograd.grad((wanted * scale).sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    right = int(((hidden @ weight.T).argmax(-1) == labels).sum())
    assert counts.tolist() == [right, int(chosen.sum())]


def test_a_batch_without_labels_still_reaches_the_weights() -> None:
    hidden, weight = torch.randn(1, 9, 8, requires_grad=True), nn.Parameter(torch.randn(50, 8))
    losses, counts = next_token(hidden, torch.full((1, 9), -100), torch.zeros(1, 9, dtype=torch.long), 2, lambda x: x @ weight.T)
    losses.sum().backward()
    assert losses.tolist() == [0, 0] and counts.tolist() == [0, 0]
    assert weight.grad is not None and not weight.grad.any() and hidden.grad is not None and not hidden.grad.any()


def test_logits_of_one_chunk_are_held_at_a_time_and_a_frozen_head_gets_no_gradient() -> None:
    rows, vocabulary = 1024, 4000
    weight = torch.randn(vocabulary, 8)
    hidden = torch.randn(1, rows, 8, requires_grad=True)
    labels, owner = torch.randint(0, vocabulary, (1, rows)), torch.zeros(1, rows, dtype=torch.long)

    def peak(chunk: int) -> float:
        return peak_bytes(lambda: next_token(hidden, labels, owner, 1, lambda x: x @ weight.T, chunk=chunk)[0].sum().backward())

    logits = rows * vocabulary * 4
    assert peak(rows) > 2.5 * logits
    assert peak(128) < 0.5 * logits
    frozen = peak(128)
    weight.requires_grad_(True)
    assert peak(128) >= frozen + 0.9 * weight.numel() * 4 and weight.grad is not None
