"""Stage 1 on the CPU: compression by next-token prediction, comatch against the reference-style path, with equal gradients.

    python benchmarks/stage1.py [--rounds 5] [--examples 32] [--tokens 2048] [--kind dora] [--out benchmarks/results/stage1.json] [--quick]

One batch of dialogues about pictures (JPEG files of mixed sizes, one to nine turns), an adapter on the language model's attention,
forward and backward:

    comatch     token_step: rows packed to a budget of tokens, visibility as segments, head on supervised places only, DoRA's norm stored
    reference   the stock model in padded chunks of 8, dense 4-D mask through SDPA, PEFT's adapter, logits at every place, stock processor

From picture file to gradient in the main process on both sides; the reference is given token ids and positions. All rounds in one
process, both in turn. No ratio is given unless losses and gradients agree in the same run. Sides of pictures are drawn log-uniformly from
112 to 896 pixels (mixed) or all at 640 (equal). Peak memory is that of tensors in one pass over about --long tokens at once, on our side
packed and on the other padded.
"""

from __future__ import annotations

import argparse
import io
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from measure import RESULTS, compare, difference, machine, peak_bytes, ratio, told, write
from PIL import Image as PILImage
from reference import CHUNK, TARGETS, Item, Reference, adapter_of, our_gradients
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from comatch.backbones import adapters
from comatch.backbones.nano import make_nano
from comatch.content import Dialogue, as_message
from comatch.core.batch import Example
from comatch.core.flops import Shape, Trains, work_of
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipes import load_recipe
from comatch.training.step import token_step

RECIPE = load_recipe("coma").with_tokens(8)
STAGE = RECIPE.stages[0]
AGREE = 1e-4
RANK, ALPHA = 16, 64
MIXED = (112, 896)
# The vocabulary is to a layer's memory what it is in the 3B model: logits of a place take 0.4 of what its layers keep.
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"vocab_size": 3072, "max_position_embeddings": 4096, "initializer_range": 0.05}
ROTARY = {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0}}


class Sides:
    """Both ways over the same weights."""

    def __init__(self, folder: Path, kind: str) -> None:
        encoder = Encoder.load(folder, recipe=RECIPE, device="cpu")
        torch.manual_seed(0)
        adapters.attach(encoder.backbone, kind, r=RANK, alpha=ALPHA, dropout=0.0, targets=TARGETS, train_vision=False)
        encoder.backbone.rows.requires_grad_(True)
        with torch.no_grad():  # an adapter at its start has no gradient of A
            for p in adapter_of(encoder.backbone).values():
                p += 0.02 * torch.randn_like(p)
        self.encoder, self.accelerator = encoder, Accelerator(cpu=True)
        encoder.backbone.train()
        encoder.backbone.publish_rows()
        stock = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa")
        with torch.no_grad():
            stock.get_input_embeddings().weight.copy_(encoder.backbone.text.embed_tokens.weight)
        self.reference = Reference(stock, Qwen2VLImageProcessorPil.from_pretrained(folder), kind, RANK, ALPHA)
        self.reference.take(adapter_of(encoder.backbone))

    def ours(self, dialogues: Sequence[Dialogue], tokens: int) -> float:
        """Our step from dialogues with picture files."""
        examples = [self.encoder.preparer.dialogue(dialogue, STAGE) for dialogue in dialogues]
        return self.on(examples, tokens)

    def on(self, examples: Sequence[Example], tokens: int) -> float:
        """Our step from prepared examples."""
        return token_step(self.accelerator, self.encoder.backbone, examples, STAGE, tokens).loss


def make_dialogues(n: int, sides: tuple[int, int], turns: tuple[int, int] = (1, 9)) -> list[tuple[Dialogue, bytes]]:
    """Dialogues about drawn scenes and the picture file of each: JPEG with longer sides drawn log-uniformly within `sides`."""
    dice, made = np.random.default_rng(0), []
    for i in range(n):
        one, side = scene(7, i), int(np.exp(dice.uniform(*np.log(sides))))
        size = (side, int(side * dice.uniform(0.5, 1)))
        stream = io.BytesIO()
        PILImage.fromarray(one.draw()).resize(size if i % 2 else size[::-1], PILImage.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        said = tuple((question, answer) for question, answer, _ in one.dialogue(i, int(dice.integers(turns[0], turns[1] + 1))))
        made.append((Dialogue(as_message(stream.getvalue()), said), stream.getvalue()))
    return made


def small(folder: Path) -> Path:
    """A random Qwen2.5-VL of about 9 million parameters."""
    texts = [scene(0, i).dense_caption() for i in range(300)]
    make_nano(folder, texts, 1536, seed=0, **SMALL, **ROTARY)
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2)
    processor.size = {"shortest_edge": 56 * 56, "longest_edge": 896 * 896}
    processor.save_pretrained(folder)
    return folder


