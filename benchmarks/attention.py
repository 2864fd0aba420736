"""Attention as segments against the dense mask, on the CPU: the whole language model, and the vision tower.

    python benchmarks/attention.py [--rounds 5] [--out benchmarks/results/attention.json] [--quick]

Language model, the same examples three ways:

    segments  all examples in one row, each table as plain attention calls (core/segments.py)
    dense     best-fit rows as wide as the longest example, dense mask
    padded    one example per row, passes of 8 in order of arrival, dense mask: the reference-style path

Vision tower: our one call per layer against stock SDPA once per window or picture.

All ways run in turn, round after round, in one process and one thread, timed in processor seconds. No ratio is given unless hidden
states and gradients agree, nor where the segments' own spread from round to round would explain it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from encode import middle
from measure import RESULTS, compare, difference, machine, ratio, told, write
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from comatch.backbones import attention
from comatch.backbones.base import Backbone
from comatch.core.batch import IGNORE, ROLE_ID, Batch, Example
from comatch.core.packing import Size, best_fit, collate
from comatch.encoder import Encoder
from comatch.recipe import Visibility
from comatch.recipes import load_recipe

RECIPE = load_recipe("coma").with_tokens(8)
PADDED = 8
TOLERANCE = 1e-4
Outcome = dict[str, torch.Tensor]


def example(context: int, compression: int, dialogue: int, seed: int) -> Example:
    """A row of random words with the three roles."""
    n = context + compression + dialogue
    roles = np.repeat([ROLE_ID[role] for role in ("context", "compression", "dialogue")], [context, compression, dialogue]).astype(np.int8)
    ids = np.random.default_rng(seed).integers(1, 300, n)
    return Example(ids, roles, np.full(n, IGNORE), np.tile(np.arange(n), (3, 1)))


def examples_of(kind: str, scale: float, n: int) -> list[Example]:
    """compress: pictures with dialogues. match: 55 % pictures of 64 to 256 tokens, 45 % texts (performance.md 4), times scale."""
    dice = np.random.default_rng(0)
    if kind == "compress":
        sizes = [(int(dice.integers(60, 120) * scale), int(dice.integers(60, 140) * scale)) for _ in range(n)]
    else:
        seen = dice.random(n) < 0.55
        sizes = [(int((dice.integers(64, 257) if s else dice.integers(10, 32)) * scale), 0) for s in seen]
    return [example(context, RECIPE.tokens, dialogue, i) for i, (context, dialogue) in enumerate(sizes)]


def as_rows(examples: Sequence[Example]) -> Batch:
    """Best-fit rows as wide as the longest example, as one batch."""
    widest = max(map(len, examples))
    groups = best_fit([Size.of(e) for e in examples], Size(widest)).groups
    rows = [collate([examples[i] for i in group], multiple=1) for group in groups]

    def beside(name: str, empty: int, dim: int = 0) -> torch.Tensor:
        return torch.cat([F.pad(x, (0, widest - x.shape[-1]), value=empty) for x in (getattr(row, name) for row in rows)], dim)

    place, owner = beside("example", -1), torch.full((len(rows), max(map(len, groups))), -1)
    for row, group in enumerate(groups):
        owner[row, : len(group)] = torch.tensor(group)
    owners = torch.where(place < 0, place, owner.gather(1, place.clamp(min=0)))
    both = {name: beside(name, empty) for name, empty in (("ids", 0), ("roles", -1), ("labels", IGNORE))}
    return replace(rows[0], **both, positions=beside("positions", 0, 1), example=owners, size=len(examples))


def passes_of(examples: Sequence[Example]) -> dict[str, list[tuple[Batch, list[int]]]]:
    """The batches of each way, and which examples they hold."""
    groups = [list(range(start, min(start + PADDED, len(examples)))) for start in range(0, len(examples), PADDED)]
    everything = list(range(len(examples)))
    return {
        "segments": [(collate(examples), everything)],
        "dense": [(as_rows(examples), everything)],
        "padded": [(collate([examples[i] for i in group], pack=False), group) for group in groups],
    }


def run(backbone: Backbone, passes: Sequence[tuple[Batch, list[int]]], visibility: Visibility, dense: bool, train: bool) -> Outcome:
    """Hidden states of every example's tokens in order and, with `train`, gradients of all weights of the language model."""
    backbone.dense_mask = dense
    backbone.zero_grad()
    states: dict[int, torch.Tensor] = {}
    with torch.set_grad_enabled(train):
        for batch, members in passes:
            hidden = backbone(batch, visibility)
            if train:
                (hidden * torch.sin(batch.ids).unsqueeze(-1))[batch.example >= 0].sum().backward()
            states |= {i: hidden[batch.example == place].detach() for place, i in enumerate(members)}
    found = {"hidden": torch.cat([states[i] for i in sorted(states)])}
    return found | {name: p.grad.clone() for name, p in backbone.text.named_parameters() if p.grad is not None}


