"""A process that writes into a store of vision features; apart from its test, so that it starts without a model library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comatch.backbones.store import DiskStore

CPU = torch.device("cpu")


def filled(folder: Path, size: int, **options: Any) -> tuple[DiskStore, Callable[[int], torch.Tensor]]:
    store = DiskStore(folder, torch.nn.Linear(1, 1, device="cpu"), **options)
    torch.nn.init.ones_(store._tower.weight)  # type: ignore[arg-type]
    torch.nn.init.ones_(store._tower.bias)  # type: ignore[arg-type]
    return store, lambda i: torch.full((1, size, 1), float(i))


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def work(folder: Path, seed: int, rounds: int, answers: Any) -> None:
    store, value = filled(folder, 2000, max_bytes=300_000, dtype=None)
    wrong = 0
    for i in np.random.default_rng(seed).integers(0, 60, rounds).tolist():
        key = b"%d" % i
        found = store.get([key], CPU).get(key)
        if found is None:
            found = store.put(key, value(i))
        wrong += not torch.equal(found, value(i))
    answers.put((wrong, dict(store.counts), on_disk(folder)))
