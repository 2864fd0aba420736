"""Stage 2 on one GPU, Qwen2.5-VL-3B's shape with random weights in bf16: pairs a second of one exact contrastive step. Runs unattended.

    python benchmarks/gpu/stage2.py [--pairs 128] [--batch 1024] [--tokens 16384] [--out benchmarks/results/gpu-stage2.json] [--dry]

Queries are photographs of about 512 visual tokens with an instruction, targets are texts; LoRA on the language model's attention. Parts:

    pairs    comatch            contrastive_step, pictures cut by loader processes meanwhile
             memory             the same, pictures cut before the clock starts
             reference          GradCache in padded chunks of 8, dense mask, PEFT's adapter, the head at every place; pictures by the stock
                                processor in the main process, once a step
             reference, memory  the same, pictures cut before the clock starts
    levers   our step with one lever taken away or turned: vision features not shared between the passes, chunks of 8 items, texts among
             pictures, more passes whose graph is kept, fewer and more tokens a pass
    compile  compiled layers against eager ones
    whole    `batch` pairs at once, one step each, no second round: ours from memory; the reference with --parts whole-reference

Ways alternate within a round. Before a clock starts, gradients at a small batch are held against the reference in float32 (`agreement` in
../large.py); where they do not agree no ratio is given. The cost of both grows with the pairs, so `pairs` is taken at fewer than `whole`.
"""

from __future__ import annotations

import io
import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

