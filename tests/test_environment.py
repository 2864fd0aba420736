"""What a machine may lack or lose: the hub, memory, a worker, a rank, a home, a reader (specs/ecosystem.md rows 23 to 25, 43, 45)."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cli_run import draw, run
from forked import Ranks

from comatch.backbones.base import Backbone
from comatch.config import RunConfig
from comatch.core.batch import Example
from comatch.encoder import Encoder
from comatch.errors import ModelError, TrainingError
from comatch.training.faults import explained
from comatch.training.loop import read_metrics, train
from comatch.training.machine import Finding, environment

NAME, COMMIT = "org/model", "a" * 40
Folders = Callable[[str], Path]

# --- the hub (row 25)


@contextmanager
def hub(status: int, code: str = "") -> Iterator[str]:
    """The address of a hub that answers every question in one way."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def cached(home: Path, *files: str) -> Path:
    """A snapshot in a hub cache, as an earlier download left it."""
    repo = home / "hub" / "models--org--model"
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    for file in files:
        (folder / file).write_text(json.dumps({"weight_map": shards} if "index" in file else {}))
    return folder


def resolve(home: Path, endpoint: str, **environment: str) -> str:
    """What `resolve` says in a process of its own: the folder, or the error."""
    code = (
        "from comatch.backbones.registry import resolve\nfrom comatch.errors import ModelError\n"
        f"try:\n    print('found', resolve({NAME!r}))\nexcept ModelError as error:\n    print('ModelError', error)"
    )
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize("how", ["offline", "refused", "down"])
def test_without_the_hub_the_cache_is_tried_and_half_a_model_never_taken(tmp_path: Path, how: str) -> None:
    offline = {"HF_HUB_OFFLINE": "1"} if how == "offline" else {}
    with hub(503) as down:
        address = down if how == "down" else NOWHERE
        empty = resolve(tmp_path / "empty", address, **offline)
        assert empty.startswith("ModelError") and f"hf download {NAME}" in empty and str(tmp_path / "empty") in empty
        assert ("HF_HUB_OFFLINE is set" in empty) == bool(offline)
        whole = cached(tmp_path / "whole", "config.json", INDEX, ONE, TWO)
        assert resolve(tmp_path / "whole", address, **offline) == f"found {whole}"
        cached(tmp_path / "half", "config.json", INDEX, ONE)
        half = resolve(tmp_path / "half", address, **offline)
        assert half.startswith("ModelError") and TWO in half and ONE not in half and f"hf download {NAME}" in half
        cached(tmp_path / "bare", "config.json", "tokenizer.json")
        assert "lacks model.safetensors:" in resolve(tmp_path / "bare", address, **offline)