def look(backbone: Backbone, batch: Batch, name: str) -> Outcome:
    """Features of the vision tower under an attention of that name."""
    config = backbone.vision_tower.config
    config._attn_implementation = name
    with torch.no_grad():
        seen = backbone.see(batch)
    config._attn_implementation = attention.VISION
    assert seen is not None
    return {"hidden": seen.tokens}


def measured(ways: dict[str, Callable[[], Outcome]], rounds: int) -> dict[str, Any]:
    """Processor seconds of every way in every round, and how much faster the first is. Stops where the outcomes differ."""
    outcomes = {name: way() for name, way in ways.items()}
    seconds = compare(ways, rounds, time.process_time)
    first = next(iter(ways))
    record: dict[str, Any] = {name: {"seconds": times, "median": float(np.median(times))} for name, times in seconds.items()}
    for name in list(ways)[1:]:
        apart = difference(outcomes[first], outcomes[name])
        if apart["difference"] > TOLERANCE:
            raise SystemExit(f"{name}: hidden states or gradients differ by {apart['difference']:.2g} of the largest; no ratio")
        record[name] |= {"apart": apart, "ratio": ratio(seconds[first], seconds[name])}
    return {"ways": record}


def text_case(backbone: Backbone, kind: str, scale: float, n: int, train: bool, rounds: int) -> dict[str, Any]:
    """Time the language model on one mixture."""
    visibility = RECIPE.stage(kind).visibility
    examples = examples_of(kind, scale, n)
    passes = passes_of(examples)
    slots = {name: sum(batch.ids.numel() for batch, _ in chosen) for name, chosen in passes.items()}
    ways = {
        name: lambda chosen=chosen, name=name: run(backbone, chosen, visibility, name != "segments", train)  # type: ignore[misc]
        for name, chosen in passes.items()
    }
    record = measured(ways, rounds)
    tokens = sum(map(len, examples))
    record |= {"examples": n, "tokens": tokens, "longest": max(map(len, examples))}
    record["slots_per_token"] = {name: slot / tokens for name, slot in slots.items()}
    return record


def vision_case(backbone: Backbone, n: int, rounds: int) -> dict[str, Any]:
    """Time the vision tower on pictures of mixed sizes, and count its attention calls."""
    dice = np.random.default_rng(0)
    grids = torch.tensor([(1, *(2 * dice.integers(2, 13, 2))) for _ in range(n)])
    patches = torch.from_numpy(dice.integers(0, 256, (int(grids.prod(1).sum()), 3 * backbone.processor.patch_size**2)).astype(np.uint8))
    nothing = torch.zeros(1, 1, dtype=torch.long)
    batch = Batch(nothing, nothing, nothing, nothing, nothing.expand(3, 1, 1), patches, grids, 1)
    calls = {"stock": 0, "ours": 0}

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        return call

    AttentionInterface.register("bench_stock", counted("stock", sdpa_attention_forward))
    AttentionInterface.register("bench_flash_ours", counted("ours", attention.vision))
    names = {"segments": "bench_flash_ours", "stock": "bench_stock"}
    record = measured({way: lambda name=name: look(backbone, batch, name) for way, name in names.items()}, rounds)  # type: ignore[misc]
    runs = (rounds + 2) * len(backbone.vision_tower.blocks)
    per_layer = {name: count / runs for name, count in calls.items()}
    return record | {"pictures": n, "patches": len(patches), "calls_per_layer": per_layer}


def table(cases: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = "| case (CPU, one thread) | way | seconds | segments are faster by | slots per token | max difference |"
    lines = [head, "|---|---|---|---|---|---|"]
    for case, record in cases.items():
        for name, row in record["ways"].items():
            cells = [told(row["ratio"]), f"{row['apart']['difference']:.1e}"] if "ratio" in row else ["", ""]
            slots = record.get("slots_per_token", {}).get(name)
            cells.insert(1, "" if slots is None else f"{slots:.2f}")
            lines.append(f"| {case} | {name} | {row['median']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and tell it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of all ways, after one that warms up")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/attention.json; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="1 round of the nano model: proves that it works, measures nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rounds = 1 if asked.quick else asked.rounds
    where = machine()
    cases: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as scratch:
        nano = Encoder.load("comatch-nano", recipe=RECIPE, device="cpu").backbone
        models = [("nano", nano, 1.0, 64)]
        if not asked.quick:
            models.append(("65M", middle(Path(scratch)).backbone, 2.0, 10))
        for name, backbone, scale, n in models:
            backbone.requires_grad_(True)
            for kind in ("compress", "match"):
                for train in (True, False):
                    case = f"{name}, {kind}, {'forward and backward' if train else 'forward'}"
                    cases[case] = text_case(backbone, kind, scale, n, train, rounds)
            cases[f"{name}, vision tower, forward"] = vision_case(backbone, 16, rounds)
    print(table(cases))
    write({"machine": where, "rounds": rounds, "cases": cases}, asked.out or (None if asked.quick else RESULTS / "attention.json"))


if __name__ == "__main__":
    main()
