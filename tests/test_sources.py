"""Sources give the same units in any order and process, say the truth, and name what is wrong with a file."""

from __future__ import annotations

import csv
import io
import json
import pickle
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from comatch.content import Message, Text
from comatch.data.items import read_items
from comatch.data.scenes import scene
from comatch.data.sources import MODES, open_source
from comatch.data.tables import Parquet, open_table
from comatch.errors import ContentError, DataError, ImageError


def png(colour: int) -> bytes:
    out = io.BytesIO()
    PILImage.new("RGB", (8, 8), (colour % 256, 7, 9)).save(out, "PNG")
    return out.getvalue()


def pixels(message: Message) -> bytes:
    return message.images[0].load().tobytes()


@pytest.fixture(scope="session")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small table in the emoji layout, in three row groups."""
    path = tmp_path_factory.mktemp("emoji") / "emoji.parquet"
    rows = [
        {
            "id": f"{i:x}", "label": f"thing {i}", "tags": [f"t{i}", "round", "small"], "group": f"g{i % 3}",
            "subgroup": f"s{i % 7}", "image": {"bytes": png(i), "path": f"{i}.png"},
            "split": "dev" if i % 5 == 0 else "train",
        }
        for i in range(30)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10)
    return path


ROWS = [
    {"caption": 'a "red" cat, sitting', "file": "0.png", "other": "α\nβ"},
    {"caption": "a dog", "file": "sub/1.png", "other": ""},
    {"caption": "bird, 日本", "file": "2.png", "other": "x"},
]


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """The rows as a table of a kind, with the pictures they name beside it."""
    path = folder / f"t.{kind}"
    (folder / "sub").mkdir(exist_ok=True)
    for i, row in enumerate(rows):
        if isinstance(row.get("file"), str) and not row["file"].startswith(("/", "..")):
            (folder / row["file"]).write_bytes(png(i * 40))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


KINDS = ("csv", "tsv", "jsonl", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    table = open_table(written(tmp_path, kind, ROWS))
    assert [table[i] for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert list(table.rows()) == ROWS and len(table) == 3
    assert table.columns == ("caption", "file", "other") and "other" in table.filled
    copy = pickle.loads(pickle.dumps(table))  # noqa: S301, what worker processes do
    assert [copy[i] for i in range(3)] == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_becomes_pairs_and_dialogues(kind: str, tmp_path: Path) -> None:
    columns = {
        "query.image": "file", "positive.text": "caption",
        "dialogue.image": "file", "dialogue.question": "caption", "dialogue.answer": "caption",
    }  # fmt: skip
    source = open_source("table", path=written(tmp_path, kind, ROWS), columns=columns)
    for i, row in enumerate(ROWS):
        group = source.group(i)
        assert pixels(group.query) == PILImage.open(tmp_path / row["file"]).tobytes()
        assert [m.text for m in group.positives] == [row["caption"]] and group.negatives == ()
        assert group.source == "table"
        assert source.dialogue(i).turns == ((row["caption"], row["caption"]),)
    guessed = open_source("table", path=tmp_path / f"t.{kind}")
    assert [guessed.group(i) for i in range(3)] == [source.group(i) for i in range(3)]
    assert len(open_source("table", path=tmp_path / f"t.{kind}", limit=2)) == 2


def test_lists_in_cells_are_several_items(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [
        {
            "q": "query",
            "pos": ["one", "two", "three"],
            "neg": ["a", "", "c"],
            "img": ["0.png", "0.png", None],
        },
        {"q": "query", "pos": "alone", "neg": [], "img": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"query.text": "q", "positive.text": "pos", "negative.text": "neg", "negative.image": "img"}
    source = open_source("table", path=path, columns=columns)
    first = {source.group(0, epoch).positives[0].text for epoch in range(30)}
    assert first == {"one", "two", "three"}, "over the epochs each positive comes first"
    assert sorted(m.text for m in source.group(0).positives) == ["one", "three", "two"]
    assert [(len(m.images), m.text) for m in source.group(0).negatives] == [(1, "a"), (1, ""), (0, "c")]
    assert source.group(1).negatives == () and len(source.group(1).positives) == 1


@pytest.mark.parametrize(
    "turns",
    [
        [{"question": "q1", "answer": "a1"}, {"question": "q2", "answer": "a2"}],
        [
            {"from": "human", "value": "<image>\nq1"}, {"from": "gpt", "value": "a1"},
            {"from": "human", "value": "q2"}, {"from": "gpt", "value": "a2"},
        ],
        [
            {"role": "system", "content": "be brief"}, {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"},
            {"role": "assistant", "content": "a2"},
        ],
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_turns_in_every_usual_form(turns: list[dict[str, str]], kind: str, tmp_path: Path) -> None:
    cell: Any = json.dumps(turns) if kind == "csv" else turns
    path = written(tmp_path, kind, [{"file": "0.png", "turns": cell}])
    columns = {"dialogue.image": "file", "dialogue.turns": "turns"}
    assert open_source("table", path=path, columns=columns).dialogue(0).turns == (("q1", "a1"), ("q2", "a2"))
    one = open_source("table", path=path, columns=columns, dialogue="single-turn")
    assert {one.dialogue(0, epoch).turns for epoch in range(20)} == {(("q1", "a1"),), (("q2", "a2"),)}


@pytest.mark.parametrize(
    "cell",
    ["", "no json", "[]", '[{"question": "q"}]', '[{"from": "human", "value": "q"}]', "[1]", '{"a": 1}',
     '[{"from": "gpt", "value": "a"}, {"from": "human", "value": "q"}]', '[{"question": "q", "answer": ""}]'],
)  # fmt: skip
def test_faulty_turns_are_a_fault_of_the_row_alone(cell: str, tmp_path: Path) -> None:
    good = '[{"question": "q", "answer": "a"}]'
    path = written(tmp_path, "csv", [{"file": "0.png", "turns": cell}, {"file": "1.png", "turns": good}])
    source = open_source("table", path=path, columns={"dialogue.image": "file", "dialogue.turns": "turns"})
    with pytest.raises(ContentError, match=r"turns|answer"):
        source.dialogue(0)
    assert source.dialogue(1).turns == (("q", "a"),)


def test_units_depend_on_seed_epoch_and_number_alone(emoji: Path) -> None:
    def units(source: Any, order: list[int], epoch: int) -> dict[int, Any]:
        return {i: (source.dialogue(i, epoch), source.group(i, epoch)) for i in order}

    for make in (
        lambda seed: open_source("scenes", limit=12, seed=seed),
        lambda seed: open_source("emoji", path=emoji, limit=12, seed=seed),
    ):
        source, order = make(1), list(range(12))
        first = units(source, order, 3)
        assert units(source, order[::-1], 3) == first
        assert units(pickle.loads(pickle.dumps(make(1))), order, 3) == first  # noqa: S301
        assert units(source, order, 4) != first and units(make(2), order, 3) != first
        with pytest.raises(IndexError, match="0 to 11"):
            source.group(12)


def test_scenes_say_what_they_show() -> None:
    source = open_source("scenes", limit=40, seed=5)
    lengths = set()
    for i in range(40):
        truth, unit = scene(5, i), source.dialogue(i)
        assert pixels(unit.context) == truth.draw().tobytes()
        lengths.add(len(unit.turns))
        assert len(set(unit.turns)) == len(unit.turns)
        picture, (text,) = source.group(i).query, source.group(i).positives
        assert pixels(picture) == truth.draw().tobytes()
        assert all(thing.colour in text.text and thing.place in text.text for thing in truth.things)
        description = open_source("scenes", seed=5, dialogue="description").dialogue(i)
        assert [answer for _, answer in description.turns] == [truth.dense_caption()]
    assert lengths == {3, 4, 5}
    for mode in MODES[:4]:
        n = {len(open_source("scenes", seed=5, dialogue=mode).dialogue(i).turns) for i in range(5)}
        assert (n == {1}) == (mode != "multi-turn")
    mixed = open_source("scenes", seed=5, dialogue="mixed", limit=40)
    assert 8 < sum(len(mixed.dialogue(i).turns) == 1 for i in range(40)) < 32
    assert (
        len(open_source("scenes")) == 1_000_000 and len(open_source("scenes", limit=2_000_000)) == 2_000_000
    )
    assert scene(5, 0).truth != open_source("scenes", seed=5, split="test").rows[0].truth


def test_direction_says_which_side_asks(emoji: Path) -> None:
    for name, path in (("scenes", None), ("emoji", emoji)):
        asks = {
            direction: [
                bool(open_source(name, path=path, columns={"direction": direction}).group(i).query.images)
                for i in range(20)
            ]
            for direction in ("image-to-text", "text-to-image", "both")
        }
        assert all(asks["image-to-text"]) and not any(asks["text-to-image"]) and 4 < sum(asks["both"]) < 16
        with pytest.raises(DataError, match="sideways"):
            open_source(name, path=path, columns={"direction": "sideways"})
        with pytest.raises(DataError, match="only direction"):
            open_source(name, path=path, columns={"query.text": "label"})


def test_emoji_speak_from_their_truth_columns(emoji: Path) -> None:
    truth = {row["label"]: row for row in pq.read_table(emoji).to_pylist()}
    train, dev = open_source("emoji", path=emoji), open_source("emoji", path=emoji, split="dev")
    assert (len(train), len(dev)) == (24, 6)
    seen = set()
    for i in range(24):
        unit, row = train.dialogue(i), truth[train.rows[i]["label"]]
        answers = {row["label"], ", ".join(row["tags"]), row["group"], row["subgroup"]}
        assert row["split"] == "train" and {a for _, a in unit.turns} <= answers and len(unit.turns) in (3, 4)
        assert pixels(unit.context) == PILImage.open(io.BytesIO(row["image"]["bytes"])).tobytes()
        text = train.group(i).positives[0].text
        assert text.split(", ")[0] == row["label"] and set(text.split(", ")[1:]) <= set(row["tags"])
        seen.add("," in text)
    assert seen == {True, False}
    full = open_source("emoji", path=emoji, split="dev", dialogue="description").dialogue(0)
    assert full.turns == (("describe the picture.", "thing 0: t0, round, small"),)


def test_the_random_access_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"n": i, "blob": bytes([i]) * 200_000} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "big.parquet", row_group_size=4)
    monkeypatch.setattr("comatch.data.tables._CACHE_BYTES", 2_000_000)
    table = Parquet(tmp_path / "big.parquet")
    for i in np.random.default_rng(0).permutation(40):
        assert table[int(i)] == rows[i]
        assert sum(group.nbytes for group in table._cache.values()) <= 2_000_000
    assert len(table._cache) == 2
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() - before for _ in Parquet(tmp_path / "big.parquet").rows())
    assert peak < 16_000_000
    monkeypatch.setattr("comatch.data.tables._LARGEST_GROUP", 500_000)
    with pytest.raises(DataError, match="row_group_size"):
        Parquet(tmp_path / "big.parquet")


def test_a_long_text_table_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " + "x" * 2000}) + "\n" for i in range(4000)))
    tracemalloc.start()
    table = open_table(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) == 4000 and table[3999]["text"].startswith("3999 ")
    assert held < 100_000 and peak < 1_000_000 < path.stat().st_size


Bad = Callable[[Path], Path]


def raw(name: str, data: bytes) -> Bad:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def arrow(columns: dict[str, Any], schema: pa.Schema | None = None) -> Bad:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(columns, schema=schema), folder / "t.parquet")
        return folder / "t.parquet"

    return write


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FAULTS: dict[str, tuple[Bad, str]] = {
    "cut last line": (raw("t.jsonl", b'{"text": "a"}\n{"text": "b'), r"t\.jsonl, line 2: the last line is"),
    "broken line": (raw("t.jsonl", b'{"text": "a"}\n{text}\n{"text": ""}\n'), r"\.jsonl, line 2: .*JSON object"),
    "no object": (raw("t.jsonl", b'{"text": "a"}\n\n[1]\n'), r"line 3: found list"),
    "deep": (raw("t.jsonl", b"[" * 100_000 + b"\n"), r"line 1"),
    "not UTF-8": (raw("t.jsonl", b'{"text": "a"}\n{"text": "\xe4"}\n'), r"line 2: byte 0xe4 at place 11"),
    "UTF-16": (raw("t.csv", "text\na\n".encode("utf-16")), r"t\.csv, line 1: byte 0xff"),
    "latin CSV": (raw("t.csv", b"text,image\nok,1.png\n\xe4h,2.png\n"), r"t\.csv, line 3: byte 0xe4"),
    "open quote": (raw("t.csv", b'text,image\n"a,1.png\nb,2.png\n'), r"t\.csv, line 2 to 3: .*quote"),
    "quote inside": (raw("t.csv", b'text,image\n"a"b,1.png\n'), r"t\.csv, line 2: .*quote"),
    "more fields": (raw("t.csv", b"text,image\na,b,c\n"), r"line 2: 3 fields, but 2 in the header"),
    "equal names": (raw("t.csv", b"text,text\na,b\n"), "must be there and differ"),
    "header alone": (raw("t.csv", b"text,image\n"), "holds no rows"),
    "no bytes": (raw("t.jsonl", b""), "holds no rows"),
    "no parquet": (raw("t.parquet", b"PAR1 hello"), r"t\.parquet is no readable Parquet"),
    "no rows": (arrow({"text": pa.array([], pa.string())}), "holds no rows"),
    "other suffix": (raw("t.xlsx", b"x"), r"\.csv, \.tsv, \.jsonl"),
    "nothing there": (lambda folder: folder / "t.csv", "there is no file"),
    "missing column": (arrow({"title": ["a"], "x": ["b"]}), "no column 'text' .*; its columns are title, x"),
    "null column": (arrow({"text": ["a"], "image": pa.array([None], pa.binary())}), "'image' .* is empty in all"),
    "null bytes": (
        arrow({"text": ["a"], "image": pa.array([{"bytes": None, "path": None}], PICTURE)}),
        "'image' .* is empty in all 1 rows",
    ),
    "wrong type": (arrow({"text": [1], "image": ["a.png"]}), "'text' holds int64, but query.text needs text"),
    "wrong picture": (arrow({"text": ["a"], "image": [[1.0]]}), "'image' holds list<.*double>, but positive.ima"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_table_is_named_with_file_and_line(fault: str, tmp_path: Path) -> None:
    make, message = FAULTS[fault]
    with pytest.raises(DataError, match=message):
        open_source("table", path=make(tmp_path), columns={"query.text": "text", "positive.image": "image"})


def test_shards_must_agree(tmp_path: Path) -> None:
    def shard(name: str, **columns: Any) -> None:
        pq.write_table(pa.table(columns), tmp_path / name)

    shard("a.parquet", text=["a", "b"], label=["x", "y"])
    shard("b.parquet", text=["c"], label=["z"])
    table = open_table(tmp_path)
    assert [table[i]["text"] for i in range(3)] == ["a", "b", "c"] == [row["text"] for row in table.rows()]
    for wrong, message in (
        (
            {"text": ["c"], "label": [1]},
            r"column 'label' is string in .*a\.parquet and int64 in .*b\.parquet",
        ),
        ({"text": ["c"]}, r"b\.parquet has no column 'label', .*a\.parquet has"),
        ({"text": ["c"], "label": ["z"], "new": [1]}, r"a\.parquet has no column 'new', .*b\.parquet has"),
    ):
        shard("b.parquet", **wrong)
        with pytest.raises(DataError, match=message):
            open_table(tmp_path)
    (tmp_path / "c.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"\.csv, \.parquet"):
        open_table(tmp_path)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "link.png", "file:///x.png", "a\0b.png"])
def test_pictures_outside_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    path = folder / "t.jsonl"
    path.write_text(json.dumps({"caption": "a", "image": name}) + '\n{"caption": "b", "image": "in.png"}\n')
    (folder / "in.png").write_bytes(png(2))
    source = open_source("table", path=path)
    with pytest.raises(ImageError):
        source.group(0)
    assert pixels(source.group(1).query)
    items = dict(read_items(path, image_column="image"))
    assert isinstance(items["0"], ImageError) and isinstance(items["1"], Message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "scene"}, "scenes, emoji, table"),
        ({"name": "scenes", "split": "validation"}, "train, dev, test"),
        ({"name": "scenes", "dialogue": "chat"}, "multi-turn, single-turn"),
        ({"name": "scenes", "limit": 0}, "limit is 0"),
        ({"name": "scenes", "path": "x"}, "take no path"),
        ({"name": "table"}, "needs a path"),
        ({"name": "emoji", "path": "EMOJI", "split": "test"}, "there are dev, train"),
        ({"name": "emoji", "path": "TABLE"}, "no label, tags, group"),
        ({"name": "table", "path": "TABLE", "split": "dev"}, "no split 'dev'"),
        ({"name": "table", "path": "TABLE", "columns": {"querytext": "text"}}, "did you mean 'query.text'"),
        ({"name": "table", "path": "TABLE", "dialogue": "description"}, "multi-turn or single-turn"),
        ({"name": "table", "path": "TABLE", "columns": {"split": "text"}, "split": "q"}, "there are a"),
    ],
)
def test_wrong_questions_get_the_allowed_answers(
    given: dict[str, Any], message: str, emoji: Path, tmp_path: Path
) -> None:
    table = written(tmp_path, "csv", [{"text": "a", "file": "0.png"}])
    path = {"EMOJI": emoji, "TABLE": table}.get(given.get("path", ""), given.get("path"))
    with pytest.raises(DataError, match=message):
        open_source(given.pop("name"), **{**given, "path": path})
    halves = open_source("table", path=table, columns={"query.image": "file"})
    with pytest.raises(DataError, match=r"positive\.image or positive\.text"):
        halves.group(0)
    with pytest.raises(DataError, match=r"dialogue\.image or dialogue\.text"):
        halves.dialogue(0)


def test_a_split_column_divides_a_table(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "file": f"{i}.png", "part": "dev" if i % 3 == 0 else "train"} for i in range(9)]
    columns = {"query.image": "file", "positive.text": "text", "split": "part"}
    path = written(tmp_path, "csv", rows)
    parts = {
        split: open_source("table", path=path, columns=columns, split=split) for split in ("train", "dev")
    }
    texts = {split: [s.group(i).positives[0].text for i in range(len(s))] for split, s in parts.items()}
    assert texts == {"train": ["t1", "t2", "t4", "t5", "t7", "t8"], "dev": ["t0", "t3", "t6"]}


def test_items_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "sub/c.webp", ".hidden.png", ".git/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(1))
    items = list(read_items(tmp_path))
    assert [id for id, _ in items] == ["a.JPG", "b.png", "sub/c.webp"]
    assert all(isinstance(m, Message) and m.images[0].size == (8, 8) and not m.text for _, m in items)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(read_items(tmp_path)) == items
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to embed"):
        list(read_items(tmp_path / "empty"))


@pytest.mark.parametrize("kind", KINDS)
def test_items_of_a_table(kind: str, tmp_path: Path) -> None:
    rows = [{"id": f"i{n}", **row} for n, row in enumerate(ROWS)]
    items = list(read_items(written(tmp_path, kind, rows)))
    assert [id for id, _ in items] == ["i0", "i1", "i2"]
    for (_, message), row in zip(items, ROWS, strict=True):
        assert isinstance(message, Message) and message.text == row["caption"] and len(message.images) == 1
    plain = list(read_items(written(tmp_path, kind, ROWS), text_column="other"))
    assert [id for id, _ in plain] == ["0", "1", "2"]
    assert isinstance(plain[1][1], ContentError), "an empty cell is a fault of its row alone"
    assert plain[2][1] == Message((Text("x"),))


def test_columns_that_cannot_be_guessed(tmp_path: Path) -> None:
    both = written(tmp_path, "csv", [{"text": "a", "caption": "b"}])
    with pytest.raises(DataError, match="text or caption; say which with text_column"):
        list(read_items(both))
    neither = written(tmp_path, "csv", [{"name": "a", "weight": "b"}])
    with pytest.raises(DataError, match="has name, weight"):
        list(read_items(neither))
    with pytest.raises(DataError, match="no column 'names'"):
        list(read_items(neither, text_column="names"))
    twice = written(tmp_path, "csv", [{"id": "1", "text": "a"}, {"id": "1", "text": "b"}])
    with pytest.raises(DataError, match="'1' occurs twice"):
        list(read_items(twice))


def test_items_of_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(data: bytes) -> list[tuple[str, Any]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return list(read_items("-"))

    monkeypatch.chdir(tmp_path)
    assert read("a cat\r\n\nü {}\n/etc/hostname".encode()) == [
        ("0", Message((Text("a cat"),))),
        ("2", Message((Text("ü {}"),))),
        ("3", Message((Text("/etc/hostname"),))),
    ]
    items = read(b'{"id": 7, "text": "x"}\n{"image": "../y.png"}\n{"caption": "z"}\n')
    assert [id for id, _ in items] == ["7", "1", "2"]
    assert isinstance(items[1][1], ImageError) and items[2][1] == Message((Text("z"),))
    with pytest.raises(DataError, match="standard input, line 2: the last line is cut"):
        read(b'{"text": "x"}\n{"text": ')
    with pytest.raises(DataError, match="standard input, line 1: byte 0xe4"):
        read(b"\xe4\n")
    with pytest.raises(DataError, match="nothing to embed"):
        read(b"\n")
