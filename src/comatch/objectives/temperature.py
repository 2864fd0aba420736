"""The temperature of a contrastive loss: a number, or a parameter that is learned."""

from __future__ import annotations

import math

import torch
from torch import nn

from comatch.config import LossConfig, OptimConfig


class Temperature(nn.Module):
    """What cosines are divided by. Learned, it is held as its logarithm, a float32 parameter; fixed, there is nothing to train or save.

    Every rank computes its gradient from the same global loss, so it needs no synchronisation, and is not wrapped for it.
    """

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.log = nn.Parameter(torch.tensor(math.log(config.temperature))) if config.learn_temperature else None

    def forward(self) -> torch.Tensor | float:
        """The temperature; a learned one is first brought back into its range."""
        if self.log is None:
            return self.config.temperature
        with torch.no_grad():
            # On the parameter itself: a clamp inside the graph would have no gradient outside the range, and never come back.
            self.log.clamp_(*map(math.log, self.config.temperature_range))
        return self.log.exp()

    def join(self, optimizer: torch.optim.Optimizer, optim: OptimConfig) -> None:
        """Give a learned temperature its own group in the optimiser, without weight decay; does nothing for a fixed one.

        To be called on the prepared optimiser, before its schedule is made.
        """
        if self.log is not None:
            optimizer.add_param_group({"params": [self.log], "lr": self.config.temperature_lr or optim.lr, "weight_decay": 0.0})
