"""The training loop on tiny models: equal steps under any budget, what trains, what stops, what is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from comatch.backbones import adapters
from comatch.config import LossConfig, RunConfig, StageRun
from comatch.content import as_message
from comatch.data.mixture import Ingredient, Mixture
from comatch.data.scenes import scene
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import ConfigError, ContentError, DataError, ModelError, TrainingError
from comatch.objectives.tokens import next_token
from comatch.recipes import load_recipe
from comatch.training import loop
from comatch.training.loader import Quarantine, Sample, StageData, batches
from comatch.training.step import contrastive_step, token_step

Folders = Callable[[str], Path]
COMA = load_recipe("coma").with_tokens(4)
COMPRESS, MATCH = COMA.stages


def config(folder: Path, out: Path, **changes: Any) -> RunConfig:
    stage = {"steps": 3, "batch": 4, "tokens_per_pass": 400, "optim": {"lr": 0.01}, "log_every": 1}
    values: dict[str, Any] = {
        "name": "tiny",
        "model": str(folder),
        "recipe": "coma",
        "tokens": 4,
        "precision": "fp32",
        "device": "cpu",
        "output": str(out),
        "stages": {"compress": stage, "match": stage},
    }
    return RunConfig.model_validate(values | changes)


def pairs(encoder: Encoder, n: int) -> list[Sample]:
    items = [[encoder.preparer.item(as_message(item), MATCH) for item in (s.draw(), s.caption(0))] for s in (scene(3, i) for i in range(n))]
    return [Sample(row=i, source="scenes", examples=tuple(pair), positives=1) for i, pair in enumerate(items)]


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    out = {name: p.grad.clone() for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    encoder.backbone.zero_grad()
    return out


def assert_equal_gradients(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    scale = max(float(g.abs().max()) for g in a.values())
    assert scale > 0
    for name in a:
        assert float((a[name] - b[name]).abs().max()) < 1e-4 * scale, name


def test_token_step_is_the_same_under_any_budget(folder_of: Folders, family: str) -> None:
    encoder = Encoder.load(folder_of(family), recipe=COMA)
    source = open_source("scenes")
    examples = [encoder.preparer.dialogue(source.dialogue(i), COMPRESS) for i in range(5)]
    accelerator = Accelerator(cpu=True)
    found = []
    for budget in (1, 300, 100_000):
        result = token_step(accelerator, encoder.backbone, examples, COMPRESS, budget)
        found.append((result.loss, gradients(encoder)))
    for loss, grads in found[1:]:
        assert abs(loss - found[0][0]) < 1e-5
        assert_equal_gradients(found[0][1], grads)
    plain = []
    for example in examples:
        from comatch.core.packing import collate

        batch = collate([example])
        losses, _ = next_token(encoder.backbone(batch, COMPRESS.visibility), batch.labels, batch.example, 1, encoder.backbone.head)
        plain.append(losses[0])
    assert abs(float(torch.stack(plain).mean().detach()) - found[0][0]) < 1e-5


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_gradients_reach_what_trains_and_nothing_else(folder_of: Folders, family: str, kind: str) -> None:
    encoder = Encoder.load(folder_of(family), recipe=COMA)
    adapter = {"kind": kind} if kind == "full" else {"kind": kind, "r": 4}
    loop.open_parameters(config(folder_of(family), Path("x"), adapter=adapter), encoder.backbone)
    open_ = set(adapters.trainable(encoder.backbone))
    assert "rows" in open_ and not any(".visual." in name for name in open_)
    assert all(p.dtype == torch.float32 for p in adapters.trainable(encoder.backbone).values())
    if kind != "full":
        assert all("lora_" in name or name == "rows" for name in open_)
        vocabulary = encoder.backbone.text.embed_tokens.weight
        assert not vocabulary.requires_grad and encoder.backbone.rows.numel() == 4 * encoder.dim
    before = {name: p.detach().clone() for name, p in encoder.backbone.named_parameters()}
    samples = pairs(encoder, 4)
    run = StageRun(steps=1, batch=4, loss=LossConfig(temperature=0.1))
    optimizer = torch.optim.SGD(adapters.trainable(encoder.backbone).values(), lr=1.0)
    encoder.backbone.train()
    for _ in range(2):
        contrastive_step(Accelerator(cpu=True), encoder.backbone, samples, MATCH, run, seed=0)
        optimizer.step()
        reached = gradients(encoder)
    assert reached.keys() <= open_ and "rows" in reached
    after = dict(encoder.backbone.named_parameters())
    frozen = [name for name in before if name not in open_ and name in after]
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["rows"], after["rows"])


def test_run_folder_holds_everything_and_loads(folder_of: Folders, tmp_path: Path) -> None:
    run = config(folder_of("qwen2_5_vl"), tmp_path / "run", adapter={"kind": "lora", "r": 4})
    folder = loop.train(run, quiet=True)
    rows = loop.read_metrics(folder / "metrics.jsonl")
    assert [(r["stage"], r["step"]) for r in rows] == [(s, i) for s in ("compress", "match") for i in (1, 2, 3)]
    assert all(np.isfinite(r["loss"]) and r["tokens_per_second"] > 0 for r in rows)
    assert rows[0]["lr"] < 0.0101 and rows[-1]["lr"] < rows[-2]["lr"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["done"], manifest["config_digest"]) == ("complete", ["compress", "match"], run.digest)
    last, first = Encoder.load(folder), Encoder.load(folder / "compress")
    assert last.fingerprint == Encoder.load(folder / "match").fingerprint != first.fingerprint
    assert last.encode(["hi"]).shape == (1, last.dim)
    again = loop.train(config(folder_of("qwen2_5_vl"), tmp_path / "again", adapter={"kind": "lora", "r": 4}), quiet=True)
    assert Encoder.load(again).fingerprint == last.fingerprint, "the same config gives the same bits"
    seeded = loop.train(config(folder_of("qwen2_5_vl"), tmp_path / "seed", seed=1, adapter={"kind": "lora", "r": 4}), quiet=True)
    assert Encoder.load(seeded).fingerprint != last.fingerprint


def test_each_run_of_a_process_has_its_own_precision(folder_of: Folders, tmp_path: Path) -> None:
    stages = {"match": {"steps": 2, "batch": 4, "optim": {"lr": 0.01}, "log_every": 1}}
    losses = {}
    for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", "fp32")):
        run = config(folder_of("qwen2_5_vl"), tmp_path / name, precision=precision, stages=stages, adapter={"kind": "full"})
        losses[name] = [row["loss"] for row in loop.read_metrics(loop.train(run, quiet=True) / "metrics.jsonl")]
    assert losses["a"] == losses["c"] != losses["b"]


def test_run_folders_are_never_overwritten_by_accident(folder_of: Folders, tmp_path: Path) -> None:
    run = config(folder_of("qwen2_5_vl"), tmp_path / "run", stages={"match": {"steps": 1, "batch": 2}})
    folder = loop.train(run, quiet=True)
    with pytest.raises(TrainingError, match="already holds a complete run"):
        loop.train(run, quiet=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"status": "running", "done": []}))
    with pytest.raises(ModelError, match="half-written run"):
        Encoder.load(folder)
    loop.train(run, overwrite=True, quiet=True)
    Encoder.load(folder)
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter.tex").write_text("precious")
    with pytest.raises(TrainingError, match="not a comatch run"):
        loop.train(config(folder_of("qwen2_5_vl"), foreign), overwrite=True, quiet=True)
    assert (foreign / "chapter.tex").read_text() == "precious"


def test_a_loss_that_is_not_finite_stops_before_the_update(folder_of: Folders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    states: list[dict[str, torch.Tensor]] = []
    real = loop.take_step

    def poisoned(accelerator: Any, model: Any, *rest: Any, **named: Any) -> Any:
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        states.append(dict(model.named_parameters()))
        if len(states) == 4:
            model.rows.data[0, 0] = float("nan")
            states[2]["rows"][0, 0] = float("nan")
        return real(accelerator, model, *rest, **named)

    monkeypatch.setattr(loop, "take_step", poisoned)
    with pytest.raises(TrainingError, match=r"stage compress, step 2, rows \[\('scenes', \d+\).*nothing was updated"):
        loop.train(config(folder_of("qwen2_5_vl"), tmp_path / "run"), quiet=True)
    assert len(states) == 4
    for name, value in states[2].items():
        assert torch.equal(value.nan_to_num(), states[3][name].nan_to_num()), name


class Faulty:
    """A source whose rows are bad where `bad` says so."""

    name = "faulty"

    def __init__(self, bad: Callable[[int], bool]) -> None:
        self.bad, self.real = bad, open_source("scenes", limit=100)

    def __len__(self) -> int:
        return 100

    def dialogue(self, i: int, epoch: int = 0) -> Any:
        if self.bad(i):
            raise ContentError(f"row {i % 2} is bad")
        return self.real.dialogue(i, epoch)


def alone(source: Any) -> Mixture:
    return Mixture((Ingredient(source.name, source),))


def test_bad_rows_are_replaced_counted_and_bounded(folder_of: Folders) -> None:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA)
    few: Any = Faulty(lambda i: i % 20 == 0)
    data = StageData(alone(few), encoder.preparer, COMPRESS, seed=0, batch=10)
    samples = [sample for step in range(10) for sample in data[step]]
    bad = [s for s in samples if s.bad]
    assert len(bad) == 5 and all(s.row % 20 for s in samples)
    account = Quarantine(0.001, 100)
    for sample in samples:
        account.add(sample)
    assert (account.count, account.total("samples")) == (5, 100)
    strict = Quarantine(0.001, 100)
    for i in range(10):
        strict.add(Sample(i, "faulty", samples[1].examples, bad=(f"reason {i % 3}",)))
    with pytest.raises(DataError) as error:
        strict.add(Sample(10, "faulty", samples[1].examples, bad=("reason 1",)))
    assert "11 bad rows" in str(error.value) and "4 x reason 0" in str(error.value)
    with pytest.raises(DataError, match="all bad"):
        StageData(alone(Faulty(lambda i: True)), encoder.preparer, COMPRESS, seed=0, batch=9)[0]


def test_order_does_not_depend_on_workers(folder_of: Folders) -> None:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA)
    data = StageData(alone(open_source("scenes", limit=50)), encoder.preparer, COMPRESS, seed=0, batch=6)
    seen = {w: [(s.row, s.examples[0].ids.tolist()) for batch in batches(data, 0, 4, w) for s in batch] for w in (0, 1, 2)}
    assert seen[0] == seen[1] == seen[2]
    assert len({row for row, _ in seen[0]}) == 24


def test_configs_that_do_not_fit_their_recipe(folder_of: Folders, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has \\['compress', 'match'\\]"):
        loop.train(config(folder_of("qwen2_5_vl"), tmp_path / "a", stages={"warmup": {"steps": 1, "batch": 2}}), quiet=True)
    with pytest.raises(ModelError, match="match no layer"):
        loop.train(config(folder_of("qwen2_5_vl"), tmp_path / "b", adapter={"kind": "lora", "targets": ["w_proj"]}), quiet=True)


def test_a_tracker_that_is_not_there_is_named(folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comatch.training.plan.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        loop.train(config(folder_of("qwen2_5_vl"), tmp_path / "run", tracking=["wandb"]), quiet=True)
    assert not (tmp_path / "run").exists()


def test_training_lowers_both_losses(folder_of: Folders, tmp_path: Path) -> None:
    stage = {"steps": 25, "batch": 8, "optim": {"lr": 0.01, "warmup": 0.0}, "log_every": 5, "loss": {"temperature": 0.1}}
    run = config(folder_of("qwen2_5_vl"), tmp_path / "run", adapter={"kind": "full"}, stages={"compress": stage, "match": stage})
    rows = loop.read_metrics(loop.train(run, quiet=True) / "metrics.jsonl")
    compress = [r["loss"] for r in rows if r["stage"] == "compress"]
    assert compress[-1] < compress[0] - 0.5
