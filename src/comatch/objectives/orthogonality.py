"""Soft orthogonality of an example's compression tokens: each should say what the others do not (Lin et al., arXiv 1703.03130).

    loss = mean over pairs i != j of cos(c_i, c_j)^2

The cosines are plain, as in CoMa's own figure of similar tokens (specs/coma.md 7.2), and not those of states from which a mean was taken
away. A batch's mean would make an example's loss depend on what it is packed with, and without their own mean tokens that are all but
equal would still count as different. Plain ones can all be 0 as long as there are no more tokens than dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from comatch.devices import moved


def orthogonality(hidden: torch.Tensor, chosen: torch.Tensor, example: torch.Tensor, size: int) -> torch.Tensor:
    """Mean squared cosine between different chosen states of each example.

    hidden: [rows, seq, dim], final states, on any device. chosen: bool [rows, seq], the compression tokens. example: [rows, seq], -1 on
    padding; both in host memory. Returns [size] in float32 or better, from 0 to 1; 0 where an example has fewer than two.
    """
    owner = example[chosen]
    states = hidden.flatten(0, 1)[moved(chosen.flatten().nonzero().squeeze(1), hidden.device)]
    states = F.normalize(states.to(torch.promote_types(states.dtype, torch.float32)), dim=-1)
    count = torch.bincount(owner, minlength=size)
    # Tokens of an example side by side, [size, most, dim]: what is filled up is zero and adds nothing to the sum of squares.
    place = torch.arange(len(owner))
    first = torch.full((size,), len(owner)).scatter_reduce(0, owner, place, "amin")
    side = states.new_zeros(size, int(count.max()) if len(owner) else 1, states.shape[-1])
    side = side.index_put((moved(owner, hidden.device), moved(place - first[owner], hidden.device)), states)
    with torch.autocast(side.device.type, enabled=False):  # cosines in bf16 have two digits
        squares = (side @ side.transpose(1, 2)).square()
    apart = squares.sum((1, 2)) - squares.diagonal(dim1=1, dim2=2).sum(1)
    return apart / moved((count * (count - 1)).clamp(min=1), hidden.device)
