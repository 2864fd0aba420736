"""Splitting a rank's examples into passes that fit in memory, and running them so that gradients are synchronised once a step.

Sharded weights (FSDP2) are gathered in every pass, and a vision tower that trains is reduced at the end of a step. A rank with fewer
passes than others, or without pictures, would leave them waiting; it gets stand-ins whose gradient is multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from comatch.backbones.base import Backbone
from comatch.core.batch import IGNORE, ROLE_ID, Batch, Example
from comatch.core.packing import MULTIPLE, UNLIMITED, Size, best_fit, collate
from comatch.devices import moved


@dataclass(frozen=True)
class Pass:
    """One forward pass. members: places of its examples in the planned list, in the order of the batch; none for a stand-in."""

    batch: Batch
    members: list[int]


def plan_passes(
    accelerator: Accelerator, backbone: Backbone, examples: Sequence[Example], tokens: int, patches: int | None = None
) -> list[Pass]:
    """Passes of at most `tokens` language-model tokens and `patches` picture patches, at least one example each.

    Pictures and texts go apart, unless all fit one pass; passes with pictures come first, and each kind is packed by best fit.
    Where a vision tower trains on several ranks every rank has a pass with pictures; sharded weights have equal numbers of both kinds
    on all ranks, which costs one small collective.
    """
    seen = [i for i, example in enumerate(examples) if example.grids]
    texts = [i for i, example in enumerate(examples) if not example.grids]
    whole = _split([*seen, *texts], examples, tokens, patches)
    if len(whole) == 1:
        kinds = [whole, []] if seen else [[], whole]
    else:
        kinds = [_split(kind, examples, tokens, patches) for kind in (seen, texts)]
    wanted = [len(kind) for kind in kinds]
    if isinstance(backbone, FSDPModule):
        wanted = accelerator.gather(moved(torch.tensor([wanted]), accelerator.device)).amax(0).tolist()
    elif accelerator.num_processes > 1 and backbone.vision_trains:
        wanted[0] = max(1, wanted[0])
    planned = []
    for groups, wants, pictured in zip(kinds, wanted, (True, False), strict=True):
        planned += [Pass(_batch([examples[i] for i in group], accelerator.device), group) for group in groups]
        missing = wants - len(groups)
        if missing:
            stand_in = Pass(_batch([_stand_in(backbone, examples, pictured)], accelerator.device), [])
            planned += [stand_in] * missing
    return planned


def fill(planned: Sequence[Pass]) -> tuple[int, int]:
    """How many places of the passes hold a token, stand-ins aside, and how many places there are."""
    return sum(part.batch.tokens for part in planned if part.members), sum(part.batch.ids.numel() for part in planned)


def open_methods(backbone: Backbone) -> None:
    """Let sharded weights be gathered for the backbone's other entrances as for `forward`; does nothing for whole ones."""
    if isinstance(backbone, FSDPModule) and "see" not in vars(backbone):
        register_fsdp_forward_method(backbone, "see")


def no_sync(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """Gradients stay with their rank inside the block."""
    # Accelerate's own does nothing for one process, which it wraps all the same when a launcher started it.
    context: AbstractContextManager[None] = model.no_sync() if isinstance(model, DistributedDataParallel) else accelerator.no_sync(model)
    return context


def run_backward(accelerator: Accelerator, model: nn.Module, loss: torch.Tensor, *, last: bool) -> None:
    """Backward of one pass whose forward ran under `no_sync`; gradients of all passes are synchronised in the last."""
    with accelerator.trigger_sync_in_backward(model) if last else no_sync(accelerator, model):
        accelerator.backward(loss)


def _batch(examples: Sequence[Example], device: torch.device) -> Batch:
    return collate(examples, multiple=MULTIPLE if device.type == "cpu" else 2 * MULTIPLE)


def _split(chosen: Sequence[int], examples: Sequence[Example], tokens: int, patches: int | None) -> list[list[int]]:
    groups = best_fit([Size.of(examples[i]) for i in chosen], Size(tokens, patches or UNLIMITED)).groups
    return [[chosen[i] for i in group] for group in groups]


def _stand_in(backbone: Backbone, examples: Sequence[Example], pictured: bool) -> Example:
    """The shortest example without its pictures, behind one black picture of a single token where `pictured`."""
    # One with labels where there is any, so that the head is reached too.
    example = min(examples, key=lambda e: (e.supervised == 0, len(e)))
    text = example.ids != backbone.image_id
    example = replace(example, targets=example.targets[:0], target_places=example.target_places[:0])
    ids, roles, labels, positions = example.ids[text], example.roles[text], example.labels[text], example.positions[:, text]
    if not pictured:
        return replace(example, ids=ids, roles=roles, labels=labels, positions=positions, patches=(), grids=())
    side, merge = backbone.processor.patch_size, backbone.processor.merge_size
    return replace(
        example,
        ids=np.concatenate([[backbone.image_id], ids]),
        roles=np.concatenate([[ROLE_ID["context"]], roles]),
        labels=np.concatenate([[IGNORE], labels]),
        positions=np.concatenate([np.zeros((3, 1), np.int64), positions], axis=1),
        patches=(np.zeros((merge * merge, 3 * side * side), np.uint8),),
        grids=((1, merge, merge),),
    )
