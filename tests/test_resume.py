"""A run that was ended anywhere goes on to the same bits; signals, damage, changes and full disks (specs/ecosystem.md rows 16 to 21)."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Make, Ranks, assert_equal_runs, lines, sharded, stop_after, weights
from forked import make as make
from safetensors import SafetensorError

from comatch.encoder import Encoder
from comatch.errors import ConfigError, Stopped, TrainingError
from comatch.training import checkpoint as on_disk
from comatch.training import loop
from comatch.training.checkpoint import MANIFEST, OPTIMIZER, STATE, WEIGHTS
from comatch.training.state import Live


@pytest.fixture(scope="module")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The folder of a run on so many processes that was never interrupted."""
    root = tmp_path_factory.mktemp("whole")

    def inner(ranks: int) -> Path:
        folder = root / str(ranks)
        if not folder.exists():
            assert Ranks(make(folder), root / "log", ranks).wait() == [0] * ranks, (root / "log").read_text()
        return folder

    return inner


@pytest.fixture(scope="module")
def half(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a signal ended in its second stage, with two checkpoints there; only to be copied."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6 + 4)
        with pytest.raises(Stopped, match="after step 4 of stage match"):
            loop.train(make(folder), quiet=True)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["match-000002", "match-000004"]
    return folder


def unfinished(folder: Path) -> Callable[[], bool]:
    """Whether something is being written inside a folder."""
    return lambda: any(folder.glob(f"{on_disk.ASIDE}*"))


def after(seconds: float) -> Callable[[], bool]:
    moment = time.monotonic() + seconds
    return lambda: time.monotonic() > moment


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_runs_end_as_if_they_had_not_been(
    make: Make, whole: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    reference, folder, log = whole(ranks), tmp_path / "run", tmp_path / "log"
    real = on_disk._hash
    dice = random.Random(ranks)
    # After a checkpoint, inside the writing of the first stage's model, inside that of another checkpoint, and after that.
    moments: list[Callable[[], bool]] = [
        (folder / "checkpoints" / "compress-000004").exists,
        unfinished(folder),
        lambda: any((folder / "checkpoints").glob(f"{on_disk.ASIDE}match*")),
        lambda: '"match", "step": 3' in (folder / "metrics.jsonl").read_text(),
    ]
    monkeypatch.setattr(on_disk, "_hash", lambda path: time.sleep(0.02) or real(path))
    cut = 0
    for until in moments:
        assert Ranks(make(folder), log, ranks).wait(until) == [-9] * ranks, log.read_text()
        cut += unfinished(folder)() or unfinished(folder / "checkpoints")()
    assert cut >= 2, "no kill was inside a write"
    for workers, seconds in ((1, 0.3 + dice.random()), (2, 0.3 + dice.random()), (0, 1000.0)):
        if json.loads((folder / "manifest.json").read_text())["status"] != "complete":
            codes = Ranks(make(folder, workers=workers), log, ranks).wait(after(seconds))
            assert set(codes) <= {-9, 0}, log.read_text()
    assert_equal_runs(reference, folder)
    resumed = [(row["stage"], row["step"]) for row in json.loads((folder / "manifest.json").read_text())["resumed"]]
    assert len(resumed) >= 4 and {stage for stage, step in resumed if step} == {"compress", "match"}, "nothing was resumed"
    assert not list(folder.glob(f"{on_disk.ASIDE}*")) and not (folder / "checkpoints").exists()


@pytest.mark.parametrize(("ranks", "kind"), [(2, "sharded"), (3, "whole")])
def test_more_processes_and_sharded_weights(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, kind: str) -> None:
    """Sums over three processes round by their order; DDP and its buckets must not order them anew after a restart."""
    if kind == "sharded":
        monkeypatch.setattr(loop, "Accelerator", sharded)
    log, learned = tmp_path / "log", {"learn_temperature": True}
    stage = {"steps": 4, "batch": 6, "tokens_per_pass": 1000, "optim": {"lr": 0.01}, "log_every": 1}
    a, b = (make(tmp_path / name, stages={"match": stage | {"loss": learned}}) for name in "ab")
    assert Ranks(a, log, ranks).wait() == [0] * ranks, log.read_text()
    assert Ranks(b, log, ranks).wait((tmp_path / "b" / "checkpoints" / "match-000002").exists) == [-9] * ranks, log.read_text()
    assert Ranks(b, log, ranks).wait() == [0] * ranks, log.read_text()
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    assert len({row["temperature"] for row in lines(tmp_path / "a")}) == 4, "the temperature was learned"
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["resumed"][-1]["step"] == 2


@pytest.mark.parametrize("forgotten", ["weights", "moments", "rate", "sums", "draws", "place"])
def test_whatever_a_checkpoint_lacked_would_show(
    make: Make, whole: Callable[[int], Path], half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "run"))
    real = Live.restore

    def restore(live: Live, checkpoint: Any) -> None:
        before = {name: p.detach().clone() for name, p in live._trained()}
        real(live, checkpoint)
        with torch.no_grad():
            for name, parameter in live._trained() if forgotten == "weights" else ():
                parameter.copy_(before[name])
        if forgotten == "moments":
            live.optimizer.state.clear()
        if forgotten == "rate":
            live.scheduler.last_epoch = 0
        if forgotten == "sums":
            live.reporter.loss = 0.0
        if forgotten == "draws":
            monkeypatch.setattr(loop, "seed_step", lambda *of: 7)
        if forgotten == "place":
            live.step -= 1

    monkeypatch.setattr(Live, "restore", restore)
    loop.train(make(folder), quiet=True)
    with pytest.raises(AssertionError):
        assert_equal_runs(whole(1), folder)


@pytest.mark.parametrize(
    ("ranks", "sent", "code"), [(1, signal.SIGUSR1, 75), (1, signal.SIGINT, 130), (2, signal.SIGTERM, 75)]
)
def test_a_signal_saves_and_says_that_the_run_can_go_on(
    make: Make, whole: Callable[[int], Path], tmp_path: Path, ranks: int, sent: int, code: int
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    late = make(folder, save_every=None)
    begun = lambda: (folder / "metrics.jsonl").is_file() and "compress" in (folder / "metrics.jsonl").read_text()  # noqa: E731
    # One process of two is told, and both stop at the same step.
    assert Ranks(late, log, ranks).wait(begun, sent, slice(ranks - 1, ranks)) == [code] * ranks, log.read_text()
    saved = list((folder / "checkpoints").iterdir())
    assert len(saved) == 1 and int(saved[0].name[-6:]) >= 3
    assert signal.Signals(sent).name in log.read_text()
    assert Ranks(late, log, ranks).wait() == [0] * ranks, log.read_text()
    assert_equal_runs(whole(ranks), folder)


def test_a_second_ctrl_c_ends_at_once_and_leaves_the_last_checkpoint(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    real, saved = loop.Running._save, folder / "checkpoints" / "compress-000002"

    def slow(self: Any, live: Live, *rest: Any) -> None:
        if live.step > 2:
            time.sleep(30)
        real(self, live, *rest)

    monkeypatch.setattr(loop.Running, "_save", slow)
    began = time.monotonic()
    presses = iter(range(2))
    ranks = Ranks(make(folder), log)

    def press() -> bool:
        if saved.exists() and next(presses, None) == 0:
            os.kill(ranks.pids[0], signal.SIGINT)
            time.sleep(0.5)
        return saved.exists()

    assert ranks.wait(press, signal.SIGINT) == [130], log.read_text()
    assert time.monotonic() - began < 20 and "again to exit now" in log.read_text()
    on_disk.verify(saved)


def damage(folder: Path, how: str) -> None:
    newest = folder / "checkpoints" / "match-000004"
    if how == "truncated":
        whole = (newest / WEIGHTS).read_bytes()
        (newest / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    elif how == "flipped bit":
        content = bytearray((newest / OPTIMIZER).read_bytes())
        content[-3] ^= 1
        (newest / OPTIMIZER).write_bytes(content)
    elif how == "edited manifest":
        text = (newest / MANIFEST).read_text()
        (newest / MANIFEST).write_text(text.replace('"step": 4', '"step": 5'))
    else:
        (newest / {"no manifest": MANIFEST, "no counts": STATE, "no weights": WEIGHTS}[how]).unlink()


@pytest.mark.parametrize("how", ["truncated", "flipped bit", "edited manifest", "no manifest", "no counts", "no weights"])
def test_a_damaged_checkpoint_is_skipped_for_an_older_one(
    make: Make, whole: Callable[[int], Path], half: Path, tmp_path: Path, how: str
) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "run"))
    damage(folder, how)
    for asked in ("4", "match-000004"):
        with pytest.raises(TrainingError, match=r"match-000004"):
            loop.train(make(folder), from_step=asked, quiet=True)
    with pytest.warns(UserWarning, match=r"match-000004.*skipped, an older one"):
        loop.train(make(folder), quiet=True)
    assert json.loads((folder / "manifest.json").read_text())["resumed"][-1]["step"] == 2
    assert_equal_runs(whole(1), folder)


def test_the_step_to_go_on_from_can_be_chosen(make: Make, whole: Callable[[int], Path], half: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "run"))
    with pytest.raises(TrainingError, match=r"--from-step 3: .*\['match-000002', 'match-000004'\]"):
        loop.train(make(folder), from_step="3", quiet=True)
    with open(folder / "metrics.jsonl", "a") as metrics:
        metrics.write('{"stage": "match", "st')  # as a kill leaves it
    loop.train(make(folder), from_step="2", quiet=True)
    assert json.loads((folder / "manifest.json").read_text())["resumed"][-1]["step"] == 2
    assert_equal_runs(whole(1), folder)
    with pytest.raises(TrainingError, match="would be no checkpoint"):
        loop.train(make(tmp_path / "new"), from_step="2", quiet=True)


def test_changes_are_named_and_those_of_the_result_refused(make: Make, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(half, tmp_path / "run"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for changes, told in [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"stage": {"optim": {"lr": 0.02}}}, r"stages.match.optim.lr: 0.01 -> 0.02"),
        ({"adapter": {"kind": "full"}}, "adapter.kind: 'lora' -> 'full'"),
        ({"stage": {"tokens_per_pass": 301}}, "adapter.dropout=0.1 .*tokens_per_pass: 300 -> 301.*--inexact"),
    ]:
        with pytest.raises(TrainingError, match=f"{told}.*--new-run"):
            loop.train(make(folder, **changes), quiet=True)
    monkeypatch.setattr("comatch.training.origin.code_digest", lambda: "other")
    stop_after(monkeypatch, 0)
    free = {"workers": 1, "save_every": 3, "keep": 1, "name": "other", "stage": {"log_every": 2, "tokens_per_pass": 301}}
    told = "with changes: .*equal up to rounding.*workers: 0 -> 1; sources: .* -> other"
    with pytest.warns(UserWarning, match=told), pytest.raises(Stopped):
        loop.train(make(folder, **free), inexact=True, quiet=True)
    assert len(before) > 20 and all(path.is_file() for path in before)
    record = json.loads((folder / "manifest.json").read_text())
    assert any("workers" in line for line in record["resumed"][-1]["changes"]) and record["software"]["sources"] == "other"


def test_another_number_of_processes(make: Make, tmp_path: Path) -> None:
    """Without dropout equal up to rounding, because the batches are the same; with dropout refused."""
    log, plain = tmp_path / "log", {"kind": "lora", "r": 4}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6 + 2)
        for name, adapter in (("plain", plain), ("dropout", plain | {"dropout": 0.1})):
            stop_after(patch, 6 + 2)
            with pytest.raises(Stopped):
                loop.train(make(tmp_path / name, adapter=adapter), quiet=True)
    reference = Path(shutil.copytree(tmp_path / "plain", tmp_path / "one"))
    loop.train(make(reference, adapter=plain), quiet=True)
    assert Ranks(make(tmp_path / "plain", adapter=plain), log, 2).wait() == [0, 0], log.read_text()
    changes = json.loads((tmp_path / "plain" / "manifest.json").read_text())["resumed"][-1]["changes"]
    assert "processes: 1 -> 2 (equal up to rounding)" in changes
    a, b = (lines(folder) for folder in (reference, tmp_path / "plain"))
    np.testing.assert_allclose([row["loss"] for row in a], [row["loss"] for row in b], rtol=1e-4)
    vectors = [Encoder.load(folder).encode(["a red circle", "two stars"]) for folder in (reference, tmp_path / "plain")]
    np.testing.assert_allclose(*vectors, atol=1e-3)
    codes = Ranks(make(tmp_path / "dropout", adapter=plain | {"dropout": 0.1}), log, 2).wait()
    assert 0 not in codes and "processes: 1 -> 2. Undo that, accept it with --inexact" in log.read_text()
    odd = make(tmp_path / "plain-odd", {"batch": 3}, adapter=plain)
    assert 0 not in Ranks(odd, log, 2).wait() and "batch=3 does not divide by 2 processes" in log.read_text()


