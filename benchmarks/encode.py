"""Encoding speed of comatch against the same model run the plain way, on the CPU.

    python benchmarks/encode.py [--rounds 5] [--items 64] [--out benchmarks/results/encode.json] [--quick]

Three ways from the same items (texts, pictures, pictures with text; pictures as JPEG bytes) to vectors, with the same weights:

    comatch  Encoder.encode
    padded   stock transformers, batches of 8 in arrival order, padded, dense mask
    single   stock transformers, one item after the other

The stock ways load what `Encoder.save` wrote with AutoModelForImageTextToText (stock SDPA, no head run), AutoTokenizer and
Qwen2VLImageProcessorPil. All three run in turn, round after round, in one process. No ratio is given unless the vectors agree to a
thousandth of what parts two items, nor where comatch's own spread from round to round would explain it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging

from comatch.backbones.nano import make_config, make_tokenizer
from comatch.content import as_message
from comatch.core.batch import Example
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipes import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPE = load_recipe("coma").with_tokens(8)
PADDED = 8
Item = dict[str, Any]
Way = Callable[[Sequence[Item]], np.ndarray]


class Stock:
    """The same model as a person would run it without comatch."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.tail = "".join(RECIPE.token_name.format(i) for i in range(RECIPE.tokens))
        self.compression = torch.tensor(self.tokenizer.convert_tokens_to_ids([RECIPE.token_name.format(i) for i in range(RECIPE.tokens)]))

    def encode(self, items: Sequence[Item], size: int) -> np.ndarray:
        """Unit vectors, `size` items at a time in the order given."""
        return np.concatenate([self.batch(items[start : start + size]) for start in range(0, len(items), size)])

    @torch.no_grad()
    def batch(self, items: Sequence[Item]) -> np.ndarray:
        """Unit vectors of one padded batch."""
        pictures = [PILImage.open(io.BytesIO(item["image"])).convert("RGB") for item in items if "image" in item]
        seen = dict(self.processor(images=pictures, return_tensors="pt")) if pictures else {}
        grids = iter(seen.get("image_grid_thw", ()))
        texts = [self.text(item, grids) for item in items]
        told = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        ids = told["input_ids"]
        kinds = (ids == self.model.config.image_token_id).int()
        inputs = {"input_ids": ids, "attention_mask": told["attention_mask"], "mm_token_type_ids": kinds, **seen}
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        chosen = torch.isin(ids, self.compression)
        states = hidden[chosen].view(len(items), RECIPE.tokens, -1)
        vectors: np.ndarray = F.normalize(states.mean(1), dim=-1).numpy()
        return vectors

    def text(self, item: Item, grids: Any) -> str:
        """The item as one text, in the layout of the recipe."""
        parts = []
        if "image" in item:
            pads = int(next(grids).prod()) // self.processor.merge_size**2
            parts.append("<|vision_start|>" + "<|image_pad|>" * pads + "<|vision_end|>")
        if "text" in item:
            parts.append(("\n" if parts else "") + item["text"])
        return "".join(parts) + self.tail


def make_items(n: int, sides: tuple[int, int]) -> list[Item]:
    """Texts of several lengths, pictures with longer sides within `sides`, and both together, in a fixed shuffled order."""
    dice = np.random.default_rng(0)
    items: list[Item] = []
    for i in range(n):
        one = scene(9, i)
        item: Item = {}
        if i % 2:
            side = int(dice.integers(sides[0], sides[1] + 1))
            other = int(side * dice.uniform(0.5, 1))
            size = (side, other) if i % 4 == 1 else (other, side)
            stream = io.BytesIO()
            PILImage.fromarray(one.draw()).resize(size, PILImage.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
            item["image"] = stream.getvalue()
        if i % 2 == 0 or i % 8 == 3:
            item["text"] = (one.caption(i), one.dense_caption(), one.caption(i) + " " + one.describe(i)[1])[i % 3]
        items.append(item)
    return [items[i] for i in dice.permutation(n)]


def middle(folder: Path) -> Encoder:
    """A random Qwen2.5-VL of about 65 million parameters: text 512 x 12, vision 384 x 8 with windows."""
    texts = [scene(0, i).dense_caption() for i in range(300)]
    tokenizer = make_tokenizer(texts, 1536)
    config = make_config(
        tokenizer,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
        initializer_range=0.02,
    )
    vision = {"depth": 8, "hidden_size": 384, "intermediate_size": 1024, "num_heads": 6, "fullatt_block_indexes": [3, 7]}
    for name, value in vision.items():
        setattr(config.vision_config, name, value)
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2)
    processor.size = {"shortest_edge": 56 * 56, "longest_edge": 448 * 448}
    processor.save_pretrained(folder)
    return Encoder.load(folder, recipe=RECIPE, device="cpu")


