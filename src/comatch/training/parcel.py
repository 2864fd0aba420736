"""How samples travel from a loader worker: the patches of all their pictures as one tensor in shared memory.

Arrays inside samples would be pickled through a pipe, which costs the main process ten times as long (benchmarks/images.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from comatch.core.batch import Example

if TYPE_CHECKING:
    from comatch.training.loader import Sample


@dataclass(frozen=True)
class Parcel:
    """Samples without pixels, and the pixels: uint8 [patches of all pictures and targets in order, 3 * patch * patch]."""

    samples: list[Sample]
    patches: torch.Tensor

    @classmethod
    def packed(cls, samples: Sequence[Sample]) -> Parcel:
        """Take the pixels out of samples."""
        everything = [example for sample in samples for example in sample.everything]
        pictures = [picture for e in everything for picture in (*e.patches, *([e.targets] if len(e.targets) else []))]
        empty = [s.with_examples(replace(e, patches=(), targets=e.targets[:, :0]) for e in s.everything) for s in samples]
        return cls(empty, torch.from_numpy(np.concatenate(pictures)) if pictures else torch.zeros(0, 0, dtype=torch.uint8))

    def opened(self) -> list[Sample]:
        """The samples as they were packed; their pixels are views into one block of memory."""
        rows, at = self.patches.numpy(), 0
        samples = []
        for sample in self.samples:
            examples: list[Example] = []
            for example in sample.everything:
                ends = at + np.cumsum([time * height * width for time, height, width in example.grids], dtype=int)
                starts = [at, *ends[:-1]]
                patches = tuple(rows[a:b] for a, b in zip(starts, ends, strict=False))
                at = int(ends[-1]) if len(ends) else at
                hidden = len(example.targets)
                examples.append(replace(example, patches=patches, targets=rows[at : at + hidden] if hidden else example.targets))
                at += hidden
            samples.append(sample.with_examples(examples))
        return samples
