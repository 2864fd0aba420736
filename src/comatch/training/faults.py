"""What takes a run down from outside, in our words: no memory, a killed loader worker, a lost rank (specs/ecosystem.md rows 23, 24)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator

from comatch.core.memory import shortage
from comatch.errors import TrainingError

_PATIENCE = 5.0
AGAIN = "the same command goes on from the last checkpoint"


@contextmanager
def explained(accelerator: Accelerator) -> Iterator[None]:
    """Turn such faults inside the block into a TrainingError that names the need, the worker or the rank."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        settings = f"lower tokens_per_pass of the stage, then {AGAIN}; or images.max_pixels, in a new run"
        raise TrainingError(f"{shortage(error, 'a training step')}; {settings}") from error
    except RuntimeError as error:
        if _of_a_worker(str(error)):
            settings = f"most often memory or /dev/shm was full: lower workers (0 needs neither), then {AGAIN}"
            raise TrainingError(f"a loader worker died: {_first_line(error)}; {settings}") from error
        if accelerator.num_processes == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        lost = absent(accelerator)
        who = f"rank {', '.join(map(str, lost))} is gone or does not answer" if lost else "the ranks lost each other, though all answer"
        told = f"rank {accelerator.process_index} of {accelerator.num_processes}: {who} ({_first_line(error)})"
        raise TrainingError(f"{told}; look at that rank's log, then {AGAIN}") from error


def absent(accelerator: Accelerator, patience: float = _PATIENCE) -> list[int]:
    """Ranks that do not report within `patience` seconds. Every rank that is still there must call this at about the same time."""
    store = dist.distributed_c10d._get_default_store()
    others = [rank for rank in range(accelerator.num_processes) if rank != accelerator.process_index]
    try:
        store.set_timeout(timedelta(seconds=patience))
        store.set(f"comatch/here/{accelerator.process_index}", "yes")
        until = time.monotonic() + patience
        while others and time.monotonic() < until:
            others = [rank for rank in others if not store.check([f"comatch/here/{rank}"])]
            time.sleep(0.05)
    except RuntimeError:  # whoever kept the store is gone: the first rank, where no launcher does
        return [0]
    if not others:
        time.sleep(0.5)  # the keeper of the store stays until the others have read it
    return others


def _of_a_worker(told: str) -> bool:
    """Whether a worker died, or found no shared memory; all else that it raised was "Caught" and is told as it is."""
    return ("DataLoader worker" in told and "Caught" not in told) or "shared memory" in told or "</torch_" in told


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200]
