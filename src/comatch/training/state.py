"""Everything of a stage that changes from step to step, and how it goes into a checkpoint and comes back.

The data of a step are a function of (seed, step), its random numbers one of (seed, stage, step, rank), so neither has a state:
weights, optimiser, scheduler and what has been counted are all there is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from comatch.backbones import adapters
from comatch.errors import TrainingError
from comatch.training.checkpoint import OPTIMIZER, WEIGHTS, Checkpoint, Tensors
from comatch.training.loader import Quarantine
from comatch.training.progress import Reporter


@dataclass
class Live:
    """The moving parts of a stage. modules: what trains, by a name of its own, as Accelerate prepared it. step: finished steps."""

    accelerator: Accelerator
    modules: Mapping[str, nn.Module]
    optimizer: Any
    scheduler: Any
    quarantine: Quarantine
    reporter: Reporter
    step: int = 0

    def gather(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
        """Weights, moments of the optimiser, small numbers: all of it on the first process. Every process must call this."""
        weights, moments = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for name, parameter in self._trained():
            weights[name] = _whole(parameter)
            moments |= {f"{name}|{kind}": _whole(value) for kind, value in self.optimizer.state.get(parameter, {}).items()}
        counted = {"reasons": self.quarantine.reasons, "counts": self.quarantine.counts}
        state = {
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "rates": [group["lr"] for group in self.optimizer.param_groups],
            "reporter": self.reporter.state(),
            "quarantine": gather_object([counted]),
        }
        return weights, moments, state

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint that was verified. Raises TrainingError where it is of another model."""
        load_weights(dict(self._trained()), checkpoint.tensors(WEIGHTS), str(checkpoint.path))
        moments = checkpoint.tensors(OPTIMIZER)
        for name, parameter in self._trained():
            kinds = [kind for owner, _, kind in (key.rpartition("|") for key in moments) if owner == name]
            if kinds:
                self.optimizer.state[parameter] = {kind: _placed(moments[f"{name}|{kind}"], parameter, kind) for kind in kinds}
        state = checkpoint.state()
        self.scheduler.load_state_dict({"lr_lambdas": [None] * len(state["rates"]), **state["scheduler"]})
        for group, rate in zip(self.optimizer.param_groups, state["rates"], strict=True):
            group["lr"] = rate
        self.reporter.restore(checkpoint.step, state["reporter"])
        self._restore_counts(state["quarantine"])
        self.step = checkpoint.step

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part, module in self.modules.items():
            plain = self.accelerator.unwrap_model(module)
            for inner in plain.modules():
                if isinstance(inner, FSDPModule):
                    inner.reshard()  # after a forward pass without backward the whole parameters stand in the place of the shards
            for name, parameter in adapters.trainable(plain).items():
                yield f"{part}.{name}", parameter

    def _restore_counts(self, counted: list[dict[str, Any]]) -> None:
        """Each process its own, or on another number of processes all on the first."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine = counted[rank : rank + 1] if len(counted) == ranks else counted if rank == 0 else []
        for one in mine:
            self.quarantine.reasons.update(one["reasons"])
            for source, counts in one["counts"].items():
                self.quarantine.counts.setdefault(source, Counter()).update(counts)


def load_weights(into: Mapping[str, nn.Parameter], weights: Tensors, where: str) -> None:
    """Copy saved weights into the parameters of the same names. Raises TrainingError where names or shapes differ."""
    if off := sorted(into.keys() ^ weights.keys()) or [n for n, p in into.items() if p.shape != weights[n].shape]:
        raise TrainingError(f"{where} is of another model: {len(off)} weights differ, {off[:10]}")
    with torch.no_grad():
        for name, parameter in into.items():
            parameter.copy_(_placed(weights[name], parameter))


def seed_step(seed: int, stage: str, step: int, rank: int) -> int:
    """Fix the random numbers of python, numpy and torch for one step, and return a seed for the step that is equal on all ranks."""
    set_seed(_draw(seed, stage, step, rank))
    return _draw(seed, stage, step)


def _draw(*of: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(of).encode(), digest_size=4).digest())


def _whole(value: torch.Tensor) -> torch.Tensor:
    """The full tensor on the CPU, also of one that is spread over the processes."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu().contiguous()


def _placed(value: torch.Tensor, parameter: torch.Tensor, kind: str = "") -> torch.Tensor:
    """A full tensor where and as its parameter is; AdamW keeps its step on the CPU."""
    if kind == "step":
        return value
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)
