"""From a picture file to what the vision tower reads: ours against the stock Hugging Face processor, per core.

    python benchmarks/images.py [--rounds 9] [--pictures 4] [--out benchmarks/results/images.json] [--quick]

JPEGs (quality 90) of synthetic photographs in three sizes, from bytes in memory:

    ours   ImageSettings.cut: decode, resize, cut into uint8 patches; scaling and normalising are left to the device
    stock  PIL decode and Qwen2VLImageProcessorPil: float32 patches, normalised, each frame twice
    draft  ours with scaled JPEG decoding, which changes pixels and is off by default

One thread, processor time, all ways in turn in every round. No ratio is given unless ours, normalised as `Backbone.see` does it, is the
stock's output to the bit. Last, what a batch costs the main process on its way from a loader worker: as arrays, and as `Parcel`.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import RESULTS, compare, machine, ratio, told, write
from PIL import Image as PILImage
from torch.utils.data import DataLoader, Dataset
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.content import Image
from comatch.core.batch import Example
from comatch.data.images import ImageSettings
from comatch.training.loader import Sample
from comatch.training.parcel import Parcel

SIZES = ((640, 480), (1280, 960), (2048, 1536))
SHIPPED = 32


def photo(width: int, height: int, seed: int) -> bytes:
    """A JPEG with structure at every scale and some grain, which compresses like a photograph."""
    dice = np.random.default_rng(seed)
    total = np.full((height, width, 3), 128, np.float32)
    for waves in (4, 16, 64, 256):
        small = dice.normal(size=(2 + height * waves // 2048, 2 + width * waves // 2048, 3)) * 60 / waves**0.3
        for c in range(3):
            layer = PILImage.fromarray(small[..., c].astype(np.float32))
            total[..., c] += np.asarray(layer.resize((width, height), PILImage.Resampling.BICUBIC))
    total += dice.normal(size=total.shape) * 4
    stream = io.BytesIO()
    PILImage.fromarray(total.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def stock(processor: Qwen2VLImageProcessorPil, files: Sequence[bytes]) -> list[torch.Tensor]:
    """Pixel values of each file, as the Hugging Face processor makes them."""
    pictures = [PILImage.open(io.BytesIO(data)).convert("RGB") for data in files]
    return [processor(images=[picture], return_tensors="pt")["pixel_values"] for picture in pictures]


def cut(settings: ImageSettings, files: Sequence[bytes]) -> list[np.ndarray]:
    """Patches of each file, as comatch makes them."""
    return [settings.cut(Image(data))[0] for data in files]


def normalised(settings: ImageSettings, patches: np.ndarray) -> torch.Tensor:
    """What the device makes of patches."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (settings.mean, settings.std))
    pixels = torch.from_numpy(patches).reshape(-1, 3, 1, settings.patch, settings.patch).float() / 255
    return ((pixels - mean) / std).expand(-1, -1, settings.temporal, -1, -1).flatten(1)


def one_size(size: tuple[int, int], pictures: int, rounds: int) -> dict[str, Any]:
    """Time pictures of one size all ways. Stops where a pixel differs."""
    files = [photo(*size, seed) for seed in range(pictures)]
    processor = Qwen2VLImageProcessorPil()
    processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1024}
    settings = ImageSettings.from_processor(processor)
    quick = settings.limited(None, None, draft=True)
    theirs, ours, drafted = stock(processor, files), cut(settings, files), cut(quick, files)
    worst = max(float((normalised(settings, a) - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    if worst:
        raise SystemExit(f"{size}: pixel values differ by up to {worst:.2g}; no ratio")
    ways: dict[str, Callable[[], object]] = {
        "ours": partial(cut, settings, files), "stock": partial(stock, processor, files), "draft": partial(cut, quick, files)
    }  # fmt: skip
    seconds = compare(ways, rounds, clock=time.process_time)
    each = {way: [s / pictures for s in times] for way, times in seconds.items()}
    _, high, wide = settings.grid(*size)
    return {
        "file_kb": round(sum(map(len, files)) / len(files) / 1024),
        "visual_tokens": high * wide // 4,
        "milliseconds": {way: 1e3 * statistics.median(times) for way, times in each.items()},
        "bytes_shipped": {"ours": ours[0].nbytes, "stock": theirs[0].nbytes},
        "max_difference": worst,
        "draft_mean_difference_of_255": float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(ours, drafted, strict=True)])),
        "seconds": each,
        "ratio": ratio(each["ours"], each["stock"]),
        "draft_ratio": ratio(each["draft"], each["stock"]),
    }


class Shipped(Dataset[list[Sample]]):
    """Batches of samples with one picture of 390 visual tokens each."""

    def __getitem__(self, step: int) -> list[Sample]:
        row = np.zeros(400, np.int64)
        pictures = [np.full((1560, 588), step + i, np.uint8) for i in range(SHIPPED)]
        return [Sample(i, "x", (Example(row, row, row, np.zeros((3, 400)), (p,), ((1, 30, 52),)),)) for i, p in enumerate(pictures)]


def shipping(steps: int, pack: Callable[[Any], Any]) -> float:
    """Processor time of the main process for a batch from one loader worker, in milliseconds a picture."""
    loader = iter(DataLoader(Shipped(), batch_size=None, sampler=range(steps + 1), num_workers=1, collate_fn=pack))
    next(loader)
    began = time.process_time()
    for part in loader:
        samples = part.opened() if isinstance(part, Parcel) else part
        assert len(samples) == SHIPPED and samples[1].examples[0].patches[0][0, 0] == samples[0].examples[0].patches[0][0, 0] + 1
    return 1e3 * (time.process_time() - began) / steps / SHIPPED


def table(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| JPEG | visual tokens | ours ms | stock ms | ours is faster by | with draft |", "|---|---|---|---|---|---|"]
    for name, row in record["sizes"].items():
        ms = row["milliseconds"]
        cells = [name, str(row["visual_tokens"]), f"{ms['ours']:.1f}", f"{ms['stock']:.1f}", told(row["ratio"]), told(row["draft_ratio"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure all sizes and tell it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one that warms up")
    parser.add_argument("--pictures", type=int, default=4, help="pictures of each size")
    parser.add_argument("--out", type=Path, default=RESULTS / "images.json")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 picture: proves that it works, writes nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds, pictures = (2, 1) if args.quick else (args.rounds, args.pictures)
    record: dict[str, Any] = {"machine": machine(), "clock": "processor time, one thread", "rounds": rounds, "pictures": pictures}
    record["sizes"] = {f"{w}x{h}": one_size((w, h), pictures, rounds) for w, h in SIZES}
    steps = 2 if args.quick else 12
    both = {"arrays": list, "parcel": Parcel.packed}
    times = {name: [shipping(steps, pack) for _ in range(1 if args.quick else 3)] for name, pack in both.items()}
    record["main_process_ms_a_picture"] = {name: statistics.median(values) for name, values in times.items()}
    print(f"CPU figures, one core of {record['machine']['processor']}; pixel values equal to the bit")
    print(table(record))
    shipped = record["main_process_ms_a_picture"]
    print(f"from a worker to the main process: {shipped['arrays']:.2f} ms a picture as arrays, {shipped['parcel']:.2f} ms as one tensor")
    write(record, None if args.quick else args.out)


if __name__ == "__main__":
    main()
