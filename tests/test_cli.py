"""The shell of the command line: exit codes, streams, closed pipes. Verbs have tests of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from comatch import cli
from comatch.config import load_config
from comatch.errors import ConfigError, ModelError

RUN = """\
name: tiny
model: comatch-nano
recipe: coma
stages:
  match: {steps: 2, batch: 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


def comatch(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "comatch", *map(str, args)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ModelError("no such model [bold]x[/bold]"), 1),
        (ConfigError("unknown key 'stpes'"), 2),
        (KeyboardInterrupt(), 130),
        (typer.Exit(75), 75),
        (typer.Exit(3), 3),
        (None, 0),
    ],
)
def test_exit_codes(
    error: BaseException | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    app = typer.Typer()

    @app.command()
    def verb() -> None:
        print("data")  # noqa: T201 - stands for a verb's data
        if error is not None:
            raise error

    monkeypatch.setattr(cli, "build", lambda: app)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == code
    out, err = capsys.readouterr()
    assert out == "data\n"
    if isinstance(error, ModelError | ConfigError):
        assert err == f"{type(error).__name__}: {error}\n"


def test_wrong_usage_is_2_and_says_nothing_on_stdout() -> None:
    for args in (["no-such-verb"], ["config", "show"], ["config", "shwo", "x.yaml"]):
        run = comatch(*args)
        assert (run.returncode, run.stdout) == (2, "")
        assert run.stderr


def test_version() -> None:
    run = comatch("--version")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count(".") == 2


def test_config_show_says_where_each_value_came_from(file: Path) -> None:
    run = comatch("config", "show", file, "seed=7")
    assert (run.returncode, run.stderr) == (0, "")
    assert f"name: tiny  # {file}:1\n" in run.stdout
    assert "seed: 7  # command line\n" in run.stdout
    assert f"    steps: 2  # {file}:5\n" in run.stdout
    assert "      lr: 5.0e-05  # default\n" in run.stdout


def test_config_show_prints_a_config_of_the_same_run(file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.yaml"
    overrides = ["seed=7", "data.columns={query.text: a, '1': '# b'}"]
    config = load_config(file, overrides)
    again.write_text(comatch("config", "show", file, *overrides).stdout, encoding="utf-8")
    assert load_config(again) == config != load_config(file)
    shown = json.loads(comatch("config", "show", file, *overrides, "--json").stdout)
    assert shown["config"] == config.model_dump(mode="json")
    assert shown["digest"] == config.digest
    assert shown["origins"]["seed"] == "command line"


def test_a_config_typo_is_2_with_the_nearest_key_before_any_model_loads(file: Path) -> None:
    run = comatch("config", "show", file, "stages.match.stpes=3")
    assert (run.returncode, run.stdout) == (2, "")
    assert "'stages.match.stpes'" in run.stderr
    assert "did you mean 'steps'?" in run.stderr
    code = f"import sys, comatch.config as c\nc.load_config({str(file)!r})\nprint('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_a_closed_pipe_ends_without_a_word(file: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ask = [sys.executable, "-m", "comatch", "config", "show", str(file)]
    run = subprocess.run(ask, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")
