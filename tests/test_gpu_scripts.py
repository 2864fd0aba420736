"""The scripts for a GPU run here at nano scale, with a stand-in for the kernel, so that none is spent on a typing error."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen

from comatch.backbones import attention

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu"
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))
Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Scripts by name; some are named like a script for the CPU, so they are not imported as modules."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"gpu_{name}", SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"gpu_{name}", module)
        spec.loader.exec_module(module)
        return module

    return load


def dry(module: ModuleType, out: Path, *parts: str) -> dict[str, Any]:
    """The record of a dry run, which is what was written, and has every part."""
    record: dict[str, Any] = module.main(["--dry", "--rounds", "1", "--out", str(out), *(["--parts", *parts] if parts else [])])
    assert json.loads(out.read_text()) == record
    assert record["measured"] is False, "a dry run is not to be taken for a measurement"
    assert record["left_out"] == {} and (not parts or list(record["parts"]) == list(parts))
    return record


def test_the_attention_script_checks_then_times(script: Script, tmp_path: Path) -> None:
    kernel, reason = varlen.varlen_attn, attention.why_no_kernel
    record = script("attention").main(["--dry", "--rounds", "1", "--out", str(tmp_path / "a.json")])
    assert json.loads((tmp_path / "a.json").read_text()) == record
    assert record["measured"] is False, "a dry run is not to be taken for a measurement"
    checks = record["right"].values()
    assert len(checks) == 5 and all(check["cosine"] > 0.9999 > 0.99 > check["cosine_without_mask"] for check in checks)
    assert record["tower"]["launches_per_layer"] == 1 and record["text"]["agree"]["cosine"] > 0.9999
    assert varlen.varlen_attn is kernel and attention.why_no_kernel is reason


def test_a_wrong_kernel_is_not_timed(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("attention")
    right = module.stand_in

    def not_causal(*args: torch.Tensor, **how: object) -> torch.Tensor:
        out: torch.Tensor = right(*args, **{**how, "window_size": (-1, -1)})
        return out

    monkeypatch.setattr(module, "stand_in", not_causal)
    monkeypatch.setattr(module, "timed", lambda *_: pytest.fail("timed"))
    with pytest.raises(SystemExit, match="causal, 4/2 heads of 16: the kernel and the formula differ"):
        module.main(["--dry"])


def test_ceilings(script: Script, tmp_path: Path) -> None:
    parts = dry(script("ceilings"), tmp_path / "c.json", "matmul", "copies")["parts"]
    assert parts["matmul"]["flop_per_second"]["median"] > 0 and parts["matmul"]["off"] < 0.01
    assert parts["copies"]["bytes_per_second"]["device"]["median"] > 0


def test_stage_1(script: Script, tmp_path: Path) -> None:
    part = dry(script("stage1"), tmp_path / "1.json", "dora")["parts"]["dora"]
    assert part["agreed"]["equal"] and part["agreed"]["cosine_to_float32"]["wrong"] < 0.9
    assert part["ratios"].keys() == {"memory", "reference"} and part["mfu"].keys() == part["examples_per_second"].keys()
    assert part["tokens"] < part["slots_of_reference"] and part["loader_over_memory"]["of_medians"] > 0


def test_stage_2_and_its_levers(script: Script, tmp_path: Path) -> None:
    parts = dry(script("stage2"), tmp_path / "2.json", "pairs", "levers")["parts"]
    assert parts["pairs"]["ratios"].keys() == {"memory", "reference", "reference, memory"}
    levers = parts["levers"]
    assert all(row["equal"] for row in levers["agreed"].values())
    assert len(levers["ratios"]) == 6 == len(levers["seconds"]) - 1


def test_a_step_that_is_wrong_gets_no_ratio(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours without the bottleneck is as fast as ours with it; but it is something else."""
    module = script("stage1")
    bench = module.Bench.on

    def leaking(self: Any, examples: Any, tokens: int) -> Any:
        stage, self.both.stage = self.both.stage, module.OPEN
        try:
            return bench(self, examples, tokens)
        finally:
            self.both.stage = stage

    monkeypatch.setattr(module.Bench, "on", leaking)
    part = dry(module, tmp_path / "1.json", "lora")["parts"]["lora"]
    assert not part["agreed"]["equal"] and "reference" in part["seconds"] and "reference" not in part["ratios"]


def test_memory(script: Script, tmp_path: Path) -> None:
    record = script("memory").main(["--dry", "--parts", "lora", "--out", str(tmp_path / "m.json")])
    part = record["parts"]["lora"]
    assert part["agreed"]["equal"] and [row["tokens"] for row in part["sizes"]] == sorted(row["tokens"] for row in part["sizes"])
    assert len(part["sizes"]) == 3 and all(line["bytes_a_token"] > 0 for line in part["fitted"].values())
    assert 0 < part["ratio"]["of_peaks"] < 1 and not part["ratio"]["extrapolated"]


def test_where_the_reference_does_not_fit_its_line_is_used(script: Script) -> None:
    compared = script("memory").compared
    row = {"tokens": 100, "peak_bytes": {"comatch": 50}}
    assert compared(row, {"bytes_a_token": 2.0, "fixed_bytes": 50.0}, True)["of_peaks"] == 0.2
    assert compared(row, None, True) is None and compared(row, {"bytes_a_token": 2.0, "fixed_bytes": 0.0}, False) is None