def checked(sides: Sides, ours: Callable[[], float], theirs: Callable[[], float]) -> dict[str, float]:
    """Both once, and how far their losses and gradients are apart. Stops where they do not agree."""
    losses = ours(), theirs()
    found = difference(our_gradients(sides.encoder.backbone), sides.reference.gradients())
    found["loss"] = abs(losses[0] - losses[1]) / abs(losses[1])
    if not (found["difference"] < AGREE and found["loss"] < AGREE and found["cosine"] > 1 - 1e-6 and found["largest"] > 0):
        raise SystemExit(f"the two ways do not agree, so no ratio is given: {found}")
    return found


def speed(sides: Sides, n: int, tokens: int, rounds: int, size: tuple[int, int]) -> dict[str, Any]:
    """Examples a second of both, on mixed lengths."""
    made = make_dialogues(n, size)
    dialogues = [dialogue for dialogue, _ in made]
    examples = [sides.encoder.preparer.dialogue(dialogue, STAGE) for dialogue in dialogues]
    items = [Item(example, (file,)) for example, (_, file) in zip(examples, made, strict=True)]
    ours, theirs = partial(sides.ours, dialogues, tokens), partial(sides.reference.token_step, items, STAGE)
    agreed = checked(sides, ours, theirs)
    seconds = compare({"comatch": ours, "reference": theirs}, rounds)
    lengths = [len(example) for example in examples]
    padded = sum(len(part) * max(part) for part in (lengths[i : i + CHUNK] for i in range(0, n, CHUNK)))
    trains = Trains(rank=RANK, targets=TARGETS)
    work = trains.flops(work_of(Shape.of(sides.encoder.backbone.stock.config), examples, STAGE.visibility, trains))
    median = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "examples": n,
        "tokens": sum(lengths),
        "slots_of_reference": padded,
        "supervised": sum(example.supervised for example in examples),
        "patches": sum(len(patches) for example in examples for patches in example.patches),
        "tokens_per_pass": tokens,
        "gflop": work / 1e9,
        "agreed": agreed,
        "seconds": seconds,
        "examples_per_second": {name: n / value for name, value in median.items()},
        "gflops": {name: work / 1e9 / value for name, value in median.items()},
        "ratio": ratio(seconds["comatch"], seconds["reference"]),
    }


def memory(sides: Sides, long: int, size: tuple[int, int], turns: tuple[int, int]) -> dict[str, Any]:
    """Peak bytes of tensors in one pass of about `long` tokens."""
    made, examples = make_dialogues(64, size, turns), list[Example]()
    for dialogue, _ in made:
        examples.append(sides.encoder.preparer.dialogue(dialogue, STAGE))
        if sum(map(len, examples)) >= long:
            break
    items = [Item(example) for example in examples]
    ours, theirs = partial(sides.on, examples, 10**9), partial(sides.reference.token_step, items, STAGE, 10**9)
    agreed = checked(sides, ours, theirs)
    peaks = {"comatch": peak_bytes(ours), "reference": peak_bytes(theirs)}
    slots = len(examples) * max(map(len, examples))
    lengths = {"tokens": sum(map(len, examples)), "slots_of_reference": slots, "examples": len(examples)}
    return {**lengths, "agreed": agreed, "peak_bytes": peaks, "ratio": peaks["comatch"] / peaks["reference"]}


def main() -> None:
    """Measure and tell it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that warms up")
    parser.add_argument("--examples", type=int, default=32, help="examples of a batch")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of one of our passes")
    parser.add_argument("--long", type=int, default=16384, help="tokens of the pass whose memory is measured")
    parser.add_argument("--kind", nargs="*", choices=("lora", "dora"), default=["lora", "dora"])
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/stage1.json; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="1 round of 8 examples, 1,000 tokens: proves that it works")
    asked = parser.parse_args()
    logging.disable_progress_bar()
    n, rounds, long = (8, 1, 1000) if asked.quick else (asked.examples, asked.rounds, asked.long)
    record: dict[str, Any] = {"machine": machine(), "dtype": "float32", "rounds": rounds, "speed": {}, "memory": {}}
    with TemporaryDirectory() as scratch:
        folder = small(Path(scratch) / "model")
        for kind in asked.kind:
            sides = Sides(folder, kind)
            found = record["speed"][kind] = speed(sides, n, asked.tokens, rounds, MIXED)
            rates = found["examples_per_second"]
            both = f"comatch {rates['comatch']:.2f} examples/s, reference {rates['reference']:.2f}"
            print(f"{kind}: {both}: {told(found['ratio'])}", flush=True)
            print(f"  {found['tokens']:,} tokens, {found['slots_of_reference']:,} slots padded; {found['agreed']}", flush=True)
        for name, size, turns in (("mixed lengths", MIXED, (1, 9)), ("equal lengths", (640, 640), (9, 9))):
            found = record["memory"][name] = memory(sides, long, size, turns)
            mib = {way: peak / 2**20 for way, peak in found["peak_bytes"].items()}
            print(f"{name}: {mib['comatch']:.0f} MiB against {mib['reference']:.0f} MiB in a pass of {found['tokens']:,} tokens", end=" ")
            print(f"= {found['ratio']:.2f} ({kind})", flush=True)
    write(record, asked.out or (None if asked.quick else RESULTS / "stage1.json"))


if __name__ == "__main__":
    main()
