"""When a device's memory runs out: the need is told, and encoding goes on, once, with smaller passes (specs/ecosystem.md row 23)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence

import torch

from comatch.core.packing import budget
from comatch.errors import ModelError


class Passes:
    """Runs items in passes of at most so many tokens, and of half as many from the first time on that memory runs out."""

    def __init__(self) -> None:
        self.limit: int | None = None

    def run(self, lengths: Sequence[int], order: Sequence[int], tokens: int, forward: Callable[[list[int]], None]) -> None:
        """Call `forward` with the places of the items of each pass, in `order`. Raises ModelError where memory runs out again."""
        waiting = list(order)
        while waiting:
            for group in budget([lengths[i] for i in waiting], min(tokens, self.limit or tokens)):
                chosen = waiting[: len(group)]
                try:
                    forward(chosen)
                except torch.OutOfMemoryError as error:
                    self._halve(error, tokens, sum(lengths[i] for i in chosen))
                    break
                waiting = waiting[len(group) :]

    def _halve(self, error: torch.OutOfMemoryError, allowed: int, used: int) -> None:
        told = shortage(error, f"a pass of {used:,} tokens")
        if self.limit is not None:
            raise ModelError(f"{told}; it was halved once already. Set batch_tokens below {used:,}, or lower images.max_pixels") from error
        self.limit = max(1, min(allowed, used) // 2)
        warnings.warn(f"{told}; going on with passes of {self.limit:,} tokens instead of {allowed:,}", stacklevel=2)


def shortage(error: torch.OutOfMemoryError, what: str) -> str:
    """The measured need in one sentence: what was running, what it asked for, and what was held already."""
    asked = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    room = re.search(r"total capacity of ([\d.]+ \w+)", str(error))
    told = f"out of memory in {what}: it asked for {asked.group(1) if asked else 'more than there is'}"
    if torch.cuda.is_available():
        told += f" beyond the {torch.cuda.memory_allocated() / 2**30:.2f} GiB in use"
    return told + (f", of {room.group(1)} in all" if room else "")
