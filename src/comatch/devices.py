"""Host memory and devices: a batch is planned in the one, and only what a kernel reads goes to the other."""

from __future__ import annotations

import torch

HOST = torch.device("cpu")


def moved(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of host memory on a device; on its way to a GPU it is pinned, so that nobody waits for the copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    # Apple's may still be reading when the copy's source is gone.
    return x.to(device, non_blocking=device.type != "mps")


def default_device() -> str:
    """Where a model goes if nobody says."""
    return "cuda" if torch.cuda.is_available() else "cpu"
