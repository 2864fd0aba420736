"""Stage 2 on the CPU: one exact contrastive step, comatch against the reference-style path, with equal gradients.

    python benchmarks/stage2.py [--rounds 3] [--pairs 128] [--tokens 4096] [--out benchmarks/results/stage2.json] [--quick]

Queries are captions, targets pictures (JPEG files, longer sides drawn log-uniformly from 112 to 448 pixels), half of them with a text:

    comatch     contrastive_step from picture files: token budget, texts apart from pictures, each picture decoded and seen once a step
    reference   GradCache in padded chunks of 8, dense 4-D mask through SDPA, PEFT's adapter, the head at every place, stock processor in
                the main process, once a step as a collator runs it

From item to gradient on both sides; the reference is given token ids and positions. No ratio is given unless losses and gradients agree
in the same run. 1,024 pairs, as on a GPU, would take a CPU an hour; the ratio depends little on their number, because both ways cut the
batch to pieces: `--pairs` says so with --pairs 32 and 128.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import RESULTS, compare, machine, ratio, told, write
from PIL import Image as PILImage
from reference import Item
from stage1 import Sides, checked, make_dialogues, small
from transformers.utils import logging

from comatch.config import LossConfig, StageRun
from comatch.content import Message, Text, as_message
from comatch.data.scenes import scene
from comatch.training.loader import Sample
from comatch.training.step import contrastive_step

TEMPERATURE = 0.05
SIZES = (112, 448)
Pair = tuple[Message, Message, bytes]


def make_pairs(n: int) -> list[Pair]:
    """A caption, a picture (every second one with the name of its file), and that picture's file."""
    found = []
    for i, (dialogue, file) in enumerate(make_dialogues(n, SIZES)):
        picture = dialogue.context if i % 2 else Message((*dialogue.context.parts, Text(f"picture {i}")))
        found.append((as_message(scene(7, i).dense_caption() if i % 4 else scene(7, i).caption(i)), picture, file))
    return found


def samples_of(sides: Sides, pairs: Sequence[Pair]) -> list[Sample]:
    """Prepared pairs, in the form of the training step; no two items are equal."""
    prepare, stage, made = sides.encoder.preparer, sides.encoder.stage, []
    for i, (query, target, _) in enumerate(pairs):
        examples = prepare.item(query, stage), prepare.item(target, stage)
        made.append(Sample(row=i, source="bench", examples=examples, positives=1, keys=(2 * i + 1, 2 * i + 2)))
    return made


def measure(sides: Sides, n: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Pairs a second of both."""
    pairs, stage = make_pairs(n), sides.encoder.stage
    run = StageRun(steps=1, batch=n, tokens_per_pass=tokens, loss=LossConfig(temperature=TEMPERATURE))

    def ours() -> float:
        return contrastive_step(sides.accelerator, sides.encoder.backbone, samples_of(sides, pairs), stage, run, seed=0).loss

    samples = samples_of(sides, pairs)
    items = [(Item(s.examples[0]), Item(s.examples[1])) for s in samples]

    def theirs() -> float:
        for _, _, file in pairs:
            sides.reference.processor(images=[PILImage.open(io.BytesIO(file)).convert("RGB")], return_tensors="pt")
        # The patches it makes are those of the examples; taking them from there is what a collator's batch would be.
        return sides.reference.matching_step(items, stage, TEMPERATURE)

    agreed = checked(sides, ours, theirs)
    seconds = compare({"comatch": ours, "reference": theirs}, rounds)
    examples = [example for sample in samples for example in sample.examples]
    return {
        "pairs": n,
        "tokens": sum(map(len, examples)),
        "patches": sum(len(patches) for example in examples for patches in example.patches),
        "tokens_per_pass": tokens,
        "agreed": agreed,
        "seconds": seconds,
        "pairs_per_second": {name: n / statistics.median(times) for name, times in seconds.items()},
        "ratio": ratio(seconds["comatch"], seconds["reference"]),
    }


def main() -> None:
    """Measure and tell it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--pairs", type=int, nargs="+", default=[32, 128], help="pairs of a batch")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of one of our passes")
    parser.add_argument("--kind", nargs="*", choices=("lora", "dora"), default=["lora", "dora"])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/stage2.json; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="1 round of 16 pairs: proves that it works")
    asked = parser.parse_args()
    logging.disable_progress_bar()
    sizes, rounds = ([16], 1) if asked.quick else (asked.pairs, asked.rounds)
    record: dict[str, Any] = {"machine": machine(), "dtype": "float32", "rounds": rounds, "speed": {}}
    with TemporaryDirectory() as scratch:
        folder = small(Path(scratch) / "model")
        for kind in asked.kind:
            sides = Sides(folder, kind)
            for n in sizes:
                found = record["speed"][f"{kind}, {n} pairs"] = measure(sides, n, asked.tokens, rounds)
                rates = found["pairs_per_second"]
                both = f"comatch {rates['comatch']:.2f} pairs/s, reference {rates['reference']:.2f}"
                print(f"{kind}, {n} pairs: {both}: {told(found['ratio'])}; {found['agreed']}", flush=True)
    write(record, asked.out or (None if asked.quick else RESULTS / "stage2.json"))


if __name__ == "__main__":
    main()
