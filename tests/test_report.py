"""The page of figures says what the JSON files say: no more, and nothing that was not found equal."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import claims
import pytest
import report
from figures import Figure, Refused

Records = dict[str, dict[str, Any]]
MACHINE = {"device": "cpu", "processor": "Tin", "cores": 2, "threads": 1, "load_before": 0.25, "packages": {"torch": "2.13.0"}}
CLOSE = {"difference": 3e-7, "cosine": 1.0, "largest": 0.5}
AGREED = {"equal": True, "cosine": 0.99987, "cosine_to_float32": {"comatch": 0.99991, "reference": 0.99982, "wrong": 0.5}}


def ratio(value: float, spread: float = 1.05) -> dict[str, Any]:
    return {"of_medians": value, "low": value - 0.2, "high": value + 0.3, "own_spread": spread, "above_noise": value > spread}


def stage1(value: float) -> dict[str, Any]:
    row = {"examples": 32, "agreed": CLOSE, "examples_per_second": {"comatch": 12.6, "reference": 4.45}, "ratio": ratio(value)}
    peaks = {"comatch": 2**30, "reference": 5 * 2**30}
    return {
        "machine": MACHINE,
        "speed": {"dora": row},
        "memory": {"mixed": {"tokens": 16556, "agreed": CLOSE, "peak_bytes": peaks, "ratio": 0.2}},
    }


def gpu_stage1() -> dict[str, Any]:
    rates = {"comatch": 31.5, "memory": 32.5, "reference": 5.25}
    row = {"examples": 32, "agreed": AGREED, "examples_per_second": rates, "mfu": {"comatch": 0.47}, "matmul_flop_per_second": 780e12}
    row |= {"ratios": {"reference": ratio(6.0)}, "loader_over_memory": ratio(1.03, 1.0), "left_out": {}}
    left = {"lora": "out of memory in a pass of 8,192 tokens"}
    return {"measured": True, "machine": {"device": "Big GPU"}, "parts": {"dora": row}, "left_out": left}


RECORDS: Records = {
    "stage1.json": stage1(2.84),
    "packing.json": {
        "machine": MACHINE,
        "every_item_once": True,
        "fill": [
            {
                "items": 1024,
                "budget": 4096,
                "best_possible_fill": {"median": 0.997},
                "padded_slots": {"median": 2.2},
                "ways": {"best fit": {"fill": {"median": 0.955, "low": 0.95, "high": 0.96}, "slots": {"median": 1.001}}},
            }
        ],
        "balance": [{"batch": 128, "ranks": 8, "deal": {"median": 1.004, "low": 1.0, "high": 1.006}, "random": {"median": 1.27}}],
    },
    "gpu-stage1.json": gpu_stage1(),
    "effect.json": {"of": "another page"},
}


def put(folder: Path, records: Records) -> Path:
    for name, record in records.items():
        (folder / name).write_text(json.dumps(record))
    return folder


def page(folder: Path) -> str:
    return report.page(report.collect(folder), folder, [])


def row(text: str, title: str, place: str) -> str:
    """The claim's row of the first table."""
    return next(line for line in text.splitlines() if line.startswith(f"| {title} | {place} |"))


def test_the_figures_are_those_of_the_files(tmp_path: Path) -> None:
    text = page(put(tmp_path, RECORDS))
    told = "| dora, 32 examples of mixed length | 2.84x (2.64x to 3.14x) | 12.6 examples/s | 4.45 examples/s |"
    assert f"{told} gradients within 3e-07 of the largest |" in text.splitlines()
    assert "| mixed, 16,556 tokens in one pass | 0.20x | 1.00 GiB | 5.00 GiB |" in text
    assert "From `benchmarks/results/stage1.json`: Tin, 1 of 2 cores, load 0.2 before, torch 2.13.0." in text
    assert row(text, claims.STAGE1, "CPU").endswith("| at least 2.00x | 2.84x | reached |")
    gpu = "| dora, 32 examples, against reference | 6.00x (5.80x to 6.30x) | 31.5 examples/s | 5.25 examples/s | gradients: cosine 0.99987;"
    assert gpu in text and "| dora | 47.0% | 367 TFLOP/s useful | 780 TFLOP/s matmul |" in text


def test_another_figure_makes_another_page(tmp_path: Path) -> None:
    before = page(put(tmp_path, RECORDS))
    assert page(put(tmp_path, {"stage1.json": stage1(2.85)})) != before == page(put(tmp_path, RECORDS))


