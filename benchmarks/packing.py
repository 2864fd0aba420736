"""How full packed passes are and how equal the work of ranks is, on an invented mixture like MMEB's. No model; seconds.

    python benchmarks/packing.py [--seeds 20] [--out benchmarks/results/packing.json] [--quick]

Mixture (specs/performance.md section 4; MMEB's own lengths were not measured): 55 % pictures of 256 to 1,024 visual tokens, 45 % short
texts, each with 32 compression tokens and some words. Fill is tokens over the room of all passes:

    greedy    in order of arrival; the peer that costs nothing
    training  what `training.passes.plan_passes` does, pictures and texts apart
    best fit  largest first into the fullest pass that has room
    padded    chunks of 8 in order of arrival, each as wide as its longest: the reference-style path

`slots` are places that are computed for each token, a row being rounded up to a multiple. Imbalance is the work of the slowest of 8 ranks
over the mean, by the FLOP of Qwen2.5-VL-3B: `deal` against ranks that take every eighth item of a shuffled batch. No figure is given
unless every plan holds every item once and no pass more than its room.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, machine, write

from comatch.backbones.shapes import config_of
from comatch.core.flops import Shape
from comatch.core.packing import UNLIMITED, Plan, Size, best_fit, deal, greedy, imbalance, width
from comatch.training.passes import _split

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
COMPRESSION = 32
RANKS = 8
PADDED = 8
MULTIPLE = 128
BUDGETS = (4096, 8192, 16384)
ITEMS = (1024, 8192)
BATCHES = (128, 256, 1024)


def mixture(n: int, seed: int) -> list[Size]:
    """Items in order of arrival."""
    dice = np.random.default_rng(seed)
    visual = np.where(dice.random(n) < 0.55, dice.integers(256, 1025, n), 0)
    words = COMPRESSION + dice.integers(8, 98, n)
    return [Size(int(v + w), int(4 * v)) for v, w in zip(visual, words, strict=True)]


@dataclass(frozen=True)
class Planned:
    """As much of an Example as a planner looks at."""

    size: Size

    def __len__(self) -> int:
        return self.size.tokens

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """One picture of so many patches."""
        return ((1, 1, self.size.patches),) if self.size.patches else ()


def training(sizes: Sequence[Size], room: Size) -> Plan:
    """What a training step does: pictures and texts apart."""
    examples: list[Any] = [Planned(size) for size in sizes]
    groups: list[list[int]] = []
    for seen in (True, False):
        groups += _split([i for i, size in enumerate(sizes) if bool(size.patches) is seen], examples, room.tokens, None)
    return Plan(groups, sum(size.tokens for size in sizes) / (len(groups) * room.tokens))


PLANS: dict[str, Callable[[Sequence[Size], Size], Plan]] = {"greedy": greedy, "training": training, "best fit": best_fit}


def checked(plan: Plan, sizes: Sequence[Size], room: Size) -> None:
    """Stop where a plan loses an item, has one twice, or overfills a pass."""
    once = sorted(chain.from_iterable(plan.groups)) == list(range(len(sizes)))
    fits = all(len(group) == 1 or sum(sizes[i].tokens for i in group) <= room.tokens for group in plan.groups)
    if not (once and fits):
        raise SystemExit("a plan lost an item or overfilled a pass; no figure")


def fill(n: int, budget: int, seeds: int) -> dict[str, Any]:
    """Fill, slots a token and seconds of every way to plan, one for each seed."""
    room = Size(budget, UNLIMITED)
    found: dict[str, dict[str, list[float]]] = {name: {"fill": [], "slots": [], "microseconds_an_item": []} for name in PLANS}
    least, padded = [], []
    for seed in range(seeds):
        sizes = mixture(n, seed)
        tokens = sum(size.tokens for size in sizes)
        least.append(tokens / (-(-tokens // budget) * budget))
        rows = [sizes[i : i + PADDED] for i in range(0, n, PADDED)]
        padded.append(sum(len(row) * max(size.tokens for size in row) for row in rows) / tokens)
        for name, how in PLANS.items():
            began = time.perf_counter()
            plan = how(sizes, room)
            took = time.perf_counter() - began
            checked(plan, sizes, room)
            rounded = sum(width(sum(sizes[i].tokens for i in group), MULTIPLE) for group in plan.groups)
            found[name]["fill"].append(plan.fill)
            found[name]["slots"].append(rounded / tokens)
            found[name]["microseconds_an_item"].append(1e6 * took / n)
    ways = {name: {what: spread(values) for what, values in row.items()} for name, row in found.items()}
    return {"items": n, "budget": budget, "best_possible_fill": spread(least), "padded_slots": spread(padded), "ways": ways}


def balance(batch: int, seeds: int) -> dict[str, Any]:
    """Work of the slowest rank over the mean, dealt by FLOP and at random, one for each seed."""
    shape, dealt, plain = Shape.of(config_of(MODEL)), [], []
    for seed in range(seeds):
        sizes = mixture(batch, seed)
        costs = [shape.work(t, t * (t + 1) / 2, grids=[(1, 2, p // 2)] if p else []).forward for t, p in sizes]
        hands = deal(costs, RANKS)
        if sorted(chain.from_iterable(hands)) != list(range(batch)) or len({len(hand) for hand in hands}) > 1:
            raise SystemExit("the deal lost an item, or hands differ in size; no figure")
        dealt.append(imbalance(costs, hands))
        plain.append(imbalance(costs, [list(range(rank, batch, RANKS)) for rank in range(RANKS)]))
    return {"batch": batch, "ranks": RANKS, "deal": spread(dealt), "random": spread(plain)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """The middle and both ends."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def main() -> None:
    """Measure and tell it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="mixtures drawn")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/packing.json; none with --quick)")
    parser.add_argument("--quick", action="store_true", help="2 mixtures of 256 items: proves that it works")
    asked = parser.parse_args()
    items, batches, seeds = ((256,), (128,), 2) if asked.quick else (ITEMS, BATCHES, asked.seeds)
    lengths = [size.tokens for size in mixture(100_000, 0)]
    quantiles = {name: float(np.quantile(lengths, q)) for name, q in (("p5", 0.05), ("median", 0.5), ("p95", 0.95))}
    record: dict[str, Any] = {"machine": machine(), "seeds": seeds, "mixture": quantiles, "every_item_once": True}
    record["fill"] = [fill(n, budget, seeds) for n in items for budget in BUDGETS]
    record["balance"] = [balance(batch, seeds) for batch in batches]
    print("tokens of an item: " + ", ".join(f"{name} {value:.0f}" for name, value in quantiles.items()))
    for row in record["fill"]:
        told = ", ".join(f"{name} {way['fill']['median']:.1%} ({way['slots']['median']:.3f} slots)" for name, way in row["ways"].items())
        print(f"{row['items']} items in passes of {row['budget']}: {told}; at best {row['best_possible_fill']['median']:.1%};", end=" ")
        print(f"padded {row['padded_slots']['median']:.2f} slots")
    for row in record["balance"]:
        print(f"batch {row['batch']}, {RANKS} ranks: deal {row['deal']['median']:.4f} ({row['deal']['high']:.4f} at worst),", end=" ")
        print(f"random {row['random']['median']:.3f} ({row['random']['high']:.3f})")
    write(record, asked.out or (None if asked.quick else RESULTS / "packing.json"))


if __name__ == "__main__":
    main()
