"""A real model on MMEB: command and library agree, each picture is decoded once, and a changed checkpoint shares nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import run
from fixtures.mmeb import write_v1

from comatch.core.packing import collate
from comatch.data.images import ImageSettings
from comatch.encoder import Encoder
from comatch.errors import EvaluationError
from comatch.evaluation.mmeb import Suite
from comatch.evaluation.records import SuiteResult
from comatch.evaluation.results import read_result
from comatch.evaluation.running import run_suite

SOME = ("OK-VQA", "WebQA", "RefCOCO-Matching")


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v1(tmp_path_factory.mktemp("v1"))


def test_command_and_library_agree_and_decode_once(v1: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Counter[object]()
    plain = ImageSettings.cut

    def counted(self: ImageSettings, image: Any) -> Any:
        cut[image.source] += 1
        return plain(self, image)

    monkeypatch.setattr(ImageSettings, "cut", counted)
    encoder = Encoder.load(model)
    result = run_suite(encoder, Suite(v1), tmp_path / "library", name=str(model))
    assert len(result.tasks) == 36 and len(cut) > 200 and set(cut.values()) == {1}
    ran = run("evaluate", model, "--suite", "mmeb-v1", "--data", v1, "--out", tmp_path / "command", "--json")
    assert ran.code == 0, ran.err
    (told,) = ran.objects
    assert (told["fingerprint"], told["protocol"], told["revision"]) == (encoder.fingerprint, "comatch", result.revision)
    assert [round(task.score.hit, 6) for task in result.tasks] == [task["hit"] for task in told["tasks"]]
    assert read_result(tmp_path / "command" / "result.json") == result
    again = run("evaluate", model, "--suite", "mmeb-v1", "--data", v1, "--out", tmp_path / "command")
    assert "Overall: mean of the 36 datasets" in again.out and "by protocol comatch" in again.out
    page, table = ((tmp_path / "command" / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "md"))
    assert "data:image/" in page and "GQA" in page and "GQA" in table
    part = run("evaluate", model, "--suite", "mmeb-v1", "--data", v1, "--out", tmp_path / "part", "--task", "GQA", "--protocol", "coma")
    assert part.code == 0 and "missing, so no CLS" in part.out and "Overall: mean" not in part.out


def test_workers_batches_and_padding_change_nothing(v1: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def result(out: str, **options: Any) -> SuiteResult:
        return run_suite(encoder, Suite(v1, names=SOME), tmp_path / out, **options)

    wanted = result("a")
    assert same_hits(result("b", batch_tokens=100, workers=0), wanted)
    assert same_hits(result("c", batch_tokens=100_000, workers=2, shard=5), wanted)
    monkeypatch.setattr("comatch.encoder.collate", partial(collate, pack=False, side="left"))
    assert same_hits(result("d"), wanted)


def same_hits(one: SuiteResult, other: SuiteResult) -> bool:
    margins = [[p.margin for task in result.tasks for p in task.predictions] for result in (one, other)]
    hits = [np.concatenate([task.score.hits for task in result.tasks]).tolist() for result in (one, other)]
    return hits[0] == hits[1] and np.allclose(*margins, atol=1e-4)


def test_a_changed_checkpoint_shares_nothing(v1: Path, model: Path, tmp_path: Path) -> None:
    encoder = Encoder.load(model)
    suite = Suite(v1, names=["CIRR"])
    first = run_suite(encoder, suite, tmp_path)
    encoder.backbone.text.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(EvaluationError, match="fingerprint"):
        run_suite(encoder, suite, tmp_path)
    (tmp_path / "result.json").unlink()
    second = run_suite(encoder, suite, tmp_path)
    fresh = run_suite(encoder, suite, tmp_path / "fresh")
    assert second.tasks == fresh.tasks and second.tasks[0].predictions != first.tasks[0].predictions
    assert len(list((tmp_path / "vectors").iterdir())) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--out", "o"], "needs --data"),
        (["--data", "d"], "need --out"),
        (["--data", "d", "--out", "o"], "there is no folder d"),
        (["--data", "d", "--out", "o", "--protocol", "clip"], "no protocol 'clip'; allowed: comatch, vlm2vec-v1"),
        (["--data", "d", "--out", "o", "--task", "GQB"], "has no dataset 'GQB'"),
    ],
)
def test_what_the_command_refuses(model: Path, options: Sequence[str], told: str) -> None:
    ran = run("evaluate", model, "--suite", "mmeb-v1", *options)
    assert ran.code and told in " ".join(ran.err.replace("│", " ").split())
