"""Compiled layers compute what eager ones do, with few graphs whatever the lengths."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from comatch.backbones import adapters
from comatch.backbones.compiled import compiled_layers
from comatch.backbones.dora import FactoredDora
from comatch.backbones.memory import recompute
from comatch.config import RunConfig
from comatch.core.batch import Batch
from comatch.core.packing import collate
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.objectives.tokens import next_token
from comatch.recipes import load_recipe
from comatch.training import loop

COMA = load_recipe("coma").with_tokens(4)
COMPRESS = COMA.stages[0]
Folders = Callable[[str], Path]
# norm; q, k, v and rotary embeddings; attention's output; norm and MLP: what lies between calls and the one break at attention.
GRAPHS = 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def opened(folder: Path, kind: str) -> Encoder:
    torch.manual_seed(1)
    encoder = Encoder.load(folder, recipe=COMA)
    adapters.attach(encoder.backbone, kind, r=4, alpha=8, dropout=0.0, targets=("q_proj", "o_proj"), train_vision=False)
    encoder.backbone.rows.requires_grad_(True)
    with torch.no_grad():
        for name, p in encoder.backbone.named_parameters():
            if "lora_" in name:
                p += 0.1 * torch.randn_like(p)
    encoder.backbone.train()
    return encoder


def batches_of(encoder: Encoder, sizes: tuple[int, ...]) -> list[Batch]:
    source = open_source("scenes")
    return [collate([encoder.preparer.dialogue(source.dialogue(i), COMPRESS) for i in range(n)]) for n in sizes]


def gradients(encoder: Encoder, batch: Batch) -> dict[str, torch.Tensor]:
    hidden = encoder.backbone(batch, COMPRESS.visibility)
    next_token(hidden, batch.labels, batch.example, batch.size, encoder.backbone.head)[0].sum().backward()
    found = {name: p.grad.clone() for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    encoder.backbone.zero_grad()
    return found | {"hidden": hidden.detach()}


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) < tolerance * scale, name


def test_compiled_is_eager_with_a_bound_on_compilations(folder_of: Folders, family: str) -> None:
    encoder = opened(folder_of(family), "dora" if family == "qwen2_5_vl" else "lora")
    batches = batches_of(encoder, (1, 2, 5, 9))
    assert len({batch.ids.shape[1] for batch in batches}) > 2
    wanted = [gradients(encoder, batch) for batch in batches]
    names = set(dict(encoder.backbone.named_parameters()))
    with compiled_layers(encoder.backbone, backend="eager"):  # captures graphs like any backend, and runs them as they are
        assert set(dict(encoder.backbone.named_parameters())) == names
        assert_close(gradients(encoder, batches[0]), wanted[0], 1e-5)
        first = counters["stats"]["unique_graphs"]
        for batch, value in zip(batches, wanted, strict=True):
            assert_close(gradients(encoder, batch), value, 1e-5)
        # Three layers and five lengths later: at most once more, where the first length was equal to some width.
        assert 0 < first <= GRAPHS and counters["stats"]["unique_graphs"] <= 2 * GRAPHS
        with torch.no_grad():
            for batch, value in zip(batches, wanted, strict=True):
                torch.testing.assert_close(encoder.backbone(batch, COMPRESS.visibility), value["hidden"], rtol=1e-4, atol=1e-5)
        assert counters["stats"]["unique_graphs"] <= 3 * GRAPHS, "without gradients the graphs are others, once"
        assert all("torch.compiler.disable" in reason for reason in counters["graph_break"]), "attention is the only break"
    seen = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert_close(gradients(encoder, batches[1]), wanted[1], 1e-6)
    assert counters["stats"]["unique_graphs"] == seen, "outside of the block nothing is compiled"


def test_compiled_dora_follows_the_optimiser(folder_of: Folders) -> None:
    encoder = opened(folder_of("qwen2_5_vl"), "dora")
    other = opened(folder_of("qwen2_5_vl"), "dora")
    batch = batches_of(encoder, (3,))[0]
    with compiled_layers(encoder.backbone, backend="eager"):
        for step in range(3):
            norms = [m.norm for m in encoder.backbone.modules() if isinstance(m, FactoredDora)]
            for side in (encoder, other):
                stepper = torch.optim.SGD(adapters.trainable(side.backbone).values(), lr=0.5)
                hidden = side.backbone(batch, COMPRESS.visibility)
                hidden.square().mean().backward()
                stepper.step()
                stepper.zero_grad()
            assert_close({"x": encoder.backbone(batch, COMPRESS.visibility)}, {"x": other.backbone(batch, COMPRESS.visibility)}, 1e-5)
            after = [m.norm for m in encoder.backbone.modules() if isinstance(m, FactoredDora)]
            assert step == 0 or any(not torch.equal(a, b) for a, b in zip(norms, after, strict=True) if a is not None and b is not None)


def test_compiled_and_recomputed_go_together(folder_of: Folders) -> None:
    encoder = opened(folder_of("qwen2_5_vl"), "lora")
    batch = batches_of(encoder, (4,))[0]
    wanted = gradients(encoder, batch)
    recompute(encoder.backbone, 2)
    with compiled_layers(encoder.backbone, backend="aot_eager"):
        assert_close(gradients(encoder, batch), wanted, 1e-5)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile on a CPU needs g++ or clang++")
def test_inductor_on_this_machine(folder_of: Folders) -> None:
    encoder = opened(folder_of("qwen2_5_vl"), "lora")
    batch = batches_of(encoder, (2,))[0]
    with torch.no_grad():
        wanted = encoder.backbone(batch, COMPRESS.visibility)
        with compiled_layers(encoder.backbone):
            torch.testing.assert_close(encoder.backbone(batch, COMPRESS.visibility), wanted, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 0


def test_a_run_may_compile_and_recompute_and_logs_its_rate(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = compiled_layers
    monkeypatch.setattr(loop, "compiled_layers", lambda backbone, on: real(backbone, on, "eager"))
    stage = {"steps": 2, "batch": 2, "optim": {"lr": 0.01}, "log_every": 1}
    rows = {}
    for name, more in (("plain", {}), ("fast", {"compile": True, "checkpointing": 2, "peak_tflops": 0.5})):
        values = {"name": name, "model": str(folder_of("qwen2_5_vl")), "recipe": "coma", "tokens": 4, "precision": "fp32", "device": "cpu"}
        values |= {"output": str(tmp_path / name), "stages": {"compress": stage}}
        with caplog.at_level(logging.ERROR):
            folder = loop.train(RunConfig.model_validate(values | more), quiet=True)
        rows[name] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows["fast"]] == pytest.approx([r["loss"] for r in rows["plain"]], rel=1e-4)
    assert all(r["tflops"] > 0 and "mfu" not in r for r in rows["plain"])
    assert all(r["mfu"] == pytest.approx(r["tflops"] / 0.5) for r in rows["fast"])
    assert counters["stats"]["unique_graphs"] > 0
