"""The command line does what the library does, to the bit, and says how it ended by its exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cli_run import read, run

from comatch import cli
from comatch.encoder import Encoder, write_json
from comatch.evaluation.tasks import evaluate, scene_tasks

# --- encode


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
def test_encode_a_folder_is_the_library(
    model: Path, encoder: Encoder, pictures: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"vectors{suffix}"
    ran = run("encode", model, pictures, "--out", out, "--json")
    assert ran.code == 0 and ran.objects[0]["fingerprint"] == encoder.fingerprint
    ids, vectors = read(out)
    assert ids == [f"s{i}.png" for i in range(6)]
    np.testing.assert_array_equal(vectors, encoder.encode([pictures / id for id in ids]))
    assert vectors.dtype == np.float32 and len(np.unique(vectors, axis=0)) == 6
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] == ".") == [], "the file aside is left"


def test_encode_tables_are_the_library(
    model: Path, encoder: Encoder, pictures: Path, tmp_path: Path
) -> None:
    rows = [{"id": f"r{i}", "note": f"scene {i}", "file": f"pictures/s{i}.png"} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.csv").write_text("id,note,file\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    wanted = encoder.encode([{"image": tmp_path / row["file"], "text": row["note"]} for row in rows])
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        ran = run("encode", model, tmp_path / name, "--text-column", "note", "--image-column", "file")
        assert ran.code == 0 and [row["id"] for row in ran.objects] == ["r0", "r1", "r2", "r3"]
        np.testing.assert_array_equal(ran.vectors, wanted)
    texts = run("encode", model, tmp_path / "t.csv", "--text-column", "note")
    np.testing.assert_array_equal(texts.vectors, encoder.encode([row["note"] for row in rows]))


def test_encode_reads_standard_input(model: Path, encoder: Encoder, pictures: Path) -> None:
    ran = run("encode", model, "-", stdin="a red circle\n\nein Kreis, rot\n")
    assert [row["id"] for row in ran.objects] == ["0", "2"]
    np.testing.assert_array_equal(ran.vectors, encoder.encode(["a red circle", "ein Kreis, rot"]))
    ran = run("encode", model, "-", stdin='{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
    assert [row["id"] for row in ran.objects] == ["a", "b"]
    np.testing.assert_array_equal(ran.vectors, encoder.encode(["one", "two"]))


def test_encode_one_item_and_a_cut(model: Path, encoder: Encoder, pictures: Path) -> None:
    picture = pictures / "s1.png"
    for args, item in (
        (("--text", "a red circle"), "a red circle"),
        (("--image", picture), picture),
        (("--image", picture, "--text", "what?"), [picture, "what?"]),
    ):
        ran = run("encode", model, *args, "--dim", 8)
        assert ran.code == 0
        np.testing.assert_array_equal(ran.vectors, encoder.encode([item], dim=8))


def test_a_stream_equals_encode_stretch_by_stretch(encoder: Encoder) -> None:
    items = [(f"t{i}", f"text number {i} " * (1 + i % 5)) for i in range(20)]
    taken: list[str] = []

    def source() -> Any:
        for id, text in items:
            taken.append(id)
            yield id, text

    stream = encoder.stream(source(), chunk=8)
    first = next(stream)
    assert taken == [id for id, _ in items[:16]], "one stretch is read ahead, and no more"
    stretches = [first, *stream]
    assert [id for part in stretches for id in part.ids] == [id for id, _ in items]
    for at, part in zip((0, 8, 16), stretches, strict=True):
        np.testing.assert_array_equal(part.vectors, encoder.encode([text for _, text in items[at : at + 8]]))


def test_long_texts_are_cut_and_counted(model: Path, encoder: Encoder) -> None:
    long = "word " * 2000
    with pytest.warns(UserWarning, match="text of 1 items was longer"):
        wanted = encoder.encode(["short", long])
    ran = run("encode", model, "-", stdin=f"short\n{long}\n")
    assert ran.code == 0 and "1 texts were longer" in ran.err
    np.testing.assert_array_equal(ran.vectors, wanted)


# --- usage, models


@pytest.mark.parametrize(
    "args",
    [
        ("encode", "model"),
        ("encode", "model", "input", "--text", "x"),
        ("encode", "model", "input", "--out", "x.pickle"),
        ("encode", "model", "input", "--out", "no-such-folder/x.npy"),
        ("encode", "model", "input", "--dim", "0"),
        ("index", "model", "input"),
        ("search", "index"),
        ("search", "index", "-", "--image", "x.png"),
        ("search", "index", "words", "-k", "0"),
        ("evaluate", "model", "--suite", "emoji"),
        ("evaluate", "model", "--data", "x.parquet"),
        ("evaluate", "model", "--suite", "mmeb"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(args: Sequence[str]) -> None:
    ran = run(*args)
    assert ran.code == cli.USAGE and ran.out == "" and "Usage" in ran.err


def test_a_missing_input_is_told_before_the_model(tmp_path: Path) -> None:
    for verb in (("encode",), ("index", "--out", tmp_path / "index")):
        ran = run(*verb, "no-such-model", tmp_path / "missing")
        assert ran.code == cli.FAILED and "missing" in ran.err and "no-such-model" not in ran.err
    assert not (tmp_path / "index").exists()


def test_a_half_written_run_is_refused_and_a_complete_one_read(
    model: Path, encoder: Encoder, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(model, folder / "match")
    write_json(folder / "manifest.json", {"status": "running", "done": ["match"]})
    ran = run("encode", folder, "--text", "x")
    assert ran.code == cli.FAILED and "half-written run" in ran.err and "match" in ran.err
    (folder / "manifest.json").write_text('{"status": "comp')
    assert "manifest.json" in run("encode", folder, "--text", "x").err
    write_json(folder / "manifest.json", {"status": "complete", "done": ["compress", "match"]})
    np.testing.assert_array_equal(run("encode", folder, "--text", "x").vectors, encoder.encode(["x"]))


# --- evaluate


def test_evaluate_prints_the_library_scores(model: Path, encoder: Encoder) -> None:
    wanted = evaluate(encoder, scene_tasks(4, 8))
    args = ("evaluate", model, "--n", 4, "--candidates", 8)
    told = run(*args, "--json")
    assert told.code == 0
    for row, score in zip(told.objects[0]["tasks"], wanted, strict=True):
        told_of = (score.name, *(round(x, 6) for x in (score.hit, score.low, score.high)))
        assert (row["name"], row["hit"], row["low"], row["high"]) == told_of
        assert (row["ties"], row["n"]) == (score.ties, score.n)
    table = run(*args).out.splitlines()
    assert len(table) == 1 + len(wanted)
    for line, score in zip(table[1:], wanted, strict=True):
        assert line.split()[:3] == [score.name, score.meta, f"{100 * score.hit:.1f}"]


# --- another process


def test_another_process_gives_the_same_bits(model: Path, encoder: Encoder, tmp_path: Path) -> None:
    texts = ["a red circle", "zwei blaue Quadrate", "a path/to/x.png"]
    out = tmp_path / "out.npy"
    command = [sys.executable, "-m", "comatch", "encode", str(model), "-", "--out", str(out), "--skip-errors"]
    done = subprocess.run(
        command, input="".join(f"{text}\n" for text in texts).encode(), capture_output=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == b""
    np.testing.assert_array_equal(read(out)[1], encoder.encode(texts))
