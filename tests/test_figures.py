"""Every figure is readable, says what it was given, whatever the names, and is the same every time."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from comatch.analysis import figures, levels
from comatch.analysis.masks import mask_check
from comatch.analysis.probes import Probe
from comatch.analysis.projection import pca
from comatch.analysis.redundancy import redundancy
from comatch.analysis.survival import scene_questions, survival
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import EvaluationError, MissingExtra
from comatch.recipes import load_recipe

Folders = Callable[[str], Path]
SCENES = open_source("scenes", split="test", limit=6)
DIALOGUES = [SCENES.dialogue(i) for i in range(6)]
ITEMS: list[Any] = [*(d.context for d in DIALOGUES), "a red circle", {"text": "what is left of it?", "image": SCENES.rows[0].draw()}]


def drawn(folder_of: Folders) -> dict[str, Figure]:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=load_recipe("coma").with_tokens(4), device="cpu")
    stage = encoder.recipe.stage("compress")
    vectors = encoder.encode(ITEMS)
    rows = [{"stage": stage, "step": step, "loss": 9 / step} for stage in ("compress", "match") for step in range(1, 90)]
    odd = "_$odd$ $\\frac{"
    return {
        "mask": figures.mask(encoder.preparer.dialogue(DIALOGUES[0], stage), stage.visibility),
        "attention": figures.attention(mask_check(encoder, DIALOGUES[:2])),
        "similarity": figures.similarity(redundancy(encoder, ITEMS)),
        "projection": figures.projection(pca([vectors, -vectors]), ["before", odd], [list("abababab"), [odd] * 8]),
        "losses": figures.losses({"coma": rows, odd: rows[:40]}),
        "scores": figures.scores({"coma": {"a": (0.5, 0.4, 0.6), "b": 0.3}, odd: {"a": 0.2}}, chance={"a": 0.1}),
        "levels": levels.survived({name: survival(encoder, scene_questions(18), longest=2) for name in ("coma", odd)}),
        "searches": figures.searches(
            [
                figures.Search(odd, [(ITEMS[0], 0.9, True), (ITEMS[1], 0.8, False), (ITEMS[-1], 0.7, None)]),
                figures.Search(ITEMS[-1], [("words " * 60, 0.9, None)]),
            ]
        ),
    }


def test_figures_are_readable_pngs_and_the_same_every_time(folder_of: Folders, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = drawn(folder_of)
        files = {name: figures.save(figure, tmp_path / "new" / f"{name}.png") for name, figure in found.items()}
    again = drawn(folder_of)
    for name, file in files.items():
        with Image.open(file) as picture:
            assert picture.format == "PNG" and 500 < picture.width < 2500 and 300 < picture.height < 1500, name
        assert figures.save(again[name], tmp_path / "again.png").read_bytes() == file.read_bytes(), name
    assert figures.data_uri(found["mask"]).startswith("data:image/png;base64,iVBOR")


def test_any_name_stands_in_the_legend(folder_of: Folders) -> None:
    found = drawn(folder_of)
    for name in ("projection", "losses", "scores", "levels"):
        texts = [text.get_text() for legend in found[name].legends for text in legend.get_texts()]
        assert "_$odd$ $\\frac{" in texts, name


def test_levels_stand_where_their_values_are() -> None:
    figure = levels.levels({"x": {"a": (0.5, 0.75, 0.25), "b": (0.0, 1.0, 0.5)}}, ("", "most", "least"), title="t", label="l")
    bars = [bar.get_height() for bar in figure.axes[0].patches]
    marks = [line.get_ydata().tolist() for line in figure.axes[0].lines if len(line.get_ydata())]
    assert bars == [0.5, 0.0] and marks == [[0.75, 1.0], [0.25, 0.5]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["x", "most", "least"]
    probed = levels.probed({"x": {"a": Probe(0.5, 0.25, 4)}})
    assert probed.axes[0].lines[0].get_ydata().tolist() == [0.25]


def test_a_missing_score_is_told_and_a_zero_is_a_zero() -> None:
    figure = figures.scores({"x": {"a": 0.0}, "y": {"b": 0.5}})
    texts = [text.get_text().strip() for text in figure.axes[0].texts]
    assert sorted(texts) == ["0.00", "0.50", "not measured", "not measured"]


def test_right_results_have_a_tick_and_a_frame() -> None:
    figure = figures.searches([figures.Search("q", [("x", 0.5, True), ("y", 0.25, False), ("z", 0.1, None)])])
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "0.50 ✓", "0.25", "0.10"]
    frames = [axes.spines["left"].get_linewidth() for axes in figure.axes[1:]]
    assert frames[0] > frames[1] == frames[2]


def test_figures_leave_matplotlib_as_it_is(folder_of: Folders) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.save(figures.scores({"x": {"a": 0.5}}), folder_of("qwen2_vl").parent / "x.png")
    assert dict(matplotlib.rcParams) == before


def test_figures_refuse_what_says_nothing() -> None:
    for draw in (lambda: figures.losses({"x": []}), lambda: figures.scores({}), lambda: figures.searches([])):
        with pytest.raises(EvaluationError, match="pass"):
            draw()
    for table in ({}, {"x": {}}, {"x": {"a": (0.5,)}}, {"x": {"a": (0.5, 0.2)}, "y": {"b": (0.5, 0.2)}}):
        with pytest.raises(EvaluationError, match="models"):
            levels.levels(table, ("", "most"), title="t", label="l")
    cloud = pca([np.eye(3)])
    with pytest.raises(EvaluationError, match="clouds of \\[3\\] points"):
        figures.projection(cloud, ["x"], [["a"]])
    with pytest.raises(EvaluationError, match="57 classes"):
        figures.projection(pca([np.eye(57)]), ["x"], [[str(i) for i in range(57)]])


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "comatch.drawing.style", "comatch.analysis.figures"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"comatch\[plots\]"):
        import comatch.analysis.figures  # noqa: F401


def test_losses_smooth_with_a_running_mean() -> None:
    values = np.arange(6.0)
    np.testing.assert_allclose(figures.running_mean(values**2, 3), [0.5, 5 / 3, 14 / 3, 29 / 3, 50 / 3, 20.5])
    np.testing.assert_allclose(figures.running_mean(values, 1), values)
