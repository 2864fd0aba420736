"""Training runs in forked processes, which can be killed: no start-up to pay, and one or several ranks over gloo."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file

from comatch.config import RunConfig
from comatch.errors import ComatchError, Stopped
from comatch.training.loop import Evaluate, read_metrics, train
from comatch.training.signals import Signals

TIMING = {"seconds", "items_per_second", "tokens_per_second", "tflops", "mfu", "imbalance", "data_wait", "peak_memory_mib"}

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def make(folder_of: Callable[[str], Path]) -> Make:
    """The config of a run of two stages of six steps, with dropout, several passes a step and lines of metrics between checkpoints."""
    model = folder_of("qwen2_5_vl")

    def inner(out: Path, stage: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
        each = {"steps": 6, "batch": 4, "tokens_per_pass": 300, "optim": {"lr": 0.01}, "log_every": 3} | (stage or {})
        values: dict[str, Any] = {
            "name": "tiny",
            "model": str(model),
            "recipe": "coma",
            "tokens": 4,
            "precision": "fp32",
            "device": "cpu",
            "output": str(out),
            "adapter": {"kind": "lora", "r": 4, "dropout": 0.1},
            "save_every": 2,
            "stages": {"compress": each, "match": each},
        }
        return RunConfig.model_validate(values | changes)

    return inner


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Let SIGTERM come after so many steps of a run in this process."""
    codes = iter([0] * steps + [75])
    patch.setattr(Signals, "agreed", lambda self, accelerator: next(codes))


class Ranks:
    """A training run of one or several processes. codes: what they ended with, -9 after a kill."""

    def __init__(self, config: RunConfig, log: Path, ranks: int = 1, evaluate: Evaluate | None = None, **options: Any) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        sys.stdout.flush()
        self.pids = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                _child(config, log, place if ranks > 1 else {}, evaluate, options)
            self.pids.append(pid)
        self.codes: list[int] = []

    def wait(self, until: Callable[[], bool] = lambda: False, send: int = signal.SIGKILL, to: slice = slice(None)) -> list[int]:
        """Send a signal to the processes `to` once `until` holds; wait for the end of all."""
        sent, limit = False, time.monotonic() + 120
        running = dict.fromkeys(self.pids)
        while None in running.values():
            if not sent and until():
                sent = True
                for pid in self.pids[to]:
                    if running[pid] is None:
                        os.kill(pid, send)
            for pid in (pid for pid, code in running.items() if code is None):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running[pid] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > limit:
                for pid in (pid for pid, code in running.items() if code is None):
                    os.kill(pid, signal.SIGKILL)
                raise TimeoutError(self.log.read_text())
            time.sleep(0.0005)
        self.codes = [code for code in running.values() if code is not None]
        return self.codes


def sharded(**settings: Any) -> Accelerator:
    """In the place of Accelerator, with sharded weights. Accelerate takes FSDP2 for GPUs only; torch runs it on gloo as well."""
    accelerator = Accelerator(**settings)
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    return accelerator


def _child(config: RunConfig, log: Path, place: Mapping[str, Any], evaluate: Evaluate | None, options: Mapping[str, Any]) -> None:
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
        os.environ.update({name: str(value) for name, value in place.items()})
        torch.set_num_threads(1)
        AcceleratorState._reset_state(reset_partial_state=True)
        train(config, quiet=True, evaluate=evaluate, **options)
        code = 0
    except Stopped as stopped:
        code = stopped.code
    except KeyboardInterrupt:
        code = 130
    except (ComatchError, RuntimeError, OSError):
        traceback.print_exc()
    finally:
        os._exit(code)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what a clock or the machine decides."""
    return [{name: value for name, value in row.items() if name not in TIMING} for row in read_metrics(folder / "metrics.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all models in a run folder."""
    files = sorted(path for path in folder.rglob("*.safetensors") if "checkpoints" not in path.parts)
    return {f"{path.relative_to(folder)}: {name}": tensor for path in files for name, tensor in load_file(path).items()}


def assert_equal_runs(a: Path, b: Path) -> None:
    """Equal weights to the bit in every saved model, and equal lines of metrics."""
    assert lines(a) == lines(b)
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and len(first) > 10
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
