"""Our attention functions, entered through transformers' AttentionInterface under our own names.

The language model's (`TEXT`) is stock SDPA with the dense mask, kept in float32 on a CPU. The vision tower's (`VISION`) lets segments of
equal length share one SDPA call.

The stock tower without a flash kernel calls SDPA once per picture window in a Python loop (specs/performance.md 3.1). A name with
"flash" in it is handed all segments at once; this function groups them by length. Exact: every segment attends to itself alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

TEXT = "comatch_dense"
VISION = "comatch_flash_segments"


def masked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    visibility_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention under the mask that `Backbone.forward` hands down.

    query: [batch, heads, seq, head_dim]. key, value: [batch, key_heads, seq, head_dim].
    visibility_mask: bool [batch, 1, seq, seq], True where a query sees a key. attention_mask: always None, because
    transformers makes none for our name. Returns [batch, seq, heads, head_dim].
    """
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    return _sdpa(query, key, value, visibility_mask, scaling, dropout).transpose(1, 2).contiguous(), None


def segments(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention inside each segment.

    query, key, value: [1, heads, total, head_dim]. cu_seq_lens_q: [segments + 1], where segments begin and end.
    Returns [1, total, heads, head_dim].
    """
    lengths = cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    out = torch.empty_like(q)
    for length in torch.unique(lengths).tolist():
        if length == 0:
            continue
        starts = cu_seq_lens_q[:-1][lengths == length]
        place = (starts.unsqueeze(1) + torch.arange(length, device=starts.device)).flatten()
        whole = len(place) == len(q)
        group = [(x if whole else x[place]).reshape(-1, length, *q.shape[1:]).transpose(1, 2) for x in (q, k, v)]
        done = _sdpa(group[0], group[1], group[2], None, scaling, dropout).transpose(1, 2).flatten(0, 1)
        out = done if whole else out.index_copy(0, place, done)
    return out.unsqueeze(0), None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scaling: float, dropout: float) -> torch.Tensor:
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout)
    # torch's CPU kernel takes three times as long in bf16 as in float32 on short rows (forward and backward, torch 2.13).
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask, scale=scaling, dropout_p=dropout)
    return out.to(q.dtype)


AttentionInterface.register(TEXT, masked)
AttentionInterface.register(VISION, segments)
