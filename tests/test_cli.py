"""The command line does what the library does, to the bit, and says how it ended by its exit code."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from comatch import cli
from comatch.content import Text
from comatch.core.batch import ROLE_ID, Example
from comatch.data.items import read_items
from comatch.data.scenes import scene
from comatch.encoder import Encoder, write_json
from comatch.errors import ContentError, ImageError, SearchError
from comatch.recipes import load_recipe
from comatch.search.index import Index
from comatch.search.update import update

Folders = Callable[[str], Path]
HTML = b"<html>not found</html>"


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`comatch ARGS...` in this process; `stdin` is a text."""

    def go(*args: object, stdin: str = "") -> Ran:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([str(arg) for arg in args])
        code = end.value.code
        return Ran(code if isinstance(code, int) else 0, *capsys.readouterr())

    return go


@pytest.fixture(scope="module")
def model(folder_of: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved encoder with random weights."""
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=load_recipe("coma").with_tokens(4))
    return encoder.save(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def encoder(model: Path) -> Encoder:
    return Encoder.load(model)


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model but for one number."""
    encoder = Encoder.load(model)
    encoder.backbone.rows.data[0, 0] += 1
    return encoder.save(tmp_path_factory.mktemp("cli") / "other")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    draw(folder, range(6))
    return folder


def draw(folder: Path, numbers: Sequence[int]) -> None:
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


def vectors_of(ran: Ran) -> np.ndarray:
    return np.array([row["vector"] for row in ran.objects], dtype=np.float32)


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of examples of every forward pass from now on."""
    counts: list[int] = []
    plain = Encoder.forward

    def counting(self: Encoder, examples: Sequence[Example]) -> Any:
        counts.append(len(examples))
        return plain(self, examples)

    monkeypatch.setattr(Encoder, "forward", counting)
    return counts


# --- encode


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".jsonl"])
def test_encode_a_folder_is_the_library(
    run: Run, model: Path, encoder: Encoder, pictures: Path, tmp_path: Path, suffix: str
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
    run: Run, model: Path, encoder: Encoder, pictures: Path, tmp_path: Path
) -> None:
    rows = [{"id": f"r{i}", "note": f"scene {i}", "file": f"pictures/s{i}.png"} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.csv").write_text("id,note,file\n" + "".join(",".join(row.values()) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    wanted = encoder.encode([{"image": tmp_path / row["file"], "text": row["note"]} for row in rows])
    for name in ("t.jsonl", "t.csv", "t.parquet"):
        ran = run("encode", model, tmp_path / name, "--text-column", "note", "--image-column", "file")
        assert ran.code == 0 and [row["id"] for row in ran.objects] == ["r0", "r1", "r2", "r3"]
        np.testing.assert_array_equal(vectors_of(ran), wanted)
    texts = run("encode", model, tmp_path / "t.csv", "--text-column", "note")
    np.testing.assert_array_equal(vectors_of(texts), encoder.encode([row["note"] for row in rows]))


def test_encode_reads_standard_input(run: Run, model: Path, encoder: Encoder, pictures: Path) -> None:
    ran = run("encode", model, "-", stdin="a red circle\n\nein Kreis, rot\n")
    assert [row["id"] for row in ran.objects] == ["0", "2"]
    np.testing.assert_array_equal(vectors_of(ran), encoder.encode(["a red circle", "ein Kreis, rot"]))
    ran = run("encode", model, "-", stdin='{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n')
    assert [row["id"] for row in ran.objects] == ["a", "b"]
    np.testing.assert_array_equal(vectors_of(ran), encoder.encode(["one", "two"]))


def test_encode_one_item_and_a_cut(run: Run, model: Path, encoder: Encoder, pictures: Path) -> None:
    picture = pictures / "s1.png"
    for args, item in (
        (("--text", "a red circle"), "a red circle"),
        (("--image", picture), picture),
        (("--image", picture, "--text", "what?"), [picture, "what?"]),
    ):
        ran = run("encode", model, *args, "--dim", 8)
        assert ran.code == 0
        np.testing.assert_array_equal(vectors_of(ran), encoder.encode([item], dim=8))


def test_a_stream_equals_encode_stretch_by_stretch(encoder: Encoder) -> None:
    items = [(f"t{i}", f"text number {i} " * (1 + i % 5)) for i in range(20)]
    taken: list[str] = []

    def source() -> Any:
        for id, text in items:
            taken.append(id)
            yield id, text

    stream = encoder.stream(source(), chunk=8)
    first = next(stream)
    assert taken == [id for id, _ in items[:8]], "more was read than fits one stretch"
    stretches = [first, *stream]
    assert [id for part in stretches for id in part.ids] == [id for id, _ in items]
    for at, part in zip((0, 8, 16), stretches, strict=True):
        np.testing.assert_array_equal(part.vectors, encoder.encode([text for _, text in items[at : at + 8]]))


def test_long_texts_are_cut_and_counted(run: Run, model: Path, encoder: Encoder) -> None:
    long = "word " * 2000
    with pytest.warns(UserWarning, match="text of 1 items was longer"):
        wanted = encoder.encode(["short", long])
    ran = run("encode", model, "-", stdin=f"short\n{long}\n")
    assert ran.code == 0 and "1 texts were longer" in ran.err
    np.testing.assert_array_equal(vectors_of(ran), wanted)


# --- bad items (rows 1, 7, 10)


def test_a_bad_item_stops_encode_and_leaves_no_file(
    run: Run, model: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "s3.png").write_bytes(HTML)
    out = tmp_path / "out.npy"
    out.write_bytes(b"older result")
    ran = run("encode", model, pictures, "--out", out)
    assert ran.code == cli.FAILED and ran.out == ""
    assert "item 3: 's3.png'" in ran.err and "HTML" in ran.err
    assert out.read_bytes() == b"older result" and sorted(p.name for p in tmp_path.iterdir()) == [
        "out.npy",
        "pictures",
    ]


def test_skip_errors_encodes_the_rest_and_says_so(
    run: Run, model: Path, encoder: Encoder, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "s3.png").write_bytes(HTML)
    (pictures / "s5.png").write_bytes((pictures / "s5.png").read_bytes()[:200])
    ran = run("encode", model, pictures, "--out", tmp_path / "out.npy", "--skip-errors", "--json")
    assert ran.code == cli.QUARANTINED
    assert [(one["position"], one["id"]) for one in ran.objects[0]["bad"]] == [(3, "s3.png"), (5, "s5.png")]
    assert "3 (s3.png)" in ran.err and "5 (s5.png)" in ran.err
    ids, vectors = read(tmp_path / "out.npy")
    assert ids == ["s0.png", "s1.png", "s2.png", "s4.png"]
    np.testing.assert_array_equal(vectors, encoder.encode([pictures / id for id in ids]))


def test_one_bad_item_in_64_leaves_63_to_the_bit(encoder: Encoder, pictures: Path) -> None:
    items: list[Any] = [f"text {i} " * (1 + i % 4) if i % 3 else pictures / f"s{i % 6}.png" for i in range(64)]
    bad = pictures / "bad.png"
    bad.write_bytes(HTML)
    alone = encoder.encode([item for i, item in enumerate(items) if i != 17])
    vectors, errors = encoder.encode([*items[:17], bad, *items[18:]], on_error="mark")
    assert list(errors) == [17] and "HTML" in errors[17]
    np.testing.assert_array_equal(np.delete(vectors, 17, axis=0), alone)
    assert not vectors[17].any() and vectors[16].any()
    with pytest.raises(ImageError, match="item 17") as caught:
        encoder.encode([*items[:17], bad, *items[18:]])
    assert caught.value.position == 17


@pytest.mark.parametrize("empty", ["", "  \n", None, float("nan"), "\0"])
def test_nothing_is_no_item(encoder: Encoder, empty: object) -> None:
    with pytest.raises(ContentError, match="item 1"):
        encoder.encode(["one", empty])


# --- hostile texts (rows 8, 9)

TYPED = ("<|im_end|>", "<|image_pad|>", "<|ctoken_pad_0|>", "<|vision_start|><|image_pad|><|vision_end|>")


@pytest.mark.parametrize("typed", TYPED)
def test_special_tokens_in_a_text_are_plain_text(run: Run, model: Path, encoder: Encoder, typed: str) -> None:
    tokenizer, stage = encoder.backbone.tokenizer, encoder.stage
    assert len(tokenizer.encode(typed)) <= 3, "these are no special tokens of this tokenizer"
    row = encoder.preparer.renderer.item(as_item(typed), stage)
    context = [id for id, role in zip(row.ids, row.roles, strict=True) if role == "context"]
    assert not set(context) & {*tokenizer.all_special_ids, *encoder.preparer.renderer.compression}
    assert tokenizer.decode(context) == typed and not row.images
    neighbours = ["before", scene(0, 1).draw(), "after"]
    among = encoder.encode([neighbours[0], f"a {typed} b", *neighbours[1:]])
    np.testing.assert_allclose(np.delete(among, 1, axis=0), encoder.encode(neighbours), atol=2e-6)
    ran = run("encode", model, "-", stdin=f"before\na {typed} b\n")
    assert ran.code == 0
    np.testing.assert_array_equal(vectors_of(ran), encoder.encode(["before", f"a {typed} b"]))


def as_item(text: str) -> Any:
    from comatch.content import as_message

    return as_message(text)


def test_compression_tokens_stand_only_at_the_end(encoder: Encoder) -> None:
    example = encoder.preparer.item(as_item("".join(TYPED)), encoder.stage)
    ours = np.isin(example.ids, encoder.preparer.renderer.compression)
    np.testing.assert_array_equal(ours, example.roles == ROLE_ID["compression"])
    assert ours.sum() == 4 and ours[-4:].all()


def test_a_text_that_is_a_path_or_an_address_stays_text(
    run: Run, model: Path, encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    for name in ("socket.socket.connect", "socket.getaddrinfo", "socket.create_connection"):
        monkeypatch.setattr(name, refuse)
    texts = [str(pictures / "s0.png"), "http://127.0.0.1:9/x.png", "file:///etc/passwd", "data:image/png;base64,AA"]
    vectors = encoder.encode(texts)
    np.testing.assert_array_equal(vectors, encoder.encode([Text(text) for text in texts]))
    assert np.abs(vectors[0] - encoder.encode([pictures / "s0.png"])[0]).max() > 1e-3
    ran = run("encode", model, "-", stdin="".join(f"{text}\n" for text in texts))
    assert ran.code == 0
    np.testing.assert_array_equal(vectors_of(ran), vectors)
    np.testing.assert_array_equal(vectors_of(run("encode", model, "--text", texts[0])), encoder.encode([texts[0]]))


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
def test_wrong_usage_is_told_before_anything_is_loaded(run: Run, args: Sequence[str]) -> None:
    ran = run(*args)
    assert ran.code == cli.USAGE and ran.out == "" and "Usage" in ran.err


def test_a_missing_input_is_told_before_the_model(run: Run, tmp_path: Path) -> None:
    for verb in (("encode",), ("index", "--out", tmp_path / "index")):
        ran = run(*verb, "no-such-model", tmp_path / "missing")
        assert ran.code == cli.FAILED and "missing" in ran.err and "no-such-model" not in ran.err
    assert not (tmp_path / "index").exists()


def test_a_half_written_run_is_refused_and_a_complete_one_read(
    run: Run, model: Path, encoder: Encoder, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(model, folder / "match")
    write_json(folder / "manifest.json", {"status": "running", "done": ["match"]})
    ran = run("encode", folder, "--text", "x")
    assert ran.code == cli.FAILED and "half-written run" in ran.err and "match" in ran.err
    (folder / "manifest.json").write_text('{"status": "comp')
    assert "manifest.json" in run("encode", folder, "--text", "x").err
    write_json(folder / "manifest.json", {"status": "complete", "done": ["compress", "match"]})
    np.testing.assert_array_equal(vectors_of(run("encode", folder, "--text", "x")), encoder.encode(["x"]))


# --- index and search


def test_index_and_search_are_encode_and_argsort(
    run: Run, model: Path, encoder: Encoder, pictures: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    ran = run("index", model, pictures, "--out", index, "--json")
    done = ran.objects[0]
    assert ran.code == 0 and done["added"] == done["encoded"] == done["rows"] == 6 and not done["bad"]
    ids = [f"s{i}.png" for i in range(6)]
    stored = encoder.encode([pictures / id for id in ids])
    queries: list[tuple[Sequence[object], Any]] = [
        (("a red circle",), "a red circle"),
        (("--image", pictures / "s2.png"), pictures / "s2.png"),
        (("what?", "--image", pictures / "s2.png"), [pictures / "s2.png", "what?"]),
    ]
    for args, query in queries:
        scores = stored @ encoder.encode([query])[0]
        order = np.argsort(-scores)[:4]
        hits = run("search", index, *args, "-k", 4, "--json").objects
        assert [hit["id"] for hit in hits] == [ids[i] for i in order]
        np.testing.assert_allclose([hit["score"] for hit in hits], scores[order], atol=1e-6)
        assert [hit["rank"] for hit in hits] == [1, 2, 3, 4]
        assert hits[0]["image"] == str((pictures / hits[0]["id"]).resolve())
        assert hits[0]["margin"] == pytest.approx(hits[0]["score"] - hits[1]["score"], abs=1e-6)
    table = run("search", index, "a red circle", "-k", 2)
    found = run("search", index, "a red circle", "-k", 2, "--json").objects
    assert table.code == 0 and len(table.out.splitlines()) == 3
    assert [line.split()[-1] for line in table.out.splitlines()[1:]] == [hit["id"] for hit in found]
    many = run("search", index, "-", "-k", 2, "--json", stdin="a blue square\na red circle\n").objects
    assert [hit["query"] for hit in many] == ["a blue square"] * 2 + ["a red circle"] * 2
    assert [hit["id"] for hit in many[2:]] == [hit["id"] for hit in found]


def state(index: Path) -> dict[str, tuple[str, bytes]]:
    """Id -> digest and vector of every row."""
    with Index.open(index) as opened:
        return {id: (opened.get(id)["digest"], opened.vectors([id]).tobytes()) for id in opened}


def test_a_second_index_encodes_only_what_is_new(
    run: Run, model: Path, encoder: Encoder, pictures: Path, tmp_path: Path, forwarded: list[int]
) -> None:
    index = tmp_path / "index"
    assert run("index", model, pictures, "--out", index).code == 0
    first = state(index)
    assert sum(forwarded) == 6
    forwarded.clear()
    again = run("index", model, pictures, "--out", index)
    assert again.code == 0 and "6 unchanged" in again.out and "0 encoded" in again.out
    assert forwarded == [] and state(index) == first

    (pictures / "s0.png").rename(pictures / "renamed.png")
    (pictures / "s1.png").unlink()
    draw(pictures / "below", [7])
    shutil.copy(pictures / "below" / "s7.png", pictures / "below" / "copy.png")
    shutil.copy(pictures / "below" / "s7.png", pictures / "s2.png")
    done = run("index", model, pictures, "--out", index, "--json").objects[0]
    counts = {key: done[key] for key in ("added", "changed", "unchanged", "removed", "encoded", "rows")}
    assert counts == {"added": 3, "changed": 1, "unchanged": 3, "removed": 2, "encoded": 1, "rows": 7}
    assert sum(forwarded) == 1
    now = state(index)
    assert now["renamed.png"] == first["s0.png"] and "s0.png" not in now and "s1.png" not in now
    assert now["s2.png"] == now["below/copy.png"] == now["below/s7.png"] != first["s2.png"]
    run("index", model, pictures, "--out", tmp_path / "fresh")
    fresh = state(tmp_path / "fresh")
    assert {id: digest for id, (digest, _) in now.items()} == {id: digest for id, (digest, _) in fresh.items()}
    for id, (_, vector) in now.items():
        np.testing.assert_allclose(np.frombuffer(vector), np.frombuffer(fresh[id][1]), atol=2e-6)


def test_index_goes_on_past_bad_files_and_forgets_what_went_bad(
    run: Run, model: Path, pictures: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    (pictures / "zero.png").touch()
    (pictures / "page.jpg").write_bytes(HTML)
    ran = run("index", model, pictures, "--out", index, "--json")
    assert ran.code == cli.QUARANTINED and ran.objects[0]["added"] == 6
    assert sorted(one["id"] for one in ran.objects[0]["bad"]) == ["page.jpg", "zero.png"]
    assert "page.jpg" in ran.err and "zero.png" in ran.err
    (pictures / "s4.png").write_bytes((pictures / "s4.png").read_bytes()[:300])
    ran = run("index", model, pictures, "--out", index)
    assert ran.code == cli.QUARANTINED and "3 bad" in ran.out and "1 removed" in ran.out
    assert "s4.png" not in state(index) and len(state(index)) == 5


def test_rows_below_an_unreadable_folder_stay(encoder: Encoder, pictures: Path, tmp_path: Path) -> None:
    draw(pictures / "below", [7])
    items = list(read_items(pictures))
    index = Index.create(tmp_path / "index", encoder.fingerprint, encoder.dim)
    assert update(index, encoder, items, source="here", prune=True).added == 7
    closed = ("below", ImageError("folder cannot be read"))
    seen = [item for item in items if item[0] not in ("below/s7.png", "s5.png")]
    done = update(index, encoder, [*seen, closed], source="here", prune=True)
    assert done.removed == 1 and "below/s7.png" in index and "s5.png" not in index
    assert update(index, encoder, [(".", ImageError("closed"))], source="here", prune=True).removed == 0


def test_an_index_of_another_model_is_refused_with_both_names(
    run: Run, model: Path, other: Path, pictures: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    run("index", model, pictures, "--out", index)
    before = state(index)
    names = {Encoder.load(model).fingerprint, Encoder.load(other).fingerprint}
    assert len(names) == 2
    for args in (("index", other, pictures, "--out", index), ("search", index, "x", "--model", other)):
        ran = run(*args)
        assert ran.code == cli.FAILED and ran.out == "" and all(name in ran.err for name in names)
    assert state(index) == before


def test_a_model_that_moved_is_named_and_can_be_given(
    run: Run, model: Path, pictures: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(model, mine)
    run("index", mine, pictures, "--out", tmp_path / "index")
    found = run("search", tmp_path / "index", "a red circle").out
    mine.rename(tmp_path / "moved")
    ran = run("search", tmp_path / "index", "a red circle")
    assert ran.code == cli.FAILED and str(mine) in ran.err and "--model" in ran.err
    assert run("search", tmp_path / "index", "a red circle", "--model", tmp_path / "moved").out == found != ""
    assert run("search", tmp_path / "none", "x").code == cli.FAILED


def test_two_inputs_never_overwrite_each_other_and_a_moved_one_is_known(
    run: Run, model: Path, encoder: Encoder, pictures: Path, tmp_path: Path, forwarded: list[int]
) -> None:
    index, second = tmp_path / "index", tmp_path / "second"
    run("index", model, pictures, "--out", index)
    draw(second, [1, 8])
    ran = run("index", model, second, "--out", index)
    assert ran.code == cli.FAILED and "s1.png" in ran.err and str(pictures) in ran.err and str(second) in ran.err
    assert len(state(index)) == 6
    (second / "s1.png").unlink()
    ran = run("index", model, second, "--out", index)
    assert ran.code == 0 and len(state(index)) == 7, "the first folder's rows must stay"
    forwarded.clear()
    pictures.rename(tmp_path / "moved")
    (tmp_path / "moved" / "s0.png").unlink()
    done = run("index", model, tmp_path / "moved", "--out", index, "--json").objects[0]
    assert (done["changed"], done["removed"], done["encoded"], done["rows"]) == (5, 1, 0, 6)
    assert forwarded == []
    hit = run("search", index, "--image", tmp_path / "moved" / "s2.png", "-k", 1, "--json").objects[0]
    assert hit["image"] == str(tmp_path / "moved" / "s2.png")


def test_update_itself_refuses_another_encoder(other: Path, pictures: Path, tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", "some other", 32)
    with pytest.raises(SearchError, match="some other"):
        update(index, Encoder.load(other), read_items(pictures))


def test_texts_in_an_index(run: Run, model: Path, encoder: Encoder, tmp_path: Path) -> None:
    index, texts = tmp_path / "index", ["a red circle", "a blue square", "a red circle", "\x1b[31mred"]
    ran = run("index", model, "-", "--out", index, "--json", stdin="".join(f"{text}\n" for text in texts))
    assert ran.code == 0 and ran.objects[0]["encoded"] == 3 and ran.objects[0]["added"] == 4
    hit = run("search", index, "a blue square", "-k", 1, "--json").objects[0]
    assert (hit["id"], hit["text"]) == ("1", "a blue square") and hit["score"] == pytest.approx(1, abs=1e-6)


# --- evaluate


def test_evaluate_prints_the_library_scores(run: Run, model: Path, encoder: Encoder) -> None:
    from comatch.evaluation.tasks import evaluate, scene_tasks

    wanted = evaluate(encoder, scene_tasks(4, 8))
    args = ("evaluate", model, "--n", 4, "--candidates", 8)
    told = run(*args, "--json")
    assert told.code == 0
    for row, score in zip(told.objects[0]["tasks"], wanted, strict=True):
        assert (row["name"], row["hit"], row["low"], row["high"]) == (score.name, score.hit, score.low, score.high)
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
