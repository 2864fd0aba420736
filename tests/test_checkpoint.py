"""Checkpoints on disk, what a run follows from, and signals; runs that go on from them are in test_resume.py."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import run
from forked import Make, stop_after
from forked import make as make

from comatch import cli
from comatch.config import RunConfig, dump
from comatch.encoder import Encoder
from comatch.errors import TrainingError
from comatch.recipes import load_recipe
from comatch.training import checkpoint as on_disk
from comatch.training import loop
from comatch.training.checkpoint import OPTIMIZER, STATE, WEIGHTS, Checkpoint, atomic_folder
from comatch.training.origin import Origin, changed_settings, code_digest, data_digests, digest
from comatch.training.run import RunFolder, unused
from comatch.training.signals import Signals

TENSORS = {"a": torch.randn(3, 2), "b": torch.tensor(2.0), "c": torch.arange(4, dtype=torch.bfloat16)}
LEAST = {"name": "n", "model": "m", "recipe": "coma", "stages": {"match": {"steps": 1, "batch": 1}}}


def saved(folder: Path, stage: str = "match", step: int = 1, score: float | None = None) -> Checkpoint:
    return on_disk.write(folder, stage, step, TENSORS, TENSORS, {"x": 0.1}, {"score": score, "config": {"seed": 1}})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_again_and_runs_no_code(tmp_path: Path) -> None:
    one = saved(tmp_path, step=12, score=0.5)
    assert one.path == tmp_path / "match-000012" and names(tmp_path) == ["match-000012"]
    record = on_disk.verify(one.path)
    assert (record["stage"], record["step"], record["config"], one.score, one.state()) == ("match", 12, {"seed": 1}, 0.5, {"x": 0.1})
    for file in (WEIGHTS, OPTIMIZER):
        found = one.tensors(file)
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in TENSORS)
    assert {path.suffix for path in one.path.iterdir()} == {".json", ".safetensors"}
    assert set(record["files"]) == {WEIGHTS, OPTIMIZER, STATE}


def test_every_bit_of_a_checkpoint_is_watched(tmp_path: Path) -> None:
    one = saved(tmp_path)
    for file in sorted(one.path.iterdir()):
        content = file.read_bytes()
        for place in range(0, len(content), 7):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(TrainingError, match="match-000001"):
                on_disk.verify(one.path)
        file.write_bytes(content)
        on_disk.verify(one.path)


def test_the_newest_that_is_whole_the_best_and_those_kept(tmp_path: Path) -> None:
    stages = ["compress", "match"]
    for step, score in [(9, 0.1), (10, 0.7), (100, 0.7), (1_000_000, 0.2)]:
        saved(tmp_path, "match", step, score)
    saved(tmp_path, "compress", 500)
    (tmp_path / "notes").mkdir()
    (tmp_path / "other-000001").mkdir()
    (tmp_path / f"{on_disk.ASIDE}match-000002").mkdir()
    there = on_disk.found(tmp_path, stages)
    assert [(one.stage, one.step) for one in there] == [("compress", 500), *(("match", n) for n in (9, 10, 100, 1_000_000))]
    assert on_disk.best(there) == there[2], "the earliest of equals"
    assert on_disk.newest(there) == there[-1]
    (there[-1].path / STATE).unlink()
    with pytest.warns(UserWarning, match="match-1000000.*skipped"):
        assert on_disk.newest(there) == there[-2]
    on_disk.prune(there, 1)
    assert on_disk.found(tmp_path, stages) == [there[2], there[-1]]
    on_disk.remove_unfinished(tmp_path)
    assert names(tmp_path) == ["match-000010", "match-1000000", "notes", "other-000001"]
    assert on_disk.newest([]) is None and on_disk.best([there[0]]) is None


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_folder(target) as aside:
            (aside / "inner").mkdir()
            (aside / "inner" / "file").write_text(text)
            assert not target.exists() or text == "new"
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            write_half(target, error("half"))
    with pytest.raises(TrainingError, match=r"model could not be written: .*No space.*same command goes on"):
        write_half(target, OSError(28, "No space left on device"))
    assert (target / "inner" / "file").read_text() == "new" and names(tmp_path) == ["model"] and names(target) == ["inner"]


def write_half(target: Path, error: BaseException) -> None:
    with atomic_folder(target) as aside:
        (aside / "file").write_text("half")
        raise error


def test_a_disk_without_room_is_told_and_the_older_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = saved(tmp_path)

    def cut_off() -> None:
        # The kernel's own refusal to write on, as a full disk gives it.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(TrainingError, match="match-000002 could not be written"):
            saved(tmp_path, step=2)

    assert in_child(cut_off) == 0
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: os.terminal_size((10, 10)) and type("Usage", (), {"free": 10}))
        with pytest.raises(TrainingError, match="no space left on the disk: 72 bytes are needed, 10 are free"):
            saved(tmp_path, step=2)
    assert names(tmp_path) == ["match-000001"]
    on_disk.verify(older.path)


def in_child(work: Callable[[], None]) -> int:
    """The exit code of a forked process that does something."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_data_are_known_by_their_content(tmp_path: Path) -> None:
    small, large = tmp_path / "a.jsonl", tmp_path / "big" / "b.parquet"
    large.parent.mkdir()
    small.write_bytes(b"x")
    content = bytearray(17 * 2**20)
    large.write_bytes(content)
    settings: dict[str, Any] = {"s": {"source": "table", "path": str(small)}, "t": {"source": "table", "path": str(large.parent)}}
    config = RunConfig.model_validate(LEAST | {"data": {"mixture": settings}})
    before = data_digests(config)
    assert set(before) == {"s: a.jsonl", "t: b.parquet"} and data_digests(config) == before
    (large.parent / "picture.png").write_bytes(b"pictures are not looked at")
    os.utime(small, (0, 0))
    assert data_digests(config) == before
    for place in (0, 2**15, len(content) - 1):
        content[place] = 1
        large.write_bytes(content)
        assert digest(large) != before["t: b.parquet"]
        content[place] = 0
    large.write_bytes(content + b"\0")
    assert digest(large) != before["t: b.parquet"]
    large.write_bytes(content)
    (large.parent / "c.parquet").write_bytes(b"another shard")
    origin = Origin.of(config, 1)
    with pytest.raises(TrainingError, match=r"other data: \['t: c.parquet'\]"):
        origin.check({**origin.record, "data": before}, config, False)
    pattern = {"source": "webdataset", "path": str(large.parent / "*.parquet")}
    assert set(data_digests(RunConfig.model_validate(LEAST | {"data": pattern}))) == {"webdataset: b.parquet", "webdataset: c.parquet"}


