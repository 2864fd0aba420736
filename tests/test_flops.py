"""The counter of floating-point work against torch's own, which watches the matrix products that really run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.shapes import config_of
from comatch.core.batch import ROLE_ID, Example
from comatch.core.flops import Shape, Trains, Work, matmul_rate, seen_pairs, work_of
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.encoder import Encoder
from comatch.objectives.tokens import ROWS, next_token
from comatch.recipe import Visibility
from comatch.recipes import load_recipe

COMA = load_recipe("coma").with_tokens(4)
FULL = Visibility(("context", "compression", "dialogue"), ("fff", "fff", "fff"))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GRIDS = [(1, 4, 6), (1, 10, 6)]


def examples_for(backbone: Backbone) -> list[Example]:
    """Two dialogues of 128 tokens with one picture each, sides no multiple of a window; 128 supervised places in all: nothing is padded."""
    dice = np.random.default_rng(0)
    made = []
    for grid, supervised in zip(GRIDS, (28, 100), strict=True):
        patches = int(np.prod(grid))
        rows = range(backbone.first_token, backbone.first_token + 4)
        words = 124 - patches // 4
        ids = np.array([*[backbone.image_id] * (patches // 4), *rows, *dice.integers(0, 100, words)])
        roles = np.repeat([ROLE_ID[r] for r in FULL.roles], [patches // 4, 4, words]).astype(np.int8)
        labels = np.full(len(ids), -100)
        labels[-supervised:] = 5
        positions = np.tile(np.arange(len(ids)), (3, 1))
        pixels = dice.integers(0, 256, (patches, 3 * backbone.processor.patch_size**2), dtype=np.uint8)
        made.append(Example(ids, roles, labels, positions, (pixels,), (grid,)))
    return made


def loss_of(backbone: Backbone, examples: list[Example]) -> torch.Tensor:
    batch = collate(examples)
    losses, _ = next_token(backbone(batch, FULL), batch.labels, batch.example, batch.size, backbone.head)
    return losses.sum()


def counted(run: Callable[[], object]) -> dict[str, int]:
    """FLOP by part, as torch counts them. Attention runs as plain matrix products, which torch counts as such.

    Angles of the rotary embedding, a product of one column and one row in some releases of transformers, are no work of ours.
    """
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        run()
    counts = {name: sum(by.values()) for name, by in counter.get_flop_counts().items()}
    angles = part(counts, "language_model.rotary_emb")
    holds = ("Global", "Backbone", "Backbone.hf", "language_model", "model")
    return {name: n - angles if name.endswith(holds) else n for name, n in counts.items()}


def part(counts: dict[str, int], name: str) -> int:
    return next((n for key, n in counts.items() if key.endswith(name)), 0)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_equals_what_torch_counts(folder_of: Callable[[str], Path], family: str, kind: str) -> None:
    backbone = Encoder.load(folder_of(family), recipe=COMA).backbone
    vision = kind == "full"
    adapters.attach(backbone, kind, r=4, alpha=8, dropout=0.0, targets=TARGETS, train_vision=vision)
    backbone.rows.requires_grad_(True)
    trains = Trains(full=vision, vision=vision, rank=4, targets=TARGETS)
    shape, examples = Shape.of(backbone.stock.config), examples_for(backbone)
    assert sum(e.supervised for e in examples) == ROWS
    work = work_of(shape, examples, FULL, trains)
    forward = counted(lambda: loss_of(backbone, examples))
    both = counted(lambda: loss_of(backbone, examples).backward())
    assert part(forward, "language_model") == work.text + work.attention + work.adapter
    stock = 2 * 2 * shape.pixels * shape.vision_width  # one patch goes through the stock convolution, both frames of it
    assert part(forward, ".visual") == work.vision + stock
    assert forward["Global"] == work.forward + stock and work.vision > 0 and (work.adapter > 0) == (kind == "lora")
    # Pictures need no gradient of their own, which our 3 forwards of a tower that trains leave out of account.
    pixels = sum(2 * int(np.prod(grid)) * shape.pixels * shape.vision_width for grid in GRIDS) if vision else 0
    assert both["Global"] == trains.flops(work) - pixels + stock
    assert pixels < 0.1 * trains.flops(work), "in these toys; one part in 900 of the 3B model's tower"
    assert abs(trains.flops(work) / work.forward - (3 if vision else 2)) < 0.75


def test_windows_and_published_figures() -> None:
    """specs/performance.md section 2: TFLOP of one picture and one example of Qwen2.5-VL-3B."""
    shape = Shape.of(config_of("Qwen/Qwen2.5-VL-3B-Instruct"))
    for grid, visual, seen, forward, pairs in (((1, 32, 32), 256, 1.34, 3.43, 0.031), ((1, 32, 64), 512, 2.73, 4.85, 0.065)):
        tokens = 30 + visual + 32 + 300
        roles = np.array([ROLE_ID[r] for r, n in (("context", 30 + visual), ("compression", 32), ("dialogue", 300)) for _ in range(n)])
        work = shape.work(tokens, seen_pairs(roles, COMA.stages[0].visibility), 180, [grid])
        told = [round(x / 1e12, n) for x, n in ((work.vision, 2), (work.text, 2), (work.attention, 3), (work.head, 2))]
        assert told == [seen, forward, pairs, 0.11]
    full = Shape.of(config_of("Qwen/Qwen2.5-VL-3B-Instruct"))
    assert shape.picture((1, 33, 32)) > shape.picture((1, 32, 32)) and full.window == 8 and full.full_layers == 4
    lean = Trains(rank=16, targets=TARGETS[:4]).flops(shape.work(874, 219_000, 180, [(1, 32, 64)], Trains(rank=16, targets=TARGETS[:4])))
    assert lean / 1e12 == pytest.approx(13.07, rel=0.02), "stage 1 lean"


@pytest.mark.parametrize("table", [("c..", "cc.", ".cc"), ("ff.", "fff", ".ff"), ("f..", "ff.", ".ff"), ("c..", "cc.", "ccc")])
def test_pairs_are_those_of_the_dense_mask(table: tuple[str, ...]) -> None:
    visibility = Visibility(("context", "compression", "dialogue"), table)
    roles = np.array([0] * 5 + [1] * 3 + [2] * 4 + [1] + [2] * 2)
    roles = np.array([ROLE_ID[visibility.roles[r]] for r in roles])
    mask = dense(torch.from_numpy(roles)[None], torch.zeros(1, len(roles), dtype=torch.long), visibility)
    assert seen_pairs(roles, visibility) == int(mask.sum())
    assert seen_pairs(np.append(roles, [-1, -1]), visibility) == int(mask.sum()), "padding is no work"


def test_work_adds_up_and_repeated_passes_are_told_apart() -> None:
    work = Work(text=10, attention=2, head=1, vision=5, adapter=1)
    assert (work + work).forward == 2 * work.forward == 38
    assert Trains().flops(work) == 2 * 11 + 3 * 3 + 5
    assert Trains(full=True, vision=True).flops(work) == 3 * work.forward
    assert Trains().flops(work, again=1) - Trains().flops(work) == 13


def test_matmul_rate_is_a_rate() -> None:
    assert 1e6 < matmul_rate("cpu", torch.float32, size=64, seconds=0.01) < 1e14
