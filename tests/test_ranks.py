"""Two processes train what one trains: equal losses, equal vectors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from comatch.encoder import Encoder
from comatch.training.loop import read_metrics

RUN = """
name: ranks
model: {model}
recipe: coma
tokens: 4
precision: fp32
device: cpu
output: {out}
adapter: {{kind: lora, r: 4}}
stages:
  compress: {{steps: 3, batch: 4, tokens_per_pass: 300, optim: {{lr: 0.01}}, log_every: 1}}
  match: {{steps: 3, batch: 6, tokens_per_pass: 300, temperature: 0.2, symmetric: true, optim: {{lr: 0.01}}, log_every: 1}}
"""


def test_two_ranks_are_one(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folders = {}
    for ranks in (1, 2):
        out, file = tmp_path / f"run{ranks}", tmp_path / f"run{ranks}.yaml"
        file.write_text(RUN.format(model=folder_of("qwen2_5_vl"), out=out))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launch, "-m", "comatch", "train", str(file), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        folders[ranks] = out
    one, two = (read_metrics(folder / "metrics.jsonl") for folder in folders.values())
    assert len(one) == len(two) == 6
    np.testing.assert_allclose([r["loss"] for r in one], [r["loss"] for r in two], rtol=1e-4)
    assert one[0]["loss"] != one[1]["loss"]
    items = ["a red circle", "two stars"]
    a, b = (Encoder.load(folder).encode(items) for folder in folders.values())
    np.testing.assert_allclose(a, b, atol=1e-3)
    assert np.abs(a[0] - a[1]).max() > 1e-2
