"""Alignment, uniformity, probes and UMAP: equal to plain loops, right where the truth is known, and refusing what says nothing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from comatch.analysis.alignment import aligned, alignment, uniformity
from comatch.analysis.probes import probe, scene_probes
from comatch.analysis.projection import pca, umap
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import EvaluationError, MissingExtra

RNG = np.random.default_rng(0)


def unit(*shape: int) -> np.ndarray:
    x = RNG.normal(size=shape)
    return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))


# --- alignment and uniformity


@pytest.mark.parametrize(("n", "t", "power"), [(2, 2.0, 2.0), (9, 2.0, 1.0), (600, 3.0, 2.0)])
def test_alignment_and_uniformity_equal_plain_loops(n: int, t: float, power: float) -> None:
    a, b = unit(n, 7), unit(n, 7)
    apart = [math.sqrt(sum((x - y) ** 2 for x, y in zip(a[i], b[i], strict=True))) ** power for i in range(n)]
    assert alignment(a, b, power) == pytest.approx(sum(apart) / n)
    kernel = [math.exp(-t * float(((a[i] - a[j]) ** 2).sum())) for i in range(n) for j in range(i + 1, n)]
    assert uniformity(a, t) == pytest.approx(math.log(sum(kernel) / len(kernel)))
    assert alignment(a, a) == 0 and alignment(a, -a) == pytest.approx(4) and alignment(a, b) > 0.5


def test_uniformity_of_what_is_known() -> None:
    one = np.tile(unit(1, 5), (40, 1))
    assert uniformity(one) == pytest.approx(0, abs=1e-9)
    assert uniformity(np.array([[1.0, 0], [-1, 0]])) == pytest.approx(-8), "two opposite vectors: exp(-2 * 4)"
    many = unit(1500, 64)
    assert uniformity(many) == pytest.approx(-4 + 8 / 64, abs=0.02)
    assert uniformity(many[:, :8] / np.linalg.norm(many[:, :8], axis=1, keepdims=True)) > uniformity(many)


def test_pairs_under_an_encoder_equal_the_measures_of_its_vectors(encoder: Encoder) -> None:
    pairs = [(scene(0, i).draw(), scene(0, i).caption(0)) for i in range(6)]
    found = aligned(encoder, pairs)
    a, b = (encoder.encode([pair[side] for pair in pairs]) for side in (0, 1))
    assert found.alignment == alignment(a, b) and found.uniformity == (uniformity(a), uniformity(b))
    others = [float(((a[i] - b[j]) ** 2).sum()) for i in range(6) for j in range(6) if i != j]
    assert found.mismatched == pytest.approx(sum(others) / 30, rel=1e-5)
    assert found.gap == pytest.approx(float(np.linalg.norm(a.mean(0) - b.mean(0))), rel=1e-5) and found.gap > 0
    assert json.loads(json.dumps(found.to_dict()))["pairs"] == 6
    swapped = aligned(encoder, [(pairs[i][0], pairs[i - 1][1]) for i in range(6)])
    assert swapped.alignment != found.alignment and swapped.uniformity == pytest.approx(found.uniformity)


def test_alignment_refuses_what_says_nothing(encoder: Encoder) -> None:
    broken = np.full((3, 4), np.nan)
    for bad, words in ((unit(3, 4) * 2, "vector 0 has length 2"), (broken, "length nan"), (unit(4), "shape"), (unit(1, 4), "at least 2")):
        with pytest.raises(EvaluationError, match=words):
            uniformity(bad)
    with pytest.raises(EvaluationError, match="no pairs"):
        alignment(unit(3, 4), unit(2, 4))
    with pytest.raises(EvaluationError, match="1 pairs"):
        aligned(encoder, [("a", "b")])


# --- probes


def test_a_probe_reads_what_a_plane_divides_and_guesses_what_it_does_not() -> None:
    x = RNG.normal(size=(900, 6))
    side = np.where(x[:, 0] + 2 * x[:, 1] > 0, "over", "under").tolist()
    found = probe(x[:600], side[:600], x[600:], side[600:])
    assert found.accuracy > 0.97 and found.n == 300
    coin = RNG.choice(["heads", "tails", "tails"], 900).tolist()
    blind = probe(x[:600], coin[:600], x[600:], coin[600:])
    assert blind.accuracy == pytest.approx(blind.chance, abs=0.06) and blind.chance == pytest.approx(coin[600:].count("tails") / 300)


def test_a_probe_reads_the_middle_of_three_classes() -> None:
    """What least squares on class indicators would not: the reason for logistic regression."""
    x = RNG.normal(size=(900, 3))
    number = np.digitize(x[:, 0], [-0.4, 0.4]).astype(str).tolist()
    assert probe(x[:600], number[:600], x[600:], number[600:]).accuracy > 0.93


def test_chance_is_the_class_that_was_commonest_in_what_was_learned() -> None:
    x = np.arange(8.0)[:, None]
    assert probe(x, list("aaaaabbb"), x[:4], list("abbb")).chance == 0.25


def test_scene_probes_read_the_truth_out_of_the_truth_and_nothing_out_of_noise(monkeypatch: pytest.MonkeyPatch, encoder: Encoder) -> None:
    """An encoder that writes the truth of each scene down is read right everywhere; one that throws dice is not."""
    from comatch.data.scene_truth import BACKGROUNDS, COLOURS, LETTERS, PLACES, SHAPES, SIZES

    scenes = {scene(0, i, split).draw().tobytes(): scene(0, i, split) for split, n in (("train", 700), ("test", 150)) for i in range(n)}

    def written(items: list[np.ndarray]) -> np.ndarray:
        rows = []
        for item in items:
            one = scenes[item.tobytes()]
            at = {thing.place: thing for thing in one.things}
            row = [one.background == b for b in BACKGROUNDS] + [len(one.things) == n for n in (2, 3, 4)]
            for place in PLACES:
                look = (at[place].shape, at[place].colour, at[place].size, at[place].letter) if place in at else ()
                row += [word in look for word in (*SHAPES, *COLOURS, *SIZES, "", *LETTERS)]
            rows.append(row)
        return np.array(rows, np.float32)

    monkeypatch.setattr(encoder, "encode", written)
    found = scene_probes(encoder, 700, unseen=150)
    assert list(found) == ["count", "background", "place", "colour", "shape", "size", "letter"]
    assert min(one.accuracy for one in found.values()) > 0.97 and found["place"].n == 600
    assert found["colour"].n == sum(len(scene(0, i, "test").things) for i in range(150))
    monkeypatch.setattr(encoder, "encode", lambda items: RNG.normal(size=(len(items), 16)).astype(np.float32))
    blind = scene_probes(encoder, 700, unseen=150)
    assert all(one.accuracy < one.chance + 0.08 and one.chance == found[kind].chance for kind, one in blind.items())
    assert found["background"].chance < 0.4 and found["colour"].chance < 0.2 and found["letter"].chance > 0.4


def test_probes_refuse_what_says_nothing() -> None:
    x = unit(4, 3)
    for labels, other, unseen in ((list("aba"), x, list("abab")), (list("abab"), x[:0], []), (list("abab"), x[:, :2], list("abab"))):
        with pytest.raises(EvaluationError, match="needs n "):
            probe(x, labels, other, unseen)
    with pytest.raises(EvaluationError, match="at least two classes"):
        probe(x, list("aaaa"), x, list("aaaa"))


# --- umap


def test_umap_keeps_groups_together_in_one_plane_and_is_the_same_for_a_seed() -> None:
    pytest.importorskip("umap")
    centres = np.eye(3, 8)
    labels = np.arange(60) % 3
    clouds = [centres[labels] + 0.05 * RNG.normal(size=(60, 8)) for _ in range(2)]
    found = umap(clouds, seed=1)
    assert [cloud.shape for cloud in found.coordinates] == [(60, 2)] * 2 and found.explained is None
    points, group = np.concatenate(found.coordinates), np.tile(labels, 2)
    away = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(120)
    assert (group[away.argmin(1)] == group).all(), "each point's neighbour is of its own group, whichever cloud it is of"
    again = umap(clouds, seed=1)
    assert all((a == b).all() for a, b in zip(found.coordinates, again.coordinates, strict=True))
    assert umap([np.eye(4)[:2], np.eye(4)[2:]]).coordinates[0].shape == (2, 2)


def test_umap_refuses_what_pca_refuses_and_too_few_points() -> None:
    for clouds in ([], [np.zeros((2, 3)), np.zeros((2, 4))], [np.full((9, 3), np.nan)]):
        for project in (pca, umap):
            with pytest.raises(EvaluationError):
                project(clouds)
    with pytest.raises(EvaluationError, match="at least 4 points"):
        umap([np.eye(3)])


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("umap", lambda: umap([np.eye(5)])),
        ("sklearn.linear_model", lambda: probe(np.eye(2), list("ab"), np.eye(2), list("ab"))),
    ],
)
def test_without_the_extra_it_is_named(package: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"comatch\[analysis\]"):
        call()


def test_inspect_names_a_missing_extra_before_it_works(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from comatch.cli import build

    monkeypatch.setitem(sys.modules, "umap", None)
    result = CliRunner().invoke(build(), ["inspect", str(model), "--umap", "--out", str(tmp_path / "out")])
    assert result.exit_code == 1 and isinstance(result.exception, MissingExtra) and not (tmp_path / "out").exists()