def test_changed_data_or_base_weights_are_refused(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, model = tmp_path / "pairs.jsonl", tmp_path / "model"
    rows = [{"query": f"thing number {i}", "answer": f"the {i}th thing" if i % 9 else ""} for i in range(60)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(make(tmp_path).model, model)
    columns = {"query.text": "query", "positive.text": "answer"}
    stage = {"steps": 8, "batch": 6, "log_every": 3}
    settings = {"model": str(model), "data": {"source": "table", "path": str(table), "columns": columns}, "stages": {"match": stage}}
    whole = loop.train(make(tmp_path / "whole", **settings), quiet=True)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Stopped):
            loop.train(make(tmp_path / "run", **settings), quiet=True)
    table.write_text(table.read_text().replace("thing number 7", "thing number 8"))
    with pytest.raises(TrainingError, match=r"other data: \['table: pairs.jsonl'\] changed.*--new-run"):
        loop.train(make(tmp_path / "run", **settings), quiet=True)
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bits = bytearray((model / "model.safetensors").read_bytes())
    bits[-1] ^= 1
    (model / "model.safetensors").write_bytes(bits)
    with pytest.raises(TrainingError, match="other weights than when the run began"):
        loop.train(make(tmp_path / "run", **settings), quiet=True)
    bits[-1] ^= 1
    (model / "model.safetensors").write_bytes(bits)
    moved = tmp_path / "elsewhere" / "pairs.jsonl"
    moved.parent.mkdir()
    table.rename(moved)
    settings["data"] = settings["data"] | {"path": str(moved)}
    with pytest.warns(UserWarning, match="data.path"):
        loop.train(make(tmp_path / "run", **settings), quiet=True)
    assert_equal_runs(whole, tmp_path / "run")
    bad = [row["bad_rows"] for row in lines(whole)]
    assert 0 < bad[0] < bad[-1], "the counts of bad rows are part of the equality"


def test_a_full_disk_costs_no_checkpoint(make: Make, whole: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, log, real = tmp_path / "run", tmp_path / "log", on_disk.save_file

    def full(tensors: Any, path: Path) -> None:
        if "compress-000004" in str(path) and path.name == OPTIMIZER:
            path.write_bytes(b"half")
            raise SafetensorError('Error while serializing: I/O error: "No space left on device (os error 28)"')
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(on_disk, "save_file", full)
        with pytest.raises(TrainingError, match=r"compress-000004 could not be written: .*No space left.*the same command goes on"):
            loop.train(make(folder), quiet=True)
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["compress-000002"]
        # All processes end, and none waits for the first.
        assert Ranks(make(tmp_path / "two"), log, 2).wait() == [1, 1]
        assert log.read_text().count("No space left") >= 2
    on_disk.verify(folder / "checkpoints" / "compress-000002")
    loop.train(make(folder), quiet=True)
    assert_equal_runs(whole(1), folder)


def test_one_process_writes_a_run_and_a_new_one_fits_beside_it(
    make: Make, whole: Callable[[int], Path], half: Path, tmp_path: Path
) -> None:
    folder, log = Path(shutil.copytree(half, tmp_path / "run")), tmp_path / "log"
    first, second = Ranks(make(folder), tmp_path / "first"), Ranks(make(folder), log)
    assert sorted([*second.wait(), *first.wait()]) == [0, 1]
    assert "is being written by another process" in log.read_text() + (tmp_path / "first").read_text()
    assert_equal_runs(whole(1), folder)
    beside = loop.train(make(folder, stages={"match": {"steps": 1, "batch": 2}}), new_run=True, quiet=True)
    assert beside == tmp_path / "run-2" and beside.is_dir()


class Score:
    """Scores that fall from one evaluation to the next but for a rise at the end, and a wish to disturb: it draws and asks for bits."""

    def __init__(self, *scores: float) -> None:
        self.scores = iter(scores)
        self.seen: list[np.ndarray] = []

    def __call__(self, encoder: Encoder) -> dict[str, float]:
        self.seen.append(encoder.encode(["a red circle", "two stars"]))
        torch.rand(3), np.random.rand(3), random.random()
        return {"a": next(self.scores), "b": 0.0}


def test_evaluation_changes_nothing_and_chooses_the_best(make: Make, whole: Callable[[int], Path], tmp_path: Path) -> None:
    wanted = {"every": 1, "n": 2, "candidates": 4, "metric": "a"}
    scores = Score(0.1, 0.9, 0.2, 0.9, 0.3, 0.4)
    folder = loop.train(make(tmp_path / "run", evaluate=wanted, keep=1), evaluate=scores, quiet=True)
    found = [row for row in lines(folder) if "evaluation" in row]
    assert [(row["step"], row["evaluation"]["a"]) for row in found] == [(1, 0.1), (2, 0.9), (3, 0.2), (4, 0.9), (5, 0.3), (6, 0.4)]
    mine, theirs = weights(folder), weights(whole(1))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert [row for row in lines(folder) if "loss" in row] == lines(whole(1))
    assert json.loads((folder / "manifest.json").read_text())["best"] == {"stage": "match", "step": 2, "score": 0.9}
    items = ["a red circle", "two stars"]
    best, last = Encoder.load(folder / "best").encode(items), Encoder.load(folder).encode(items)
    np.testing.assert_allclose(best, scores.seen[1], atol=1e-5)
    np.testing.assert_allclose(last, scores.seen[-1], atol=1e-5)
    assert np.abs(best - last).max() > 1e-3
    # Ended after the best step, and again: the best is kept although newer checkpoints came.
    again = tmp_path / "again"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 6 + 5)
        with pytest.raises(Stopped):
            loop.train(make(again, evaluate=wanted, keep=1), evaluate=Score(0.1, 0.9, 0.2, 0.9, 0.3), quiet=True)
    assert sorted(path.name for path in (again / "checkpoints").iterdir()) == ["match-000002", "match-000005"]
    loop.train(make(again, evaluate=wanted, keep=1), evaluate=Score(0.4), quiet=True)
    assert_equal_runs(folder, again)


def test_evaluation_that_cannot_be_had_is_refused(make: Make, tmp_path: Path) -> None:
    wanted = {"every": 2, "n": 2, "candidates": 4}
    with pytest.raises(ConfigError, match="none was passed"):
        loop.train(make(tmp_path / "a", evaluate=wanted), quiet=True)
    with pytest.raises(ConfigError, match="one was passed"):
        loop.train(make(tmp_path / "a"), evaluate=Score(), quiet=True)
    with pytest.raises(ConfigError, match="match of recipe 'coma' is not trained here"):
        loop.train(make(tmp_path / "a", evaluate=wanted, stages={"compress": {"steps": 1, "batch": 2}}), evaluate=Score(), quiet=True)
    with pytest.raises(ConfigError, match="metric is 'c'; the scores are mean, a, b"):
        loop.choose({"a": 1.0, "b": 0.0}, "c")
    with pytest.raises(TrainingError, match="is nan"):
        loop.choose({"a": float("nan"), "b": 0.0}, "mean")
    assert loop.choose({"a": 1.0, "b": 0.0}, "mean") == 0.5
    assert not (tmp_path / "a").exists()
