"""The dense attention mask: slow, plain, and the oracle that every faster form is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from comatch.core.batch import ROLE_ID, Loan
from comatch.recipe import ROLES, Visibility


def dense(roles: torch.Tensor, rows: torch.Tensor, visibility: Visibility, loans: Sequence[Loan] = ()) -> torch.Tensor:
    """Who may attend to whom, as one boolean per pair of places (design.md section 4).

    roles: [batch, seq] int, places in ROLES, -1 on padding. rows: [batch, seq] int, which example a place belongs to. loans: as in Batch.
    Returns bool [batch, 1, seq, seq], True where query (third axis) sees key (fourth). Padding sees itself, so that no row is empty.
    Places are in sequence order: causal compares their order in the row, which packing keeps within each example.
    """
    never = len(ROLES)
    table = torch.zeros(2, never + 1, never + 1, dtype=torch.bool, device=roles.device)
    for query in visibility.roles:
        for key in visibility.roles:
            letter = visibility.letter(query, key)
            table[0, ROLE_ID[query], ROLE_ID[key]] = letter == "f"
            table[1, ROLE_ID[query], ROLE_ID[key]] = letter == "c"
    place = roles.long().where(roles >= 0, never)
    index = place.unsqueeze(2) * (never + 1) + place.unsqueeze(1)
    seq = roles.shape[1]
    triangle = torch.ones(seq, seq, dtype=torch.bool, device=roles.device).tril()
    full, causal = table.flatten(1)
    allowed: torch.Tensor = full[index] | (causal[index] & triangle)
    same = rows.unsqueeze(2) == rows.unsqueeze(1)
    for loan in loans:
        lent = (rows == loan.lender) & ((rows == loan.lender).cumsum(1) <= loan.length)
        same |= (rows == loan.borrower).unsqueeze(2) & lent.unsqueeze(1)
    allowed &= same
    allowed |= torch.eye(seq, dtype=torch.bool, device=roles.device)
    return allowed.unsqueeze(1)
