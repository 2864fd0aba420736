"""Each claim of the fast path (issue 3), the file that measures it, and its figures.

A dry or quick run is refused, and a file that nobody reads is named.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from figures import (
    Figure,
    Reader,
    Refused,
    attention_equal,
    attention_speed,
    balance,
    cached_losses,
    calls,
    encode,
    fill,
    gpu_attention_equal,
    gpu_attention_speed,
    gpu_calls,
    gpu_ceilings,
    gpu_encode,
    gpu_loader,
    gpu_mfu,
    gpu_peaks,
    gpu_steps,
    gpu_whole,
    images,
    peaks,
    steps,
)

OTHERS = ("effect*.json", "nano_answers.json", "kills*.json", "matching_options*.json", "notes.json")
"""Results that stand on pages of their own, and the notes to this one."""


@dataclass(frozen=True)
class Claim:
    """What is claimed of a place ("CPU" or "GPU"), measured by a file. target: None where nothing was promised. unit: "x", "%" or ""."""

    key: str
    place: str
    title: str
    file: str
    read: Reader
    target: float | None = None
    at_least: bool = True
    unit: str = "x"


def figures(claim: Claim, folder: Path) -> list[Figure] | None:
    """The figures of a claim; None where its file is not there. Raises Refused for a file that does not hold what its script writes."""
    path = folder / claim.file
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("quick") or record.get("measured") is False:
        raise Refused(f"{path} is of a dry or quick run, which measures nothing; run its script at full size, or delete the file")
    try:
        return list(claim.read(record))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise Refused(f"{path} lacks {error}, so it is not what its script writes today; run the script again") from error
    except Refused as error:
        raise Refused(f"{path}: {error}") from error


def strangers(folder: Path) -> list[str]:
    """Names of JSON files that nobody here reads."""
    known = {claim.file for claim in CLAIMS}
    names = sorted(path.name for path in folder.glob("*.json"))
    return [name for name in names if name not in known and not any(fnmatch(name, other) for other in OTHERS)]


STAGE1, STAGE2 = "stage 1: examples/s over the reference-style path", "stage 2: pairs/s over the reference-style path"
PEAK = "stage 1: peak memory at 16k tokens over the reference-style path"
GPU1, GPU2 = "gpu-stage1.json", "gpu-stage2.json"
KINDS = ("dora", "lora")
CLAIMS = (
    Claim("dense", "CPU", "fast = dense oracle, outputs and gradients in float32", "attention.json", attention_equal, 1e-5, False, ""),
    Claim("dense", "GPU", "fast = dense oracle, cosine in bf16", "gpu-attention.json", gpu_attention_equal, 0.9999, True, ""),
    Claim(
        "stage1", "CPU", STAGE1, "stage1.json",
        steps("examples", lambda row: f"{row['examples']} examples of mixed length"), 2.0,
    ),
    Claim("stage1", "GPU", STAGE1, GPU1, gpu_steps("examples", KINDS, ("reference",)), 4.0),
    Claim("mfu", "GPU", "stage 1: share of the measured matmul rate", GPU1, gpu_mfu(KINDS), 0.5, True, "%"),
    Claim("stage2", "CPU", STAGE2, "stage2.json", steps("pairs", lambda row: "one step"), 2.5),
    Claim("stage2", "GPU", STAGE2, GPU2, gpu_steps("pairs", ("pairs",), ("reference",)), 5.0),
    Claim("encode", "CPU", "encode: items/s over sentence-transformers", "encode.json", encode(("st",)), 1.5),
    Claim("encode", "GPU", "encode: items/s over sentence-transformers", "gpu-encode.json", gpu_encode(("st", "st-flash")), 2.0),
    Claim("encode-stock", "GPU", "encode: items/s over the stock path without flash-attn", "gpu-encode.json", gpu_encode(("padded",)), 5.0),
    Claim("images", "CPU", "image path over the Hugging Face processor, per core", "images.json", images, 2.0),
    Claim("images", "GPU", "step with the loader over data in memory, stage 1", GPU1, gpu_loader("examples", KINDS), 1.05, False),
    Claim("fill", "CPU", "packing: share of the passes' room that is filled", "packing.json", fill, 0.97, True, "%"),
    Claim("balance", "CPU", "slowest of 8 ranks over the mean", "packing.json", balance, 1.01, False),
    Claim("launches", "CPU", "attention calls per layer of the vision tower", "attention.json", calls, 1.0, False, ""),
    Claim("launches", "GPU", "attention launches per layer of the vision tower", "gpu-attention.json", gpu_calls, 1.0, False, ""),
    Claim("memory", "CPU", PEAK, "stage1.json", peaks, 1 / 2, False),
    Claim("memory", "GPU", PEAK, "gpu-memory.json", gpu_peaks, 1 / 3, False),
    Claim("losses", "CPU", "stage 2 against other cached losses, equal adapter", "matching_step.json", cached_losses),
    Claim("plain", "CPU", "encode against plain transformers", "encode.json", encode(("padded", "single"))),
    Claim("attention", "CPU", "attention as segments, one thread", "attention.json", attention_speed),
    Claim("attention", "GPU", "attention: kernel against mask and loop", "gpu-attention.json", gpu_attention_speed),
    Claim("levers1", "GPU", "stage 1: layers recomputed", GPU1, gpu_steps("examples", ("checkpointing",), (), "auto")),
    Claim("passes1", "GPU", "stage 1: tokens of a pass, 8,192 against others", GPU1, gpu_steps("examples", ("passes",), (), "8192")),
    Claim("compile1", "GPU", "stage 1: compiled layers", "gpu-stage1-compile.json", gpu_steps("examples", ("compile",), (), "compiled")),
    Claim("levers2", "GPU", "stage 2: levers one by one", GPU2, gpu_steps("pairs", ("levers",), (), "as it is")),
    Claim("whole", "GPU", "stage 2: 1,024 pairs at once", "gpu-stage2-whole.json", gpu_whole, unit=""),
    Claim("ceilings", "GPU", "what the device can do", "gpu-ceilings.json", gpu_ceilings, unit=""),
)  # fmt: skip
