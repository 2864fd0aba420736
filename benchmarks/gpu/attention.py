"""Attention on one GPU: is torch's variable-length kernel right, and how fast is it? Runs unattended; needs no flash-attn package.

    python benchmarks/gpu/attention.py [--rounds 10] [--out benchmarks/results/gpu-attention.json] [--dry]

1. Right: our calls of the kernel against softmax written out in float32, forward and backward, for the shapes of Qwen2.5-VL-3B (16 query
   and 2 key heads of 128; 16 heads of 80 in windows of 64), causal, full, with unequal queries and keys. If one fails, nothing is timed.
2. One layer's attention in the language model, CoMa's table, a packed row of 8k tokens: segments with the compression rows repeated,
   against the dense mask.
3. Vision tower of that shape, random weights: one launch per layer, against stock SDPA once per window.

Ways alternate within a round. Nothing is timed unless outputs and gradients agree; a ratio within the spread of our own rounds is marked.
--dry does the same at nano scale with a stand-in for the kernel, on a CPU: it proves that the script works and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from comatch.backbones import attention
from comatch.core.masks import dense
from comatch.core.segments import Segments, compile_segments, stretches
from comatch.recipe import Visibility

ROOT = Path(__file__).resolve().parents[2]
COMA = Visibility(("context", "compression", "dialogue"), ("c..", "cc.", ".cc"))
BRIDGE = Visibility(("context", "compression", "target"), ("ff.", "fff", ".ff"))
PLAIN = Visibility(("context",), ("c",))
COSINE = 0.9999


@dataclass(frozen=True)
class Scale:
    """Sizes of one kind of run. heads, key_heads, head_dim, vision_head_dim; examples of (context, compression, rest) tokens; pictures."""

    device: str
    heads: int
    key_heads: int
    head_dim: int
    vision_head_dim: int
    examples: tuple[tuple[int, int, int], ...]
    pictures: tuple[tuple[int, int, int], ...]
    tower: dict[str, Any]


def tower_of(layers: int, width: int, mlp: int, heads: int, out: int, full: list[int]) -> dict[str, Any]:
    """A vision config's own names."""
    sizes = {"depth": layers, "hidden_size": width, "intermediate_size": mlp, "num_heads": heads}
    return {**sizes, "out_hidden_size": out, "fullatt_block_indexes": full}


# Ten examples of 604 to 1,000 tokens, 8,020 in all, and four pictures of 660 visual tokens each (specs/performance.md 3).
LONG = tuple((300 + 32 * i, 32, 272 + 12 * i) for i in range(10))
REAL = Scale("cuda", 16, 2, 128, 80, LONG, ((1, 44, 60),) * 4, tower_of(32, 1280, 3420, 16, 2048, [7, 15, 23, 31]))
SHORT = tuple((10 + i, 4, 6 + i) for i in range(4))
DRY = Scale("cpu", 4, 2, 16, 8, SHORT, ((1, 18, 10), (1, 16, 16)), tower_of(2, 32, 48, 4, 32, [1]))


def stand_in(*args: Any, **how: Any) -> torch.Tensor:
    """The kernel as a loop over segments, for --dry."""
    q, k, v, bounds_q, bounds_k, _, _ = args
    causal, grouped = how["window_size"] == (-1, 0), how.get("enable_gqa", False)
    parts = zip(*(torch.split(x, at.diff().tolist()) for x, at in ((q, bounds_q), (k, bounds_k), (v, bounds_k))), strict=True)
    done = []
    for part in parts:
        a, b, c = (x.transpose(0, 1) for x in part)
        done.append(F.scaled_dot_product_attention(a, b, c, scale=how["scale"], is_causal=causal, enable_gqa=grouped).transpose(0, 1))
    return torch.cat(done)


def rows(places: int, heads: Sequence[int], head_dim: int, device: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """Random queries, keys and values of a flattened batch."""
    dice = torch.Generator().manual_seed(0)
    return [torch.randn(places, n, head_dim, generator=dice).to(device, dtype).requires_grad_() for n in heads]


def layout(examples: Sequence[Sequence[int]], visibility: Visibility) -> tuple[torch.Tensor, torch.Tensor]:
    """Roles and examples of one packed row, padded to a multiple of 128."""
    kinds = [3 if role == "target" else i for i, role in enumerate(visibility.roles)]
    sizes = [n[: len(kinds)] for n in examples]
    roles = torch.from_numpy(np.concatenate([np.repeat(kinds, n) for n in sizes]))
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor([sum(n) for n in sizes]))
    roles, owner = (F.pad(x, (0, -len(x) % 128), value=-1).unsqueeze(0) for x in (roles, owner))
    return roles.to(torch.int8), owner


