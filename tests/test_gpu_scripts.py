"""The scripts for a GPU run here at nano scale, with a stand-in for the kernel, so that none is spent on a typing error."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn.attention import varlen

from comatch.backbones import attention

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_attention", SCRIPTS / "attention.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_attention", module)
    spec.loader.exec_module(module)
    return module


def test_the_attention_script_checks_then_times(script: ModuleType, tmp_path: Path) -> None:
    kernel, reason = varlen.varlen_attn, attention.why_no_kernel
    record = script.main(["--dry", "--rounds", "1", "--out", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text()) == record
    assert record["measured"] is False, "a dry run is not to be taken for a measurement"
    checks = record["right"].values()
    assert len(checks) == 5 and all(check["cosine"] > 0.9999 > 0.99 > check["cosine_without_mask"] for check in checks)
    assert record["tower"]["launches_per_layer"] == 1 and record["text"]["agree"]["cosine"] > 0.9999
    assert varlen.varlen_attn is kernel and attention.why_no_kernel is reason


def test_a_wrong_kernel_is_not_timed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    right = script.stand_in

    def not_causal(*args: torch.Tensor, **how: object) -> torch.Tensor:
        out: torch.Tensor = right(*args, **{**how, "window_size": (-1, -1)})
        return out

    monkeypatch.setattr(script, "stand_in", not_causal)
    monkeypatch.setattr(script, "timed", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="causal, 4/2 heads of 16: the kernel and the formula differ"):
        script.main(["--dry"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--dry"):
        script.main([])
