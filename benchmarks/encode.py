"""Encoding speed of comatch against sentence-transformers and against the same model run the plain way, on the CPU.

    python benchmarks/encode.py [--rounds 5] [--items 64] [--out benchmarks/results/encode.json] [--quick]

From items to vectors, with the same weights, in three kinds of work, pictures as JPEG bytes:

    pictures   one picture an item
    mixed      half texts, half pictures, some with a text
    questions  eight questions about each picture

    comatch  Encoder.encode
    st       sentence-transformers, its own modules and batch size (st_peer.py says how it is set up; pip install comatch[st])
    padded   stock transformers, batches of 8 in arrival order, padded, dense mask
    single   stock transformers, one item after the other

The stock ways load what `Encoder.save` wrote with AutoModelForImageTextToText (stock SDPA, no head run), AutoTokenizer and
Qwen2VLImageProcessorPil. The recipe is CoMa with one compression token, because sentence-transformers can pool the last token but not a
mean of some. All ways run in turn, round after round, in one process. No ratio is given unless the vectors agree to a thousandth of what
parts two items, nor where comatch's own spread from round to round would explain it.
"""

from __future__ import annotations

import argparse
import io
import resource
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import RESULTS, compare, machine, ratio, told, write
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

RECIPE = load_recipe("coma").with_tokens(1)
PADDED = 8
ABOUT_ONE = 8
KINDS = ("pictures", "mixed", "questions")
Item = dict[str, Any]
Way = Callable[[Sequence[Item]], np.ndarray]


