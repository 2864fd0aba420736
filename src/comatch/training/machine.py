"""What a machine has for a run, and whether the run fits the way it is started. Every check is a function that returns findings."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from comatch.backbones.memory import free_memory
from comatch.config import RunConfig

Level = Literal["ok", "warning", "error"]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "comatch")
SHARED = Path("/dev/shm")  # noqa: S108 - looked at, not written to
_GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """What one check found. level: "warning" where a run works but hardly as meant, "error" where it would fail. step: what to do next."""

    check: str
    level: Level
    told: str
    step: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def environment(folder: Path, workers: int = 0) -> Iterator[Finding]:
    """Versions, processors, shared memory, and the disk below the output folder."""
    found = {name: version(name) for name in PACKAGES if _installed(name)}
    told = ", ".join(f"{name} {number}" for name, number in {"python": platform.python_version(), **found}.items())
    yield Finding("versions", "ok", told, values={"python": platform.python_version(), **found})
    yield _processors(workers)
    yield _disk(folder)
    if workers:
        yield _shared_memory(workers)


def device(config: RunConfig | None = None) -> Finding:
    """What will compute, and with how much memory."""
    if config is not None and config.device == "cpu":
        return Finding("device", "ok", f"the CPU, as the run says; {room() / _GIB:.1f} GiB of memory", values={"device": "cpu"})
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch has no CUDA"
        return Finding("device", "ok", f"the CPU; no GPU was found ({built}); {room() / _GIB:.1f} GiB of memory", values={"device": "cpu"})
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    free, _ = torch.cuda.mem_get_info()
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    told = f"{len(gpus)} x {names}, {gpus[0].total_memory / _GIB:.1f} GiB each, {free / _GIB:.1f} GiB of the first free"
    told += f"; CUDA {torch.version.cuda}"
    values = {"device": "cuda", "gpus": len(gpus), "name": names, "memory": gpus[0].total_memory, "free": free}
    if free < 0.5 * gpus[0].total_memory:
        return Finding("device", "warning", told, "something else holds the GPU; end it, or choose another by CUDA_VISIBLE_DEVICES", values)
    return Finding("device", "ok", told, values=values)


def launch(config: RunConfig, processes: int) -> Iterator[Finding]:
    """Whether the run can be shared out to so many processes, by what they were started with."""
    gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    for name, run in config.stages.items():
        if run.batch % processes:
            fits = [n for n in range(1, run.batch + 1) if run.batch % n == 0 and n <= 2 * processes]
            told = f"stages.{name}.batch={run.batch} does not divide by {processes} processes"
            yield Finding("launch", "error", told, f"make it a multiple of {processes}, or start one of {fits} processes")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    if gpus and here > gpus:
        yield Finding("launch", "error", f"{here} processes for {gpus} GPUs of this machine", f"start {gpus}, or set device=cpu")
    elif gpus > 1 and processes == 1:
        step = f"accelerate launch --config_file accelerate/ddp.yaml --num_processes {gpus} -m comatch train ..."
        yield Finding("launch", "warning", f"one process would use one of {gpus} GPUs", step)
    elif sharded and not gpus:
        step = "use accelerate/ddp.yaml on CPUs; the result is the same"
        yield Finding("launch", "warning", "Accelerate shards weights on GPUs only; here every process keeps them whole", step)
    else:
        shares = ", ".join(f"{run.batch // processes} of {run.batch} in {name}" for name, run in config.stages.items())
        how = "sharded weights (FSDP2)" if sharded else "whole weights in each"
        each = f"{processes} processes, {how}; each takes {shares}" if processes > 1 else f"one process takes batches whole: {shares}"
        yield Finding("launch", "ok", each, values={"processes": processes, "sharded": sharded})


def room(config: RunConfig | None = None) -> float:
    """Bytes of memory that a process can count on: what is free on the first GPU, or in this machine."""
    keeps_off = config is not None and config.device == "cpu"
    return free_memory(torch.device("cuda" if torch.cuda.is_available() and not keeps_off else "cpu"))


def _processors(workers: int) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    told = f"{cores} cores, {threads} threads in torch, {workers} loader workers"
    values = {"cores": cores, "threads": threads, "workers": workers}
    if threads > cores:
        return Finding("processors", "warning", told, f"more threads than cores slow each other down: OMP_NUM_THREADS={cores}", values)
    if workers > cores:
        return Finding("processors", "warning", told, f"more workers than cores: workers={cores}", values)
    return Finding("processors", "ok", told, values=values)


def _disk(folder: Path) -> Finding:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    told, values = f"{free / _GIB:.1f} GiB free for {folder}", {"folder": str(folder), "free": free}
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding("disk", "error", f"{there} cannot be written to", "choose another place: output=...", values)
    if free < _GIB:
        return Finding("disk", "warning", told, "a checkpoint may not fit; free some space, or choose another place: output=...", values)
    return Finding("disk", "ok", told, values=values)


def _shared_memory(workers: int) -> Finding:
    if platform.system() != "Linux":
        return Finding("shared memory", "ok", f"left to {platform.system()}")
    free = shutil.disk_usage(SHARED).free if SHARED.is_dir() else 0
    told = f"{free / _GIB:.2f} GiB of {SHARED} for the batches of {workers} workers"
    if free < workers * 2**26:
        return Finding("shared memory", "error", told, "set workers=0, or give the container more: --shm-size=8g", {"free": free})
    return Finding("shared memory", "ok", told, values={"free": free})


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
