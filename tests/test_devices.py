"""Work on a device gives what it gives in host memory, and no pass of it makes the host wait (specs/performance.md 9).

Shown without a GPU, on a pretended one that refuses what a GPU refuses and notes what a GPU's host would wait for.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from comatch.backbones.base import Backbone
from comatch.backbones.tower import lookups
from comatch.devices import HOST

HERE = Path(__file__).resolve().parent
Folders = Callable[[str], Path]


@cache
def found(folder: Path) -> dict[str, Any]:
    """What the script says of a model."""
    where = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "on_pretended.py", folder], env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def ours(waits: list[dict[str, Any]]) -> Counter[str]:
    """What was waited for, and by which function; without the stock model's deepstack, which counts a mask in each early layer."""
    left = [wait for wait in waits if "_deepstack_process" not in wait["asked"]]
    return Counter(f"{wait['what']} in {wait['asked'][-1] if wait['asked'] else 'backward'}" for wait in left)


def test_a_step_on_a_device_is_the_step_in_host_memory(folder_of: Folders, family: str) -> None:
    steps = found(folder_of(family))["steps"]
    assert len(steps) == 12
    for name, step in steps.items():
        assert step["losses"][0] == pytest.approx(step["losses"][1], rel=1e-6), name
        assert step["same_names"] and step["gradients"] > 20 and step["off"] < 2e-6, name
        assert step["operations"] > 1000, "little was watched"
        assert (step["passes"] == 1) == (name == "coma match, one pass"), name


def test_no_pass_makes_the_host_wait(folder_of: Folders, family: str) -> None:
    """A step of labels waits for the number of examples of all ranks before it, and for its loss after it, however many passes it has."""
    steps = found(folder_of(family))["steps"]
    told = {name: step for name, step in steps.items() if " match" not in name}
    assert len(told) == 8
    stock = family == "qwen3_vl"
    for name, step in told.items():
        waits = ours(step["waits"])
        once = {"aten._to_copy in token_step": 2, "aten._local_scalar_dense in check_finite": 1}
        # The backward pass of deepstack is the stock model's as well, and nobody's by name.
        left = {what: n for what, n in waits.items() if not (stock and what.startswith("aten.index") and what.endswith("backward"))}
        assert left == once, name
    matched = {name: ours(step["waits"]) for name, step in steps.items() if name.startswith("coma match")}
    assert len(matched) == 3
    for name, waits in matched.items():
        in_loss = {what: n for what, n in waits.items() if not what.endswith("backward")}
        assert in_loss == {what: n for what, n in matched["coma match, one pass"].items() if not what.endswith("backward")}, name
        if not stock:
            assert waits == matched["coma match, one pass"], name
    whole = steps["coma match"]["waits"]
    assert all("_loss" in wait["asked"] for wait in whole if wait["asked"] and "_deepstack_process" not in wait["asked"])


def test_other_uses_of_a_device(folder_of: Folders, family: str) -> None:
    uses = found(folder_of(family))["uses"]
    assert set(uses) == {"encode", "mask_check", "carried", "redundancy", "answers"}
    for name, use in uses.items():
        assert use["off"] <= 1e-6 * max(1.0, use["largest"]) and use["numbers"] > 0, name
    assert sum(ours(uses["encode"]["waits"]).values()) == 1, "the vectors are read, and nothing before them"


def test_the_stock_tower_takes_what_is_looked_up_for_it(folder_of: Folders, family: str) -> None:
    """Every value is used: with it the sizes are of no use, and none travels on into the blocks, where nobody would look at it."""
    tower = Backbone.load(folder_of(family)).vision_tower
    grids, nonsense = torch.tensor([[1, 4, 6], [1, 8, 4]]), torch.full((2, 3), -1)
    side = tower.config.patch_size
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * side * side, generator=torch.Generator().manual_seed(0))
    given: list[set[str]] = []
    for block in tower.blocks:
        block.register_forward_pre_hook(lambda _, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    with torch.no_grad():
        plain = tower(pixels, grid_thw=grids).pooler_output
        stock = given.copy()
        given.clear()
        found = tower(pixels, grid_thw=nonsense, **lookups(tower, grids, HOST)).pooler_output
        assert torch.equal(found, plain) and given == stock
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            tower(pixels, grid_thw=nonsense)
