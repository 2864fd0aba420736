"""Kills a nano run fifty times, on one and on two processes, and compares what comes out with a run that was left alone.

SIGKILL comes at random moments, every second one inside the writing of a checkpoint or of a model. The same command is started again each
time; a run that got to its end is compared to the bit, weights of every stage and lines of metrics, and another one is begun until there
were enough kills. LoRA dropout is on. Writes benchmarks/results/kills.json.

    python benchmarks/kills.py [--kills 50] [--ranks 1 2] [--reach 0.25] [--seed 0] [--model comatch-nano] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "results" / "kills.json"
TIMING = {"seconds", "items_per_second", "tokens_per_second", "tflops", "mfu", "imbalance", "data_wait", "peak_memory_mib"}
RUN = """
name: kills
model: {model}
recipe: coma
tokens: 8
precision: fp32
device: cpu
save_every: 3
adapter: {{kind: lora, r: 8, dropout: 0.1}}
stages:
  compress: {{steps: 40, batch: 8, tokens_per_pass: 1024, optim: {{lr: 0.001}}, log_every: 4}}
  match: {{steps: 40, batch: 16, tokens_per_pass: 1024, loss: {{temperature: 0.05, symmetric: true}}, optim: {{lr: 0.001}}, log_every: 4}}
"""


def start(file: Path, folder: Path, ranks: int, log: Path) -> list[subprocess.Popen[bytes]]:
    """`comatch train` as one process, or as the several that torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "comatch", "train", str(file), f"output={folder}", "--quiet"]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {"OMP_NUM_THREADS": "1", **os.environ, **(place if ranks > 1 else {})}
        with open(log, "ab") as stream:
            processes.append(subprocess.Popen(command, env=environment, stdout=stream, stderr=stream))
    return processes


def ended(processes: list[subprocess.Popen[bytes]]) -> bool:
    """Whether all processes are gone."""
    return all(process.poll() is not None for process in processes)


def unfinished(folder: Path) -> bool:
    """Whether something is being written."""
    return any(folder.glob(".unfinished-*")) or any((folder / "checkpoints").glob(".unfinished-*"))


def complete(folder: Path) -> bool:
    """Whether a run says that it is at its end."""
    manifest = folder / "manifest.json"
    return manifest.is_file() and json.loads(manifest.read_text())["status"] == "complete"


def kill(processes: list[subprocess.Popen[bytes]], folder: Path, after: float, inside: bool) -> bool:
    """SIGKILL all processes so many seconds from now, or at the next write from then on; False where they ended before that."""
    until = time.monotonic() + after
    while not ended(processes):
        if time.monotonic() > until and (not inside or unfinished(folder)):
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
            return True
        time.sleep(0.0005)
    return False


def result(folder: Path) -> dict[str, Any]:
    """What must be equal: a hash of every file of weights, and the metrics without what a clock decides."""
    files = sorted(path for path in folder.rglob("*.safetensors"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "metrics": [{name: value for name, value in row.items() if name not in TIMING} for row in rows],
    }


def finish(processes: list[subprocess.Popen[bytes]], log: Path) -> None:
    """Wait for a good end of all processes."""
    codes = [process.wait() for process in processes]
    assert codes == [0] * len(codes), f"ended with {codes}:\n{log.read_text()[-4000:]}"


def measure(ranks: int, kills: int, reach: float, dice: random.Random, file: Path, root: Path) -> dict[str, Any]:
    """Kill runs on so many processes so many times, each within this share of a whole run."""
    log, whole, began = root / f"log{ranks}", root / f"whole{ranks}", time.monotonic()
    processes = start(file, whole, ranks, log)
    while not (whole / "metrics.jsonl").exists() and not ended(processes):
        time.sleep(0.01)
    warm = time.monotonic() - began
    finish(processes, log)
    spent = time.monotonic() - began
    wanted, again = result(whole), root / f"again{ranks}"
    finish(start(file, again, ranks, log), log)
    assert result(again) == wanted, "two runs that nobody disturbs differ already"
    print(f"{ranks} processes: first line of metrics after {warm:.1f} s, whole run {spent:.1f} s", flush=True)
    done, cut, runs, resumed = 0, 0, 0, list[tuple[str, int]]()
    while done < kills or runs == 0:
        runs += 1
        folder = root / f"run{ranks}-{runs}"
        while True:
            processes = start(file, folder, ranks, log)
            inside, after = done % 2 == 1, dice.uniform(0.8 * warm, warm + reach * (spent - warm))
            if done == kills or not kill(processes, folder, after, inside):
                finish(processes, log)
                break
            done += 1
            cut += unfinished(folder)
            if complete(folder):  # the kill came after the last write, before the process was gone
                break
            print(f"  kill {done:3} of {kills} after {after:5.1f} s{', inside a write' if unfinished(folder) else ''}", flush=True)
        found, manifest = result(folder), json.loads((folder / "manifest.json").read_text())
        assert not any(row["changes"] for row in manifest["resumed"]), f"something was changed while this ran: {manifest['resumed']}"
        other = [name for name, known in wanted["weights"].items() if found["weights"].get(name) != known]
        other += [f"metrics line {i}" for i, row in enumerate(wanted["metrics"]) if row not in found["metrics"]]
        assert found == wanted, f"run {runs} differs in {other}; it went on {manifest['resumed']}"
        resumed += [(row["stage"], row["step"]) for row in manifest["resumed"]]
        print(f"  run {runs} is equal to the bit; it went on {len(manifest['resumed'])} times", flush=True)
    return {
        "processes": ranks, "kills": done, "inside_a_write": cut, "runs": runs, "equal_to_the_bit": runs,
        "went_on_from": sorted(set(resumed)), "files_of_weights": len(wanted["weights"]), "lines_of_metrics": len(wanted["metrics"]),
    }  # fmt: skip


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--reach", type=float, default=0.25, help="how far a run may come before it is killed: a share of a whole one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="comatch-nano")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        file = root / "run.yaml"
        file.write_text(RUN.format(model=options.model))
        dice = [random.Random(f"{options.seed}:{ranks}") for ranks in options.ranks]
        found = [measure(ranks, options.kills, options.reach, d, file, root) for ranks, d in zip(options.ranks, dice, strict=True)]
    packages = {name: version(name) for name in ("comatch", "torch", "transformers", "accelerate")}
    record = {"model": options.model, "seed": options.seed, "reach": options.reach, "packages": packages, "results": found}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    kills, runs = (sum(row[name] for row in found) for name in ("kills", "runs"))
    print(f"{options.out} written: {kills} kills, {runs} runs, all equal to the bit")


if __name__ == "__main__":
    main()
