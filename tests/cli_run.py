"""What the tests of the command line share: running a verb in this process, drawing pictures, reading results."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from comatch import cli
from comatch.data.scenes import scene

HTML = b"<html>not found</html>"


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def vectors(self) -> np.ndarray:
        return np.array([row["vector"] for row in self.objects], dtype=np.float32)


def run(*args: object, stdin: str = "") -> Ran:
    """`comatch ARGS...` in this process."""
    given = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "stdin", given), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        cli.main([str(arg) for arg in args])
    code = end.value.code
    return Ran(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def draw(folder: Path, numbers: Iterable[int]) -> None:
    """Scenes as folder/s0.png and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        PILImage.fromarray(scene(0, i).draw()).save(folder / f"s{i}.png")


def read(path: Path) -> tuple[list[str], np.ndarray]:
    """Ids and vectors of what `encode --out` wrote."""
    if path.suffix == ".npy":
        ids = path.with_suffix(".ids.jsonl").read_text().splitlines()
        return [json.loads(line) for line in ids], np.load(path, allow_pickle=False)
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["id"] for row in rows], np.array([row["vector"] for row in rows], dtype=np.float32)