def test_settings_that_differ_are_named_with_both_values() -> None:
    a = RunConfig.model_validate(LEAST)
    b = RunConfig.model_validate(LEAST | {"seed": 3, "stages": {"match": {"steps": 1, "batch": 1, "optim": {"lr": 0.1}}}})
    assert changed_settings(a, b) == {"seed": (0, 3), "stages.match.optim.lr": (5e-5, 0.1)}
    assert changed_settings(a, a) == {}
    evaluated = RunConfig.model_validate(LEAST | {"evaluate": {"every": 3}})
    rarer = RunConfig.model_validate(LEAST | {"evaluate": {"every": 4}})
    origin = Origin.of(rarer, 1)
    assert origin.check(Origin.of(evaluated, 1).record, evaluated, False) == ["evaluate.every: 3 -> 4"]
    with pytest.raises(TrainingError, match="evaluate"):
        origin.check(Origin.of(a, 1).record, a, False)
    assert len(code_digest()) == 16


def test_a_run_that_died_before_its_manifest_is_begun_anew(tmp_path: Path) -> None:
    recipe, path = load_recipe("coma"), tmp_path / "run"
    path.mkdir()
    for name in (".lock", "manifest.json.tmp"):
        (path / name).write_text("")
    folder = RunFolder(path, Origin.of(RunConfig.model_validate(LEAST), 1), recipe, True)
    folder.find()
    folder.begin("")
    assert json.loads((path / "manifest.json").read_text())["status"] == "running" and (path / "config.yaml").is_file()
    folder.close()
    assert unused(path) == tmp_path / "run-2" and unused(tmp_path / "new") == tmp_path / "new"


