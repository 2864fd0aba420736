"""What the benchmarks share: two ways in turn in one process, ratios with their spread, peak memory, and the machine.

A claim is a ratio between ways that do the same work (specs/performance.md section 13). `compare` runs them A B A B after a warm-up and
gives no ratio where A's own spread would explain it; that their results are equal is for the script to check, in the same run.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Clock = Callable[[], float]


def wait() -> None:
    """Let a GPU finish what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(ways: Mapping[str, Callable[[], object]], rounds: int, clock: Clock = time.perf_counter) -> dict[str, list[float]]:
    """Seconds of each way in each round; all ways run in turn in every round. A round of warm-up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            wait()
            began = clock()
            way()
            wait()
            if number:
                seconds[name].append(clock() - began)
    return seconds


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How many times faster ours is: of medians, smallest and largest of a round, and whether our own spread could not explain it."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    medians = statistics.median(theirs) / statistics.median(ours)
    spread = max(ours) / min(ours)
    told = max(medians, 1 / medians) > spread
    return {"of_medians": medians, "low": min(each), "high": max(each), "own_spread": spread, "above_noise": told}


def told(found: Mapping[str, Any]) -> str:
    """A ratio in words."""
    if not found["above_noise"]:
        return f"within noise ({found['own_spread']:.2f}x)"
    return f"{found['of_medians']:.2f}x ({found['low']:.2f}-{found['high']:.2f})"


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that tensors took during a run, beyond what they took before it."""
    if torch.cuda.is_available():
        wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        wait()
        return torch.cuda.max_memory_allocated() - before
    # Every allocation of torch's CPU allocator is an event of the profiler; their running sum is exact and repeats.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference of two sets of tensors, as a share of the largest entry, and the cosine between the sets laid end to end."""
    if ours.keys() != theirs.keys() or not ours:
        raise SystemExit(f"the two ways have other tensors: {sorted(ours.keys() ^ theirs.keys())[:6]}; no ratio")
    scale = max(float(x.abs().max()) for x in theirs.values())
    most = max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
    dot = sum(float((ours[name].double() * theirs[name].double()).sum()) for name in ours)
    norms = [sum(float(x.double().square().sum()) for x in side.values()) ** 0.5 for side in (ours, theirs)]
    return {"difference": most / scale, "cosine": dot / (norms[0] * norms[1]), "largest": scale}


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "commit": _commit(),
    }
    if torch.cuda.is_available():
        found |= {"cuda": torch.version.cuda, "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9}
    return found


def write(record: Mapping[str, Any], out: Path | None) -> None:
    """The record as JSON; without a path it is told that nothing was written."""
    if out is None:
        print("too short to mean anything, nothing written")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}")


def _commit() -> str:
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)  # noqa: S607
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
