"""Cost of one contrastive step of comatch against the cached losses of others, on the CPU, with equal weights and equal gradients.

    python benchmarks/matching_step.py [--rounds 5] [--pairs 64] [--tokens 4096] [--out benchmarks/results/matching_step.json] [--quick]

One batch of query and target items (texts, pictures, pictures with text), LoRA on the language model, one loss over the whole batch:

    comatch           contrastive_step: token budget, texts apart from pictures, vision features shared between the passes
    sentence chunks   sentence-transformers' CachedMultipleNegativesRankingLoss, mini_batch_size 32 (its default)
    sentence tokens   the same with mini_batch_num_tokens, equal to comatch's budget
    gradcache 8       a GradCache loop in chunks of 8, each padded to its longest item

The others run the stock model (stock SDPA, padded rows) that comatch saved, with the same adapter. Preparing items is not timed. All
ways run in turn, round after round, in one process. No ratio is given unless losses and gradients agree in the same run, nor where
comatch's own spread from round to round would explain it. No item repeats, so nothing is won by encoding equal items once.
Needs sentence-transformers: pip install 'comatch[st]'.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from encode import RECIPE, Item, Stock, make_items, middle
from measure import RESULTS, compare, difference, machine, ratio, told, write
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from torch import nn
from transformers.utils import logging

from comatch.backbones import adapters
from comatch.config import LossConfig, StageRun
from comatch.content import as_message
from comatch.encoder import Encoder
from comatch.training.loader import Sample
from comatch.training.step import contrastive_step

TEMPERATURE = 0.05
CHUNK = 8
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
AGREE = 1e-4
Step = Callable[[], float]
Features = dict[str, torch.Tensor]


class Padded(Stock):
    """The stock model with an adapter, from padded features to vectors with a graph."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        layers = r"model\.language_model\..*\.(" + "|".join(TARGETS) + ")"
        self.model = get_peft_model(self.model, LoraConfig(r=16, lora_alpha=64, lora_dropout=0.0, target_modules=layers))
        self.stock = self.model.get_base_model()

    def features(self, items: Sequence[Item]) -> Features:
        """Items as one padded batch, in the names that sentence-transformers slices."""
        pictures = [PILImage.open(item["file"]).convert("RGB") for item in items if "image" in item]
        seen = dict(self.processor(images=pictures, return_tensors="pt")) if pictures else {}
        grids = iter(seen.get("image_grid_thw", ()))
        told = self.tokenizer([self.text(item, grids) for item in items], padding=True, return_tensors="pt", add_special_tokens=False)
        counts = torch.tensor([int("image" in item) for item in items])
        kinds = (told["input_ids"] == self.stock.config.image_token_id).int()
        ids, mask = told["input_ids"], told["attention_mask"]
        return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds, "num_images_per_sample": counts, **seen}

    def vectors(self, features: Features) -> torch.Tensor:
        """Unit vectors [items, dim]."""
        names = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")
        inputs = {name: features[name] for name in names if name in features}
        hidden = self.stock.model(**inputs, use_cache=False).last_hidden_state
        chosen = torch.isin(inputs["input_ids"], self.compression)
        return F.normalize(hidden[chosen].view(len(chosen), RECIPE.tokens, -1).mean(1), dim=-1)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by parameter, which are then forgotten."""
        return taken(self.model)


class Module(nn.Module):
    """A module of sentence-transformers around it."""

    def __init__(self, padded: Padded) -> None:
        super().__init__()
        self.model, self.vectors = padded.model, padded.vectors

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """Features with `sentence_embedding`."""
        return {**features, "sentence_embedding": self.vectors(features)}


def taken(model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter, which are then forgotten."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def comatch_step(encoder: Encoder, queries: Sequence[Item], targets: Sequence[Item], tokens: int) -> tuple[Step, list[Sample]]:
    """Our step over prepared samples."""
    samples = []
    for i, pair in enumerate(zip(queries, targets, strict=True)):
        examples = tuple(encoder.preparer.item(as_message(content(item)), encoder.stage) for item in pair)
        samples.append(Sample(row=i, source="bench", examples=examples, positives=1))
    run = StageRun(steps=1, batch=len(samples), tokens_per_pass=tokens, loss=LossConfig(temperature=TEMPERATURE))
    accelerator = Accelerator(cpu=True)
    return lambda: contrastive_step(accelerator, encoder.backbone, samples, encoder.stage, run, seed=0).loss, samples


def sentence_step(padded: Padded, columns: Sequence[Features], **size: int) -> Step:
    """The step of sentence-transformers' cached loss."""
    model = SentenceTransformer(modules=[Module(padded)], device="cpu")
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **size)

    def step() -> float:
        value = loss([dict(column) for column in columns], torch.empty(0))
        value.backward()
        return float(value.detach())

    return step


