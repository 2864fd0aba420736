"""Stage 1 on one GPU, Qwen2.5-VL-3B's shape with random weights in bf16: examples a second and MFU. Runs unattended.

    python benchmarks/gpu/stage1.py [--examples 32] [--rounds 3] [--tokens 8192] [--out benchmarks/results/gpu-stage1.json] [--dry]

One batch of dialogues about photographs of mixed sizes, 140 to 504 visual tokens and 60 to 500 of text, an adapter on the language model's
attention, forward and backward. Parts, each in the JSON as soon as it is done:

    dora, lora     comatch    token_step with pictures cut by loader processes meanwhile: packed rows, segments, head on supervised places
                   memory     the same, pictures cut before the clock starts: comatch over memory is what the loader costs
                   reference  stock model in padded chunks of 8, dense 4-D mask, PEFT's adapter, logits everywhere, pictures by the stock
                              processor in the main process
    checkpointing  how many layers are recomputed: none, auto, all, in passes of twice the tokens
    passes         half, once, twice the tokens of a pass
    compile        compiled layers against eager ones; graphs made, and peak memory of both

Ways alternate within a round. Before a clock starts, gradients at a small batch are held against the reference in float32 (`agreement` in
../large.py); where they do not agree no ratio is given. MFU is useful FLOP (no padding, no pass run twice) over the matmul rate measured
in the same part.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

from large import (
    SIDES,
    Both,
    Gradients,
    agreement,
    arguments,
    by,
    compile_backend,
    in_parts,
    in_turn,
    loaded,
    once,
    photographs,
    ratios,
    stretch,
    tell,
)
from measure import peak_bytes, ratio
from reference import Item
from stage1 import make_dialogues

from comatch.backbones.compiled import compiled_layers
from comatch.backbones.memory import recompute
from comatch.content import Dialogue, as_message
from comatch.core.batch import Example
from comatch.core.flops import Shape, matmul_rate, work_of
from comatch.core.packing import collate
from comatch.data.scenes import scene
from comatch.recipes import load_recipe
from comatch.training.fit import fit_layers, trained_part
from comatch.training.loader import Sample
from comatch.training.step import token_step

RECIPE = load_recipe("coma")
OPEN = load_recipe("coma-no-bottleneck").stages[0]
FEW = 4
NOMINAL = 990e12
Made = list[tuple[Dialogue, bytes]]


def dialogues(n: int, dry: bool) -> Made:
    """Dialogues, 60 % of whose text is answers (specs/performance.md 2), and the picture file of each."""
    if dry:
        return make_dialogues(n, (60, 120), (1, 4))
    dice, made = np.random.default_rng(0), []
    for i, file in enumerate(photographs(n, SIDES)):
        said: list[tuple[str, str]] = []
        for turn in range(int(dice.integers(1, 10))):
            one = scene(7, i * 10 + turn)
            said.append((one.dialogue(turn, 1)[0][0] + " and " + one.describe(turn)[0], one.describe(turn)[1]))
        made.append((Dialogue(as_message(file), tuple(said)), file))
    return made


class Bench:
    """One batch and both ways over it."""

    def __init__(self, kind: str, n: int, tokens: int, dry: bool, checkpointing: str = "none") -> None:
        recipe = RECIPE.with_tokens(4) if dry else RECIPE
        self.tokens, self.dry = tokens, dry
        self.both = Both(recipe, recipe.stages[0], kind, tokens, dry, checkpointing)
        self.made = dialogues(n, dry)
        self.samples = self.cut()
        self.examples = [sample.examples[0] for sample in self.samples]
        self.items = [Item(example, (file,)) for example, (_, file) in zip(self.examples, self.made, strict=True)]
        kind_of = torch.float32 if dry else torch.bfloat16
        self.rate = matmul_rate(self.both.device, kind_of, *((64, 0.01) if dry else ()))
        trains = trained_part(self.both.config.adapter)
        shape = Shape.of(self.both.backbone.stock.config)
        self.useful = trains.flops(work_of(shape, self.examples, self.both.stage.visibility, trains))

    def cut(self) -> list[Sample]:
        """The batch from its files."""
        prepare, stage = self.both.encoder.preparer, self.both.stage
        return [Sample(i, "bench", (prepare.dialogue(dialogue, stage),)) for i, (dialogue, _) in enumerate(self.made)]

    def step(self, samples: Sequence[Sample], tokens: int | None = None) -> float:
        """Our step; its gradients are dropped before the next."""
        self.both.forget()
        return self.on([sample.examples[0] for sample in samples], tokens or self.tokens)

    def on(self, examples: Sequence[Example], tokens: int) -> float:
        """Our step over prepared examples."""
        return token_step(self.both.accelerator, self.both.backbone, examples, self.both.stage, tokens).loss

    def reference(self) -> float:
        """Seconds of a step of the reference."""
        return once(lambda: self.both.reference.token_step(self.items, self.both.stage))

    def memory(self, steps: int, tokens: int | None = None) -> float:
        """Seconds of our step without a loader."""
        return stretch(lambda samples: self.step(samples, tokens), iter([self.samples] * (steps + 1)), steps)

    @cached_property
    def known(self) -> list[tuple[float, Gradients]]:
        """Loss and gradients of a few examples: the reference's, the same in float32, and what comes out without the bottleneck."""
        both, few = self.both, [Item(item.example) for item in self.items[:FEW]]
        theirs, exact = by(both.reference, lambda: both.reference.token_step(few, both.stage, 2)), both.exact()
        right, wrong = (by(exact, lambda stage=stage: exact.token_step(few, stage, 1)) for stage in (both.stage, OPEN))  # type: ignore[misc]
        return [theirs, right, wrong]

    def agreed(self) -> dict[str, Any]:
        """Our gradients of a few examples in several passes against those."""
        few = self.examples[:FEW]
        return agreement(self.both.ours(lambda: self.on(few, sum(map(len, few)) // 2)), *self.known)

    def told(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """Times as examples a second and MFU."""
        median = {name: statistics.median(times) for name, times in seconds.items()}
        return {
            "seconds": seconds,
            "examples_per_second": {name: len(self.examples) / value for name, value in median.items()},
            "mfu": {name: self.useful / value / self.rate for name, value in median.items()},
            "mfu_nominal": {name: self.useful / value / NOMINAL for name, value in median.items()},
        }

    @property
    def batch(self) -> dict[str, Any]:
        """What the batch holds."""
        return {
            "examples": len(self.examples),
            "tokens": sum(map(len, self.examples)),
            "slots_of_reference": sum(collate(self.examples[i : i + 8], pack=False).ids.numel() for i in range(0, len(self.examples), 8)),
            "supervised": sum(example.supervised for example in self.examples),
            "visual_tokens": sum(t * h * w // 4 for example in self.examples for t, h, w in example.grids),
            "tokens_per_pass": self.tokens,
            "useful_flop": self.useful,
            "matmul_flop_per_second": self.rate,
        }


def against(kind: str, asked: Any) -> dict[str, Any]:
    """Ours against the reference."""
    bench = Bench(kind, asked.examples, asked.tokens, asked.dry)
    agreed = bench.agreed()
    print(f"{kind}: {agreed}", flush=True)
    workers = 0 if asked.dry else asked.workers
    ways = {
        "comatch": lambda: loaded(bench.step, bench.cut, asked.steps, workers),
        "memory": partial(bench.memory, asked.steps),
        "reference": bench.reference,
    }
    seconds, left_out = in_turn(ways, asked.rounds, bench.both.forget)
    found = ratios(seconds, "comatch", {"reference": agreed["equal"], "memory": True})
    tell(kind, seconds, found, "comatch")
    record = {**bench.batch, "agreed": agreed, **bench.told(seconds), "ratios": found, "left_out": left_out}
    if {"comatch", "memory"} <= seconds.keys():
        record["loader_over_memory"] = ratio(seconds["memory"], seconds["comatch"])
    return record


def checkpointing(asked: Any) -> dict[str, Any]:
    """Layers that are recomputed: none, as many as do not fit, all."""
    bench = Bench("lora", asked.examples, 2 * asked.tokens, asked.dry, "auto")
    layers, both = len(bench.both.backbone.text.layers), bench.both
    needed = fit_layers(both.accelerator, both.config, both.backbone, both.stage, both.config.stages[both.stage.name])

    def way(count: int) -> float:
        recompute(both.backbone, count)
        return bench.memory(asked.steps)

    counts = {"auto": needed, "none": 0, "all": layers}
    agreed = {}
    for name, count in counts.items():
        recompute(both.backbone, count)
        agreed[name] = bench.agreed()
    seconds, left_out = in_turn({name: partial(way, count) for name, count in counts.items()}, asked.rounds, both.forget)
    found = ratios(seconds, "auto", {name: row["equal"] and agreed["auto"]["equal"] for name, row in agreed.items()})
    tell("checkpointing", seconds, found, "auto")
    return {**bench.batch, "layers": counts, "agreed": agreed, **bench.told(seconds), "ratios": found, "left_out": left_out}


def passes(asked: Any) -> dict[str, Any]:
    """Tokens of a pass."""
    bench = Bench("lora", asked.examples, asked.tokens, asked.dry)
    agreed = bench.agreed()
    sizes = {str(n): n for n in (asked.tokens, asked.tokens // 2, asked.tokens * 2)}
    ways = {name: partial(bench.memory, asked.steps, n) for name, n in sizes.items()}
    seconds, left_out = in_turn(ways, asked.rounds, bench.both.forget)
    first = str(asked.tokens)
    found = ratios(seconds, first, dict.fromkeys(sizes, agreed["equal"]))
    tell("passes", seconds, found, first)
    return {**bench.batch, "agreed": agreed, **bench.told(seconds), "ratios": found, "left_out": left_out}


def compiled(asked: Any) -> dict[str, Any]:
    """Compiled layers against eager ones."""
    bench = Bench("lora", asked.examples, asked.tokens, asked.dry)
    backbone = bench.both.backbone
    layers = list(backbone.text.layers)
    counters.clear()
    with compiled_layers(backbone, backend=compile_backend(asked.dry)):
        compiled_calls = [layer._compiled_call_impl for layer in layers]

        def way(calls: Sequence[Any]) -> float:
            for layer, call in zip(layers, calls, strict=True):
                layer._compiled_call_impl = call
            return bench.memory(asked.steps)

        agreed = bench.agreed()
        ways = {"compiled": partial(way, compiled_calls), "eager": partial(way, [None] * len(layers))}
        seconds, left_out = in_turn(ways, asked.rounds, bench.both.forget)
        peaks = {name: peak_bytes(run) for name, run in ways.items() if name in seconds}
    found = ratios(seconds, "compiled", {"eager": agreed["equal"]})
    tell("compile", seconds, found, "compiled")
    stats = {"graphs": counters["stats"]["unique_graphs"], "peak_bytes": peaks}
    return {**bench.batch, **stats, "agreed": agreed, **bench.told(seconds), "ratios": found, "left_out": left_out}


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, tell, write."""
    asked = arguments(__doc__.splitlines()[0], "gpu-stage1", given, examples=32, rounds=3, steps=4, tokens=8192, workers=2)
    if asked.dry:
        asked.examples, asked.tokens, asked.steps = FEW, 300, 1
    parts = {kind: partial(against, kind, asked) for kind in ("dora", "lora")}
    parts |= {name: partial(run, asked) for name, run in (("checkpointing", checkpointing), ("passes", passes), ("compile", compiled))}
    return in_parts(parts, asked)


if __name__ == "__main__":
    main()
