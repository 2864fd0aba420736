"""Several processes train what one trains: equal losses, equal gradients, equal vectors; under DDP and FSDP2, on gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from matching import MATCH, assert_equal, gradients, load, one_big_batch, run, samples
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from comatch.content import Dialogue, as_message
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipes import load_recipe
from comatch.training.loader import Sample
from comatch.training.loop import read_metrics
from comatch.training.step import contrastive_step, token_step

COMPRESS = load_recipe("coma").with_tokens(4).stage("compress")
RUN = """
name: ranks
model: {model}
recipe: coma
tokens: 4
precision: fp32
device: cpu
output: {out}
adapter: {{kind: lora, r: 4}}
stages:
  compress: {{steps: 3, batch: 4, tokens_per_pass: 300, optim: {{lr: 0.01}}, log_every: 1}}
  match: {{steps: 3, batch: 6, tokens_per_pass: 300, loss: {{temperature: 0.2, symmetric: true}}, optim: {{lr: 0.01}}, log_every: 1}}
"""

# What each case loads, and how many tokens a pass has.
CASES: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "lora, one pass": {"kind": "lora", "tokens": 100_000},
    "dora, kept": {"kind": "dora", "keep_passes": 2},
    "full with tower": {"kind": "full", "vision": True},
    "full with tower, one pass": {"kind": "full", "vision": True, "tokens": 100_000},
    "texts on all but one rank": {"kind": "full", "vision": True, "sort": True},
    "head of its own": {"kind": "full", "untied": True},
}


def cases(ranks: int) -> list[str]:
    """Four processes share the cores of the machine; they run those cases in which more ranks are another matter."""
    return ["lora", "lora, one pass", "texts on all but one rank"] if ranks == 4 else list(CASES)


def prepared(case: dict[str, Any], folder: Path, dropout: float = 0.0) -> tuple[Encoder, list[Sample]]:
    """The model of a case, and the global batch; `sort` gives all pictures to the first rank."""
    encoder = load(folder, case["kind"], dropout, case.get("vision", False), untied=case.get("untied", False), head=case.get("head", False))
    some = samples(encoder, 5)
    if case.get("sort"):
        texts = [encoder.preparer.item(as_message(scene(4, i).caption(0)), MATCH) for i in range(20)]
        for i, sample in enumerate(some):
            if i % 4:  # samples go round the ranks: only the first has any pictures
                some[i] = replace(sample, examples=tuple(texts[3 * i : 3 * i + len(sample.examples)]), keys=())
    return encoder, some


def dialogues(encoder: Encoder) -> list[Any]:
    """Pictures stand in the first of every four only."""
    found = []
    for i in range(5):
        world = scene(1, i)
        turns = tuple((q, a) for q, a, _ in world.dialogue(i, 1 + i % 3))
        found.append(encoder.preparer.dialogue(Dialogue(as_message(world.caption(0) if i % 4 else world.draw()), turns), COMPRESS))
    return found


@contextmanager
def process(rank: int, ranks: int, port: int, sharded: bool) -> Iterator[Accelerator]:
    """An Accelerator of one of several processes. Accelerate takes FSDP2 for GPUs only; torch itself runs it on gloo as well."""
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= where
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    if sharded:
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
        wrap = "transformer_based_wrap"
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=wrap, reshard_after_forward=True)
        assert accelerator.is_fsdp2
    yield accelerator
    # Gloo's group must not outlive itself in a model of DDP: whoever frees that last waits for a thread that waits for it.
    accelerator.free_memory()
    torch.distributed.destroy_process_group()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """All gradients, with the names that one process gives them; a sharded model needs every rank for it."""
    named = ((name.removeprefix("module."), p.grad) for name, p in model.named_parameters() if p.grad is not None)
    found = {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone() for name, grad in named}
    model.zero_grad()
    return found


def wrapped(accelerator: Accelerator, encoder: Encoder) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in encoder.backbone.parameters() if p.requires_grad], lr=0.1)
    model: nn.Module = accelerator.prepare(encoder.backbone, optimizer)[0]
    return model.train()


class Synchronisations(TorchDispatchMode):
    """Counts the collectives that reduce gradients."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(op) for name in ("c10d.allreduce_", "c10d._reduce_scatter_base_"))
        return op(*args, **(kwargs or {}))