@pytest.mark.parametrize(
    ("status", "code", "told"),
    [
        (403, "GatedRepo", "is gated: accept its terms at"),
        (404, "RevisionNotFound", "has no revision"),
        (404, "RepoNotFound", "no such model, or keeps it private"),
        (500, "", "neither the hub nor the cache gave it (HfHubHTTPError: Server error '500"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_next_step(tmp_path: Path, status: int, code: str, told: str) -> None:
    with hub(status, code) as address:
        said = resolve(tmp_path, address)
    assert said.startswith(f"ModelError model {NAME!r} could not be fetched") and told in said
    assert f"hf download {NAME}" in said or code == "RevisionNotFound"


# --- memory (row 23)


def short_of(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """From now on a pass of more tokens than that does not fit; the tokens of every pass that was tried."""
    tried: list[int] = []
    plain = Encoder.forward

    def spy(self: Encoder, examples: Sequence[Example], *rest: Any) -> Any:
        tried.append(sum(map(len, examples)))
        if tried[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which")
        return plain(self, examples, *rest)

    monkeypatch.setattr(Encoder, "forward", spy)
    return tried


def test_encode_halves_its_budget_once_and_says_so(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, items = Encoder.load(model), [f"text {i} " * (1 + i % 7) for i in range(40)]
    wanted = encoder.encode(items, batch_tokens=400)
    tried = short_of(monkeypatch, 250)
    with pytest.warns(UserWarning, match=r"out of memory in a pass of .* asked for 2.50 GiB.* of 79.15 GiB in all; going on") as told:
        vectors = encoder.encode(items, batch_tokens=400)
    assert len(told) == 1 and sum(t > 250 for t in tried) == 1 and max(tried) <= 400
    np.testing.assert_allclose(vectors, wanted, atol=2e-6)
    tried.clear()
    assert len(encoder.encode(items, batch_tokens=400)) == 40 and max(tried) <= 200, "the next call keeps to what fits"
    short_of(monkeypatch, 40)
    with pytest.raises(ModelError, match=r"halved once already. Set batch_tokens below \d+, or lower images.max_pixels"):
        encoder.encode(items, batch_tokens=400)


def test_the_verb_says_it_on_stderr(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of(monkeypatch, 60)
    with pytest.warns(UserWarning, match="going on with passes"):
        ran = run("encode", model, "-", stdin="".join(f"a red circle {i}\n" for i in range(9)))
    assert ran.code == 0 and len(ran.objects) == 9


# --- a worker, a rank (row 24)


def config(model: Path, out: Path, **changes: Any) -> RunConfig:
    """A run of so many tiny steps that it does not end by itself while a test looks on."""
    stage = {"steps": 2000, "batch": 4, "tokens_per_pass": 1000, "log_every": 1, "optim": {"lr": 0.001}}
    values = {"name": "run", "model": str(model), "recipe": "matching", "tokens": 4, "precision": "fp32", "device": "cpu", "seed": 3}
    more = {"adapter": {"kind": "lora", "r": 2}, "stages": {"match": stage}, "output": str(out)}
    return RunConfig.model_validate(values | more | changes)


def begun(folder: Path, rows: int = 2) -> Callable[[], bool]:
    """Whether a run has written so many lines of metrics."""
    metrics = folder / "metrics.jsonl"
    return lambda: metrics.is_file() and metrics.read_bytes().count(b"\n") >= rows


@pytest.mark.parametrize("gone", [0, 1])
def test_a_killed_rank_ends_the_job_and_is_named(folder_of: Folders, tmp_path: Path, gone: int) -> None:
    ranks = Ranks(config(folder_of("qwen2_5_vl"), tmp_path / "run"), tmp_path / "log", 2)
    began = time.monotonic()
    codes = ranks.wait(begun(tmp_path / "run"), to=slice(gone, gone + 1))
    assert codes[gone] == -9 and codes[1 - gone] == 1 and time.monotonic() - began < 60
    log = (tmp_path / "log").read_text()
    assert f"TrainingError: rank {1 - gone} of 2: rank {gone} is gone or does not answer" in log
    assert "the same command goes on from the last checkpoint" in log


def test_a_rank_that_hangs_is_waited_for_so_long_and_named(folder_of: Folders, tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    ranks = Ranks(config(folder_of("qwen2_5_vl"), run, timeout_minutes=0.05), log, 2)
    first, second = ranks.pids
    try:
        until = time.monotonic() + 60
        while not begun(run)() and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(second, signal.SIGSTOP)
        began, ended = time.monotonic(), 0
        while not ended and time.monotonic() < began + 60:
            ended, status = os.waitpid(first, os.WNOHANG)
            time.sleep(0.01)
        assert ended and os.waitstatus_to_exitcode(status) == 1
        assert 2 < time.monotonic() - began < 30
        assert "rank 0 of 2: rank 1 is gone or does not answer" in log.read_text()
    finally:
        os.kill(second, signal.SIGKILL)
        os.waitpid(second, 0)


def test_a_killed_worker_ends_the_job_and_says_what_helps(folder_of: Folders, tmp_path: Path) -> None:
    ranks = Ranks(config(folder_of("qwen2_5_vl"), tmp_path / "run", workers=1), tmp_path / "log")
    children = Path(f"/proc/{ranks.pids[0]}/task/{ranks.pids[0]}/children")
    killed = []

    def kill_worker() -> bool:
        if not killed and begun(tmp_path / "run")():
            killed.extend(int(pid) for pid in children.read_text().split())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
        return False

    assert ranks.wait(kill_worker) == [1] and len(killed) == 1
    log = (tmp_path / "log").read_text()
    assert "TrainingError: a loader worker died: DataLoader worker" in log and "lower workers" in log


def test_training_without_memory_names_the_need_and_what_helps(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.15 GiB of which")

    monkeypatch.setattr(Backbone, "forward", full)
    with pytest.raises(TrainingError, match=r"in a training step: it asked for 2.50 GiB.*tokens_per_pass.*images.max_pixels"):
        train(config(folder_of("qwen2_5_vl"), tmp_path / "run"), quiet=True)


@pytest.mark.parametrize("told", ["shapes do not fit", "Caught RuntimeError in DataLoader worker process 0.\nshapes do not fit"])
def test_other_faults_are_left_alone(told: str) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"), explained(Accelerator(cpu=True)):
        raise RuntimeError(told)


# --- homes, paths, clocks, shared memory (row 43)


def command(folder: Path, *args: object, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """`comatch ARGS...` in a process and a working folder of its own; None takes a variable out."""
    env = {name: value for name, value in {**os.environ, "HF_HUB_OFFLINE": "1", **environment}.items() if value is not None}
    ask = [sys.executable, "-m", "comatch", *map(str, args)]
    return subprocess.run(ask, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)


def written(folder: Path, model: Path, **changes: Any) -> Path:
    """A run of two steps as a YAML file."""
    stage = {"steps": 2, "batch": 2, "tokens_per_pass": 1000, "log_every": 1}
    values = config(model, Path("out of it"), stages={"match": stage}, **changes).model_dump(mode="json")
    (folder / "run.yaml").write_text(json.dumps(values))
    return folder / "run.yaml"


def test_without_a_home_everything_works_in_odd_places(folder_of: Folders, tmp_path: Path) -> None:
    odd = tmp_path / "with spaces, ünïcode, 模型 and 'quotes'"
    odd.mkdir()
    model = odd / "the model"
    shutil.copytree(folder_of("qwen2_5_vl"), model)
    draw(odd / "a folder of pictures", range(2))
    lacks: dict[str, str | None] = {"HF_HOME": None, "XDG_CACHE_HOME": None}
    done = command(odd, "train", written(odd, model).name, "--quiet", HOME="/dev/null/nobody", **lacks)
    assert done.returncode == 0 and done.stdout == "out of it\n", done.stderr
    found = command(odd, "encode", "out of it", "a folder of pictures", "--out", "the vectors.npy", HOME=None, **lacks)
    assert found.returncode == 0, found.stderr
    vectors, pictures = np.load(odd / "the vectors.npy", allow_pickle=False), odd / "a folder of pictures"
    np.testing.assert_array_equal(vectors, Encoder.load(odd / "out of it").encode([pictures / "s0.png", pictures / "s1.png"]))


def test_a_strict_umask_and_a_mad_clock_change_nothing(folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(name: str) -> list[float]:
        stage = {"steps": 3, "batch": 2, "tokens_per_pass": 1000, "log_every": 1}
        folder = train(config(folder_of("qwen2_5_vl"), tmp_path / name, stages={"match": stage}, save_every=1), quiet=True)
        return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]

    wanted = trained("plain")
    seconds = itertools.cycle([4e9, 0.0, 1e9, 2e9])
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    before = os.umask(0o077)
    try:
        assert trained("mad") == wanted and len(wanted) == 3
    finally:
        os.umask(before)
    monkeypatch.undo()
    assert (tmp_path / "mad").stat().st_mode & 0o077 == 0, "the umask was not in force"
    a, b = (Encoder.load(tmp_path / name) for name in ("plain", "mad"))
    assert a.fingerprint == b.fingerprint


def test_missing_shared_memory_is_told_before_and_when_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shared() -> list[Finding]:
        return [finding for finding in environment(tmp_path, workers=2) if finding.check == "shared memory"]

    assert [finding.level for finding in shared()] == ["ok"]
    monkeypatch.setattr("comatch.training.machine.SHARED", tmp_path / "nothing")
    (finding,) = shared()
    assert finding.level == "error" and "workers=0" in finding.step
    assert not [finding for finding in environment(tmp_path) if finding.check == "shared memory"], "0 workers need none"
    told = "Caught RuntimeError in DataLoader worker process 0.\nunable to write to file </torch_9_1>: No space left on device (28)"
    with pytest.raises(TrainingError, match=r"shm was full: lower workers \(0 needs neither\)"), explained(Accelerator(cpu=True)):
        raise RuntimeError(told)


# --- trackers, progress, closed pipes (row 45)


def test_a_tracker_that_fails_is_left_behind(folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(*args: object, **kwargs: object) -> None:
        asked.append(1)
        raise ConnectionError("no route to the tracker")

    monkeypatch.setattr(Accelerator, "log", refuse)
    stage = {"steps": 4, "batch": 2, "tokens_per_pass": 1000, "log_every": 1}
    with pytest.warns(UserWarning, match="no route to the tracker.*training goes on without it"):
        folder = train(config(folder_of("qwen2_5_vl"), tmp_path / "run", stages={"match": stage}), quiet=True)
    assert len(read_metrics(folder / "metrics.jsonl")) == 4 and len(asked) == 1
    Encoder.load(folder)


@pytest.mark.parametrize("together", [False, True], ids=["stdout", "stdout and stderr"])
def test_nobody_reads_and_training_goes_on(folder_of: Folders, tmp_path: Path, together: bool) -> None:
    written(tmp_path, folder_of("qwen2_5_vl"))
    ask = [sys.executable, "-m", "comatch", "train", "run.yaml"]
    errors = subprocess.STDOUT if together else subprocess.PIPE
    with subprocess.Popen(ask, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, text=True) as running:
        assert running.stdout is not None
        running.stdout.close()  # as `| head -n 0` does
        said = running.stderr.read() if running.stderr else ""
        assert running.wait(120) in (0, 1)
    assert "Traceback" not in said and "BrokenPipe" not in said and "Exception ignored" not in said
    assert json.loads((tmp_path / "out of it" / "manifest.json").read_text())["status"] == "complete"
