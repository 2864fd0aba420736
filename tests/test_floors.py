"""The house stands: modules import only from levels below their own."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "comatch"

# From the ground up. A room imports itself and lower lines; rooms on one line never import each other.
LEVELS = (
    # floor 0: no torch
    ("errors",),
    ("plain_yaml", "headers"),
    ("pictures",),
    ("content",),
    ("corruption",),
    ("recipe",),
    ("recipes",),
    ("config",),
    # floor 1: pure functions on tensors
    ("devices",),
    ("core", "objectives"),
    # floor 2
    ("backbones", "data", "render", "drawing"),
    # floor 3
    ("prepare", "card"),
    ("encoder",),
    ("released",),
    # floor 4
    ("training", "synthesis", "evaluation", "analysis", "search", "export"),
    # floor 5
    ("studies",),
    ("serving", "cli"),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
FLOOR_0 = [room for rooms in LEVELS[:8] for room in rooms]


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of one module, given its dotted name and its text."""
    room = module.split(".")[1]
    if room not in LEVEL:
        return [f"{module}: room {room!r} stands on no floor; give it a line in LEVELS"]
    wrong = []
    for line, name in imports(ast.parse(source), module):
        other = name.split(".")[1] if "." in name else "the package itself"
        if other not in LEVEL:
            wrong.append(f"{module}:{line} imports {name}, which is no room")
        elif other != room and LEVEL[other] >= LEVEL[room]:
            wrong.append(f"{module}:{line} imports {other}, which is not below {room}")
    return wrong


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each import of comatch, also inside functions; not under `if TYPE_CHECKING`."""
    checking = ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    guards = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) in checking]
    unseen = {id(n) for guard in guards for child in guard.body for n in ast.walk(child)}
    for node in ast.walk(tree):
        names: list[str] = []
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "comatch" else [base]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        for name in names:
            if name.split(".")[0] == "comatch" and name != "comatch.__version__":
                yield getattr(node, "lineno", 0), name


def modules() -> list[tuple[str, Path]]:
    """Dotted name and file of every module but the package's own, which re-exports from all floors."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name != "comatch":
            # A package's own file is one deeper for relative imports.
            found.append((f"{name}.__init__" if path.name == "__init__.py" else name, path))
    return found


def test_every_module_imports_only_from_below() -> None:
    found = modules()
    assert len(found) > 10
    wrong = [line for name, path in found for line in violations(name, path.read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("comatch.core.batch", "import comatch.encoder"),
        ("comatch.core.batch", "from comatch import encoder"),
        ("comatch.core.batch", "from comatch import Encoder"),
        ("comatch.core.batch", "import comatch"),
        ("comatch.core.batch", "from ..encoder import Encoder"),
        ("comatch.core.__init__", "from .. import encoder"),
        ("comatch.core.batch", "def f():\n    if x:\n        from comatch.data.sources import Source"),
        ("comatch.core.batch", "try:\n    import x\nexcept ImportError:\n    from comatch.cli import main"),
        ("comatch.core.batch", "import importlib\nimportlib.import_module('comatch.encoder')"),
        ("comatch.core.batch", "if TYPE_CHECKING:\n    pass\nelse:\n    import comatch.encoder"),
        ("comatch.data.sources", "from comatch.backbones.base import Backbone"),
        ("comatch.prepare", "from comatch.encoder import Encoder"),
        ("comatch.pictures", "from comatch.content import Image"),
        ("comatch.errors", "from comatch.recipe import Recipe"),
        ("comatch.attic", "import math"),
    ],
)
def test_a_violation_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("comatch.encoder", "from comatch.prepare import Preparer\nfrom comatch.core import masks"),
        ("comatch.core.masks", "from comatch.core.batch import Batch\nfrom . import batch"),
        ("comatch.core.batch", "if TYPE_CHECKING:\n    import comatch.encoder"),
        ("comatch.training.run", "from comatch import __version__\nfrom comatch_plugins import x"),
        ("comatch.core.__init__", "from .batch import Batch"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_floor_0_loads_without_torch() -> None:
    names = [f"comatch.{room}" for room in FLOOR_0]
    slow = {"torch", "transformers", "numpy", "PIL"}
    code = f"import sys, {', '.join(names)}\nprint({slow} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