def measure(ways: dict[str, Way], items: Sequence[Item], rounds: int) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Wall seconds of every way in every round, and its vectors; a warm-up round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    vectors = {name: way(items) for name, way in ways.items()}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way(items)
            seconds[name].append(time.perf_counter() - began)
    return seconds, vectors


def compare(name: str, encoder: Encoder, items: Sequence[Item], rounds: int) -> dict[str, Any]:
    """Time one model in all three ways. Stops where the vectors differ."""
    with TemporaryDirectory() as scratch:
        stock = Stock(encoder.save(Path(scratch) / "model"))
    ways: dict[str, Way] = {
        "comatch": lambda some: encoder.encode(list(some)),
        "padded": lambda some: stock.encode(some, PADDED),
        "single": lambda some: stock.encode(some, 1),
    }
    seconds, vectors = measure(ways, items, rounds)
    ours, spread = vectors["comatch"], max(seconds["comatch"]) / min(seconds["comatch"])
    examples = [encoder.preparer.item(as_message(item), encoder.stage) for item in items]
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in stock.model.parameters()),
        "items": len(items),
        "pictures": sum("image" in item for item in items),
        "tokens": sum(map(len, examples)),
        "tokens_padded": padded_tokens(examples),
        "patches": sum(t * h * w for e in examples for t, h, w in e.grids),
        "between_items": float(np.median([np.abs(a - b).max() for a, b in pairwise(ours)])),
        "own_spread": spread,
        "ways": {},
    }
    for way, times in seconds.items():
        median = float(np.median(times))
        row: dict[str, Any] = {"seconds": times, "median": median, "items_per_second": len(items) / median}
        if way != "comatch":
            row["max_difference"] = float(np.abs(vectors[way] - ours).max())
            row["min_cosine"] = float((vectors[way] * ours).sum(1).min())
            if row["max_difference"] > 1e-3 * record["between_items"] or row["min_cosine"] < 0.99999:
                raise SystemExit(f"{name}, {way}: vectors differ by {row['max_difference']:.2g}, cosine {row['min_cosine']:.6f}; no ratio")
            each = [a / b for a, b in zip(times, seconds["comatch"], strict=True)]
            row["ratio"] = {"of_medians": row["median"] / record["ways"]["comatch"]["median"], "low": min(each), "high": max(each)}
            row["ratio"]["above_noise"] = min(each) > 1 and row["ratio"]["of_medians"] > spread
        record["ways"][way] = row
    return record


def padded_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the padded way computes, padding included."""
    groups = [examples[start : start + PADDED] for start in range(0, len(examples), PADDED)]
    return sum(len(group) * max(map(len, group)) for group in groups)


def table(models: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = "| model (CPU) | way | items/s | comatch is faster by | max difference (between items) | min cosine |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, record in models.items():
        size = f"{name}, {record['parameters'] / 1e6:.1f}M"
        for way, row in record["ways"].items():
            cells = ["", "", ""]
            if ratio := row.get("ratio"):
                told = f"{ratio['of_medians']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"
                cells = [told if ratio["above_noise"] else f"within noise ({record['own_spread']:.2f}x)"]
                cells += [f"{row['max_difference']:.1e} ({record['between_items']:.1e})", f"{row['min_cosine']:.7f}"]
            lines.append(f"| {size} | {way} | {row['items_per_second']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    return {
        "device": "cpu",
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("torch", "transformers", "pillow", "numpy")},
    }


def main() -> None:
    """Measure both models and tell it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of all three ways, after one that warms up")
    parser.add_argument("--items", type=int, default=64, help="items a round")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/encode.json; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 16 items: proves that it works, measures nothing")
    args = parser.parse_args()
    rounds, n = (2, 16) if args.quick else (args.rounds, args.items)
    out = args.out or (None if args.quick else ROOT / "benchmarks" / "results" / "encode.json")
    logging.disable_progress_bar()
    record: dict[str, Any] = {"machine": machine(), "dtype": "float32", "rounds": rounds, "quick": args.quick, "models": {}}
    with TemporaryDirectory() as scratch:
        models: dict[str, tuple[Callable[[], Encoder], tuple[int, int]]] = {
            "comatch-nano": (lambda: Encoder.load("comatch-nano", recipe=RECIPE, device="cpu"), (90, 160)),
            "random-middle": (lambda: middle(Path(scratch) / "middle"), (100, 480)),
        }
        for name, (load, sides) in models.items():
            record["models"][name] = compare(name, load(), make_items(n, sides), rounds)
            m = record["models"][name]
            waste = m["tokens_padded"] / m["tokens"] - 1
            print(f"{name}: {n} items, {m['pictures']} with a picture of {m['patches']} patches in all,", end=" ")
            print(f"{m['tokens']} tokens (padding adds {waste:.0%})", flush=True)
    record["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    m = record["machine"]
    print(f"CPU figures: {m['threads']} threads, torch {m['packages']['torch']}, {m['processor']}")
    print(table(record["models"]))
    if out is None:
        print("--quick: too short to mean anything, nothing written")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