def written_out(qkv: Sequence[torch.Tensor], allowed: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax attention in float32 under a mask [places, places], head by head so that it fits."""
    q, k, v = (x.float() for x in qkv)
    repeats = q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):
        scores = (q[:, h] @ k[:, h // repeats].T * scaling).masked_fill(~allowed, -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, h // repeats])
    return torch.stack(heads, dim=1)


def outcome(out: torch.Tensor, qkv: Sequence[torch.Tensor], counts: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of the places that count, and gradients of a fixed weighted sum of them."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device) * counts[:, None, None]
    return [out[counts].detach().float(), *(g.float() for g in torch.autograd.grad((out.float() * weights).sum(), qkv))]


def compared(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Lowest cosine, and largest difference in units of the largest entry, over outputs and gradients."""
    cosines = [float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)) for a, b in zip(ours, theirs, strict=True)]
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, theirs, strict=True)]
    return {"cosine": min(cosines), "difference": max(apart)}


def right(scale: Scale) -> dict[str, dict[str, Any]]:
    """Part 1: every call we make of the kernel, against softmax written out."""
    found: dict[str, dict[str, Any]] = {}
    for name, visibility in (("causal", PLAIN), ("coma", COMA), ("bridge", BRIDGE)):
        roles, owner = layout(scale.examples, visibility)
        segments = compile_segments(roles, owner, visibility, device=torch.device(scale.device))
        roles, owner = roles.to(scale.device), owner.to(scale.device)
        assert isinstance(segments, Segments)
        heads = (scale.heads, scale.key_heads, scale.key_heads)
        qkv, allowed = rows(roles.numel(), heads, scale.head_dim, scale.device), dense(roles, owner, visibility)[0, 0]
        found[f"{name}, {heads[0]}/{heads[1]} heads of {scale.head_dim}"] = one_check(qkv, segments, allowed, (roles >= 0).flatten())
    for name, lengths in (("windows of 64", [64] * 12), ("ragged windows", [64, 48, 64, 16, 36, 64, 1])):
        bounds = tuple(np.cumsum([0, *lengths]).tolist())
        owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(scale.device)
        qkv = rows(bounds[-1], (scale.heads,) * 3, scale.vision_head_dim, scale.device)
        segments = stretches(bounds, torch.device(scale.device))
        everything = torch.ones(bounds[-1], dtype=torch.bool, device=scale.device)
        found[f"{name}, {scale.heads} heads of {scale.vision_head_dim}"] = one_check(qkv, segments, owner[:, None] == owner, everything)
    return found


def one_check(qkv: Sequence[torch.Tensor], segments: Segments, allowed: torch.Tensor, counts: torch.Tensor) -> dict[str, Any]:
    """The kernel's outputs and gradients against the formula's, and whether two backward passes give the same bits."""
    scaling = qkv[0].shape[-1] ** -0.5
    ours = [outcome(attention.attend(qkv[0], qkv[1], qkv[2], segments, scaling), qkv, counts) for _ in range(2)]
    theirs = outcome(written_out(qkv, allowed, scaling), qkv, counts)
    blind = outcome(written_out(qkv, torch.ones_like(allowed), scaling), qkv, counts)
    same = all(torch.equal(a, b) for a, b in zip(*ours, strict=True))
    return compared(ours[0], theirs) | {"cosine_without_mask": compared(blind, theirs)["cosine"], "same_bits_twice": same}


