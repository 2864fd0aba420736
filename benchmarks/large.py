"""What the scripts for one GPU share: Qwen2.5-VL-3B's shape with random weights, photographs, parts under a time limit, equality in bf16.

`dry` is the nano model and small pictures on a CPU: it proves that a script works and measures nothing.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from images import photo
from measure import RESULTS, difference, machine, ratio, told, wait, write
from reference import Reference, adapter_of, our_gradients
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.backbones.base import Backbone
from comatch.backbones.nano import SPECIAL, make_tokenizer
from comatch.backbones.shapes import config_of
from comatch.config import RunConfig
from comatch.core.memory import shortage
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipe import Recipe, Stage
from comatch.training.loader import Sample, batches
from comatch.training.plan import open_parameters

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
DEVICE = "cuda"
VISUAL = 512
RANK, ALPHA = 16, 64
SIDES = ((1280, 960), (640, 480), (960, 640), (512, 512), (384, 288))
"""Photographs of mixed sizes: 494, 391, 504, 324 and 140 visual tokens."""

FAILURES = (RuntimeError, TypeError, AttributeError, ValueError, LookupError, ImportError, AssertionError, OSError, SystemExit)
"""What ends a part of an unattended run and not the run; CUDA, the compiler and other releases of packages raise all of these."""

Gradients = dict[str, torch.Tensor]
Way = Callable[[], float]


def random_model() -> tuple[Any, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil]:
    """The 3B shape made in bf16 on the GPU, a small tokenizer whose special tokens stand where the model looks, and a processor."""
    tokenizer = make_tokenizer([scene(0, i).dense_caption() for i in range(300)], 1536)
    config = config_of(MODEL)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL}
    config.image_token_id, config.video_token_id = ids["<|image_pad|>"], ids["<|video_pad|>"]
    config.vision_start_token_id, config.vision_end_token_id = ids["<|vision_start|>"], ids["<|vision_end|>"]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    processor = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, temporal_patch_size=2)
    processor.size = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * VISUAL}
    return model, tokenizer, processor


def photographs(n: int, sizes: Sequence[tuple[int, int]], distinct: int = 32) -> list[bytes]:
    """JPEGs that cycle through `distinct` pictures of these sizes, with a changed comment so that no two files are equal."""
    shown = [_photo(sizes[i % len(sizes)], i) for i in range(min(n, distinct))]
    # A JPEG comment: equal pixels to decode, another file to whoever compares bytes.
    marks = [b"\xff\xfe\x00\x06" + i.to_bytes(4, "big") for i in range(n)]
    return [data[:2] + mark + data[2:] for mark, data in zip(marks, (shown[i % len(shown)] for i in range(n)), strict=True)]


@cache
def _photo(size: tuple[int, int], seed: int) -> bytes:
    return photo(*size, seed=seed)


class Both:
    """Our model and the reference-style path over equal weights, with an adapter that changes what they compute."""

    def __init__(self, recipe: Recipe, stage: Stage, kind: str, tokens: int, dry: bool, checkpointing: str = "none") -> None:
        self.device = torch.device("cpu" if dry else DEVICE)
        if dry:
            backbone = Backbone.load("comatch-nano", recipe)
        else:
            backbone = Backbone(*random_model(), recipe).to(self.device)
        backbone.publish_rows()
        stock = copy.deepcopy(backbone.hf)
        self.config = RunConfig.model_validate(
            {
                "name": "bench",
                "model": MODEL,
                "recipe": "coma",
                "precision": "fp32" if dry else "bf16",
                "checkpointing": checkpointing,
                "adapter": {"kind": kind, "r": RANK, "alpha": ALPHA},
                "stages": {stage.name: {"steps": 1, "batch": 1, "tokens_per_pass": tokens}},
            }
        )
        open_parameters(self.config, backbone, stage)
        torch.manual_seed(0)
        with torch.no_grad():  # an adapter at its start has no gradient of A
            for p in adapter_of(backbone).values():
                p += 0.02 * torch.randn_like(p)
        self.stage, self.backbone, self.encoder = stage, backbone.train(), Encoder(backbone, recipe)
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(cpu=self.device.type == "cpu", mixed_precision="no" if dry else "bf16")
        self.reference = Reference(stock, backbone.processor, kind, RANK, ALPHA)
        self.reference.take(adapter_of(backbone))

    def exact(self) -> Reference:
        """The reference in float32, a copy that takes 15 GB at the 3B shape."""
        twin = copy.copy(self.reference)
        twin.model = copy.deepcopy(self.reference.model).float()
        twin.autocast = lambda: nullcontext()  # type: ignore[method-assign]
        return twin

    def ours(self, step: Way) -> tuple[float, Gradients]:
        """Loss and gradients of one of our steps."""
        return step(), our_gradients(self.backbone)

    def forget(self) -> None:
        """Drop all gradients."""
        self.backbone.zero_grad(set_to_none=True)
        self.reference.model.zero_grad(set_to_none=True)


def by(reference: Reference, step: Way) -> tuple[float, Gradients]:
    """Loss and gradients of a step of the reference."""
    return step(), reference.gradients()


def agreement(ours: Any, theirs: Any, exact: Any, wrong: Any) -> dict[str, Any]:
    """Whether ours equals the reference within bf16: (loss, gradients) of both, of the float32 reference, and of a step known to be wrong.

    Two right ways in bf16 differ by rounding. Ours counts as equal where it is no farther from float32 than twice what the reference in
    bf16 is, and ten times nearer than the wrong step. Distances are 1 - cosine of all gradients laid end to end.
    """
    sides = {"comatch": ours, "reference": theirs, "wrong": wrong}
    cosines = {name: difference(gradients, exact[1])["cosine"] for name, (_, gradients) in sides.items()}
    far = {name: 1 - cosine for name, cosine in cosines.items()}
    losses = {name: abs(loss - exact[0]) / abs(exact[0]) for name, (loss, _) in sides.items()}
    equal = far["comatch"] <= 2 * far["reference"] + 1e-6 and 10 * far["comatch"] < far["wrong"]
    equal = equal and losses["comatch"] <= 2 * losses["reference"] + 1e-3
    return {
        "equal": equal,
        "cosine": difference(ours[1], theirs[1])["cosine"],
        "cosine_to_float32": cosines,
        "loss_off_float32": losses,
    }


class Shown:
    """One batch, cut from its files anew for every step: what `training.loader.batches` reads."""

    def __init__(self, cut: Callable[[], list[Sample]]) -> None:
        self.cut = cut

    def __getitem__(self, step: int) -> list[Sample]:
        return self.cut()


def stretch(step: Callable[[list[Sample]], object], parts: Iterator[list[Sample]], steps: int) -> float:
    """Seconds a step over `steps` of them, after one that is not counted."""
    done, began = 0, 0.0
    for number, samples in enumerate(parts):
        if number == 1:
            wait()
            began = time.perf_counter()
        step(samples)
        done = number
        if number == steps:
            break
    assert done == steps, "the parts ended too early"
    wait()
    return (time.perf_counter() - began) / steps


def once(step: Callable[[], object]) -> float:
    """Seconds of one step."""
    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def loaded(step: Callable[[list[Sample]], object], cut: Callable[[], list[Sample]], steps: int, workers: int) -> float:
    """The same with pictures cut from their files by loader processes meanwhile."""
    data: Any = Shown(cut)
    return stretch(step, batches(data, 0, steps + 1, workers), steps)


def in_turn(ways: Mapping[str, Way], rounds: int, forget: Callable[[], object]) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each way in each round, as the way tells them, after a round that warms up; and why some ways have none.

    A way for which memory does not suffice is left out from then on.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    out: dict[str, str] = {}
    for number in range(rounds + 1):
        for name, way in ways.items():
            if name in out:
                continue
            try:
                took = way()
            except torch.OutOfMemoryError as error:
                out[name] = shortage(error, name)
                seconds.pop(name)
            else:
                if number:
                    seconds[name].append(took)
            forget()
            if name in out:
                release()
    return seconds, out


def ratios(seconds: Mapping[str, Sequence[float]], first: str, equal: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """How many times faster `first` is than every other way that is known to give the same."""
    if first not in seconds:
        return {}
    return {name: ratio(seconds[first], times) for name, times in seconds.items() if name != first and equal.get(name, False)}


def tell(name: str, seconds: Mapping[str, Sequence[float]], found: Mapping[str, Any], first: str) -> None:
    """Ways in lines."""
    for way, times in seconds.items():
        said = told(found[way]) if way in found else "no ratio"
        print(f"{name}, {way}: {float(np.median(times)):.4f} s" + (f"; {first} is faster by {said}" if way != first else ""), flush=True)


def arguments(description: str, out: str, given: Sequence[str] | None, **more: Any) -> argparse.Namespace:
    """The arguments that all scripts share, and a script's own numbers with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=9.0, help="no part starts after so many minutes")
    parser.add_argument("--parts", nargs="+", help="only these parts")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: benchmarks/results/{out}.json; none with --dry)")
    parser.add_argument("--dry", action="store_true", help="nano scale on a CPU: proves that the script works, measures nothing")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    asked = parser.parse_args(given)
    if not asked.dry and DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here; --dry runs the script at nano scale on a CPU")
    asked.out = asked.out or (None if asked.dry else RESULTS / f"{out}.json")
    return asked


