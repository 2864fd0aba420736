"""What one GPU can do at most: matrix products, copies in its memory, copies from the host. Other rates are held against these.

    python benchmarks/gpu/ceilings.py [--size 8192] [--gigabytes 4] [--out benchmarks/results/gpu-ceilings.json] [--dry]

Matrix products of random bf16 numbers (zeros would run faster). A copy within the device counts bytes read and bytes written.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

from large import arguments, in_parts
from measure import wait

from comatch.core.flops import matmul_rate


def rate(amount: float, run: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Amount a second of each round, and the median, after three rounds that warm up."""
    each = []
    for number in range(rounds + 3):
        wait()
        began = time.perf_counter()
        run()
        wait()
        if number > 2:
            each.append(amount / (time.perf_counter() - began))
    return {"each": each, "median": statistics.median(each)}


def matmul(device: str, size: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Rates of square matrix products; the product is checked against float64 on some rows."""
    dice = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=dice).bfloat16() for _ in range(2))
    exact = a[:4].double() @ b.double()
    off = float((((a @ b)[:4].double() - exact).norm() / exact.norm()).cpu())
    if not off < 0.01:
        raise SystemExit(f"the product is off by {off:.2g} of its norm; nothing is timed")
    each = [matmul_rate(device, torch.bfloat16, size, seconds) for _ in range(rounds)]
    return {"size": size, "off": off, "flop_per_second": {"each": each, "median": statistics.median(each)}}


def copies(device: str, size: int, rounds: int) -> dict[str, Any]:
    """Bytes a second within the device, from pinned host memory, and from memory that is not pinned."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8)
    there, room = source.to(device), torch.empty(size, dtype=torch.uint8, device=device)
    ways: dict[str, tuple[float, torch.Tensor]] = {"device": (2.0 * size, there)}
    if device == "cuda":
        ways |= {"pinned": (size, source.pin_memory()), "pageable": (size, source)}
    record: dict[str, Any] = {"bytes": size, "bytes_per_second": {}}
    for name, (amount, given) in ways.items():
        room.zero_()
        record["bytes_per_second"][name] = rate(amount, lambda given=given: room.copy_(given, non_blocking=True), rounds)  # type: ignore[misc]
        if not torch.equal(room, there):
            raise SystemExit(f"the {name} copy did not arrive whole")
    return record


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, tell, write."""
    asked = arguments(__doc__.splitlines()[0], "gpu-ceilings", given, rounds=10, size=8192, gigabytes=4.0)
    device, size, count = ("cpu", 64, 2**16) if asked.dry else ("cuda", asked.size, int(asked.gigabytes * 2**30))
    record = in_parts(
        {
            "matmul": lambda: matmul(device, size, 0.01 if asked.dry else 0.5, asked.rounds),
            "copies": lambda: copies(device, count, asked.rounds),
        },
        asked,
    )
    if "matmul" in record["parts"]:
        print(f"matrix products: {record['parts']['matmul']['flop_per_second']['median'] / 1e12:.0f} TFLOP/s")
    for name, found in record["parts"].get("copies", {}).get("bytes_per_second", {}).items():
        print(f"copy, {name}: {found['median'] / 1e9:.1f} GB/s")
    return record


if __name__ == "__main__":
    main()
