"""`import comatch` is quick, lazy and says the same to people and to type checkers."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

import comatch
from comatch import errors


def test_importing_loads_nothing_of_ours() -> None:
    code = "import sys, comatch\nprint([m for m in sys.modules if m.startswith(('comatch.', 'torch'))])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_name_is_there_and_is_the_one_of_its_module() -> None:
    for name, module in comatch._HOME.items():
        assert getattr(comatch, name) is getattr(import_module(module), name)
    assert set(comatch.__all__) <= set(dir(comatch))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(comatch.__file__).read_text(encoding="utf-8"))
    guard = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {a.asname: n.module for n in guard.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed == comatch._HOME


def test_every_error_is_exported() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert defined == {name for name, module in comatch._HOME.items() if module == "comatch.errors"}


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match=r"'comatch' has no attribute 'Encodr'.*Encoder"):
        _ = comatch.Encodr


def test_one_version() -> None:
    assert version("comatch") == comatch.__version__
