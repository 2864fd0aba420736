"""Our attention functions, entered through transformers' AttentionInterface under our own names; nothing is patched.

The language model's (`TEXT`) takes a visibility table as segments (core/segments.py) or as the dense mask, which is the oracle and the
fallback. The vision tower's (`VISION`) takes its windows as segments: a name with "flash" in it is handed all of them at once,
where the stock tower calls SDPA once per window in a Python loop (specs/performance.md 3.1).

Segments run through torch's own variable-length flash kernel on a GPU, one launch per block, and elsewhere as one SDPA call for all
segments of equal shape. On a CPU that beats the dense mask at every shape measured (benchmarks/attention.py), so it has no switch.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface

from comatch.core.segments import Block, Segments, stretches

TEXT = "comatch_segments"
VISION = "comatch_flash_segments"
_LARGEST_HEAD = 256


def text(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    segments: Segments | None = None,
    visibility_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention under what `Backbone.forward` hands down: `segments`, or the dense `visibility_mask`.

    query: [batch, heads, seq, head_dim]. key, value: [batch, key_heads, seq, head_dim]. attention_mask: always None, because transformers
    makes none for our name. Returns [batch, seq, heads, head_dim].
    """
    if segments is None:
        if visibility_mask is None:
            raise TypeError(f"{TEXT} needs segments or a visibility_mask; call the model through comatch.backbones.base.Backbone")
        return masked(module, query, key, value, attention_mask, visibility_mask=visibility_mask, scaling=scaling, dropout=dropout)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out = attend(flat[0], flat[1], flat[2], segments, scaling, dropout)
    return out.view(query.shape[0], query.shape[2], *out.shape[1:]), None


def vision(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    scaling: float,
    max_length_q: int | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention inside each segment.

    query, key, value: [1, heads, total, head_dim]. cu_seq_lens_q: [segments + 1], where segments begin and end. max_length_q: of the
    longest. Returns [1, total, heads, head_dim].
    """
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if max_length_q is not None and _has_kernel(q, dropout):
        block = Block(False, None, None, cu_seq_lens_q, cu_seq_lens_q, int(max_length_q), int(max_length_q), ())
        return _launch(q, k, v, block, scaling).unsqueeze(0), None
    segments = stretches(tuple(cu_seq_lens_q.tolist()), q.device)
    return attend(q, k, v, segments, scaling, dropout).unsqueeze(0), None


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Segments, scaling: float, dropout: float = 0.0) -> torch.Tensor:
    """Attention of rows that stand side by side, under `segments`.

    q: [places, heads, head_dim]. k, v: [places, key_heads, head_dim]. Returns [places, heads, head_dim].
    """
    outs = []
    for block in segments.blocks:
        rows = [x if at is None else x.index_select(0, at) for x, at in ((q, block.queries), (k, block.keys), (v, block.keys))]
        if _has_kernel(q, dropout):
            outs.append(_launch(rows[0], rows[1], rows[2], block, scaling))
        else:
            outs.append(_grouped(rows[0], rows[1], rows[2], block, scaling, dropout))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if segments.source is None else out.index_select(0, segments.source)


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
    """Attention under a dense mask.

    query: [batch, heads, seq, head_dim]. key, value: [batch, key_heads, seq, head_dim]. visibility_mask: bool [batch, 1, seq, seq], True
    where a query sees a key. Returns [batch, seq, heads, head_dim].
    """
    key, value = (_repeat(x, query.shape[1], dim=1) for x in (key, value))
    return _sdpa(query, key, value, visibility_mask, scaling, dropout).transpose(1, 2).contiguous(), None


def why_no_kernel(q: torch.Tensor, dropout: float) -> str:
    """Why torch's variable-length kernel cannot take these queries, in words; empty where it can. q: [rows, heads, head_dim]."""
    if q.device.type != "cuda":
        return f"it has no {q.device.type} form"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "this GPU is older than compute capability 8.0"
    if _dtype(q) not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16, not in {str(_dtype(q)).removeprefix('torch.')}; set precision=bf16"
    if q.shape[-1] > _LARGEST_HEAD or q.shape[-1] % 8:
        return f"heads of {q.shape[-1]} are not a multiple of 8 up to {_LARGEST_HEAD}"
    return "it has no dropout; set attention_dropout to 0" if dropout else ""


def _has_kernel(q: torch.Tensor, dropout: float) -> bool:
    reason = why_no_kernel(q, dropout)
    if reason and q.device.type != "cpu":
        warn_once(f"attention runs as one SDPA call per segment shape, without torch's variable-length kernel: {reason}")
    return not reason


@cache
def warn_once(text: str) -> None:
    """Warn once in the life of the process."""
    warnings.warn(text, stacklevel=3)


def _dtype(x: torch.Tensor) -> torch.dtype:
    """The type that matrix products of x have: under autocast rotary embeddings give float32 queries beside bf16 values."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "cpu" and torch.is_autocast_enabled(device) else x.dtype


@cache
def _knows_grouped_heads(kernel: Callable[..., Any]) -> bool:
    """torch 2.13 takes fewer key heads behind a flag that 2.11 does not have."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _launch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, scaling: float) -> torch.Tensor:
    """One launch of the variable-length kernel over all segments of a block. q: [rows, heads, head_dim]."""
    q, k, v = (x.to(_dtype(q)) for x in (q, k, v))
    more: dict[str, Any] = {}
    if k.shape[1] != q.shape[1]:
        if _knows_grouped_heads(varlen.varlen_attn):
            more = {"enable_gqa": True}
        else:
            k, v = (_repeat(x, q.shape[1], dim=1) for x in (k, v))
    bounds = (block.bounds_q, block.bounds_k, block.longest_q, block.longest_k)
    window = (-1, 0) if block.causal else (-1, -1)
    kernel: Any = varlen.varlen_attn
    out: torch.Tensor = kernel(q, k, v, *bounds, scale=scaling, window_size=window, **more)
    return out


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, scaling: float, dropout: float) -> torch.Tensor:
    """One SDPA call for all segments of equal shape. q: [rows, heads, head_dim]."""
    sizes_q, sizes_k = [n * rows for n, rows, _ in block.groups], [n * rows for n, _, rows in block.groups]
    outs = []
    parts = zip(torch.split(q, sizes_q), torch.split(k, sizes_k), torch.split(v, sizes_k), strict=True)
    for (n, _, _), part in zip(block.groups, parts, strict=True):
        a, b, c = (x.reshape(n, -1, *x.shape[1:]).transpose(1, 2) for x in part)
        outs.append(_sdpa(a, b, c, None, scaling, dropout, block.causal).transpose(1, 2).flatten(0, 1))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    dropout: float,
    causal: bool = False,
) -> torch.Tensor:
    """[batch, heads, seq, head_dim] of all three; keys and values may have fewer heads where there is no mask."""
    grouped = k.shape[1] != q.shape[1]
    if q.device.type != "cpu":
        k, v = (_repeat(x, q.shape[1], dim=1) for x in (k, v))  # only some GPU kernels know grouped heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, dropout_p=dropout, is_causal=causal)
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    # torch's CPU kernel takes three times as long in bf16 as in float32 on short rows (forward and backward, torch 2.13).
    with torch.autocast("cpu", enabled=False):
        a, b, c = (x.to(wide) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            a, b, c, attn_mask=mask, scale=scaling, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
        )
    return out.to(q.dtype)


def _repeat(x: torch.Tensor, heads: int, dim: int) -> torch.Tensor:
    """Key heads repeated to the number of query heads."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim=dim)


AttentionInterface.register(TEXT, text)
AttentionInterface.register(VISION, vision)
