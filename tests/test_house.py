"""House rules that a script can see: sizes, forbidden calls, nothing of one machine, a quick `--help`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in sorted(ROOT.glob("src/**/*.py"))}

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {"eval", "exec", "torch.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"}
MACHINE = re.compile(
    r"(?<![\w.-])/(?:work|farm|root|home/\w+|Users/\w+|opt/(?:wheels|pypi))(?:/|\b)"
    r"|\bpypi\.(?:org)\b|\bpythonhosted\.(?:org)\b|\bregistry\.npmjs\b|\bdeb\.debian\b"
)


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Functions above 60 lines, from `def` to the last line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > 60:
                yield f"{node.name} has {size} lines"


def forbidden(tree: ast.Module) -> Iterator[str]:
    """What can run code from data, or hide an error."""
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names if a.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{a.name}" for a in node.names}
            found = sorted(names & CALLS) or [node.module] * (node.module.split(".")[0] in MODULES)
        elif isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node) in CALLS:
            found = [ast.unparse(node)]
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            found = [node.arg] * (ast.unparse(node.value) != "False")
        elif isinstance(node, ast.ExceptHandler) and node.type is None:
            found = ["bare except"]
        yield from (f"line {getattr(node, 'lineno', '?')}: {name}" for name in found)


def test_no_file_is_too_long() -> None:
    assert len(FILES) > 10
    sizes = {name: len(text.splitlines()) for name, text in FILES.items()}
    assert {name: size for name, size in sizes.items() if size > 350} == {}


def test_no_function_is_too_long() -> None:
    found = [f"{name}: {line}" for name, text in FILES.items() for line in long_functions(ast.parse(text))]
    assert found == []


def test_nothing_forbidden() -> None:
    found = [f"{name}: {line}" for name, text in FILES.items() for line in forbidden(ast.parse(text))]
    assert found == []


def test_no_catch_all_files() -> None:
    lumps = ("utils", "util", "helpers", "helper", "misc")
    assert [name for name in FILES if Path(name).stem.strip("_") in lumps] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "from torch import load",
        "from yaml import load",
        "def f():\n    return eval('1')",
        "call = exec",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=trust)",
        "try:\n    pass\nexcept:\n    pass",
    ],
)
def test_the_forbidden_is_found(source: str) -> None:
    assert len(list(forbidden(ast.parse(source)))) == 1


def test_the_harmless_is_not_reported() -> None:
    source = "model.eval()\nyaml.safe_load(text)\njson.load(file)\nnumpy.load(path, allow_pickle=False)"
    assert list(forbidden(ast.parse(source))) == []


@pytest.mark.parametrize(("lines", "found"), [(60, 0), (61, 1)])
def test_the_limit_of_a_function(lines: int, found: int) -> None:
    source = "def f():\n" + "    pass\n" * (lines - 1)
    assert len(list(long_functions(ast.parse(source)))) == found


def test_nothing_of_one_machine_in_the_tree() -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in run.stdout.split("\0") if name]
    assert len(paths) > 10
    found = []
    for path in paths:
        data = path.read_bytes() if path.is_file() and path != Path(__file__) else b""
        if b"\0" not in data[:4096]:
            text = data.decode("utf-8", errors="replace")
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("open('/work/shared/x')", True),
        ("cd /root/x", True),
        ("see https://" + "pypi" + ".org/simple", True),
        ("/home/ada/models", True),
        ("net/work/x, home/page, ./work/x", False),
    ],
)
def test_a_path_of_a_machine_is_found(text: str, found: bool) -> None:
    assert bool(MACHINE.search(text)) is found


def test_help_is_quick_and_light() -> None:
    times = []
    ask = [sys.executable, "-m", "comatch", "--help"]
    for _ in range(3):
        start = time.perf_counter()
        run = subprocess.run(ask, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    assert "config" in run.stdout
    assert min(times) < 0.5, f"`comatch --help` took {min(times):.2f} s at best"
    code = (
        "import sys, comatch.cli\n"
        "try:\n    comatch.cli.main(['--help'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "set()"


def test_the_oldest_releases_that_are_tested_are_the_oldest_that_are_allowed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    allowed = {name: bound for line in named for name, bound in re.findall(r"^([\w-]+)>=([\d.]+)", line)}
    pinned = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text("utf-8"), re.MULTILINE)
    assert len(pinned) == 4
    for name, version in pinned:
        assert f"{version}.".startswith(f"{allowed[name]}."), f"{name}: {version} is tested, {allowed[name]} is allowed"