def timed(ways: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, Any]:
    """Seconds and peak memory of every way; the first is the one that ratios are of."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float] = {}
    for turn in range(rounds + 2):  # two that warm up
        for name, way in ways.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            if turn > 1:
                seconds[name].append(time.perf_counter() - began)
    first = next(iter(ways))
    spread = max(seconds[first]) / min(seconds[first])
    record: dict[str, Any] = {"own_spread": spread, "seconds": seconds, "peak_mib": peaks, "ratios": {}}
    for name, times in seconds.items():
        each = [a / b for a, b in zip(times, seconds[first], strict=True)]
        ratio = float(np.median(times) / np.median(seconds[first]))
        if name != first:
            noise = 1 / spread <= ratio <= spread
            record["ratios"][name] = {"of_medians": ratio, "low": min(each), "high": max(each), "above_noise": not noise}
    return record


def text(scale: Scale, rounds: int) -> dict[str, Any]:
    """Part 2: one layer's attention over one packed row."""
    roles, owner = layout(scale.examples, COMA)
    segments = compile_segments(roles, owner, COMA, device=torch.device(scale.device))
    roles, owner = roles.to(scale.device), owner.to(scale.device)
    counts = (roles >= 0).flatten()
    qkv = rows(roles.numel(), (scale.heads, scale.key_heads, scale.key_heads), scale.head_dim, scale.device)
    mask = dense(roles, owner, COMA)
    assert isinstance(segments, Segments)
    scaling = scale.head_dim**-0.5

    def fast() -> torch.Tensor:
        return attention.attend(qkv[0], qkv[1], qkv[2], segments, scaling)

    def slow() -> torch.Tensor:
        q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in qkv)
        return attention.masked(torch.nn.Module(), q, k, v, None, visibility_mask=mask, scaling=scaling)[0].squeeze(0)

    agree = compared(outcome(fast(), qkv, counts), outcome(slow(), qkv, counts))
    refuse(agree, "segments and the dense mask")
    both = {"segments": fast, "dense": slow}
    with torch.no_grad():
        forward = timed(both, rounds, scale.device)
    backward = timed({name: lambda way=way: torch.autograd.grad(way().sum(), qkv) for name, way in both.items()}, rounds, scale.device)  # type: ignore[misc]
    return {"tokens": int(counts.sum()), "agree": agree, "forward": forward, "forward and backward": backward}


def tower(scale: Scale, rounds: int) -> dict[str, Any]:
    """Part 3: the whole vision tower, forward."""
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(**scale.tower)
    with torch.device(scale.device):
        model = Qwen2_5_VisionTransformerPretrainedModel(config).to(torch.bfloat16).eval()
    grids = torch.tensor(scale.pictures, device=scale.device)
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * config.patch_size**2, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(scale.device, torch.bfloat16)

    def look(name: str) -> torch.Tensor:
        model.config._attn_implementation = name
        with torch.no_grad():
            seen: torch.Tensor = model(pixels, grids).pooler_output
        return seen

    launches = [0]
    real = varlen.varlen_attn

    def counted(*args: Any, **kwargs: Any) -> Any:
        launches[0] += 1
        return real(*args, **kwargs)

    varlen.varlen_attn = counted
    try:
        ours = look(attention.VISION)
    finally:
        varlen.varlen_attn = real
    agree = compared([ours.float()], [look("sdpa").float()])
    refuse(agree, "the tower by one launch per layer and by stock SDPA", 0.999)  # bf16 roundings add up over 32 layers
    ways = {"one launch": lambda: look(attention.VISION), "stock loop": lambda: look("sdpa")}
    record = timed(ways, rounds, scale.device)
    return {"patches": len(pixels), "launches_per_layer": launches[0] / config.depth, "agree": agree, "forward": record}


def refuse(agree: dict[str, float], what: str, cosine: float = COSINE) -> None:
    """Stop where two ways do not agree."""
    if not agree["cosine"] > cosine:
        raise SystemExit(f"{what} differ: cosine {agree['cosine']:.6f}; nothing is timed")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Check, measure, tell, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds, after two that warm up")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/gpu-attention.json; none with --dry)")
    parser.add_argument("--dry", action="store_true", help="nano scale on a CPU with a stand-in for the kernel")
    asked = parser.parse_args(arguments)
    scale = DRY if asked.dry else REAL
    if scale.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --dry runs the script at nano scale on a CPU")
    known = varlen.varlen_attn, attention.why_no_kernel
    if asked.dry:
        varlen.varlen_attn, attention.why_no_kernel = stand_in, lambda *_: ""
    out = asked.out or (None if asked.dry else ROOT / "benchmarks" / "results" / "gpu-attention.json")
    try:
        record: dict[str, Any] = {"measured": not asked.dry, "machine": machine(scale), "right": right(scale)}
        keep(record, out)
        for name, check in record["right"].items():
            print(f"{name}: {check}", flush=True)
            refuse(check, f"{name}: the kernel and the formula")
            assert check["cosine_without_mask"] < 0.99, "a check that attention over everything would pass shows nothing"
        for name, part in (("text", text), ("tower", tower)):
            record[name] = part(scale, asked.rounds)
            print(f"{name}: {json.dumps(record[name])}", flush=True)
            keep(record, out)
    finally:
        varlen.varlen_attn, attention.why_no_kernel = known
    return record


def keep(record: dict[str, Any], out: Path | None) -> None:
    """Write what there is so far."""
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def machine(scale: Scale) -> dict[str, Any]:
    """What the figures were taken on."""
    name = torch.cuda.get_device_name() if scale.device == "cuda" else platform.processor()
    return {"device": name, "python": platform.python_version(), "packages": {p: version(p) for p in ("torch", "transformers")}}


if __name__ == "__main__":
    main()