def in_parts(parts: Mapping[str, Callable[[], dict[str, Any]]], asked: argparse.Namespace) -> dict[str, Any]:
    """Run parts in order and write the record after each; what fails, or would start too late, is told in it and does not stop the rest."""
    if unknown := sorted(set(asked.parts or ()) - set(parts)):
        raise SystemExit(f"--parts {unknown} are none of {list(parts)}")
    settings = {name: value for name, value in vars(asked).items() if name not in ("out", "dry", "parts")}
    record: dict[str, Any] = {"measured": not asked.dry, "machine": machine(), "settings": settings, "parts": {}, "left_out": {}}
    began = time.monotonic()
    for name in asked.parts or parts:
        spent = (time.monotonic() - began) / 60
        if spent > asked.minutes:
            record["left_out"][name] = f"{spent:.1f} minutes were spent, {asked.minutes} allowed"
        else:
            try:
                record["parts"][name] = parts[name]() | {"part_minutes": (time.monotonic() - began) / 60 - spent}
            except FAILURES as error:
                record["left_out"][name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()
            release()
        if name in record["left_out"]:
            print(f"{name} left out: {record['left_out'][name]}", flush=True)
        if asked.out:
            write(record, asked.out)
    return record


def compile_backend(dry: bool) -> str:
    """The real compiler, or for dry runs one that only traces."""
    return "eager" if dry else "inductor"


def release() -> None:
    """Give memory that no tensor holds back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
