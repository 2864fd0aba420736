"""The whole journey on the shipped nano model, with a few steps only: every part runs and the report stands alone."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from cli_run import run

from comatch.analysis.answers import accuracy, answer
from comatch.backbones.base import Backbone
from comatch.backbones.registry import SHIPPED
from comatch.content import as_message
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipes import load_recipe

NANO = SHIPPED / "comatch-nano"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quick") / "start"
    done = run("quickstart", "--fast", "--quiet", "--out", out)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out / "report.html")
    return out


def test_the_report_stands_alone(folder: Path) -> None:
    page = (folder / "report.html").read_text(encoding="utf-8")
    for title in ("Scores side by side", "Loss curves", "Similarity of the compression tokens", "PCA before", "Searches"):
        assert title in page
    assert page.count("data:image/png;base64,") >= 5
    assert not re.search(r'(src|href)="(https?:)?//', page)


def test_its_index_can_be_searched_on(folder: Path) -> None:
    done = run("search", folder / "index", "a small red star", "-k", "3", "--json")
    hits = [json.loads(line) for line in done.out.splitlines()]
    assert done.code == 0 and [hit["rank"] for hit in hits] == [1, 2, 3]
    assert Encoder.load(folder / "coma").dim == Encoder.load(folder / "matching").dim == 128


def test_the_shipped_weights_are_the_ones_that_were_measured() -> None:
    record = json.loads((NANO / "provenance.json").read_text())
    weights = (NANO / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["weights_sha256"]
    assert len(weights) <= 8 * 2**20


def test_nano_answers_as_well_as_its_provenance_says() -> None:
    record = json.loads((NANO / "provenance.json").read_text())["held_out_answers"]["exact_match"]
    recipe = load_recipe("vlm")
    encoder = Encoder(Backbone.load("comatch-nano", recipe).eval(), recipe)
    scenes = [scene(0, i, "test") for i in range(200)]
    asked = [s.question(i) for i, s in enumerate(scenes)]
    stage = recipe.stage("rehearse")
    said = answer(encoder, [(as_message(s.draw()), q) for s, (q, _, _) in zip(scenes, asked, strict=True)], stage)
    truth, kinds = [a for _, a, _ in asked], [kind for _, _, kind in asked]
    share, n = accuracy(said, truth, kinds)["all"]
    assert n == 200 and share > record["all"]["accuracy"] - 0.08
    blind = answer(encoder, [(as_message(scenes[i - 1].draw()), q) for i, (q, _, _) in enumerate(asked)], stage)
    assert accuracy(blind, truth, kinds)["all"][0] < share - 0.2, "with another picture the answers must be worse"
