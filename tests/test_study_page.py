"""The page of studies says what their results say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import study
from conftest import EMOJI

from comatch.config import load_config
from comatch.studies.plan import read_study
from comatch.studies.runner import results
from comatch.training.origin import deciding

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_that_of_the_results() -> None:
    assert study.studies() and study.page() == (ROOT / "docs" / "study.md").read_text(), "run python benchmarks/study.py"


def test_every_figure_on_the_page_is_there() -> None:
    shown = re.findall(r"\]\((study/[^)]+\.png)\)", study.PAGE.read_text())
    assert {Path(name).stem.rpartition("-")[0] for name in shown} == set(study.studies())
    assert all((ROOT / "docs" / name).stat().st_size > 5000 for name in shown)


@pytest.mark.parametrize("name", study.studies())
def test_the_results_are_those_of_the_files_and_go_on_from_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "emoji":
        if not EMOJI.is_file():
            pytest.skip("../shared/data/emoji is not beside this checkout")
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / EMOJI.name).symlink_to(EMOJI)
        monkeypatch.chdir(tmp_path)
    found = study.load(name)
    (tmp_path / "results.json").write_text(json.dumps(found))
    read = results(read_study(ROOT / "runs" / "study" / f"{name}.yaml", tmp_path), tmp_path)
    assert read["runs"] == found["runs"] and set(read["arms"]) == set(found["arms"])


def test_the_run_that_is_named_best_is_the_one_that_was_studied(tmp_path: Path) -> None:
    arms = {arm.name: arm.config for arm in read_study(ROOT / "runs" / "study" / "comatch.yaml", tmp_path).arms}
    ours = deciding(load_config(ROOT / "runs" / "comatch-nano.yaml"))
    assert deciding(arms["comatch"]) == ours != deciding(arms["comatch, no questions"])
