"""Sources give the same units in any order and process, say the truth, and refuse what they cannot read."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import EMOJI, needs_emoji
from PIL import Image as PILImage
from table_files import KINDS, ROWS, pixels, png, written

from comatch.content import Image, Message, Text
from comatch.data.items import read_items
from comatch.data.scenes import scene
from comatch.data.sources import MODES, open_source
from comatch.errors import ContentError, DataError, ImageError


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
        unit, row = train.dialogue(i), truth[train.rows[i][0]["label"]]
        answers = {row["label"], ", ".join(row["tags"]), row["group"], row["subgroup"]}
        assert row["split"] == "train" and {a for _, a in unit.turns} <= answers and len(unit.turns) in (3, 4)
        assert pixels(unit.context) == PILImage.open(io.BytesIO(row["image"]["bytes"])).tobytes()
        text = train.group(i).positives[0].text
        assert text.split(", ")[0] == row["label"] and set(text.split(", ")[1:]) <= set(row["tags"])
        seen.add("," in text)
    assert seen == {True, False}
    full = open_source("emoji", path=emoji, split="dev", dialogue="description").dialogue(0)
    assert full.turns == (("describe the picture.", "thing 0: t0, round, small"),)


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
        ({"name": "scenes", "path": "x"}, "takes no path"),
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


@needs_emoji
def test_the_real_emoji_table() -> None:
    train, dev = (open_source("emoji", path=EMOJI, split=split) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (1454, 161)
    for source in (train, dev):
        for i in range(0, len(source), 40):
            assert source.group(i).query.images[0].size == (64, 64) and len(source.dialogue(i).turns) in (
                3,
                4,
            )
    assert len(list(read_items(EMOJI))) == 1615


def test_scenes_make_the_near_misses_that_are_asked_for() -> None:
    plain, hard = open_source("scenes", limit=30), open_source("scenes", limit=30, negatives=3)
    for i in range(30):
        group = hard.group(i)
        assert (group.query, group.positives) == (plain.group(i).query, plain.group(i).positives)
        assert plain.group(i).negatives == ()
        assert len(set(group.negatives)) == 3
        assert not set(group.negatives) & set(group.positives)
    drawn = open_source("scenes", limit=30, negatives=2, columns={"direction": "text-to-image"}).group(0)
    assert all(isinstance(part, Image) for message in drawn.negatives for part in message.parts)


def test_scene_questions_are_pairs_of_their_own() -> None:
    asked = open_source("scenes", limit=30, subset="questions").group(4)
    assert [type(part) for part in asked.query.parts] == [Image, Text]
    assert asked.positives != open_source("scenes", limit=30).group(4).positives
    with pytest.raises(DataError, match="captions, questions"):
        open_source("scenes", subset="answers")
    with pytest.raises(DataError, match="no effect on questions"):
        open_source("scenes", subset="questions", columns={"direction": "both"})


def test_scene_dialogues_are_pairs_too() -> None:
    source = open_source("scenes", limit=30, subset="dialogues")
    pair, spoken = source.group(4), {turn for epoch in range(40) for turn in source.dialogue(4, epoch).turns}
    (words,) = pair.positives[0].parts
    assert isinstance(words, Text) and [type(part) for part in pair.query.parts] == [Image]
    told = [turn for turn in spoken if f"{turn[0]} {turn[1]}" in words.text]
    assert len(told) >= 2 and pair != source.group(4, epoch=1) and pair == source.group(4)
    turned = open_source("scenes", limit=30, subset="dialogues", columns={"direction": "text-to-image"}).group(4)
    assert isinstance(turned.query.parts[0], Text)


@needs_emoji
def test_emoji_negatives_are_kin_and_not_the_same() -> None:
    source = open_source("emoji", path=EMOJI, negatives=4)
    kin = [len(source.group(i).negatives) for i in range(60)]
    assert max(kin) == 4
    for i in range(20):
        group = source.group(i)
        name = source.rows[i][0]["label"]
        assert name not in [message.text for message in group.negatives]
    groups = open_source("emoji", path=EMOJI, subset="groups").group(0)
    assert groups.positives[0].text == source.rows[0][0]["group"]
