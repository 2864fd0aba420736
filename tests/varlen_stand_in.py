"""torch's variable-length attention kernel, written out as a loop, for machines without a GPU. As strict as the kernel about its input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from comatch.backbones import attention

Calls = list[dict[str, Any]]


def stand_in(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The signature of torch 2.13 as far as we use it."""
    assert query.dtype == key.dtype == value.dtype and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size in ((-1, -1), (-1, 0)) and isinstance(max_q, int) and isinstance(max_k, int)
    bounds_q, bounds_k = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (bounds_q[0], bounds_q[-1]) == (0, len(query)) and (bounds_k[0], bounds_k[-1]) == (0, len(key))
    assert max_q == max(cu_seq_q.diff().tolist()) and max_k == max(cu_seq_k.diff().tolist())
    repeats = query.shape[1] // key.shape[1]
    outs = []
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        k, v = (x[k0:k1].repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], k) * scale
        if window_size == (-1, 0):
            assert q1 - q0 == k1 - k0, "flash aligns an unequal causal rectangle to the bottom right, SDPA to the top left"
            scores = scores.masked_fill(~torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=query.device).tril(), -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outs)


def install(monkeypatch: pytest.MonkeyPatch, grouped_heads: bool = True) -> Calls:
    """Give our attention the kernel of torch 2.13, or (without `grouped_heads`) of 2.11; returns what it is called with."""
    calls: Calls = []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append({"query": args[0], "key": args[1], "bounds": args[3], **kwargs})
        return stand_in(*args, **kwargs)

    def of_2_13(*args: Any, enable_gqa: bool = False, **kwargs: Any) -> torch.Tensor:
        return watched(*args, enable_gqa=enable_gqa, **kwargs)

    def of_2_11(*args: Any, **kwargs: Any) -> torch.Tensor:
        return watched(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", of_2_13 if grouped_heads else of_2_11)
    monkeypatch.setattr(attention, "why_no_kernel", lambda *_: "")
    return calls