def test_a_miss_says_by_how_much_and_what_the_profile_shows(tmp_path: Path) -> None:
    text = page(put(tmp_path, RECORDS))
    fill = "packing: share of the passes' room that is filled"
    assert row(text, fill, "CPU").endswith("| at least 97.0% | 95.5% | **missed by 1.5%**: 95.5% of 97.0% |")
    assert "What the profile shows: nobody has looked yet." in text
    put(tmp_path, {"notes.json": {"fill CPU": "the last pass is half empty", "stage1 CPU": "not missed, so not told"}})
    noted = page(tmp_path)
    assert "What the profile shows: the last pass is half empty." in noted and "so not told" not in noted
    with pytest.raises(Refused, match="no claims"):
        page(put(tmp_path, {"notes.json": {"fill TPU": "?"}}))


def test_what_is_missing_is_not_measured(tmp_path: Path) -> None:
    text = page(put(tmp_path, RECORDS))
    assert row(text, claims.STAGE2, "CPU").endswith("|  | not measured (no stage2.json) |")
    assert row(text, claims.STAGE2, "GPU").endswith("|  | not measured (no GPU was lent) |")
    (tmp_path / "none").mkdir()
    nothing = page(tmp_path / "none")
    assert nothing.count("not measured (") == len(claims.CLAIMS) + sum(claim.target is not None for claim in claims.CLAIMS)


def test_a_part_that_was_left_out_is_told(tmp_path: Path) -> None:
    text = page(put(tmp_path, RECORDS))
    assert "| lora | none: out of memory in a pass of 8,192 tokens |" in text
    assert row(text, claims.STAGE1, "GPU").endswith("| 6.00x | 1 of 2 reached; 1 of 2 not measured, see below |")
    assert "**missed by 6.0%**: 47.0% of 50.0%" in row(text, "stage 1: share of the measured matmul rate", "GPU")


def test_a_ratio_within_noise_is_not_printed(tmp_path: Path) -> None:
    noisy = stage1(2.84)
    noisy["speed"]["dora"]["ratio"] = ratio(2.84, spread=3.0)
    text = page(put(tmp_path, {"stage1.json": noisy}))
    assert "2.84x" not in text and "within noise: our own rounds differ by 3.00x" in text
    assert row(text, claims.STAGE1, "CPU").endswith("|  | 1 of 1 within noise, which shows nothing |")


@pytest.mark.parametrize(
    ("name", "path", "value", "told"),
    [
        ("stage1.json", ("speed", "dora", "agreed"), None, "not equal"),
        ("stage1.json", ("speed", "dora", "agreed", "difference"), 0.5, "not equal"),
        ("stage1.json", ("speed", "dora", "agreed", "difference"), float("nan"), "not equal"),
        ("stage1.json", ("memory", "mixed", "agreed"), {}, "not equal"),
        ("packing.json", ("every_item_once",), False, "every item"),
        ("gpu-stage1.json", ("parts", "dora", "agreed", "equal"), False, "not found equal"),
        ("gpu-stage1.json", ("measured",), False, "dry or quick"),
        ("stage1.json", ("quick",), True, "dry or quick"),
        ("stage1.json", ("speed", "dora", "ratio"), {}, "lacks 'above_noise'"),
    ],
)
def test_a_ratio_without_equality_is_refused(tmp_path: Path, name: str, path: tuple[str, ...], value: object, told: str) -> None:
    records = copy.deepcopy(RECORDS)
    place = records[name]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(Refused, match=told) as refused:
        page(put(tmp_path, records))
    assert name in str(refused.value)


def test_a_file_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"\['speed_of_light.json'\], which no claim reads"):
        page(put(tmp_path, {**RECORDS, "speed_of_light.json": {}}))


def test_the_worst_figure_decides() -> None:
    claim = next(claim for claim in claims.CLAIMS if claim.key == "memory" and claim.place == "CPU")
    values = [Figure("a", 0.2), Figure("b", 0.6), Figure("c", 0.9, counted=False)]
    assert report.verdict(claim, values) == "**missed by 20.0%**: 0.60x of 0.50x" and report.verdict(claim, values[:1]) == "reached"


def test_plots_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    report.main(["--results", str(put(tmp_path, RECORDS)), "--out", str(tmp_path / "docs" / "page.md")])
    drawn = sorted(path.name for path in (tmp_path / "docs" / "performance").iterdir())
    assert drawn == ["memory.png", "packing.png", "speed.png"]
    text = (tmp_path / "docs" / "page.md").read_text()
    assert all(f"![{name.removesuffix('.png')}](performance/{name})" in text for name in drawn)
    for name in RECORDS:
        (tmp_path / name).unlink()
    report.main(["--results", str(tmp_path), "--out", str(tmp_path / "docs" / "page.md")])
    assert not list((tmp_path / "docs" / "performance").iterdir())


def test_the_committed_page_is_that_of_the_committed_files() -> None:
    found = report.collect(report.RESULTS)
    plots = [name for name in ("speed", "memory", "packing") if (report.PAGE.parent / "performance" / f"{name}.png").is_file()]
    assert report.PAGE.read_text(encoding="utf-8") == report.page(found, report.RESULTS, plots), "run: python benchmarks/report.py"
