"""Takes the base that `comatch train runs/nano-base.yaml` made into the package, with its provenance and its measured answers.

    comatch train runs/nano-base.yaml
    python benchmarks/nano_answers.py --model out/nano-base/answer
    python benchmarks/ship_nano.py out/nano-base
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "src" / "comatch" / "models" / "comatch-nano"
LIMIT = 8 * 2**20


def main() -> None:
    """Copy the files of the last stage and write provenance.json beside them."""
    run = Path(sys.argv[1])
    record = json.loads((run / "manifest.json").read_text())
    if record["status"] != "complete":
        raise SystemExit(f"{run} is not complete (status {record['status']}); finish the run first")
    answers = json.loads((ROOT / "benchmarks" / "results" / "nano_answers.json").read_text())
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(run / record["done"][-1], TARGET)
    weights = TARGET / "model.safetensors"
    weights.chmod(0o644)
    if weights.stat().st_size > LIMIT:
        raise SystemExit(f"{weights} has {weights.stat().st_size} bytes; at most {LIMIT} ship with the package")
    provenance = {
        "what": "a Qwen2.5-VL of nano size, trained from scratch on generated scenes (comatch.data.scenes)",
        "made_by": "comatch train runs/nano-base.yaml",
        "config": (run / "config.yaml").read_text(),
        "run": {key: record[key] for key in ("started", "finished", "done", "config_digest", "seed", "python", "packages")},
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "held_out_answers": {key: answers[key] for key in ("split", "questions", "exact_match", "whole dense caption right")},
        "licence": "Apache-2.0",
    }
    (TARGET / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")
    print(f"{TARGET}: {weights.stat().st_size / 2**20:.1f} MiB of weights")


if __name__ == "__main__":
    main()
