"""Takes the base that `comatch train runs/nano-base.yaml` made into the package, with its provenance and its measured answers.

    comatch train runs/nano-base.yaml
    python benchmarks/nano_answers.py --model out/nano-base/rehearse
    python benchmarks/ship_nano.py out/nano-base

A run may also have been made in parts, each from the last stage of the one before; name their folders in order. Where the first part
started from the shipped weights, the parts that made those are kept.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "comatch" / "models" / "comatch-nano"
LIMIT = 8 * 2**20


def main() -> None:
    """Copy the files of the last stage and write provenance.json beside them."""
    runs = [Path(name) for name in sys.argv[1:]]
    records = [json.loads((run / "manifest.json").read_text()) for run in runs]
    for run, record in zip(runs, records, strict=True):
        if record["status"] != "complete":
            raise SystemExit(f"{run} is not complete (status {record['status']}); finish the run first")
    began = yaml.safe_load((runs[0] / "config.yaml").read_text())["model"]
    earlier = json.loads((TARGET / "provenance.json").read_text())["parts"] if began == TARGET.name else []
    answers = json.loads((ROOT / "benchmarks" / "results" / "nano_answers.json").read_text())
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(runs[-1] / records[-1]["done"][-1], TARGET)
    weights = TARGET / "model.safetensors"
    weights.chmod(0o644)
    if weights.stat().st_size > LIMIT:
        raise SystemExit(f"{weights} has {weights.stat().st_size} bytes; at most {LIMIT} ship with the package")
    provenance = {
        "what": "a Qwen2.5-VL of nano size, trained from scratch on generated scenes (comatch.data.scenes)",
        "made_by": "comatch train runs/nano-base.yaml",
        "config": (ROOT / "runs" / "nano-base.yaml").read_text(),
        "parts": [*earlier, *map(part, runs, records)],
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "held_out_answers": {key: answers[key] for key in ("split", "questions", "exact_match", "whole dense caption right")},
        "licence": "Apache-2.0",
    }
    (TARGET / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(f"{TARGET}: {weights.stat().st_size / 2**20:.1f} MiB of weights")


def part(run: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What one run did: when, with what, and the stages of its config."""
    stages = yaml.safe_load((run / "config.yaml").read_text())["stages"]
    brief = {name: {key: stage[key] for key in ("steps", "batch", "data", "optim")} for name, stage in stages.items()}
    told = ("started", "finished", "done", "seed", "software", "python", "packages")
    return {key: record[key] for key in told if key in record} | {"stages": brief}


if __name__ == "__main__":
    main()
