"""Encoding end to end on one GPU: from JPEG bytes to vectors, Qwen2.5-VL-3B's shape with random weights in bf16. Runs unattended.

    python benchmarks/gpu/encode.py [--items 128] [--rounds 2] [--out benchmarks/results/gpu-encode.json] [--dry]

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

import encode as cpu
import large
from large import arguments, in_parts, photographs, random_model, release
from measure import compare, peak_bytes, ratio, told

from comatch.backbones.store import Memory
from comatch.content import as_message
from comatch.core.flops import Shape, matmul_rate, work_of
from comatch.core.packing import budget
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.prepare import Ahead, side_by_side

SIDES = ((640, 480), (1280, 960), (960, 640), (512, 512))
STRETCH = 64
TOKENS = 8192
COSINE = 0.999


def real(folder: Path) -> Encoder:
    """The 3B shape with random weights, saved from the GPU and loaded again, so that every way reads the same files."""
    for part in random_model():
        part.save_pretrained(folder)
    release()
    return Encoder.load(folder, recipe=cpu.RECIPE, device=large.DEVICE, dtype=torch.bfloat16)


def make_items(kind: str, n: int, dry: bool) -> list[cpu.Item]:
    """Photographs, and texts."""
    if dry:
        return cpu.make_items(n, (90, 160), kind)
    dice = np.random.default_rng(0)
    shown = photographs(n, SIDES if kind == "mixed" else SIDES[1:2])
    items: list[cpu.Item] = []
    for i in range(n):
        number = i // cpu.ABOUT_ONE if kind == "questions" else i
        one = scene(9, number)
        item: cpu.Item = {"image": shown[number]}
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


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, tell, write."""
    asked = arguments(__doc__.splitlines()[0], "gpu-encode", given, items=128, rounds=2)
    device, n, rounds = ("cpu", 8, 1) if asked.dry else (large.DEVICE, asked.items, asked.rounds)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        encoder = Encoder.load("comatch-nano", recipe=cpu.RECIPE, device="cpu") if asked.dry else real(Path(scratch) / "made")
        encoder.save(folder)
        ways, missing = ways_of(encoder, folder, device)
        rate = matmul_rate(device, encoder.backbone.stock.dtype, *((64, 0.01) if asked.dry else ()))
        print("\n".join(missing), flush=True)

        def part(kind: str) -> dict[str, Any]:
            found = measure(encoder, ways, make_items(kind, n, asked.dry), rounds)
            tell(kind, found)
            return {**found, "matmul_flop_per_second": rate, "left_out": missing}

        return in_parts({kind: partial(part, kind) for kind in cpu.KINDS}, asked)


if __name__ == "__main__":
    main()