def test_encode(script: Script, tmp_path: Path) -> None:
    part = dry(script("encode"), tmp_path / "e.json", "mixed")["parts"]["mixed"]
    assert {"comatch", "stream", "memory", "padded"} <= part["ways"].keys() and part["loader_over_memory"] > 0
    assert "ratio" in part["ways"]["padded"] and part["ways"]["padded"]["min_cosine"] > 0.999


def test_a_part_that_fails_or_starts_too_late_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    large = importlib.import_module("large")
    asked = large.arguments("", "x", ["--dry", "--out", str(tmp_path / "x.json")])

    def fails() -> dict[str, Any]:
        raise torch.OutOfMemoryError("Tried to allocate 9.00 GiB")

    record = large.in_parts({"a": fails, "b": lambda: {"found": 1}}, asked)
    assert "9.00 GiB" in record["left_out"]["a"] and record["parts"]["b"]["found"] == 1
    asked.minutes = -1
    assert large.in_parts({"b": dict}, asked)["left_out"].keys() == {"b"}
    asked.parts = ["c"]
    with pytest.raises(SystemExit, match=r"\['c'\] are none of \['b'\]"):
        large.in_parts({"b": dict}, asked)


def test_a_way_without_memory_is_left_out_and_the_others_stay() -> None:
    large = importlib.import_module("large")

    def never() -> float:
        raise torch.OutOfMemoryError("Tried to allocate 9.00 GiB")

    seconds, out = large.in_turn({"a": lambda: 1.0, "b": never}, 3, lambda: None)
    assert seconds == {"a": [1.0] * 3} and "9.00 GiB" in out["b"]


def test_the_three_calls_are_under_ten_minutes_and_their_arguments_are_known(script: Script) -> None:
    text = (SCRIPTS / "all.sh").read_text()
    calls = re.findall(r"^\d\)\n(.*?);;", text, re.DOTALL | re.MULTILINE)
    assert len(calls) == 3
    seen = set()
    for call in calls:
        lines = [line.split() for line in re.findall(r"^    run (.*)$", call, re.MULTILINE)]
        assert sum(int(limit) for limit, *_ in lines) < 580
        for limit, name, out, *rest in lines:
            seen.add(name)
            assert out.startswith(f"gpu-{name}")
            if "--minutes" in rest:
                assert 60 * float(rest[rest.index("--minutes") + 1]) < int(limit)
            if "--parts" in rest:
                nothing = script(name).main(["--dry", "--minutes", "-1", *rest[rest.index("--parts") :]])
                assert nothing["left_out"].keys() == set(rest[rest.index("--parts") + 1 :])
    assert seen == set(NAMES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_it_says_so(script: Script, name: str) -> None:
    with pytest.raises(SystemExit, match="--dry"):
        script(name).main([])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would do, on a CPU: the 3B model's heads and windows, and next to nothing of its width, depth and vocabulary."""
    large = importlib.import_module("large")

    def config_of(name: str) -> Any:
        config = real(name)
        text, vision = config.text_config, config.vision_config
        for key, value in {"hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 4096}.items():
            setattr(text, key, value)
        text.num_attention_heads, text.num_key_value_heads, text.layer_types = 2, 1, text.layer_types[:2]
        for key, value in {"depth": 2, "hidden_size": 160, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 256}.items():
            setattr(vision, key, value)
        vision.fullatt_block_indexes = [1]
        return config

    real = large.config_of
    monkeypatch.setattr(large, "config_of", config_of)
    monkeypatch.setattr(large, "DEVICE", "cpu")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("stage1", "--parts lora checkpointing --examples 4 --steps 1 --tokens 1500 --workers 1"),
        ("stage2", "--parts pairs --pairs 4 --steps 1 --tokens 1500 --workers 1"),
        ("memory", "--parts dora --tokens 3200"),
        ("encode", "--parts mixed --items 6"),
    ],
)
def test_what_only_a_gpu_does_runs_at_a_small_shape(
    script: Script, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    """Random weights, photographs of 140 to 504 visual tokens, bf16, loader processes: all that --dry leaves out."""
    rounds = [] if name == "memory" else ["--rounds", "1"]
    module = script(name)
    monkeypatch.setattr(module, "matmul_rate", lambda *_: 1e9, raising=name != "memory")  # half a minute at the real size
    record = module.main([*given.split(), *rounds, "--out", str(tmp_path / "x.json")])
    assert record["left_out"] == {} and record["measured"], "at a small shape on a CPU; of a GPU it would be a measurement"
    for part in record["parts"].values():
        assert not part.get("left_out") or name == "encode", "where flash-attn is not"
        if name == "encode":
            assert part["pictures"] and part["tokens"] > 600 and part["ways"]["padded"]["min_cosine"] > 0.99
        elif "agreed" in part and "equal" in part["agreed"]:
            cosines = part["agreed"]["cosine_to_float32"]
            assert part["agreed"]["cosine"] > 0.99 and cosines["comatch"] > 0.99 > cosines["wrong"]