from large import (
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
from measure import ratio
from PIL import Image as PILImage
from reference import CHUNK, Item
from stage1 import make_dialogues

from comatch.backbones.compiled import compiled_layers
from comatch.config import LossConfig, StageRun
from comatch.content import Image, Message, Text, as_message
from comatch.core.flops import Shape, matmul_rate, work_of
from comatch.core.packing import UNLIMITED, Size, collate, greedy
from comatch.data.scenes import scene
from comatch.prepare import Ahead
from comatch.recipes import load_recipe
from comatch.training import step as training
from comatch.training.fit import trained_part
from comatch.training.loader import Sample
from comatch.training.passes import Pass
from comatch.training.step import contrastive_step

RECIPE = load_recipe("coma")
SIDES = ((1280, 960), (960, 640), (960, 1280))
TEMPERATURE = 0.05
FEW = 8
NOMINAL = 990e12
Pair = tuple[Message, Message, bytes]
Toggle = Callable[[], AbstractContextManager[object]]


class Unshared(training._Once):
    """A pass that sees its pictures anew each time."""

    def __call__(self, number: int, part: Pass) -> torch.Tensor:
        self.seen.clear()
        return super().__call__(number, part)


def by_count(accelerator: Any, backbone: Any, examples: Sequence[Any], *_: Any) -> list[Pass]:
    """Passes of 8 items in order of arrival."""
    groups = [list(range(start, min(start + 8, len(examples)))) for start in range(0, len(examples), 8)]
    return [Pass(collate([examples[i] for i in group]), group) for group in groups]


def together(accelerator: Any, backbone: Any, examples: Sequence[Any], tokens: int, *_: Any) -> list[Pass]:
    """Passes of so many tokens in order of arrival, texts among pictures."""
    groups = greedy([Size.of(example) for example in examples], Size(tokens, UNLIMITED)).groups
    return [Pass(collate([examples[i] for i in group]), group) for group in groups]


def make_pairs(n: int, dry: bool) -> list[Pair]:
    """A picture with an instruction, a text of some 60 tokens, and the picture's file."""
    files = [file for _, file in make_dialogues(n, (60, 90))] if dry else photographs(n, SIDES)
    asked = "find a caption that says what the picture shows and where"
    texts = [f"{scene(9, i).caption(i)}, number {i}" for i in range(n)]
    return [(Message((Image(file), Text(asked))), as_message(text), file) for file, text in zip(files, texts, strict=True)]


class Bench:
    """One batch of pairs and both ways over it."""

    def __init__(self, n: int, asked: Any) -> None:
        recipe = RECIPE.with_tokens(4) if asked.dry else RECIPE
        stage = recipe.stages[1]
        self.dry, self.tokens, self.made = asked.dry, asked.tokens, make_pairs(n, asked.dry)
        self.both = Both(recipe, stage, "lora", asked.tokens, asked.dry)
        with ThreadPoolExecutor(16) as pool:
            self.samples = self.cut(pool)
        self.rate = matmul_rate(self.both.device, torch.float32 if asked.dry else torch.bfloat16, *((64, 0.01) if asked.dry else ()))
        trains, shape = trained_part(self.both.config.adapter), Shape.of(self.both.backbone.stock.config)
        examples = [example for sample in self.samples for example in sample.examples]
        self.useful = trains.flops(work_of(shape, examples, stage.visibility, trains))
        self.seen = {
            "pairs": n,
            "tokens": sum(map(len, examples)),
            "visual_tokens": sum(t * h * w // 4 for example in examples for t, h, w in example.grids),
            "tokens_per_pass": asked.tokens,
            "useful_flop": self.useful,
            "matmul_flop_per_second": self.rate,
        }

    def cut(self, pool: ThreadPoolExecutor | None = None) -> list[Sample]:
        """The batch from its files; `pool` cuts pictures side by side."""
        messages = [message for query, target, _ in self.made for message in (query, target)]
        found, _ = Ahead(self.both.encoder.preparer, messages, self.both.stage, pool).examples(stop=True)
        return [Sample(i, "bench", (found[2 * i], found[2 * i + 1]), 1, (2 * i + 1, 2 * i + 2)) for i in range(len(self.made))]

    def step(self, samples: Sequence[Sample], **changes: Any) -> float:
        """Our step; its gradients are dropped before the next."""
        self.both.forget()
        run = StageRun(steps=1, batch=len(samples), tokens_per_pass=self.tokens, loss=LossConfig(temperature=TEMPERATURE))
        run = run.model_copy(update=changes)
        return contrastive_step(self.both.accelerator, self.both.backbone, samples, self.both.stage, run, seed=0).loss

    def memory(self, steps: int, toggle: Toggle = nullcontext, **changes: Any) -> float:
        """Seconds of our step without a loader."""
        with toggle():
            return stretch(lambda samples: self.step(samples, **changes), iter([self.samples] * (steps + 1)), steps)

    def items(self, samples: Sequence[Sample]) -> list[tuple[Item, Item]]:
        """Pairs for the reference, which normalises cut patches on the device."""
        return [(Item(sample.examples[0]), Item(sample.examples[1])) for sample in samples]

    def reference(self, pictures: bool) -> float:
        """Seconds of a step of the reference. pictures: run the stock processor over all files first, as its collator does once a step."""
        both, items = self.both, self.items(self.samples)

        def step() -> None:
            for start in range(0, len(self.made) if pictures else 0, CHUNK):
                shown = [PILImage.open(io.BytesIO(file)).convert("RGB") for _, _, file in self.made[start : start + CHUNK]]
                both.reference.processor(images=shown, return_tensors="pt")["pixel_values"].to(both.device)
            both.reference.matching_step(items, both.stage, TEMPERATURE)

        return once(step)

    @cached_property
    def known(self) -> list[tuple[float, Gradients]]:
        """Loss and gradients of a few pairs: the reference's, the same in float32, and those where every query has another's target."""
        both, items = self.both, self.items(self.samples[:FEW])
        theirs, exact = by(both.reference, lambda: both.reference.matching_step(items, both.stage, TEMPERATURE)), both.exact()
        moved = [(query, items[i - 1][1]) for i, (query, _) in enumerate(items)]
        right, wrong = (by(exact, lambda some=some: exact.matching_step(some, both.stage, TEMPERATURE, 2)) for some in (items, moved))  # type: ignore[misc]
        return [theirs, right, wrong]

    def agreed(self, toggle: Toggle = nullcontext, **changes: Any) -> dict[str, Any]:
        """Our gradients of a few pairs in several passes against those."""
        few = self.samples[:FEW]
        longest = max(len(example) for sample in few for example in sample.examples)
        with toggle():
            ours = self.both.ours(lambda: self.step(few, **({"tokens_per_pass": 3 * longest} | changes)))
        return agreement(ours, *self.known)

    def told(self, seconds: dict[str, list[float]]) -> dict[str, Any]:
        """Times as pairs a second and MFU."""
        median = {name: statistics.median(times) for name, times in seconds.items()}
        return {
            "seconds": seconds,
            "pairs_per_second": {name: len(self.made) / value for name, value in median.items()},
            "mfu": {name: self.useful / value / self.rate for name, value in median.items()},
            "mfu_nominal": {name: self.useful / value / NOMINAL for name, value in median.items()},
        }


def against(asked: Any) -> dict[str, Any]:
    """Ours against the reference."""
    bench = Bench(asked.pairs, asked)
    agreed = bench.agreed()
    print(f"pairs: {agreed}", flush=True)
    ways = {
        "comatch": lambda: loaded(bench.step, bench.cut, asked.steps, 0 if asked.dry else asked.workers),
        "memory": partial(bench.memory, asked.steps),
        "reference": partial(bench.reference, pictures=True),
        "reference, memory": partial(bench.reference, pictures=False),
    }
    seconds, left_out = in_turn(ways, asked.rounds, bench.both.forget)
    found = ratios(seconds, "comatch", {"reference": agreed["equal"], "reference, memory": agreed["equal"], "memory": True})
    tell("pairs", seconds, found, "comatch")
    record = {**bench.seen, "agreed": agreed, **bench.told(seconds), "ratios": found, "left_out": left_out}
    if {"comatch", "memory"} <= seconds.keys():
        record["loader_over_memory"] = ratio(seconds["memory"], seconds["comatch"])
    return record


def levers(asked: Any) -> dict[str, Any]:
    """One lever at a time against our step as it is."""
    bench, n = Bench(asked.pairs // 2, asked), asked.tokens
    turned: dict[str, tuple[Toggle, dict[str, Any]]] = {
        "as it is": (nullcontext, {}),
        "vision not shared": (lambda: mock.patch.object(training, "_Once", Unshared), {}),
        "chunks of 8": (lambda: mock.patch.object(training, "plan_passes", by_count), {}),
        "texts among pictures": (lambda: mock.patch.object(training, "plan_passes", together), {}),
        "3 passes kept": (nullcontext, {"keep_passes": 3}),
        "half the tokens": (nullcontext, {"tokens_per_pass": n // 2}),
        "twice the tokens": (nullcontext, {"tokens_per_pass": n * 2}),
    }
    agreed = {name: bench.agreed(toggle, **changes) for name, (toggle, changes) in turned.items()}
    ways = {name: partial(bench.memory, 1, toggle, **changes) for name, (toggle, changes) in turned.items()}
    seconds, left_out = in_turn(ways, asked.rounds, bench.both.forget)
    found = ratios(seconds, "as it is", {name: row["equal"] and agreed["as it is"]["equal"] for name, row in agreed.items()})
    tell("levers", seconds, found, "as it is")
    return {**bench.seen, "agreed": agreed, **bench.told(seconds), "ratios": found, "left_out": left_out}


def compiled(asked: Any) -> dict[str, Any]:
    """Compiled layers against eager ones."""
    bench = Bench(asked.pairs // 2, asked)
    layers = list(bench.both.backbone.text.layers)
    counters.clear()
    with compiled_layers(bench.both.backbone, backend=compile_backend(asked.dry)):
        compiled_calls = [layer._compiled_call_impl for layer in layers]

        def way(calls: Sequence[Any]) -> float:
            for layer, call in zip(layers, calls, strict=True):
                layer._compiled_call_impl = call
            return bench.memory(1)

        agreed = bench.agreed()
        ways = {"compiled": partial(way, compiled_calls), "eager": partial(way, [None] * len(layers))}
        seconds, left_out = in_turn(ways, asked.rounds, bench.both.forget)
    found = ratios(seconds, "compiled", {"eager": agreed["equal"]})
    tell("compile", seconds, found, "compiled")
    graphs = counters["stats"]["unique_graphs"]
    return {**bench.seen, "graphs": graphs, "agreed": agreed, **bench.told(seconds), "ratios": found, "left_out": left_out}


def whole(asked: Any, reference: bool) -> dict[str, Any]:
    """The whole batch, once: too long for rounds, so seconds and no ratio."""
    bench = Bench(asked.batch, asked)
    agreed = bench.agreed()
    bench.step(bench.samples[: asked.batch // 8])  # warms up
    seconds = {"memory": [once(lambda: bench.step(bench.samples))]}
    bench.both.forget()
    if reference:
        seconds["reference"] = [bench.reference(pictures=True)]
    tell("whole", seconds, {}, "memory")
    return {**bench.seen, "agreed": agreed, **bench.told(seconds)}


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, tell, write."""
    sizes = {"pairs": 128, "batch": 1024, "rounds": 2, "steps": 3, "tokens": 16384, "workers": 2}
    asked = arguments(__doc__.splitlines()[0], "gpu-stage2", given, **sizes)
    if asked.dry:
        asked.pairs, asked.batch, asked.tokens, asked.steps = 16, 16, 300, 1
    parts = {"pairs": partial(against, asked), "levers": partial(levers, asked), "compile": partial(compiled, asked)}
    parts |= {"whole": partial(whole, asked, False), "whole-reference": partial(whole, asked, True)}
    if not asked.parts:
        asked.parts = list(parts)[:-1]
    return in_parts(parts, asked)


if __name__ == "__main__":
    main()