def gradcache_step(padded: Padded, columns: Sequence[Sequence[Features]]) -> Step:
    """GradCache as published: chunks without graph, one loss, chunks again (arXiv 2101.06983)."""

    def step() -> float:
        with torch.no_grad():
            first = [[padded.vectors(chunk) for chunk in column] for column in columns]
        queries, targets = (torch.cat(column).requires_grad_(True) for column in first)
        loss = F.cross_entropy(queries @ targets.T / TEMPERATURE, torch.arange(len(queries)))
        loss.backward()
        for column, whole in zip(columns, (queries, targets), strict=True):
            assert whole.grad is not None
            for chunk, gradient in zip(column, whole.grad.split(CHUNK), strict=True):
                (padded.vectors(chunk) * gradient).sum().backward()
        return float(loss.detach())

    return step


def content(item: Item) -> dict[str, Any]:
    """The item as comatch reads it."""
    return {name: item[name] for name in ("image", "text") if name in item}


def files(items: list[Item], folder: Path) -> list[Item]:
    """Pictures as files beside their bytes."""
    for i, item in enumerate(items):
        if "image" in item:
            item["file"] = folder / f"{i}.jpg"
            item["file"].write_bytes(item["image"])
    return items


def measure(name: str, encoder: Encoder, pairs: int, sides: tuple[int, int], tokens: int, rounds: int) -> dict[str, Any]:
    """Time one model in all ways. Stops where a loss or a gradient differs."""
    with TemporaryDirectory() as scratch:
        items = files(make_items(2 * pairs, sides), Path(scratch))
        padded = Padded(encoder.save(Path(scratch) / "model"))
        adapters.attach(encoder.backbone, "lora", r=16, alpha=64, dropout=0.0, targets=TARGETS, train_vision=False)
        encoder.backbone.rows.requires_grad_(False)  # the stock model has them in its vocabulary, where they do not train
        same_adapter(encoder.backbone.hf, padded.model)
        queries, targets = items[:pairs], items[pairs:]
        ours, samples = comatch_step(encoder, queries, targets, tokens)
        whole = [padded.features(column) for column in (queries, targets)]
        chunks = [[padded.features(column[i : i + CHUNK]) for i in range(0, pairs, CHUNK)] for column in (queries, targets)]
    steps = {
        "comatch": ours,
        "sentence chunks": sentence_step(padded, whole, mini_batch_size=32),
        "sentence tokens": sentence_step(padded, whole, mini_batch_num_tokens=tokens),
        "gradcache 8": gradcache_step(padded, chunks),
    }
    lengths = [len(example) for sample in samples for example in sample.examples]
    record: dict[str, Any] = {
        "parameters": sum(p.numel() for p in padded.model.parameters()),
        "pairs": pairs,
        "tokens": sum(lengths),
        "longest": max(lengths),
        "patches": sum(t * h * w for sample in samples for example in sample.examples for t, h, w in example.grids),
        "tokens_per_pass": tokens,
        "ways": agreement(name, steps, encoder, padded),
    }
    return judged(record, compare({way: partial(once, step, [encoder.backbone, padded.model]) for way, step in steps.items()}, rounds))


def once(step: Step, models: Sequence[nn.Module]) -> None:
    """One step whose gradients are forgotten."""
    step()
    for model in models:
        model.zero_grad()


