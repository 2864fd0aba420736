"""One optimiser step of each objective, under a token budget per forward pass.

The contrastive step is exact at any batch size: vectors first, one loss over all of them and all ranks, then each pass again with
its cached gradients (GradCache, arXiv 2101.06983). A batch that fits one pass keeps its graph and runs once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from comatch.backbones.base import Vision
from comatch.core.batch import Batch, Example
from comatch.core.packing import budget, collate
from comatch.core.pooling import pool
from comatch.errors import TrainingError
from comatch.objectives.contrastive import info_nce
from comatch.objectives.tokens import next_token
from comatch.recipe import Stage


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    loss, accuracy (next tokens predicted right, or queries whose target ranks first) are of all ranks; examples, tokens of this one.
    """

    loss: float
    accuracy: float
    examples: int
    tokens: int


def passes(examples: Sequence[Example], tokens: int) -> list[list[int]]:
    """Group examples of like length into passes of at most `tokens` tokens; returns indices."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    return [[order[i] for i in group] for group in budget([len(examples[i]) for i in order], tokens)]


def token_step(
    accelerator: Accelerator, model: nn.Module, examples: Sequence[Example], stage: Stage, tokens: int, global_size: int
) -> StepResult:
    """Forward and backward of next-token prediction over this rank's examples; gradients are those of the global mean."""
    groups = passes(examples, tokens)
    sums = torch.zeros(3, device=accelerator.device)
    backbone = accelerator.unwrap_model(model)
    scale = accelerator.num_processes * stage.objectives["next_token"] / global_size
    for i, group in enumerate(groups):
        batch = collate([examples[j] for j in group]).to(accelerator.device)
        with _sync(accelerator, model, last=i == len(groups) - 1), accelerator.autocast():
            hidden = model(batch, stage.visibility)
            losses, hits = next_token(hidden, batch.labels, batch.example, batch.size, backbone.head)
            check_finite(losses, "loss")
            accelerator.backward(losses.sum() * scale)
        sums += torch.cat([losses.detach().sum()[None], hits])
    loss, right, supervised = accelerator.reduce(sums, "sum").tolist()
    return StepResult(loss / global_size, right / max(supervised, 1), len(examples), sum(map(len, examples)))


def contrastive_step(
    accelerator: Accelerator,
    model: nn.Module,
    queries: Sequence[Example],
    targets: Sequence[Example],
    stage: Stage,
    tokens: int,
    *,
    temperature: float,
    symmetric: bool,
    seed: int,
) -> StepResult:
    """Forward and backward of InfoNCE over all ranks' pairs. queries[i] belongs to targets[i]; seed fixes dropout in both passes."""
    examples = [*queries, *targets]
    groups = passes(examples, tokens)
    batches = [collate([examples[j] for j in group]).to(accelerator.device) for group in groups]
    backbone = accelerator.unwrap_model(model)
    frozen = not any(p.requires_grad for p in backbone.vision_tower.parameters())
    single = len(batches) == 1
    vectors: torch.Tensor | None = None
    seen: list[Vision | None] = []
    parts = []
    for i, batch in enumerate(batches):
        with torch.set_grad_enabled(single), _dropout(seed + i), accelerator.autocast():
            with torch.no_grad():
                seen.append(backbone.see(batch) if frozen else None)
            parts.append(_vectors(model, batch, stage, seen[i]))
    order = torch.tensor([j for group in groups for j in group], device=accelerator.device)
    vectors = torch.cat(parts)[torch.argsort(order)]
    check_finite(vectors, "vectors")
    gradient, loss, accuracy = _loss(accelerator, vectors.detach(), len(queries), temperature, symmetric)
    gradient = gradient * stage.objectives["contrastive"]
    if single:
        accelerator.backward((vectors * gradient).sum())
    else:
        for i, (group, batch) in enumerate(zip(groups, batches, strict=True)):
            with _sync(accelerator, model, last=i == len(groups) - 1), _dropout(seed + i), accelerator.autocast():
                again = _vectors(model, batch, stage, seen[i])
                accelerator.backward((again * gradient[group]).sum())
    return StepResult(loss, accuracy, len(queries), sum(map(len, examples)))


def check_finite(value: torch.Tensor, what: str) -> None:
    """Raise TrainingError before a non-finite number can reach the weights (row 22)."""
    if not bool(torch.isfinite(value).all()):
        raise TrainingError(
            f"{what} became NaN or infinite; nothing was updated. Lower optim.lr, set precision=fp32, or look at this batch's data"
        )


def _vectors(model: nn.Module, batch: Batch, stage: Stage, vision: Vision | None) -> torch.Tensor:
    hidden = model(batch, stage.visibility, vision)
    return pool(hidden, batch.roles, batch.example, batch.size, stage.pooling or "")


def _loss(
    accelerator: Accelerator, vectors: torch.Tensor, pairs: int, temperature: float, symmetric: bool
) -> tuple[torch.Tensor, float, float]:
    """Gradient of the global loss with respect to this rank's vectors [2 * pairs, dim], times the number of ranks (DDP averages)."""
    q, t = accelerator.gather(vectors[:pairs].contiguous()), accelerator.gather(vectors[pairs:].contiguous())
    q, t = q.requires_grad_(True), t.requires_grad_(True)
    with torch.enable_grad():
        loss = info_nce(q, t, temperature, symmetric)
    check_finite(loss, "loss")
    grads = torch.autograd.grad(loss, [q, t])
    mine = slice(accelerator.process_index * pairs, (accelerator.process_index + 1) * pairs)
    first = (q.detach() @ t.detach().T).argmax(1) == torch.arange(len(q), device=q.device)
    gradient = torch.cat([g[mine] for g in grads]) * accelerator.num_processes
    return gradient, float(loss.detach()), float(first.float().mean())


def _sync(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[object]:
    return nullcontext() if last else accelerator.no_sync(model)


@contextmanager
def _dropout(seed: int) -> Iterator[None]:
    """Fix the random state inside the block and put it back after, so that both passes draw the same dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
