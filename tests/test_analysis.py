"""The analysis measures what the model does: equal to the real forward, exact on a true bottleneck, and failing on a false one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import comatch.backbones.base as base
from comatch.analysis.alignment import aligned
from comatch.analysis.masks import attending, attention_weights, dialogue_stage, mask_check, promising_stage
from comatch.analysis.probes import scene_probes
from comatch.analysis.projection import pca
from comatch.analysis.redundancy import LIMIT, effective_rank, redundancy, states
from comatch.analysis.survival import scene_questions, survival
from comatch.backbones import attention
from comatch.cli import build
from comatch.content import Dialogue, as_message
from comatch.core.packing import collate
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import ContentError, EvaluationError, RecipeError
from comatch.recipe import Visibility
from comatch.recipes import load_recipe

K = 4
Folders = Callable[[str], Path]
SCENES = open_source("scenes", split="test", limit=6)
DIALOGUES = [SCENES.dialogue(i) for i in range(6)]
ITEMS: list[Any] = [*(d.context for d in DIALOGUES), "a red circle", {"text": "what is left of it?", "image": SCENES.rows[0].draw()}]


def load(folder_of: Folders, family: str, recipe: str = "coma", tokens: int | None = K) -> Encoder:
    return Encoder.load(folder_of(family), recipe=load_recipe(recipe).with_tokens(tokens), device="cpu")


# --- masks


def test_the_bottleneck_holds_in_every_layer_and_head(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    before = {name: value.clone() for name, value in encoder.backbone.state_dict().items()}
    report = mask_check(encoder, DIALOGUES)
    assert report.ok and report.faults == () and report.declared
    text = encoder.backbone.text.config
    assert report.leak.shape == (text.num_hidden_layers, text.num_attention_heads)
    assert (report.leak == 0).all() and report.leaked == 0 and report.shortcut == 0
    assert report.gradient > 0 and report.gradient_cut == 0
    np.testing.assert_allclose(report.mass.sum(-1), 1, atol=1e-5)
    seen = report.mass.min((0, 1)) > 0
    assert seen.tolist() == [[True, False, False], [True, True, False], [False, True, True]], "the recipe's table, as measured"
    assert text._attn_implementation == attention.TEXT
    assert all(torch.equal(value, before[name]) for name, value in encoder.backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.backbone.parameters())


@pytest.mark.parametrize("recipe", ["coma-released", "coma-no-bottleneck"])
def test_a_recipe_without_bottleneck_leaks_and_the_amount_is_told(folder_of: Folders, family: str, recipe: str) -> None:
    report = mask_check(load(folder_of, family, recipe), DIALOGUES[:3])
    assert not report.ok and not report.declared
    assert (report.leak > 0).all() and report.gradient_cut > 0
    assert report.leaked == pytest.approx(report.mass[:, :, 2, 0].mean()) and report.leaked > 0.01
    assert len(report.faults) == 2 and f"{report.leaked:.1%}" in report.faults[0]
    assert json.loads(json.dumps(report.to_dict()))["leaked"] == report.leaked


@pytest.mark.parametrize("recipe", ["cocoa", "cocoa-sealed", "cocoa-strict"])
def test_a_bridge_is_checked_by_the_text_it_rebuilds(folder_of: Folders, recipe: str) -> None:
    encoder = load(folder_of, "qwen2_5_vl", recipe, 1)
    report = mask_check(encoder, DIALOGUES[:3])
    assert report.ok and report.stage == "bridge" and report.bottleneck.reader == "target"
    seen = report.mass.min((0, 1)) > 0
    table = encoder.recipe.stage("bridge").visibility.table
    assert seen.tolist() == [[letter != "." for letter in row] for row in table]
    assert report.mass[:, :, 2, 0].max() == 0 and report.gradient > 0 and report.gradient_cut == 0
    assert (report.shortcut > 0) == (recipe == "cocoa"), "the paper's bridge sees what it is to rebuild"
    assert json.loads(json.dumps(report.to_dict()))["shortcut"] == report.shortcut


def test_a_stage_with_two_readers_tells_of_the_one_that_was_shown(folder_of: Folders) -> None:
    report = mask_check(load(folder_of, "qwen2_5_vl", "coma-rebuild"), DIALOGUES[:2])
    assert report.ok and report.roles == ("context", "compression", "dialogue") and report.mass.shape[2:] == (3, 3)
    np.testing.assert_allclose(report.mass.sum(-1), 1, atol=1e-5)
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_bridge_that_shows_the_picture_is_found(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    right = base.dense
    open_ = Visibility(("context", "compression", "target"), ("ff.", "ff.", "fff"))
    monkeypatch.setattr(base, "dense", lambda roles, rows, *_: right(roles, rows, open_))
    monkeypatch.setattr(base.Backbone, "dense_mask", True)
    report = mask_check(load(folder_of, "qwen2_5_vl", "cocoa-sealed", 1), DIALOGUES[:2])
    assert not report.ok and (report.leak > 0).all() and report.gradient_cut > 0


def test_a_wrong_mask_is_found(folder_of: Folders, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe still promises a bottleneck; the model's mask lets one dialogue token see one context token."""
    encoder, right = load(folder_of, family), base.dense

    def wrong(roles: torch.Tensor, rows: torch.Tensor, visibility: Visibility, _: object) -> torch.Tensor:
        mask = right(roles, rows, visibility)
        query = (roles[0] == 2).nonzero()[0]
        mask[0, 0, query, (rows[0] == rows[0, query]).nonzero()[0]] = True
        return mask

    monkeypatch.setattr(base, "dense", wrong)
    report = mask_check(encoder, DIALOGUES[:2])
    assert report.declared and not report.ok
    assert (report.leak > 0).all(), "one pair of places is enough"