def results(accelerator: Accelerator, rank: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Loss, gradients and number of synchronisations of every case."""
    found: dict[str, Any] = {}
    for name in cases(ranks):
        case = CASES[name]
        encoder, some = prepared(case, folder)
        model = wrapped(accelerator, encoder)
        how = run(case.get("tokens", 120), keep_passes=case.get("keep_passes", 1))
        with Synchronisations() as counted:
            result = contrastive_step(accelerator, model, some[rank::ranks], MATCH, how, seed=5)
        found[name] = result.loss, whole(model), counted.count
    encoder, some = prepared({"kind": "lora"}, folder, dropout=0.3)
    model = wrapped(accelerator, encoder)
    for keep in (1, 99):
        result = contrastive_step(accelerator, model, some[rank::ranks], MATCH, run(120, keep_passes=keep), seed=5)
        found[f"dropout {keep}"] = result.loss, whole(model), 0
    encoder, _ = prepared({"kind": "full", "vision": True, "untied": True, "head": True}, folder)
    model = wrapped(accelerator, encoder)
    mine = dialogues(encoder)[rank::ranks]
    found["tokens"] = token_step(accelerator, model, mine, COMPRESS, 100).loss, whole(model), 0
    return found


def work(rank: int, ranks: int, port: int, sharded: bool, folder: Path, out: Path) -> None:
    """What one process does: every case, and the results of the first into `out`."""
    try:
        with process(rank, ranks, port, sharded) as accelerator:
            found = results(accelerator, rank, ranks, folder)
        if rank == 0:
            torch.save(found, out)
    except BaseException:
        out.with_suffix(f".{rank}.error").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def spawned(ranks: int, sharded: bool, folder: Path, out: Path) -> dict[str, Any]:
    """Run `work` on several processes. They are forked from a server that has imported everything, and never hang for ever."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["comatch.training.loop", "torch.distributed.tensor", "torch.distributed.fsdp", "pytest"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, ranks, port, sharded, folder, out)) for rank in range(ranks)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(timeout=240)
    hung = [one for one in processes if one.is_alive()]
    for one in hung:
        one.kill()
    errors = [path.read_text(encoding="utf-8")[-3000:] for path in out.parent.glob(f"{out.stem}.*.error")]
    assert not errors and not hung, "\n".join(errors) or f"{len(hung)} processes hung"
    found: dict[str, Any] = torch.load(out, weights_only=True)
    return found


@pytest.fixture(scope="module")
def expected(folder_of: Callable[[str], Path]) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """The plain way, on one process and without any pass."""
    folder = folder_of("qwen2_5_vl")
    found = {}
    for name, case in CASES.items():
        encoder, some = prepared(case, folder)
        found[name] = one_big_batch(encoder, [replace(s, keys=s.keys or unknown(s)) for s in some], run().loss)
    return found


def unknown(sample: Sample) -> tuple[int, ...]:
    return (-1,) * len(sample.examples)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gradients_of_several_ranks_are_those_of_one_big_batch(
    folder_of: Callable[[str], Path], expected: dict[str, Any], tmp_path: Path, ranks: int, wrapper: str
) -> None:
    folder = folder_of("qwen2_5_vl")
    found = spawned(ranks, wrapper == "fsdp2", folder, tmp_path / "found.pt")
    for name in cases(ranks):
        loss, grads, _ = found[name]
        assert abs(loss - expected[name][0]) < 1e-5, name
        assert_equal(grads, expected[name][1])
    assert any(".visual." in name for name in found["texts on all but one rank"][1])
    # One synchronisation: as many calls for many passes as for one.
    assert found["lora"][2] > 0 or (ranks == 1 and wrapper == "fsdp2")
    assert found["lora"][2] == found["lora, one pass"][2]
    if ranks < 4:
        assert found["full with tower"][2] == found["full with tower, one pass"][2]
        assert not any("lm_head" in name for name in found["head of its own"][1])
    assert found["dropout 1"][0] == found["dropout 99"][0] != found["lora"][0]
    assert_equal(found["dropout 1"][1], found["dropout 99"][1], 1e-6)
    encoder, _ = prepared({"kind": "full", "vision": True, "untied": True, "head": True}, folder)
    plain = token_step(Accelerator(cpu=True), encoder.backbone, dialogues(encoder), COMPRESS, 100_000)
    assert abs(found["tokens"][0] - plain.loss) < 1e-5
    grads = gradients(encoder)
    assert "hf.lm_head.weight" in grads
    assert_equal(found["tokens"][1], grads)


def test_two_ranks_are_one(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folders = {}
    for ranks in (1, 2):
        out, file = tmp_path / f"run{ranks}", tmp_path / f"run{ranks}.yaml"
        file.write_text(RUN.format(model=folder_of("qwen2_5_vl"), out=out))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launch, "-m", "comatch", "train", str(file), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        folders[ranks] = out
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in folders.values())
    assert len(one) == len(two) == 6
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-4)
    assert one[0]["loss"] != one[1]["loss"]
    items = ["a red circle", "two stars"]
    a, b = (Encoder.load(folder).encode(items) for folder in folders.values())
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert np.abs(a[0] - a[1]).max() > 1e-2