def test_signals_are_taken_inside_the_block_only() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    accelerator: Any = type("One", (), {"num_processes": 1})
    for number, code in ((signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)):
        with Signals() as signals:
            assert signals.agreed(accelerator) == 0
            signal.raise_signal(number)
            assert signals.agreed(accelerator) == code
    with Signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Signals() as signals:  # torchrun answers Ctrl-C by SIGTERM to its workers
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.agreed(accelerator) == 130
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    elsewhere = threading.Thread(target=lambda: Signals().__enter__())
    elsewhere.start()
    elsewhere.join()


def test_the_command_says_how_a_run_ended(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = {"every": 2, "n": 2, "candidates": 4, "metric": "scenes-t2i"}
    file, folder = tmp_path / "run.yaml", tmp_path / "run"
    file.write_text(dump(make(folder, {"steps": 2}, evaluate=evaluate)))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        ended = run("train", file, "--quiet")
    assert (ended.code, ended.out) == (75, "") and "after step 1 of stage match" in ended.err
    assert run("train", file, "--from-step", "9", "--quiet").code == 1
    done = run("train", file, "--quiet")
    assert (done.code, done.out.strip()) == (0, str(folder)), done.err
    scores = [row["evaluation"] for row in loop.read_metrics(folder / "metrics.jsonl") if "evaluation" in row]
    assert len(scores) == 1 and {"scenes-t2i", "scenes-grounding"} < set(scores[0])
    best = json.loads((folder / "manifest.json").read_text())["best"]
    assert best == {"stage": "match", "step": 2, "score": scores[0]["scenes-t2i"]}
    assert Encoder.load(folder / "best").fingerprint == Encoder.load(folder).fingerprint
    again = run("train", file, "--quiet")
    assert again.code == 1 and "complete run" in again.err and "--new-run" in again.err
    assert run("train", file, "--overwrite", "--new-run").code == 2


def test_a_tracker_or_a_reader_that_fails_ends_no_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **settings: Any) -> None:
        raise ConnectionError("no network")

    config = make(tmp_path / "run", {"steps": 3, "log_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(loop.Accelerator, "log", broken)
        with pytest.warns(UserWarning, match="tracker failed .*no network.*goes on"):
            folder = loop.train(config, quiet=True)
    assert len(loop.read_metrics(folder / "metrics.jsonl")) == 6
    accelerator = loop.Accelerator(cpu=True)
    monkeypatch.setattr(loop.Accelerator, "init_trackers", broken)
    with pytest.warns(UserWarning, match="did not start"):
        loop._open_trackers(accelerator, config.model_copy(update={"tracking": ["wandb"]}), tmp_path)
    file = tmp_path / "run.yaml"
    for stream, code in ((2, 0), (1, 1)):
        file.write_text(dump(make(tmp_path / f"run{stream}", {"steps": 2})))
        log = tmp_path / f"log{stream}"

        def piped(stream: int = stream, log: Path = log) -> None:
            read, write = os.pipe()
            os.close(read)  # as `| head` does once it has seen enough
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 3 - stream)
            os.dup2(write, stream)
            torch.set_num_threads(1)
            try:
                cli.main(["train", str(file)])
            except SystemExit as end:
                os._exit(int(end.code or 0))

        with pytest.MonkeyPatch.context() as patch:
            for number, name in ((1, "stdout"), (2, "stderr")):
                patch.setattr(f"sys.{name}", os.fdopen(number, "w", buffering=1, closefd=False))
            assert in_child(piped) == code
        assert "Error" not in log.read_text() and "Traceback" not in log.read_text()
        assert json.loads((tmp_path / f"run{stream}" / "manifest.json").read_text())["status"] == "complete"