def test_a_blind_compression_is_found(folder_of: Folders, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, right = load(folder_of, family), base.dense
    blind = Visibility(("context", "compression", "dialogue"), ("c..", ".c.", ".cc"))
    monkeypatch.setattr(base, "dense", lambda roles, rows, *_: right(roles, rows, blind))
    monkeypatch.setattr(base.Backbone, "dense_mask", True)
    report = mask_check(encoder, DIALOGUES[:2])
    assert (report.leak == 0).all() and report.gradient == 0
    assert [fault.split(":")[0] for fault in report.faults] == ["no gradient from the answers to the picture (0)"]


def test_recorded_weights_are_the_models_attention(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    stage = encoder.recipe.stage("compress")
    batch = collate([encoder.preparer.dialogue(dialogue, stage) for dialogue in DIALOGUES])
    gaps: list[float] = []

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        assert inner is attention.text and encoder.backbone.dense_mask

        def record(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
            out, nothing = inner(module, query, key, value, mask, **rest)
            value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
            weights = attention_weights(query, key, rest["visibility_mask"], rest["scaling"])
            assert (weights[~rest["visibility_mask"].expand_as(weights)] == 0).all()
            gaps.append(float(((weights @ value).transpose(1, 2) - out).abs().max()))
            causal = torch.ones_like(rest["visibility_mask"]).tril()
            wrong = attention_weights(query, key, causal, rest["scaling"])
            assert ((wrong @ value).transpose(1, 2) - out).abs().max() > 1e-3, "another mask must show"
            return out, nothing

        return record

    encoder.backbone.dense_mask = True
    with torch.no_grad():
        plain = encoder.backbone(batch, stage.visibility)
        with attending(encoder.backbone, wrap):
            recorded = encoder.backbone(batch, stage.visibility)
    assert torch.equal(plain, recorded)
    assert len(gaps) == encoder.backbone.text.config.num_hidden_layers and max(gaps) < 1e-5


def test_attention_that_is_not_what_was_recorded_is_a_fault(folder_of: Folders, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(folder_of, family)
    monkeypatch.setattr("comatch.analysis.masks.attention_weights", lambda q, k, m, s: 1.01 * attention_weights(q, k, m, s))
    report = mask_check(encoder, DIALOGUES[:1])
    assert [fault[:20] for fault in report.faults] == ["the recorded weights"] and report.difference > report.tolerance


def test_the_report_does_not_depend_on_packing(folder_of: Folders, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(folder_of, family, "coma-released")
    together = mask_check(encoder, DIALOGUES)
    monkeypatch.setattr("comatch.analysis.masks.TOKENS", 1)
    alone = mask_check(encoder, DIALOGUES)
    np.testing.assert_allclose(together.mass, alone.mass, atol=1e-5)
    np.testing.assert_allclose(together.leak, alone.leak, atol=1e-5)
    assert together.gradient == pytest.approx(alone.gradient, rel=1e-3)
    assert together.gradient_cut == pytest.approx(alone.gradient_cut, rel=1e-3)


def test_what_cannot_be_checked_says_so(folder_of: Folders) -> None:
    assert dialogue_stage(load_recipe("matching")) is None and dialogue_stage(load_recipe("cocoa")) is None
    assert promising_stage(load_recipe("matching")) is None and promising_stage(load_recipe("vlm")) is None
    assert promising_stage(load_recipe("coma-released")) == dialogue_stage(load_recipe("coma-released")) is not None
    with pytest.raises(RecipeError, match="no bottleneck to check"):
        mask_check(load(folder_of, "qwen2_vl", "matching"), DIALOGUES)
    encoder = load(folder_of, "qwen2_vl")
    with pytest.raises(ContentError, match="without a picture: \\[1\\]"):
        mask_check(encoder, [DIALOGUES[0], Dialogue(as_message("only words"), (("what?", "words"),))])
    with pytest.raises(ContentError, match="got 0"):
        mask_check(encoder, [])


# --- redundancy


def test_pooled_states_are_the_vectors(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    found = states(encoder, ITEMS)
    assert [state.shape for state in found] == [(K, encoder.dim)] * len(ITEMS) and found[0].dtype == np.float32
    pooled = np.stack([state.mean(0) / np.linalg.norm(state.mean(0)) for state in found])
    np.testing.assert_allclose(pooled, encoder.encode(ITEMS), atol=2e-6)
    assert np.abs(pooled[0] - pooled[1]).max() > 1e-3


def test_redundancy_equals_plain_loops(folder_of: Folders, family: str) -> None:
    encoder = load(folder_of, family)
    report = redundancy(encoder, ITEMS)
    found = np.stack(states(encoder, ITEMS)).astype(np.float64)
    middle = found.reshape(-1, encoder.dim).mean(0)
    kinds = ((found, report.cosine, report.mean_cosine), (found - middle, report.cosine_centred, report.mean_cosine_centred))
    for stack, cosine, mean in kinds:
        plain = np.zeros((K, K))
        for item in stack:
            for i in range(K):
                for j in range(K):
                    plain[i, j] += item[i] @ item[j] / np.linalg.norm(item[i]) / np.linalg.norm(item[j]) / len(stack)
        np.testing.assert_allclose(cosine, plain, atol=1e-9)
        assert mean == pytest.approx(np.mean([plain[i, j] for i in range(K) for j in range(K) if i != j]))
    assert 1 <= report.rank <= K and report.mean_cosine != report.mean_cosine_centred
    assert json.loads(json.dumps(report.to_dict()))["redundant"] == (report.mean_cosine > LIMIT)


def test_equal_tokens_are_redundant_and_orthogonal_ones_are_not(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load(folder_of, "qwen2_5_vl")
    one = np.random.default_rng(0).normal(size=(1, encoder.dim))
    monkeypatch.setattr("comatch.analysis.redundancy.states", lambda *_: [np.repeat(one, K, 0)] * 2)
    same = redundancy(encoder, ITEMS)
    assert same.redundant and same.mean_cosine == pytest.approx(1) and same.rank == pytest.approx(1)
    monkeypatch.setattr("comatch.analysis.redundancy.states", lambda *_: [np.eye(K)] * 2)
    apart = redundancy(encoder, ITEMS)
    assert not apart.redundant and apart.mean_cosine == pytest.approx(0) and apart.rank == pytest.approx(K)


def test_effective_rank() -> None:
    assert effective_rank(np.diag([1.0, 1.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.diag([1.0, 1e-9, 0.0])) == pytest.approx(1, abs=1e-6)
    assert effective_rank(np.zeros((3, 5))) == 0


def test_nothing_to_compare_says_so(folder_of: Folders) -> None:
    with pytest.raises(RecipeError, match="tokens=1"):
        redundancy(load(folder_of, "qwen2_vl", tokens=1), ITEMS)
    with pytest.raises(RecipeError, match="no compression tokens"):
        states(load(folder_of, "qwen2_vl", "matching-last", None), ITEMS)
    with pytest.raises(ContentError, match="no items"):
        redundancy(load(folder_of, "qwen2_vl"), [])


# --- projection


def test_pca_finds_the_plane_and_keeps_its_distances() -> None:
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(7, 7)))[0][:2]
    flat = [rng.normal(size=(n, 2)) * [3, 1] for n in (20, 5)]
    clouds = [points @ plane + 10 for points in flat]
    found = pca(clouds)
    assert [cloud.shape for cloud in found.coordinates] == [(20, 2), (5, 2)]
    assert sum(found.explained) == pytest.approx(1) and found.explained[0] > found.explained[1] > 0
    together, truth = np.concatenate(found.coordinates), np.concatenate(flat)
    np.testing.assert_allclose(
        np.linalg.norm(together[:, None] - together[None], axis=-1), np.linalg.norm(truth[:, None] - truth[None], axis=-1), atol=1e-9
    )


def test_pca_has_one_basis_and_a_fixed_sign() -> None:
    rng = np.random.default_rng(1)
    clouds = [rng.normal(size=(9, 5)) * [4, 3, 2, 1, 1], rng.normal(size=(4, 5))]
    found, turned = pca(clouds), pca([-cloud for cloud in clouds])
    for a, b in zip(found.coordinates, turned.coordinates, strict=True):
        np.testing.assert_allclose(a, -b, atol=1e-9)
    swapped = pca(clouds[::-1])
    np.testing.assert_allclose(found.coordinates[0], swapped.coordinates[1], atol=1e-9)
    assert np.abs(pca(clouds[:1]).coordinates[0] - found.coordinates[0]).max() > 1e-3, "alone it has its own basis"


@pytest.mark.parametrize("clouds", [[], [np.zeros((0, 3))], [np.zeros(3)], [np.zeros((2, 3)), np.zeros((2, 4))], [np.full((2, 3), np.nan)]])
def test_pca_refuses(clouds: list[np.ndarray]) -> None:
    with pytest.raises(EvaluationError):
        pca(clouds)


def test_pca_of_a_single_point_and_of_one_dimension() -> None:
    assert pca([np.ones((1, 4))]).coordinates[0].tolist() == [[0, 0]] and pca([np.ones((1, 4))]).explained == (0, 0)
    assert pca([np.array([[1.0], [3.0]])]).coordinates[0].tolist() == [[-1, 0], [1, 0]]


# --- comatch inspect


def inspect(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(build(), ["inspect", *args])
    return result.exit_code, result.stdout, str(result.exception or "")


def test_inspect_tells_and_draws(folder_of: Folders, tmp_path: Path) -> None:
    model, out = str(folder_of("qwen2_5_vl")), tmp_path / "pictures"
    code, told, _ = inspect(model, "--recipe", "coma", "--n", "3", "--out", str(out))
    assert code == 0 and "bottleneck holds" in told and "effective rank of 32" in told
    kinds = ("attention", "mask", "tokens")
    assert sorted(path.name for path in out.iterdir()) == [*(f"qwen2_5_vl-{kind}.png" for kind in kinds), "vectors.png"]
    code, told, _ = inspect(model, "--recipe", "coma-released", "--n", "3", "--out", str(out))
    assert code == 0 and "none is promised" in told and "dialogue attends to context" in told
    code, told, _ = inspect(model, "--recipe", "matching-last", "--n", "3", "--out", str(out))
    assert code == 0 and "no bottleneck to check" in told and "nothing to compare" in told
    code, _, error = inspect(model, "--n", "3")
    assert code == 1 and "pass a recipe" in error


def test_inspect_of_a_run_folder_sees_every_stage_as_the_library_does(folder_of: Folders, tmp_path: Path) -> None:
    run = tmp_path / "run"
    encoder = load(folder_of, "qwen3_vl")
    encoder.save(run / "compress")
    encoder.backbone.rows.data += 0.1
    encoder.save(run / "match")
    (run / "manifest.json").write_text(json.dumps({"status": "running", "done": ["compress", "match"]}))
    code, told, _ = inspect(str(run), "--json", "--n", "4", "--out", str(tmp_path / "out"))
    found = json.loads(told)
    assert code == 0 and [stage["name"] for stage in found["stages"]] == ["compress", "match"]
    assert found["stages"][1]["redundancy"] == redundancy(encoder, [d.context for d in DIALOGUES[:4]]).to_dict()
    assert found["stages"][0]["redundancy"] != found["stages"][1]["redundancy"]
    assert found["stages"][0]["mask"]["ok"] and all(Path(path).is_file() for path in found["pictures"])
    pairs = [(dialogue.context, row.caption(0)) for dialogue, row in zip(DIALOGUES[:4], SCENES.rows, strict=False)]
    assert found["stages"][1]["alignment"] == aligned(encoder, pairs).to_dict()
    assert found["stages"][1]["survival"] is None and found["stages"][1]["probes"] is None
    (run / "manifest.json").write_text(json.dumps({"status": "running", "done": []}))
    assert "no finished stage" in inspect(str(run))[2]


def test_inspect_shows_the_base_first_and_what_is_asked_for(folder_of: Folders, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    encoder = load(folder_of, "qwen2_5_vl")
    encoder.backbone.rows.data += 0.1
    encoder.save(run / "compress")
    record = {"status": "running", "done": ["compress"], "config": {"model": str(folder_of("qwen2_5_vl"))}}
    (run / "manifest.json").write_text(json.dumps(record))
    code, told, _ = inspect(str(run), "--json", "--n", "4", "--answers", "18", "--probes", "200", "--out", str(out))
    stages = json.loads(told)["stages"]
    assert code == 0 and [stage["name"] for stage in stages] == ["base", "compress"]
    assert stages[1]["survival"] == survival(encoder, scene_questions(18)).to_dict()
    assert stages[1]["probes"] == {kind: one.to_dict() for kind, one in scene_probes(encoder, 200, unseen=50).items()}
    assert stages[0]["redundancy"] == redundancy(load(folder_of, "qwen2_5_vl"), [d.context for d in DIALOGUES[:4]]).to_dict()
    assert stages[0]["alignment"] != stages[1]["alignment"] and stages[0]["mask"] != stages[1]["mask"]
    kinds = sorted(f"{stage}-{kind}.png" for stage in ("base", "compress") for kind in ("attention", "mask", "tokens"))
    assert sorted(path.name for path in out.iterdir()) == sorted(["answers.png", *kinds, "probes.png", "vectors.png"])
    (run / "manifest.json").write_text(json.dumps(record | {"config": {"model": str(tmp_path / "gone")}}))
    result = CliRunner().invoke(build(), ["inspect", str(run), "--n", "3", "--answers", "9", "--out", str(out)])
    assert result.exit_code == 0 and "is left out" in result.stderr
    assert "small object" in result.stdout and "base (recipe" not in result.stdout


def test_inspect_of_recipes_that_never_spoke_tells_the_next_step(folder_of: Folders, tmp_path: Path) -> None:
    code, told, _ = inspect(str(folder_of("qwen2_5_vl")), "--recipe", "moca", "--n", "2", "--answers", "9", "--out", str(tmp_path))
    assert code == 0 and "never learned to answer" in told and "--probes" in told
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.png"]


def test_inspect_fails_on_a_broken_promise(folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = base.dense
    open_ = Visibility(("context", "compression", "dialogue"), ("c..", "cc.", "ccc"))
    monkeypatch.setattr(base, "dense", lambda roles, rows, wanted, _: right(roles, rows, open_ if len(wanted.roles) == 3 else wanted))
    code, told, _ = inspect(str(folder_of("qwen2_vl")), "--recipe", "coma", "--n", "2", "--out", str(tmp_path))
    assert code == 1 and "bottleneck FAILS" in told
