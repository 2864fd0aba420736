"""What do the options of matching do? Hard negatives, masking, homogeneous batches, Matryoshka lengths, nested vectors; paired seeds.

    python benchmarks/matching_options.py --world scenes|emoji [--emoji PATH] [--seeds 3] [--steps 200]

Every arm trains the `match` stage of `coma` (K = 32) from the shipped nano model with the same batch and steps, and differs from its
baseline in one setting. Runs that are in the output file are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from comatch.config import RunConfig
from comatch.encoder import Encoder
from comatch.evaluation.tasks import Task, emoji_tasks, scene_tasks
from comatch.training.loop import read_metrics, train

ROOT = Path(__file__).resolve().parent.parent
DIMS, VECTORS = (16, 32, 64), (1, 4, 16, 32)
PLAIN: dict[str, Any] = {"temperature": 0.05, "symmetric": True, "mask_duplicates": False}
# name -> (the arm it is compared with, what its loss and its data add)
ARMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("", {}, {}),
    "hard negatives": ("plain", {}, {"negatives": 2}),
    "masking": ("plain", {"mask_duplicates": True, "mask_margin": 0.1}, {}),
    "Matryoshka": ("plain", {"dims": list(DIMS)}, {}),
    "nested vectors": ("plain", {"vectors": list(VECTORS)}, {}),
    "mixture, free": ("", {}, {"compose": "free"}),
    "mixture, homogeneous": ("mixture, free", {}, {"compose": "homogeneous"}),
}


def config(world: str, arm: str, seed: int, steps: int, folder: Path, emoji: str | None) -> RunConfig:
    """The run of one arm."""
    source: dict[str, Any] = {"source": world, "limit": 4000} if world == "scenes" else {"source": world, "path": emoji}
    _, loss, data = ARMS[arm]
    if "compose" in data:
        second = "questions" if world == "scenes" else "groups"
        data = {**data, "mixture": {"a": {**source, "weight": 1.0}, "b": {**source, "weight": 1.0, "subset": second}}}
    else:
        data = {**source, **data}
    stage = {
        "steps": steps,
        "batch": 64,
        "tokens_per_pass": 16384,
        "loss": {**PLAIN, **loss},
        "data": data,
        "optim": {"lr": 0.0005 if world == "scenes" else 0.0015, "betas": [0.9, 0.98]},
    }
    name = f"{world}-{seed}"
    whole = {"name": name, "model": "comatch-nano", "recipe": "coma", "tokens": 32, "seed": seed, "output": str(folder), "save_every": None}
    return RunConfig.model_validate({**whole, "adapter": {"kind": "full", "train_vision": world == "emoji"}, "stages": {"match": stage}})


def score(encoder: Encoder, tasks: list[Task], dim: int | None, vectors: int) -> dict[str, list[int]]:
    """Places of the queries whose best candidate is right, per task; a tie is not right."""
    places = {m: i for i, m in enumerate(dict.fromkeys(m for task in tasks for m in (*task.queries, *task.pool)))}
    table = encoder.encode(list(places), dim=dim, vectors=vectors)
    out = {}
    for task in tasks:
        scores = encoder.similarity(table[[places[m] for m in task.queries]], table[[places[m] for m in task.pool]])
        right = []
        for i, (candidates, gold) in enumerate(zip(task.candidates, task.gold, strict=True)):
            row = scores[i, list(candidates)]
            best = np.flatnonzero(row >= row.max() - 1e-6)
            right += [i] if set(best.tolist()) <= set(gold) else []
        out[task.name] = right
    return out


def run(world: str, arm: str, seed: int, steps: int, emoji: str | None, n: int, candidates: int) -> dict[str, Any]:
    """Train and evaluate one arm with one seed."""
    tasks = scene_tasks(n, candidates, seed=0) if world == "scenes" else emoji_tasks(str(emoji))
    tasks = [t for t in tasks if t.meta in ("retrieval", "vqa") or t.name == "emoji-group"]
    with TemporaryDirectory() as scratch:
        began = time.perf_counter()
        folder = train(config(world, arm, seed, steps, Path(scratch) / "run", emoji), quiet=True)
        trained = time.perf_counter() - began
        rows = read_metrics(folder / "metrics.jsonl")
        encoder = Encoder.load(folder)
        shutil.rmtree(folder)
    views: dict[str, tuple[int | None, int]] = {"full": (None, 1)}
    if arm in ("plain", "Matryoshka"):
        views |= {f"dim {d}": (d, 1) for d in DIMS}
    if arm in ("plain", "nested vectors"):
        views |= {f"{v} vectors": (None, v) for v in VECTORS[1:]}
    return {
        "arm": arm,
        "seed": seed,
        "seconds": round(trained, 1),
        "final_loss": round(float(np.mean([r["loss"] for r in rows[-5:]])), 4),
        "queries": {task.name: len(task.queries) for task in tasks},
        "right": {view: score(encoder, tasks, *how) for view, how in views.items()},
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and spread over seeds as Markdown, and the paired difference to the arm's baseline with its 95 % interval."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for r in runs:
        for view, tasks in r["right"].items():
            for task, right in tasks.items():
                found.setdefault((r["arm"], view, task), {})[r["seed"]] = 100 * len(right) / r["queries"][task]
    lines = ["| arm | vectors | task | hit@1 | its baseline | difference |", "|---|---|---|---|---|---|"]
    for (arm, view, task), by_seed in found.items():
        base = found.get((ARMS[arm][0], view, task), {})
        seeds = sorted(set(base) & set(by_seed))
        each = [by_seed[s] - base[s] for s in seeds]
        student = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(each))
        half = f" ± {student * np.std(each, ddof=1) / len(each) ** 0.5:.1f}" if student else ""
        told = f"{np.mean(each):+.1f}{half}" if each else "-"
        lines.append(f"| {arm} | {view} | {task} | {spread(by_seed)} | {spread(base)} | {told} |")
    return "\n".join(lines)


def spread(values: dict[int, float]) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "-"
    listed = list(values.values())
    return f"{np.mean(listed):.1f}" + (f" ± {np.std(listed, ddof=1):.1f}" if len(listed) > 1 else "")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", choices=("scenes", "emoji"), default="scenes")
    parser.add_argument("--emoji", help="path of emoji.parquet")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    out = args.out or ROOT / "benchmarks" / "results" / f"matching_options_{args.world}.json"
    settings = {"world": args.world, "steps": args.steps, "n": args.n, "candidates": args.candidates}
    record: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"settings": settings, "runs": []}
    if record["settings"] != settings:
        raise SystemExit(f"{out} was made with other settings: {record['settings']}; name another file with --out")
    done = {(r["arm"], r["seed"]) for r in record["runs"]}
    missing = [(arm, seed) for seed in range(args.seeds) for arm in ARMS if (arm, seed) not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        work = [pool.submit(run, args.world, a, s, args.steps, args.emoji, args.n, args.candidates) for a, s in missing]
        for future in as_completed(work):
            result = future.result()
            record["runs"].append(result)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(record, indent=1))
            print(result["arm"], result["seed"], f"{result['seconds']:.0f} s", result["final_loss"], flush=True)
    print("hit@1 in percent, mean ± standard deviation over seeds; difference: mean ± half of the 95 % interval over paired seeds\n")
    print(table(record["runs"]))


if __name__ == "__main__":
    main()
