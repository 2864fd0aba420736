"""Does compressing first help? Contrastive only against CoMa and against the same dialogues without the bottleneck, paired seeds.

    python benchmarks/effect.py --seeds 3 --out benchmarks/results/effect.json [--emoji PATH]

Every arm starts from the shipped nano model and sees the same pairs in the same order for the same number of contrastive steps. A run
that is in the output file already is not run again, so the study can be stopped and continued.
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

from comatch.config import RunConfig, load_config
from comatch.encoder import Encoder
from comatch.evaluation.metrics import paired_difference
from comatch.evaluation.tasks import emoji_tasks, evaluate, scene_tasks
from comatch.training.loop import read_metrics, train

ROOT = Path(__file__).resolve().parent.parent
ARMS = ("matching", "coma-released", "coma")


def arm_config(world: str, arm: str, seed: int, folder: Path, overrides: list[str]) -> RunConfig:
    """The run of one arm: the world's CoMa file, under another recipe, without the stages that recipe lacks."""
    config = load_config(ROOT / "runs" / ("coma-nano.yaml" if world == "scenes" else "emoji-coma.yaml"), overrides)
    values = config.model_dump(exclude_unset=True) | {"recipe": arm, "seed": seed, "output": str(folder), "name": f"{arm}-{seed}"}
    if arm == "matching":
        values["stages"] = {"match": values["stages"]["match"]}
    return RunConfig.model_validate(values)


def run(world: str, arm: str, seed: int, overrides: list[str], emoji: str | None, n: int, candidates: int) -> dict[str, Any]:
    """Train and evaluate one arm with one seed."""
    with TemporaryDirectory() as scratch:
        began = time.perf_counter()
        folder = train(arm_config(world, arm, seed, Path(scratch) / "run", overrides), quiet=True)
        trained = time.perf_counter() - began
        rows = read_metrics(folder / "metrics.jsonl")
        tasks = scene_tasks(n, candidates, seed=0) if world == "scenes" else emoji_tasks(str(emoji))
        scores = evaluate(Encoder.load(folder), tasks)
        shutil.rmtree(folder)
    last = {stage: [r["loss"] for r in rows if r["stage"] == stage][-5:] for stage in ("compress", "match")}
    return {
        "world": world,
        "arm": arm,
        "seed": seed,
        "seconds": round(trained, 1),
        "final_loss": {stage: round(float(np.mean(values)), 4) for stage, values in last.items() if values},
        "scores": {
            s.name: {"hit": s.hit, "chance": s.chance, "mrr": s.mrr, "n": s.n, "ties": s.ties, "hits": np.flatnonzero(s.hits).tolist()}
            for s in scores
        },
    }


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread per arm and task, and CoMa's paired difference to each other arm."""
    out = []
    for world in sorted({r["world"] for r in runs}):
        mine = [r for r in runs if r["world"] == world]
        for task in mine[0]["scores"]:
            hits = {arm: {r["seed"]: r["scores"][task] for r in mine if r["arm"] == arm} for arm in ARMS}
            row: dict[str, Any] = {"world": world, "task": task, "chance": mine[0]["scores"][task]["chance"]}
            for arm, by_seed in hits.items():
                values = [s["hit"] for s in by_seed.values()]
                row[arm] = (
                    {
                        "mean": float(np.mean(values)),
                        "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                        "seeds": len(values),
                    }
                    if values
                    else None
                )
            for other in ARMS[:2]:
                seeds = sorted(set(hits["coma"]) & set(hits[other]))
                if seeds:
                    a, b = (np.concatenate([dense(hits[arm][s]) for s in seeds]) for arm in (other, "coma"))
                    d = paired_difference(a, b)
                    each = [hits["coma"][s]["hit"] - hits[other][s]["hit"] for s in seeds]
                    row[f"coma - {other}"] = {
                        "mean": d.mean,
                        "over_queries": {"low": d.low, "high": d.high, "p": d.p},
                        "per_seed": each,
                        "over_seeds": half_width(each),
                    }
            out.append(row)
    return out


def half_width(values: list[float]) -> float | None:
    """Half of the 95 % interval of a mean by Student's t; None for a single value or more than ten."""
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}.get(len(values))
    return quantile * float(np.std(values, ddof=1)) / len(values) ** 0.5 if quantile else None


def dense(score: dict[str, Any]) -> np.ndarray:
    """0/1 of every query from the places of the right ones."""
    hits = np.zeros(score["n"])
    hits[score["hits"]] = 1
    return hits


def table(rows: list[dict[str, Any]]) -> str:
    """The summary as Markdown."""
    lines = [
        "| world | task | chance | " + " | ".join(ARMS) + " | coma - matching | coma - coma-released |",
        "|---|---|---|" + "---|" * (len(ARMS) + 2),
    ]
    for row in rows:
        cells = [f"{100 * row[arm]['mean']:.1f} ± {100 * (row[arm]['std'] or 0):.1f}" if row[arm] else "-" for arm in ARMS]
        for other in ARMS[:2]:
            d = row.get(f"coma - {other}")
            cells.append(f"{100 * d['mean']:+.1f} ± {100 * (d['over_seeds'] or 0):.1f}" if d else "-")
        lines.append(f"| {row['world']} | {row['task']} | {100 * row['chance']:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--world", choices=("scenes", "emoji"), default="scenes")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--emoji", help="path of emoji.parquet")
    parser.add_argument("--n", type=int, default=400)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "effect.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    overrides = args.overrides + ([f"data.path={args.emoji}"] if args.world == "emoji" else [])
    record: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {"runs": []}
    settings = {"overrides": args.overrides, "n": args.n, "candidates": args.candidates}
    if record.setdefault(f"settings {args.world}", settings) != settings:
        raise SystemExit(f"{args.out} was made with other settings: {record[f'settings {args.world}']}; name another file with --out")
    done = {(r["world"], r["arm"], r["seed"]) for r in record["runs"]}
    missing = [(arm, seed) for seed in range(args.seeds) for arm in args.arms if (args.world, arm, seed) not in done]
    # Two single-threaded runs side by side do more on two cores than one run with two threads.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (max(1, torch.get_num_threads() // args.jobs),)) as pool:
        work = [pool.submit(run, args.world, arm, seed, overrides, args.emoji, args.n, args.candidates) for arm, seed in missing]
        for future in as_completed(work):
            result = future.result()
            record["runs"].append(result)
            record["machine"] = {"torch": torch.__version__, "device": "cpu", "cores": torch.get_num_threads(), "jobs": args.jobs}
            record["summary"] = summary(record["runs"])
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1))
            hits = {t: round(s["hit"], 3) for t, s in result["scores"].items()}
            print(result["arm"], result["seed"], f"{result['seconds']:.0f} s", result["final_loss"], hits, flush=True)
    record["summary"] = summary(record["runs"])
    args.out.write_text(json.dumps(record, indent=1))
    print("mean ± standard deviation over seeds; differences: mean ± half of the 95 % interval over paired seeds\n")
    print(table(record["summary"]))


if __name__ == "__main__":
    main()
