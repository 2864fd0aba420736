"""Segments that share one call are a plain loop over segments, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import varlen_stand_in

from comatch.backbones import attention
from comatch.backbones.attention import masked, vision

MODULE: Any = None
SCALE = 0.3
LENGTHS: list[list[int]] = [[5], [4, 4, 4], [1, 7, 3, 7, 1, 1, 12], [3, 0, 3, 2], [16, 16, 8, 16, 4, 8], [1]]


def inputs(total: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(total)
    q, k, v = (torch.randn(1, 3, total, 8, generator=generator, dtype=dtype).requires_grad_() for _ in range(3))
    return q, k, v


def bounds(lengths: Sequence[int]) -> torch.Tensor:
    return F.pad(torch.tensor(lengths), (1, 0)).cumsum(0).to(torch.int32)


def looped(qkv: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
    """Softmax attention written out, one segment after the other: [1, total, heads, head_dim]."""
    parts = zip(*(torch.split(x, list(lengths), dim=2) for x in qkv), strict=True)
    done = [torch.softmax(q @ k.transpose(-1, -2) * SCALE, dim=-1) @ v for q, k, v in parts]
    return torch.cat(done, dim=2).transpose(1, 2)


def gradients(out: torch.Tensor, of: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), of))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_segments_are_a_loop(lengths: list[int]) -> None:
    qkv = inputs(sum(lengths))
    found, weights = vision(MODULE, *qkv, None, cu_seq_lens_q=bounds(lengths), scaling=SCALE)
    expected = looped(qkv, lengths)
    assert weights is None and found.shape == (1, sum(lengths), 3, 8)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    for ours, theirs in zip(gradients(found, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
        assert theirs.abs().max() > 0 or max(lengths) == 1
    if len(lengths) > 1:
        assert (looped(qkv, [sum(lengths)]) - expected).abs().max() > 1e-2, "one long segment differs"


@pytest.mark.parametrize("lengths", [n for n in LENGTHS if 0 not in n], ids=str)
def test_one_launch_is_a_loop(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = varlen_stand_in.install(monkeypatch)
    qkv, at = inputs(sum(lengths)), bounds(lengths)
    found, _ = vision(MODULE, *qkv, None, cu_seq_lens_q=at, scaling=SCALE, max_length_q=max(lengths))
    assert len(calls) == 1 and calls[0]["bounds"] is at and calls[0]["window_size"] == (-1, -1)
    expected = looped(qkv, lengths)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)
    for ours, theirs in zip(gradients(found, qkv), gradients(expected, qkv), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    # Without the longest length at hand it is found from the bounds.
    again, _ = vision(MODULE, *qkv, None, cu_seq_lens_q=at, scaling=SCALE)
    torch.testing.assert_close(again, expected, atol=1e-12, rtol=1e-10)
    assert len(calls) == 2


def test_no_segment_reaches_another() -> None:
    lengths = [3, 5, 3, 2]
    qkv = inputs(13)
    out, _ = vision(MODULE, *qkv, None, cu_seq_lens_q=bounds(lengths), scaling=SCALE)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    for i in range(4):
        for gradient in torch.autograd.grad(out[:, owner == i].sum(), qkv, retain_graph=True):
            assert (gradient[:, :, owner != i] == 0).all()
    value = torch.autograd.grad(out[:, owner == 1].sum(), qkv[2])[0]
    assert (value[:, :, owner == 1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_type_is_kept_also_under_autocast(dtype: torch.dtype) -> None:
    lengths = [4, 2, 4]
    qkv = inputs(10, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = vision(MODULE, *qkv, None, cu_seq_lens_q=bounds(lengths), scaling=SCALE)
    assert found.dtype == dtype
    expected = looped([x.float() for x in qkv], lengths)
    exact = dtype == torch.float32
    torch.testing.assert_close(found.float(), expected, atol=1e-6 if exact else 0.01, rtol=1e-5 if exact else 0.01)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_masked_is_softmax_over_what_is_seen(key_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 8, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, key_heads, 6, 8, generator=generator, requires_grad=True) for _ in range(2))
    mask = (torch.rand(2, 1, 6, 6, generator=generator) < 0.5) | torch.eye(6, dtype=torch.bool)
    found, _ = masked(MODULE, q, k, v, None, visibility_mask=mask, scaling=SCALE)
    groups = [torch.stack([x[:, h * key_heads // 4] for h in range(4)], dim=1) for x in (k, v)]
    scores = (q @ groups[0].transpose(-1, -2) * SCALE).masked_fill(~mask, -torch.inf)
    expected = (torch.softmax(scores, dim=-1) @ groups[1]).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(gradients(found, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    everything, _ = masked(MODULE, q, k, v, None, visibility_mask=torch.ones_like(mask), scaling=SCALE)
    assert (everything - found).abs().max() > 1e-2, "the mask decides"


def test_what_the_kernel_cannot_take_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def reason(head_dim: int, dtype: torch.dtype, dropout: float = 0.0, device: str = "cuda") -> str:
        class Queries:
            shape = (5, 4, head_dim)

        queries: Any = Queries()
        queries.device, queries.dtype = torch.device(device), dtype
        return attention.why_no_kernel(queries, dropout)

    assert reason(128, torch.bfloat16) == reason(80, torch.float16) == ""
    assert "not in float32" in reason(128, torch.float32)
    assert "heads of 20" in reason(20, torch.bfloat16) and "heads of 512" in reason(512, torch.bfloat16)
    assert "dropout" in reason(128, torch.bfloat16, 0.1)
    assert "no cpu form" in reason(128, torch.bfloat16, device="cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "8.0" in reason(128, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    assert reason(128, torch.float32) == "", "under autocast the kernel computes in what matrix products do"


def test_without_table_or_mask_it_refuses() -> None:
    q, k, v = inputs(4)
    with pytest.raises(TypeError, match="segments or a visibility_mask"):
        attention.text(MODULE, q, k, v, None, scaling=SCALE)
