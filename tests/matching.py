"""What the tests of the contrastive step share: a small batch with every kind of item, and the plain way to its loss and gradients."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from comatch.backbones import adapters
from comatch.config import LossConfig, StageRun
from comatch.content import as_message
from comatch.core.batch import Example
from comatch.core.packing import collate
from comatch.core.pooling import group_means
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.objectives.contrastive import Pairing, info_nce
from comatch.recipes import load_recipe
from comatch.training.loader import Sample

Folders = Callable[[str], Path]
K = 4
MATCH = load_recipe("coma").with_tokens(K).stage("match")
LOSS = {"temperature": 0.1, "symmetric": True, "vectors": [1, 4], "dims": [8]}


def load(folder: Path, kind: str = "lora", dropout: float = 0.0, vision: bool = False, untied: bool = False, head: bool = False) -> Encoder:
    encoder = Encoder.load(folder, recipe=load_recipe("coma").with_tokens(K))
    if untied:
        stock = encoder.backbone.stock
        stock.lm_head.weight = torch.nn.Parameter(stock.lm_head.weight.detach().clone())
    targets = ("q_proj", "v_proj")
    torch.manual_seed(0)
    adapters.attach(encoder.backbone, kind, r=4, alpha=8, dropout=dropout, targets=targets, train_vision=vision, head=head)
    generator = torch.Generator().manual_seed(1)
    for name, p in encoder.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=generator)
    encoder.backbone.train()
    return encoder


def samples(encoder: Encoder, n: int = 5) -> list[Sample]:
    """Pictures to texts and texts to pictures, one or two positives, none to two negatives; some items are equal."""
    made = []
    for i in range(n):
        here, there = scene(3, i), scene(3, i + 1)
        items: list[Any] = [here.draw(), here.caption(0)] if i % 2 else [here.caption(1), here.draw()]
        names = [("picture", i), ("text", i)] if i % 2 else [("words", i), ("picture", i)]
        positives = 1
        if i % 4 == 0:
            items.append({"text": "drawn", "image": here.draw()})
            names.append(("both", i))
            positives = 2
        for _ in range(i % 3):
            items.append(there.caption(0))  # the positive of the next sample, twice where there are two
            names.append(("text", i + 1))
        examples = tuple(encoder.preparer.item(as_message(item), MATCH) for item in items)
        keys = tuple(zlib.crc32(repr(name).encode()) for name in names)
        made.append(Sample(row=i, source="test", examples=examples, positives=positives, keys=keys))
    return made


def run(tokens: int = 100_000, **changes: Any) -> StageRun:
    values = {"steps": 1, "batch": 8, "tokens_per_pass": tokens, "loss": LOSS} | changes
    return StageRun.model_validate(values)


def gradients(encoder: Encoder) -> dict[str, torch.Tensor]:
    out = {name: p.grad.clone() for name, p in encoder.backbone.named_parameters() if p.grad is not None}
    encoder.backbone.zero_grad()
    return out


def one_big_batch(encoder: Encoder, some: list[Sample], loss: LossConfig) -> tuple[float, dict[str, torch.Tensor]]:
    """The plain way: every item by itself with its graph, one loss, one backward."""

    def vector(example: Example) -> torch.Tensor:
        batch = collate([example])
        hidden = encoder.backbone(batch, MATCH.visibility)
        return group_means(hidden, batch.roles, batch.example, 1, MATCH.pooling or "", K)[0]

    queries = torch.stack([vector(s.examples[0]) for s in some])
    candidates = torch.stack([vector(example) for s in some for example in s.examples[1:]])
    owner = [i for i, s in enumerate(some) for _ in s.examples[1:]]
    positive = [n < s.positives for s in some for n in range(len(s.examples) - 1)]
    keys = [key for s in some for key in s.keys[1:]]
    pairing = Pairing(torch.tensor(owner), torch.tensor(positive), torch.tensor([s.keys[0] for s in some]), torch.tensor(keys))
    value, _ = info_nce(queries, candidates, pairing, loss)
    value.backward()
    return float(value.detach()), gradients(encoder)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], share: float = 2e-5) -> None:
    assert a.keys() == b.keys() and a
    scale = max(float(g.abs().max()) for g in b.values())
    assert scale > 0
    for name in a:
        assert float((a[name] - b[name]).abs().max()) < share * scale, name
