"""Memory of stage 1 on one GPU, Qwen2.5-VL-3B's shape with random weights in bf16: bytes a token, and the peak at 16k tokens.

    python benchmarks/gpu/memory.py [--tokens 16384] [--out benchmarks/results/gpu-memory.json] [--dry]

Peak bytes of tensors in one forward and backward pass beyond the weights, over about a quarter, half and all of --tokens, examples of equal
length (494 visual tokens, nine turns), for

    comatch     token_step, nothing recomputed
    recomputed  the same, every layer recomputed
    reference   the same examples in one padded pass: dense mask, PEFT's adapter, logits everywhere

and a line fitted through each: bytes a token, and bytes that do not depend on them. `estimate` is what `backbones/memory.py` would say.
Before that, gradients at a small batch are held against the reference in float32 (`agreement` in ../large.py); where they do not agree no
ratio is given. Where the reference does not fit, the ratio is that to its fitted line, and the record says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

from large import Both, agreement, arguments, by, in_parts, photographs, release
from measure import peak_bytes
from reference import Item
from stage1 import make_dialogues

from comatch.backbones.memory import head_bytes, recompute
from comatch.content import Dialogue, as_message
from comatch.core.batch import Example
from comatch.core.flops import Shape
from comatch.core.memory import shortage
from comatch.data.scenes import scene
from comatch.recipes import load_recipe
from comatch.training.fit import demand
from comatch.training.step import token_step

RECIPE = load_recipe("coma")
OPEN = load_recipe("coma-no-bottleneck").stages[0]
FEW = 4
SHARES = (0.25, 0.5, 1.0)


def examples_of(both: Both, tokens: int, dry: bool) -> list[Example]:
    """Examples of nearly equal length, `tokens` in all or a little more."""
    prepare, found = both.encoder.preparer, list[Example]()
    if dry:
        made = [dialogue for dialogue, _ in make_dialogues(64, (90, 90), (2, 2))]
    else:
        n = tokens // 600
        said = [tuple(scene(7, i * 10 + turn).describe(turn) for turn in range(9)) for i in range(n)]
        made = [Dialogue(as_message(file), turns) for file, turns in zip(photographs(n, ((1280, 960),), 8), said, strict=True)]
    for dialogue in made:
        found.append(prepare.dialogue(dialogue, both.stage))
        if sum(map(len, found)) >= tokens:
            break
    return found


def ours(both: Both, examples: Sequence[Example], layers: int, tokens: int) -> float:
    """Our step, the first `layers` recomputed."""
    recompute(both.backbone, layers)
    return token_step(both.accelerator, both.backbone, examples, both.stage, tokens).loss


def checked(both: Both, examples: Sequence[Example]) -> dict[str, Any]:
    """Whether gradients of a few examples are those of the reference."""
    few = [Item(example) for example in examples[:FEW]]
    mine = both.ours(lambda: ours(both, examples[:FEW], 0, 10**9))
    theirs = by(both.reference, lambda: both.reference.token_step(few, both.stage, FEW))
    exact = both.exact()
    right, wrong = (by(exact, lambda stage=stage: exact.token_step(few, stage, 1)) for stage in (both.stage, OPEN))  # type: ignore[misc]
    return agreement(mine, theirs, right, wrong)


def fitted(rows: Sequence[dict[str, Any]], way: str) -> dict[str, float] | None:
    """The line through a way's peaks; None where fewer than two sizes ran."""
    points = [(row["tokens"], row["peak_bytes"][way]) for row in rows if way in row["peak_bytes"]]
    if len(points) < 2:
        return None
    slope, start = np.polyfit(*np.array(points, dtype=float).T, 1)
    return {"bytes_a_token": float(slope), "fixed_bytes": float(start)}


def one_kind(kind: str, asked: Any) -> dict[str, Any]:
    """All ways at three sizes under one kind of adapter."""
    recipe = RECIPE.with_tokens(4) if asked.dry else RECIPE
    both = Both(recipe, recipe.stages[0], kind, asked.tokens, asked.dry)
    layers, shape, rows = len(both.backbone.text.layers), Shape.of(both.backbone.stock.config), list[dict[str, Any]]()
    agreed = checked(both, examples_of(both, int(asked.tokens * SHARES[0]), asked.dry))
    for share in SHARES:
        examples = examples_of(both, int(asked.tokens * share), asked.dry)
        items = [Item(example) for example in examples]
        ways: dict[str, Callable[[], float]] = {
            "comatch": partial(ours, both, examples, 0, 10**9),
            "recomputed": partial(ours, both, examples, layers, 10**9),
            "reference": partial(both.reference.token_step, items, both.stage, 10**9),
        }
        tokens = sum(map(len, examples))
        row: dict[str, Any] = {"tokens": tokens, "slots_of_reference": len(examples) * max(map(len, examples)), "peak_bytes": {}}
        row["left_out"], need = {}, demand(both.config, shape)
        low = both.config.precision == "bf16"
        row["estimate"] = {w: need.bytes(shape, tokens, n) + head_bytes(shape, low) for w, n in (("comatch", 0), ("recomputed", layers))}
        for name, way in ways.items():
            try:
                row["peak_bytes"][name] = peak_bytes(way)
            except torch.OutOfMemoryError as error:
                row["left_out"][name] = shortage(error, name)
            both.forget()
            release()
        rows.append(row)
        print(f"{kind}, {tokens:,} tokens: { {name: f'{peak / 2**30:.2f} GiB' for name, peak in row['peak_bytes'].items()} }", flush=True)
    lines = {name: fitted(rows, name) for name in ("comatch", "recomputed", "reference")}
    return {"agreed": agreed, "sizes": rows, "fitted": lines, "ratio": compared(rows[-1], lines["reference"], agreed["equal"])}


def compared(row: dict[str, Any], line: dict[str, float] | None, equal: bool) -> dict[str, Any] | None:
    """Our peak over the reference's at the largest size, by its fitted line where it did not fit; None where nothing can be said."""
    ours, theirs = row["peak_bytes"].get("comatch"), row["peak_bytes"].get("reference")
    extrapolated = theirs is None
    if theirs is None and line is not None:
        theirs = line["bytes_a_token"] * row["tokens"] + line["fixed_bytes"]
    if not equal or ours is None or theirs is None:
        return None
    return {"of_peaks": ours / theirs, "tokens": row["tokens"], "comatch": ours, "reference": theirs, "extrapolated": extrapolated}


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, tell, write."""
    asked = arguments(__doc__.splitlines()[0], "gpu-memory", given, tokens=16384)
    if asked.dry:
        asked.tokens = 480
    return in_parts({kind: partial(one_kind, kind, asked) for kind in ("dora", "lora")}, asked)


if __name__ == "__main__":
    main()