def same_adapter(ours: nn.Module, theirs: nn.Module) -> None:
    """Give both models one adapter that changes the vectors: PEFT's own start is zero."""
    generator = torch.Generator().manual_seed(0)
    values = {name: 0.02 * torch.randn(p.shape, generator=generator) for name, p in ours.named_parameters() if "lora_" in name}
    for model in (ours, theirs):
        for name, p in model.named_parameters():
            if name in values:
                p.data.copy_(values[name])
        model.train()


def agreement(name: str, steps: dict[str, Step], encoder: Encoder, padded: Padded) -> dict[str, dict[str, Any]]:
    """Run every way once. Stops unless losses and gradients are equal to float32 rounding, and so large that this says something."""
    found: dict[str, dict[str, Any]] = {}
    expected: dict[str, torch.Tensor] = {}
    for way, step in steps.items():
        loss = step()
        if way == "comatch":
            expected = {name.removeprefix("hf."): value for name, value in taken(encoder.backbone).items()}
            if not max(float(value.abs().max()) for value in expected.values()) > 1e-6:
                raise SystemExit(f"{name}: the gradients are near zero, so their equality says nothing")
            found[way] = {"loss": loss}
            continue
        off = difference(padded.gradients(), expected)
        found[way] = {"loss": loss, "gradients": off}
        if off["difference"] > AGREE or abs(loss - found["comatch"]["loss"]) > AGREE * loss:
            losses = f"losses are {loss:.6f} and {found['comatch']['loss']:.6f}"
            raise SystemExit(f"{name}, {way}: gradients differ by {off['difference']:.2g}, {losses}; no ratio")
    return found


def judged(record: dict[str, Any], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The record with times, and ratios of medians with their spread."""
    for way, times in seconds.items():
        record["ways"][way] |= {"seconds": times, "median": statistics.median(times)}
        if way != "comatch":
            record["ways"][way]["ratio"] = ratio(seconds["comatch"], times)
    return record


def table(models: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| model (CPU) | step | seconds | comatch is faster by | largest gradient difference |", "|---|---|---|---|---|"]
    for name, record in models.items():
        for way, row in record["ways"].items():
            found = [told(row["ratio"]), f"{row['gradients']['difference']:.1e}"] if "ratio" in row else ["", ""]
            lines.append(f"| {name}, {record['parameters'] / 1e6:.1f}M | {way} | {row['median']:.2f} | {found[0]} | {found[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Measure both models and tell it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of all ways, after one that compares gradients")
    parser.add_argument("--pairs", type=int, default=64, help="pairs of the batch")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of one pass, for comatch and for sentence tokens")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/matching_step.json; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="nano only, 2 rounds of 16 pairs: proves that it works, measures nothing")
    args = parser.parse_args()
    rounds, pairs, tokens = (2, 16, 512) if args.quick else (args.rounds, args.pairs, args.tokens)
    out = args.out or (None if args.quick else RESULTS / "matching_step.json")
    logging.disable_progress_bar()
    here = machine()
    here["packages"] |= {name: version(name) for name in ("sentence-transformers", "peft", "accelerate")}
    record: dict[str, Any] = {"machine": here, "dtype": "float32", "rounds": rounds, "quick": args.quick, "models": {}}
    with TemporaryDirectory() as scratch:
        models: dict[str, tuple[Callable[[], Encoder], tuple[int, int]]] = {
            "comatch-nano": (lambda: Encoder.load("comatch-nano", recipe=RECIPE, device="cpu"), (90, 160)),
        }
        if not args.quick:
            models["random-middle"] = (lambda: middle(Path(scratch) / "middle"), (100, 320))
        for name, (load, sides) in models.items():
            record["models"][name] = measure(name, load(), pairs, sides, tokens, rounds)
    record["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"CPU figures: {here['threads']} threads, load {here['load_before']:.1f} before, {here['processor']}")
    print(table(record["models"]))
    write(record, out)


if __name__ == "__main__":
    main()
