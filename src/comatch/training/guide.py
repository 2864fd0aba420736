"""Another embedding model that tells which candidates are as right as the positive (GISTEmbed, arXiv 2402.16829)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from comatch.card import read_card, resolve_any, run_result
from comatch.content import Image, Message, Text
from comatch.encoder import Encoder
from comatch.errors import ConfigError
from comatch.training.loader import Sample


@dataclass(frozen=True)
class Guide:
    """Calling it gives the guide's vectors of this rank's samples, in the form that `contrastive_step` takes."""

    encoder: Encoder

    @classmethod
    def load(cls, name: str, student: Encoder, device: torch.device) -> Guide:
        """A guide for a student. Raises ConfigError where it reads items in another way, because it is shown the student's token rows."""
        encoder = Encoder.load(name, device=str(device))
        probe = Message((Image(np.arange(96 * 64 * 3, dtype=np.uint8).reshape(64, 96, 3)), Text("a red circle?")))
        mine, theirs = (one.preparer.item(probe, one.stage) for one in (student, encoder))
        differing = [part for part in ("ids", "roles", "positions") if not np.array_equal(getattr(mine, part), getattr(theirs, part))]
        if differing or not all(map(np.array_equal, mine.patches, theirs.patches)):
            what = f"token {', '.join(differing)}" if differing else "pixels"
            raise ConfigError(
                f"loss.guide {name} reads items in another way than the model that is trained ({what} differ); "
                f"take one that was trained from the same base with the same number of tokens and image limits"
            )
        return cls(encoder)

    def __call__(self, samples: Sequence[Sample], tokens: int) -> torch.Tensor:
        """Unit vectors [items, dim] of all examples of all samples, in passes of so many tokens."""
        examples = [example for sample in samples for example in sample.examples]
        return torch.from_numpy(self.encoder.encode_prepared(examples, batch_tokens=tokens))


def guide_fingerprint(name: str) -> str:
    """What a manifest knows a guide by. Raises ConfigError where the folder holds no embedding model."""
    card = read_card(run_result(resolve_any(name)))
    if card is None:
        raise ConfigError(f"loss.guide {name} is no embedding model that comatch saved; train one first, or remove the guide")
    return str(card["fingerprint"])
