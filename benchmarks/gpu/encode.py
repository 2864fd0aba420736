"""Encoding end to end on one GPU: from JPEG bytes to vectors, Qwen2.5-VL-3B's shape with random weights in bf16. Runs unattended.

    python benchmarks/gpu/encode.py [--items 256] [--rounds 3] [--out benchmarks/results/gpu-encode.json] [--dry]

Work: `pictures` (one photograph of about 512 visual tokens an item), `mixed` (half texts, half pictures of other sizes), `questions` (eight
about each picture). Ways, in turn in every round:

    comatch  Encoder.encode: pictures cut by one thread a core, then the model
    stream   Encoder.stream: pictures of the next stretch cut while the model runs
    memory   the model alone, pictures cut before the clock starts: what a loader that hides entirely would reach
    st       sentence-transformers with SDPA, its own batch size (../st_peer.py); left out and told so where it is not installed
    st-flash the same with flash-attn, where that is installed
    padded   stock transformers with SDPA, batches of 8 padded in order of arrival

A way whose vectors have a cosine below 0.999 with comatch's gets no ratio. Images per second, peak memory and useful FLOP against the
measured matmul rate go into the JSON after each kind of work, so that a run cut short keeps what it has. --dry does all of it with
the nano model on a CPU: it proves that the script works and measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

import encode as cpu
from images import photo
from measure import RESULTS, compare, machine, peak_bytes, ratio, told

from comatch.backbones.nano import SPECIAL, make_tokenizer
from comatch.backbones.shapes import config_of
from comatch.backbones.store import Memory
from comatch.card import write_json
from comatch.content import as_message
from comatch.core.flops import Shape, matmul_rate, work_of
from comatch.core.packing import budget
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.prepare import Ahead, side_by_side

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
VISUAL = 512
STRETCH = 64
TOKENS = 8192
COSINE = 0.999


def real(folder: Path) -> Encoder:
    """The 3B shape with random weights, made on the GPU; a small tokenizer stands in, its special tokens where the model looks for them."""
    tokenizer = make_tokenizer([scene(0, i).dense_caption() for i in range(300)], 1536)
    config = config_of(MODEL)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id, config.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2)
    processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * VISUAL}
    processor.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return Encoder.load(folder, recipe=cpu.RECIPE, device="cuda", dtype=torch.bfloat16)


def make_items(kind: str, n: int, dry: bool) -> list[cpu.Item]:
    """Photographs as JPEG, cycling through 32 of them with a changed comment so that no two files are equal, and texts."""
    if dry:
        return cpu.make_items(n, (90, 160), kind)
    dice = np.random.default_rng(0)
    sizes = [(1280, 960)] if kind != "mixed" else [(640, 480), (1280, 960), (960, 640), (512, 512)]
    shown = [photo(*sizes[i % len(sizes)], seed=i) for i in range(32)]
    items: list[cpu.Item] = []
    for i in range(n):
        number = i // cpu.ABOUT_ONE if kind == "questions" else i
        one = scene(9, number)
        # A JPEG comment: equal pixels to decode, another file to whoever compares bytes.
        told = number.to_bytes(4, "big")
        data = shown[number % len(shown)]
        item: cpu.Item = {"image": data[:2] + b"\xff\xfe" + (2 + len(told)).to_bytes(2, "big") + told + data[2:]}
        if kind == "mixed" and i % 2:
            item = {"text": one.dense_caption()}
        elif kind == "questions":
            item["text"] = f"{one.describe(i)[0]} ({i % cpu.ABOUT_ONE})"
        items.append(item)
    return [items[i] for i in dice.permutation(n)]


def streamed(encoder: Encoder, items: Sequence[cpu.Item]) -> np.ndarray:
    """Vectors by `Encoder.stream`."""
    return np.concatenate([part.vectors for part in encoder.stream(((str(i), x) for i, x in enumerate(items)), chunk=STRETCH)])


def from_memory(encoder: Encoder, items: Sequence[cpu.Item]) -> Any:
    """A way that only runs the model, over passes as `encode` makes them: the items are prepared here, before any clock starts."""
    examples, _ = Ahead(encoder.preparer, items, encoder.stage, None).examples(stop=True)
    prepared = [examples[i] for i in range(len(items))]
    order = side_by_side(prepared)
    groups = budget([len(prepared[i]) for i in order], TOKENS)

    def run(some: Sequence[cpu.Item]) -> np.ndarray:
        vectors, memory = np.zeros((len(some), encoder.dim), np.float32), Memory(2**30)
        for group in groups:
            places = [order[i] for i in group]
            vectors[places] = encoder.forward([prepared[i] for i in places], memory).cpu().numpy()
        return vectors

    return run


def ways_of(encoder: Encoder, folder: Path, device: str) -> tuple[dict[str, Any], list[str]]:
    """All ways but `memory`, which depends on the items; and what was left out and why."""
    dtype = encoder.backbone.stock.dtype
    stock = cpu.Stock(folder, device, dtype)
    ways: dict[str, Any] = {
        "comatch": lambda some: np.asarray(encoder.encode(list(some))),
        "stream": partial(streamed, encoder),
        "padded": lambda some: stock.encode(some, cpu.PADDED),
    }
    missing = []
    if find_spec("sentence_transformers") is None:
        missing.append("st: sentence-transformers is not installed")
    else:
        from st_peer import Peer

        name = str(dtype).removeprefix("torch.")
        ways["st"] = Peer(folder, cpu.RECIPE, device, name).encode
        if find_spec("flash_attn") is None:
            missing.append("st-flash: flash-attn is not installed")
        else:
            ways["st-flash"] = Peer(folder, cpu.RECIPE, device, name, "flash_attention_2").encode
    return ways, missing


def measure(encoder: Encoder, ways: dict[str, Any], items: Sequence[cpu.Item], rounds: int) -> dict[str, Any]:
    """One kind of work in all ways."""
    ways = ways | {"memory": from_memory(encoder, items)}
    vectors = {name: way(items) for name, way in ways.items()}
    cosines = {name: float((theirs * vectors["comatch"]).sum(1).min()) for name, theirs in vectors.items()}
    examples = [encoder.preparer.item(as_message(item), encoder.stage) for item in items]
    work = work_of(Shape.of(encoder.backbone.stock.config), examples, encoder.stage.visibility).forward
    seconds = compare({name: partial(way, items) for name, way in ways.items()}, rounds)
    record: dict[str, Any] = {
        "items": len(items),
        "pictures": sum(len(e.grids) for e in examples),
        "tokens": sum(map(len, examples)),
        "patches": sum(t * h * w for e in examples for t, h, w in e.grids),
        "useful_flop": work,
        "ways": {},
    }
    for name, times in seconds.items():
        median = statistics.median(times)
        row: dict[str, Any] = {"seconds": times, "median": median, "items_per_second": len(items) / median, "min_cosine": cosines[name]}
        row |= {"flop_per_second": work / median, "peak_bytes": peak_bytes(partial(ways[name], items))}
        if name != "comatch" and cosines[name] >= COSINE:
            row["ratio"] = ratio(seconds["comatch"], times)
        record["ways"][name] = row
    record["loader_over_memory"] = record["ways"]["stream"]["median"] / record["ways"]["memory"]["median"]
    return record


def tell(kind: str, record: dict[str, Any]) -> None:
    """One kind of work in lines."""
    for name, row in record["ways"].items():
        if name == "comatch":
            found = ""
        else:
            found = f"comatch is faster by {told(row['ratio'])}" if "ratio" in row else "vectors differ, no ratio"
        print(f"{kind}, {name}: {row['items_per_second']:.1f} items/s, cosine {row['min_cosine']:.5f} {found}", flush=True)
    print(f"{kind}: with the loader {record['loader_over_memory']:.2f}x the time of pictures in memory", flush=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, tell, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/gpu-encode.json; none with --dry)")
    parser.add_argument("--dry", action="store_true", help="the nano model on a CPU")
    asked = parser.parse_args(arguments)
    if not asked.dry and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --dry runs the script at nano scale on a CPU")
    device, n, rounds = ("cpu", 8, 1) if asked.dry else ("cuda", asked.items, asked.rounds)
    out = asked.out or (None if asked.dry else RESULTS / "gpu-encode.json")
    record: dict[str, Any] = {"measured": not asked.dry, "machine": machine(), "rounds": rounds, "work": {}}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        encoder = Encoder.load("comatch-nano", recipe=cpu.RECIPE, device="cpu") if asked.dry else real(Path(scratch) / "made")
        encoder.save(folder)
        ways, record["left_out"] = ways_of(encoder, folder, device)
        record["matmul_flop_per_second"] = matmul_rate(device, encoder.backbone.stock.dtype, *((64, 0.01) if asked.dry else ()))
        print("\n".join(record["left_out"]), flush=True)
        for kind in cpu.KINDS:
            record["work"][kind] = measure(encoder, ways, make_items(kind, n, asked.dry), rounds)
            tell(kind, record["work"][kind])
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                write_json(out, record)
    return record


if __name__ == "__main__":
    main()