class Stock:
    """The same model as a person would run it without comatch."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.model = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        names = [RECIPE.token_name.format(i) for i in range(RECIPE.tokens)]
        self.tail = "".join(names)
        self.compression = torch.tensor(self.tokenizer.convert_tokens_to_ids(names), device=device)

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
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        inputs = {name: x.to(self.model.device) for name, x in (dict(tokens) | seen).items()}
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == self.model.config.image_token_id).int()
        hidden = self.model.model(**inputs, use_cache=False).last_hidden_state
        chosen = torch.isin(ids, self.compression)
        states = hidden[chosen].view(len(items), RECIPE.tokens, -1)
        vectors: np.ndarray = F.normalize(states.float().mean(1), dim=-1).cpu().numpy()
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


def picture(number: int, sides: tuple[int, int], dice: np.random.Generator) -> bytes:
    """A JPEG of a scene whose longer side lies within `sides`."""
    side = int(dice.integers(sides[0], sides[1] + 1))
    other = int(side * dice.uniform(0.5, 1))
    size = (side, other) if number % 4 == 1 else (other, side)
    stream = io.BytesIO()
    PILImage.fromarray(scene(9, number).draw()).resize(size, PILImage.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def make_items(n: int, sides: tuple[int, int], kind: str = "mixed") -> list[Item]:
    """Items of one kind of work, in a fixed shuffled order."""
    dice = np.random.default_rng(0)
    items: list[Item] = []
    shown: dict[int, bytes] = {}
    for i in range(n):
        number = i // ABOUT_ONE if kind == "questions" else i
        one = scene(9, number)
        item: Item = {}
        if kind != "mixed" or i % 2:
            if number not in shown:
                shown[number] = picture(number, sides, dice)
            item["image"] = shown[number]
        if kind == "questions":
            item["text"] = f"{one.describe(i)[0]} ({i % ABOUT_ONE})"
        elif kind == "mixed" and (i % 2 == 0 or i % 8 == 3):
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


def agree(name: str, vectors: dict[str, np.ndarray], limit: float = 1e-3, cosine: float = 0.99999) -> dict[str, dict[str, float]]:
    """How far each way's vectors are from comatch's. Stops where they differ by more than `limit` of what parts two items."""
    ours = vectors["comatch"]
    between = float(np.median([np.abs(a - b).max() for a, b in pairwise(ours)]))
    found = {}
    for way, theirs in vectors.items():
        row = {"max_difference": float(np.abs(theirs - ours).max()), "min_cosine": float((theirs * ours).sum(1).min()), "between": between}
        if row["max_difference"] > limit * between or row["min_cosine"] < cosine:
            raise SystemExit(f"{name}, {way}: vectors differ by {row['max_difference']:.2g}, cosine {row['min_cosine']:.6f}; no ratio")
        found[way] = row
    return found


def measure(name: str, encoder: Encoder, ways: dict[str, Way], items: Sequence[Item], rounds: int) -> dict[str, Any]:
    """Time one model and one kind of work in all ways. Stops where the vectors differ."""
    same = agree(name, {way: run(items) for way, run in ways.items()})
    seconds = compare({way: partial(run, items) for way, run in ways.items()}, rounds)
    tally: Counter[str] = Counter()
    encoder.encode(list(items), tally=tally)
    examples = [encoder.preparer.item(as_message(item), encoder.stage) for item in items]
    record: dict[str, Any] = {
        **tally,
        "tokens": sum(map(len, examples)),
        "tokens_padded": padded_tokens(examples),
        "patches": sum(t * h * w for e in examples for t, h, w in e.grids),
        "ways": {},
    }
    for way, times in seconds.items():
        median = statistics.median(times)
        row = {"seconds": times, "median": median, "items_per_second": len(items) / median, **same[way]}
        record["ways"][way] = row | ({"ratio": ratio(seconds["comatch"], times)} if way != "comatch" else {})
    return record


def padded_tokens(examples: Sequence[Example]) -> int:
    """Tokens that the padded way computes, padding included."""
    groups = [examples[start : start + PADDED] for start in range(0, len(examples), PADDED)]
    return sum(len(group) * max(map(len, group)) for group in groups)


def every_kind(name: str, encoder: Encoder, sides: tuple[int, int], rounds: int, n: int) -> dict[str, Any]:
    """One model in all kinds of work."""
    with TemporaryDirectory() as scratch:
        folder = encoder.save(Path(scratch) / "model")
        stock = Stock(folder)
        ways: dict[str, Way] = {
            "comatch": lambda some: np.asarray(encoder.encode(list(some))),
            "padded": lambda some: stock.encode(some, PADDED),
            "single": lambda some: stock.encode(some, 1),
        }
        if find_spec("sentence_transformers"):
            from st_peer import Peer

            ways["st"] = Peer(folder, RECIPE).encode
    record: dict[str, Any] = {"parameters": sum(p.numel() for p in stock.model.parameters()), "kinds": {}}
    for kind in KINDS:
        found = record["kinds"][kind] = measure(f"{name}, {kind}", encoder, ways, make_items(n, sides, kind), rounds)
        waste = found["tokens_padded"] / found["tokens"] - 1
        print(f"{name}, {kind}: {n} items, {found['distinct_pictures']} pictures, {found['patches']} patches,", end=" ")
        print(f"{found['tokens']} tokens (padding adds {waste:.0%})", flush=True)
    return record


def table(models: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    head = "| model (CPU) | work | way | items/s | comatch is faster by | max difference (between items) | min cosine |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    for name, record in models.items():
        for kind, found in record["kinds"].items():
            for way, row in found["ways"].items():
                cells = [f"{name}, {record['parameters'] / 1e6:.1f}M", kind, way, f"{row['items_per_second']:.1f}", "", "", ""]
                if "ratio" in row:
                    cells[4:] = [told(row["ratio"]), f"{row['max_difference']:.1e} ({row['between']:.1e})", f"{row['min_cosine']:.7f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure both models and tell it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of all ways, after one that warms up")
    parser.add_argument("--items", type=int, default=64, help="items a round")
    parser.add_argument("--out", type=Path, default=RESULTS / "encode.json", help="JSON file (none with --quick)")
    parser.add_argument("--quick", action="store_true", help="1 round of 16 items: proves that it works, measures nothing")
    args = parser.parse_args()
    rounds, n = (1, 16) if args.quick else (args.rounds, args.items)
    logging.disable_progress_bar()
    peer = version("sentence-transformers") if find_spec("sentence_transformers") else "not installed, so that way is left out"
    print(f"sentence-transformers: {peer}", flush=True)
    record: dict[str, Any] = {"machine": machine(), "sentence_transformers": peer}
    record |= {"dtype": "float32", "clock": "wall", "rounds": rounds, "quick": args.quick, "models": {}}
    with TemporaryDirectory() as scratch:
        models: dict[str, tuple[Callable[[], Encoder], tuple[int, int]]] = {
            "comatch-nano": (lambda: Encoder.load("comatch-nano", recipe=RECIPE, device="cpu"), (90, 160)),
            "random-middle": (lambda: middle(Path(scratch) / "middle"), (100, 480)),
        }
        for name, (load, sides) in models.items():
            record["models"][name] = every_kind(name, load(), sides, rounds, n)
    record["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    m = record["machine"]
    print(f"CPU figures: {m['threads']} threads, torch {m['packages']['torch']}, {m['processor']}")
    print(table(record["models"]))
    write(record, None if args.quick else args.out)


if __name__ == "__main__":
    main()
