"""What do the compression tokens carry? The loss of what is read from them, with the item's own tokens and with another item's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from comatch.content import Dialogue, Message
from comatch.core.batch import Example
from comatch.core.packing import budget, collate
from comatch.encoder import Encoder
from comatch.errors import RecipeError
from comatch.objectives.tokens import next_token
from comatch.recipe import Stage

Told = Dialogue | tuple[Message, Message]
"""What a row with labels is made of: a dialogue, or a query and the answer whose text is rebuilt."""
_TOKENS = 8192


@dataclass(frozen=True)
class Carried:
    """own, other: mean cross-entropy of the reader's labels, in nats, with the item's own context and with another item's."""

    stage: str
    rows: int
    own: float
    other: float

    @property
    def nats(self) -> float:
        """What the right item is worth, per label; 0 where its compression tokens are not used."""
        return self.other - self.own

    def to_dict(self) -> dict[str, float]:
        """The numbers alone."""
        return {"own": self.own, "other": self.other, "nats": self.nats}


def carried(encoder: Encoder, stage: Stage, rows: Sequence[Told], *, seed: int = 0) -> Carried:
    """Measure a stage that reads from compression tokens on rows that were not trained on.

    Every row's reader is put behind the context of the next row as well. seed: of what the stage hides. Raises RecipeError for a stage
    without compression tokens or without labels, or fewer than two rows; ContentError for a row that cannot be read.
    """
    if "compression" not in stage.visibility.roles or stage.tells is None or not stage.speaks:
        raise RecipeError(f"stage {stage.name!r} has nothing that is read from compression tokens; choose one like coma's compress")
    if len(rows) < 2:
        raise RecipeError(f"{len(rows)} rows; at least 2 are needed, so that one can have the other's context")
    own = [_example(encoder, stage, row, seed + i) for i, row in enumerate(rows)]
    swapped = [_with_context(row, rows[(i + 1) % len(rows)]) for i, row in enumerate(rows)]
    other = [_example(encoder, stage, row, seed + i) for i, row in enumerate(swapped)]
    return Carried(stage.name, len(rows), _loss(encoder, stage, own), _loss(encoder, stage, other))


def _with_context(row: Told, donor: Told) -> Told:
    if isinstance(row, Dialogue):
        return replace(row, context=donor.context if isinstance(donor, Dialogue) else donor[0])
    return (donor.context if isinstance(donor, Dialogue) else donor[0]), row[1]


def _example(encoder: Encoder, stage: Stage, row: Told, seed: int) -> Example:
    if isinstance(row, Dialogue):
        return encoder.preparer.dialogue(row, stage, seed)
    return encoder.preparer.pair(*row, stage, seed)


@torch.no_grad()
def _loss(encoder: Encoder, stage: Stage, examples: Sequence[Example]) -> float:
    """Mean over examples of their mean over labels, as in training."""
    backbone, total = encoder.backbone, 0.0
    for chosen in budget([len(example) for example in examples], _TOKENS):
        batch = collate([examples[i] for i in chosen])
        hidden = backbone(batch, stage.visibility)
        loss, _ = next_token(hidden, batch.labels, batch.example, batch.size, backbone.head)
        total += float(loss.sum())
    return total / len(examples)
