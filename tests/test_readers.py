"""Every format reads to the same training units, and every fault of a row or a file is named, counted and bounded."""

from __future__ import annotations

import copy
import json
import pickle
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reader_files import DIALOGUES, GROUPS, PAIRS, TOLD, lines, llava, mmeb, pictures, says, shape, shapes, tevatron
from table_files import png

from comatch.content import Message, as_message
from comatch.core.batch import Example
from comatch.data.literals import texts_of
from comatch.data.mixture import Ingredient, Mixture
from comatch.data.sources import SOURCES, Source, open_source
from comatch.errors import ContentError, DataError, ImageError
from comatch.recipes import load_recipe
from comatch.training.loader import Quarantine, StageData

COMPRESS, MATCH = load_recipe("coma").stages


@pytest.mark.parametrize("name", GROUPS)
def test_every_format_reads_to_the_same_groups(name: str, tmp_path: Path) -> None:
    wanted = [shapes(GROUPS["table"](tmp_path / "wanted", PAIRS).group(i)) for i in range(3)]
    assert wanted[0][1:] == ([("a red cat",)], [("a dog",), ("it's a 'bird', 日本",)]) and wanted[1][2] == []
    source = GROUPS[name](tmp_path / "a", PAIRS)
    assert [shapes(source.group(i)) for i in range(len(source))] == wanted
    copied = pickle.loads(pickle.dumps(source))  # noqa: S301, what worker processes do
    assert [copied.group(i) for i in (2, 0, 1)] == [source.group(i) for i in (2, 0, 1)]
    # Not vacuous: what changes in the data changes in the one unit that it stands in.
    for change in ({"ask": "else?"}, {"right": ["other"]}, {"wrong": ["nothing"]}, {"picture": "1.png"}):
        data = copy.deepcopy(PAIRS)
        data[2] |= change
        changed = GROUPS[name](tmp_path / "-".join(change) / "b", data)
        assert [shapes(changed.group(i)) == wanted[i] for i in range(3)] == [True, True, False], change


@pytest.mark.parametrize("name", DIALOGUES)
def test_every_format_reads_to_the_same_dialogues(name: str, tmp_path: Path) -> None:
    source = DIALOGUES[name](tmp_path, TOLD)
    told = [source.dialogue(i) for i in range(len(source))]
    assert [[list(turn) for turn in unit.turns] for unit in told] == [row["turns"] for row in TOLD]
    wanted = [shape(as_message(folder / row["picture"])) for folder in [pictures(tmp_path / "wanted", TOLD)] for row in TOLD]
    assert [shape(unit.context) for unit in told] == wanted and wanted[0] != wanted[1]


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "ms-swift older"])
def test_several_positives_take_turns_and_negatives_keep_their_order(name: str, tmp_path: Path) -> None:
    data = [PAIRS[0] | {"right": ["one", "two", "three"], "wrong": ["x", "y", "z", "v"]}, PAIRS[1]]
    source = GROUPS[name](tmp_path, data)
    seen = {tuple(m.text for m in source.group(0, epoch).positives) for epoch in range(30)}
    assert {order[0] for order in seen} == {"one", "two", "three"} and {len(order) for order in seen} == {3}
    assert [m.text for m in source.group(0, 5).negatives] == ["x", "y", "z", "v"]


# --- faults of a row


class Decoding:
    """In the place of a Preparer: opens the pictures of an item, and keeps nothing."""

    def item(self, message: Message, stage: Any) -> Example:
        for image in message.images:
            image.load()
        one = np.zeros(1)
        return Example(one, one, one, np.zeros((3, 1)))

    def dialogue(self, dialogue: Any, stage: Any, seed: int = 0) -> Example:
        return self.item(dialogue.context, stage)


def tried(source: Source, stage: Any) -> Quarantine:
    data = StageData(Mixture((Ingredient("s", source),), 1), Decoding(), stage, seed=0, batch=8)  # type: ignore[arg-type]
    account = Quarantine(0.001, len(source))
    for step in range(len(source) // 8):
        for sample in data[step]:
            account.add(sample)
    return account


@pytest.mark.parametrize("picture", ["gone.png", "cut.png"])
@pytest.mark.parametrize("name", [*GROUPS, *(f"{name} told" for name in DIALOGUES)])
def test_missing_and_damaged_pictures_are_counted_and_bounded(name: str, picture: str, tmp_path: Path) -> None:
    def account(bad: int) -> Quarantine:
        names = [picture if i < bad else f"{i % 10}.png" for i in range(80)]
        if told := DIALOGUES.get(name.removesuffix(" told")) if name.endswith(" told") else None:
            return tried(told(tmp_path / str(bad), [{"picture": n, "turns": [["q", "a"]]} for n in names]), COMPRESS)
        rows = [{"picture": n, "ask": f"what {i}?", "right": [f"thing {i}"], "wrong": ["x"]} for i, n in enumerate(names)]
        return tried(GROUPS[name](tmp_path / str(bad), rows), MATCH)

    assert account(0).count == 0
    some = account(3)
    reason = r"gone\.png|'image'" if picture == "gone.png" else "truncated"
    assert 3 <= some.count <= 10 and all(re.search(reason, why) for why in some.reasons), some.reasons
    with pytest.raises(DataError, match=r"bad rows in \d+ samples, allowed are 10"):
        account(30)


OUTSIDE = (
    "../secret.png", "sub/../../secret.png", "/etc/hostname", "./link.png", "up/secret.png", "file:///x.png", "http://h/x.png", "a/\0b.png",
)  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_pictures_outside_the_root_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(1))
    for outside in OUTSIDE:
        folder = tmp_path / str(OUTSIDE.index(outside))
        folder.mkdir()
        for place in (folder, folder / "assets"):
            place.mkdir(exist_ok=True)
            (place / "link.png").symlink_to(tmp_path / "secret.png")
            (place / "up").symlink_to(tmp_path)
        given = f"../{outside}" if name == "tevatron" and ".." in outside else outside  # its root is one folder deeper
        source = GROUPS[name](folder, [PAIRS[0], PAIRS[1] | {"picture": given}, PAIRS[2]])
        with pytest.raises(ImageError, match=r"outside|address|NUL"):
            source.group(1)
        assert shapes(source.group(0)) and shapes(source.group(2))
    # Not vacuous: below the root the same kind of name is read, links within included.
    folder = tmp_path / "good"
    for place in (folder, folder / "assets"):
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "in.png").write_bytes(png(7))
    good = GROUPS[name](folder, [PAIRS[0], PAIRS[1] | {"picture": "./sub/../sub/in.png"}])
    assert shape(good.group(1).query)[0] == shape(as_message(png(7)))[0]


def swift_row(**changes: Any) -> dict[str, Any]:
    row = {
        "messages": says("<image>what?"), "images": ["0.png"], "positive_messages": [says("a cat")], "negative_messages": [says("a dog")],
    }  # fmt: skip
    return {key: value for key, value in (row | changes).items() if value is not None}


def llava_row(**changes: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    return {"image": "0.png", "conversations": said} | changes


def st_row(**changes: Any) -> dict[str, Any]:
    return {"anchor": "q", "positive": "p", "negative": "n"} | changes


def passages_row(**changes: Any) -> dict[str, Any]:
    return {"query_id": "1", "query": "q", "positive_passages": [{"docid": "1", "text": "p"}], "negative_passages": []} | changes


def mmeb_row(**changes: Any) -> dict[str, Any]:
    return {
        "qry": "<|image_1|>\nwhat?\n", "qry_image_path": "0.png", "pos_text": "a cat", "pos_image_path": "", "neg_text": "a dog",
        "neg_image_path": "",
    } | changes  # fmt: skip


FAULTY: list[tuple[str, dict[str, Any], str]] = [
    ("ms-swift", swift_row(images=[]), "0 pictures, but 1 times <image>"),
    ("ms-swift", swift_row(images=["0.png", "0.png"]), "2 pictures, but 1 times <image>"),
    ("ms-swift", swift_row(images=[""]), "one is empty"),
    ("ms-swift", swift_row(messages=says("<image><video>")), "placeholder <video> is unknown; allowed: <image>"),
    ("ms-swift", swift_row(messages=[*says("<image>"), {"role": "assistant", "content": "x"}]), "assistant turn"),
    ("ms-swift", swift_row(messages="text"), "messages must be a list"),
    ("ms-swift", swift_row(messages=[{"role": "user"}]), "messages must be a list of"),
    ("ms-swift", swift_row(messages=says(3)), "found int where a text must be"),  # type: ignore[arg-type]
    ("ms-swift", swift_row(positive_messages=None), "question"),
    ("ms-swift", swift_row(positive_messages=[says("")]), "empty"),
    ("ms-swift", swift_row(positive_messages=says("a cat")), "messages must be a list"),
    ("ms-swift", swift_row(positive_messages=[says("<image>what?")], positive_images=[["0.png"]]), "positive equals its query"),
    ("ms-swift", swift_row(negative_messages=[says("x"), says("a cat")]), "negative equals a positive"),
    ("ms-swift", swift_row(negative_images=[["0.png"], []]), "1 negative_messages, but 2 negative_images"),
    ("ms-swift", {"query": "<image>", "response": "<image>", "images": ["0.png"]}, "1 pictures, but 2 times"),
    ("ms-swift", {"query": "a", "response": ""}, "neither positive_messages nor a response"),
    ("llava", llava_row(image=["0.png", "1.png"]), "2 pictures, but 1 times"),
    ("llava", llava_row(image=None), "0 pictures, but 1 times"),
    ("llava", llava_row(images=["0.png"]), "both image and images"),
    ("llava", llava_row(conversations=[{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}], image=None), "without a picture"),
    ("llava", llava_row(conversations=[{"from": "human", "value": "q"}, {"from": "gpt", "value": "<image>"}]), "in an answer"),
    ("llava", llava_row(conversations=[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]), "an answer is ''"),
    ("llava", llava_row(conversations=[{"from": "human", "value": "<image>"}]), "take turns"),
    ("llava", llava_row(conversations="text"), "turns are not understood"),
    ("sentence-transformers", st_row(anchor=""), "query has 0 items"),
    ("sentence-transformers", st_row(anchor=["a", "b"]), "query has 2 items"),
    ("sentence-transformers", st_row(positive=None), "positive is empty"),
    ("sentence-transformers", st_row(positive="q"), "positive equals its query"),
    ("sentence-transformers", st_row(negative="p"), "negative equals a positive"),
    ("sentence-transformers", st_row(anchor={"text": "", "image": None}), "query has 0 items"),
    ("sentence-transformers", st_row(anchor={"words": "x"}), "unknown key 'words'"),
    ("tevatron", passages_row(positive_passages=[]), "positive is empty"),
    ("tevatron", passages_row(positive_passages=["text"]), "a document is str"),
    ("tevatron", passages_row(positive_passages="text"), "positive_passages is str"),
    ("tevatron", passages_row(positive_passages=[{"docid": "1", "text": ""}]), "empty"),
    ("tevatron", passages_row(query_video="v.mp4"), "query_video is set"),
    ("tevatron", passages_row(negative_passages=[{"docid": "2", "text": "p"}]), "negative equals a positive"),
    ("mmeb-train", mmeb_row(qry="<|image_1|><|image_1|> what?"), "1 pictures, but 2 times"),
    ("mmeb-train", mmeb_row(qry="<|image_2|>\nwhat?"), r"placeholder <\|image_2\|> is unknown"),
    ("mmeb-train", mmeb_row(qry="", qry_image_path=""), "query has 0 items"),
    ("mmeb-train", mmeb_row(pos_text=""), "positive is empty"),
    ("mmeb-train", mmeb_row(neg_text="a cat"), "negative equals a positive"),
    ("mmeb-train", mmeb_row(neg_text="['a', 'b']", neg_image_path="['', '', '']"), "3 images and 2 texts"),
    ("mmeb-train", mmeb_row(neg_text="[__import__('os').getcwd()]"), "is no list of texts"),
]


@pytest.mark.parametrize(("name", "row", "message"), FAULTY)
def test_a_faulty_row_is_named_and_its_neighbours_are_read(name: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {
        "ms-swift": swift_row(), "llava": llava_row(), "sentence-transformers": st_row(), "tevatron": passages_row(),
        "mmeb-train": mmeb_row(),
    }[name]  # fmt: skip
    pictures(tmp_path, PAIRS)
    options: dict[str, Any] = {"path": tmp_path / "t.jsonl"}
    if name == "mmeb-train":
        options = {"path": tmp_path, "subset": "X", "split": "original"}
        lines(tmp_path / "X" / "original-0.jsonl", [good, row, good])
    else:
        lines(options["path"], [good, row, good])
    source = open_source(name, **options)
    read = source.group if SOURCES[name].group else source.dialogue
    assert read(0) == read(2)
    with pytest.raises(ContentError, match=message):
        read(1)


# --- faults of a file


def test_a_format_without_pairs_or_dialogues_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has dialogues, no pairs; for this stage use .*mmeb-train"):
        llava(tmp_path / "a", TOLD).group(0)
    with pytest.raises(DataError, match=r"has pairs, no dialogues; for this stage use .*llava"):
        mmeb(tmp_path / "b", PAIRS).dialogue(0)


WHOLE: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "labels": ("sentence-transformers", [st_row(score=0.1)], {}, "column 'score': pairs with labels"),
    "other columns": ("sentence-transformers", [st_row(id="7")], {}, "columns id are none of anchor"),
    "one column": ("sentence-transformers", [{"anchor": "a", "x": None}], {}, "at least two are needed"),
    "swift labels": ("ms-swift", [swift_row(label=0)], {}, "column 'label'"),
    "no messages": ("ms-swift", [{"text": "a"}], {}, "no column messages or query"),
    "no conversations": ("llava", [{"image": "0.png"}], {}, "no column conversations or messages"),
    "no query": ("tevatron", [{"positive_passages": []}], {}, "no query_text, query or query_image"),
    "no documents": ("tevatron", [{"query": "q"}], {}, "either positive_document_ids or positive_passages"),
    "no corpus": ("tevatron", [{"query": "q", "positive_document_ids": ["1"]}], {}, "set corpus to"),
    "idle corpus": ("tevatron", [passages_row()], {"corpus": "c.jsonl"}, "leave out corpus"),
    "idle subset": ("llava", [llava_row()], {"subset": "x"}, "takes no subset; of its kind it takes path, root, allow_cut"),
    "idle columns": ("ms-swift", [swift_row()], {"columns": {"query.text": "x"}}, "takes no columns"),
    "idle split": ("llava", [llava_row()], {"split": "dev"}, "takes no split"),
    "root is no folder": ("llava", [llava_row()], {"root": "nowhere"}, "root is 'nowhere', which is no folder"),
    "description": ("llava", [llava_row()], {"dialogue": "description"}, "multi-turn or single-turn"),
}


@pytest.mark.parametrize("fault", WHOLE)
def test_a_file_that_does_not_fit_its_format_is_refused_at_opening(fault: str, tmp_path: Path) -> None:
    name, rows, options, message = WHOLE[fault]
    with pytest.raises(DataError, match=message):
        open_source(name, path=lines(tmp_path / "t.jsonl", rows), **options)


def test_tevatron_joins_by_id_and_names_what_is_missing(tmp_path: Path) -> None:
    source = tevatron(tmp_path, [PAIRS[0]])
    rows = [
        {"query_text": "a", "positive_document_ids": [7], "negative_document_ids": []},
        {"query_text": "b", "positive_document_ids": ["gone"]},
        {"query_text": "c", "positive_document_ids": "7"},
    ]
    documents = [
        {"docid": "7", "title": "Cats", "text": "are red"},
        {"docid": "8", "document_text": "page", "document_image": "assets/0.png"},
    ]
    train, corpus = lines(tmp_path / "a.jsonl", rows), lines(tmp_path / "c.jsonl", documents)
    source = open_source("tevatron", path=train, corpus=corpus)
    assert source.group(0).positives[0].text == "Cats are red", "ids may be numbers in one file and texts in the other"
    for i, message in ((1, "document 'gone' is not in the corpus"), (2, "positive_document_ids is str")):
        with pytest.raises(ContentError, match=message):
            source.group(i)
    lines(train, [{"query_text": "a", "positive_document_ids": ["8"]}])
    page = open_source("tevatron", path=train, corpus=corpus).group(0).positives[0]
    assert page.text == "page" and len(page.images) == 1
    lines(corpus, [*documents, documents[0]])
    with pytest.raises(DataError, match="docid '7' twice"):
        open_source("tevatron", path=train, corpus=corpus)
    lines(corpus, [{"id": "7"}])
    with pytest.raises(DataError, match="no column 'docid'; its columns are id"):
        open_source("tevatron", path=train, corpus=corpus)


def test_columns_of_sentence_transformers_by_name_and_by_order(tmp_path: Path) -> None:
    def texts(rows: list[dict[str, Any]], i: int = 0) -> tuple[str, list[str], list[str]]:
        group = open_source("sentence-transformers", path=lines(tmp_path / "t.jsonl", rows)).group(i)
        return group.query.text, [m.text for m in group.positives], [m.text for m in group.negatives]

    shuffled = {"negative_10": "n10", "positive": "p", "negative_2": "n2", "query": "q", "negative": "n"}
    assert texts([shuffled]) == ("q", ["p"], ["n", "n2", "n10"])
    assert texts([{"question": "q", "answer": "p", "wrong": "n", "worse": "m"}]) == ("q", ["p"], ["n", "m"])
    assert texts([{"a": "q", "b": "p", "c": None}]) == ("q", ["p"], []), "an empty column is no negative"
    (tmp_path / "t.csv").write_text('anchor,positive\n0.png,"https://x/y.png"\n')
    group = open_source("sentence-transformers", path=tmp_path / "t.csv").group(0)
    assert (group.query.text, group.positives[0].text) == ("0.png", "https://x/y.png"), "a text is text, always"
    cells = {"anchor": [{"bytes": png(3), "path": None}], "positive": [{"text": "p", "image": {"bytes": None, "path": None}}]}
    pq.write_table(pa.table(cells), tmp_path / "t.parquet")
    arrow = open_source("sentence-transformers", path=tmp_path / "t.parquet").group(0)
    assert shape(arrow.query) == shape(as_message(png(3))) and shape(arrow.positives[0]) == ("p",)
    pq.write_table(pa.table({"anchor": ["a"], "positive": [[0.5]]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet: column 'positive' holds list<.*double>"):
        open_source("sentence-transformers", path=tmp_path / "t.parquet")


# --- MMEB-train


def test_mmeb_texts_are_kept_to_the_letter(tmp_path: Path) -> None:
    pictures(tmp_path, PAIRS)

    def group(**changes: Any) -> Any:
        lines(tmp_path / "X" / "original-0.jsonl", [mmeb_row(**changes)])
        return open_source("mmeb-train", path=tmp_path, subset="X", split="original").group(0)

    zero = shape(as_message(tmp_path / "0.png"))[0]
    assert shape(group().query) == (zero, "\nwhat?\n")
    assert shape(group(qry="<|image_1|>\nask <|image_pad|>\n\n").query) == (zero, "\nask <|image_pad|>\n\n")
    assert shape(group(qry="before <|image_1|> after").query) == ("before ", zero, " after")
    assert shape(group(qry_image_path="").query) == ("what?\n",), "a marker without a picture goes with its line break (WebQA)"
    assert shape(group(pos_text="<|image_1|>\nRepresent.", pos_image_path="1.png").positives[0])[1] == "\nRepresent."
    negatives = group(neg_text="", neg_image_path="1.png").negatives
    assert [len(m.parts) for m in negatives] == [1] and len(negatives[0].images) == 1, "VisDial's negatives are bare pictures"
    listed = group(neg_text='["<|image_1|>\\nx", "", "z"]', neg_image_path="['1.png', '2.png', '']").negatives
    assert [(len(m.images), m.text) for m in listed] == [(1, "\nx"), (1, ""), (0, "z")]
    assert [m.text for m in group(neg_text="[Music] plays").negatives] == ["[Music] plays"]


def test_mmeb_configs_and_splits_are_found_and_named(tmp_path: Path) -> None:
    pictures(tmp_path, PAIRS)
    row = {key: value for key, value in mmeb_row().items() if not key.startswith("neg")}
    for config, split, asks in (("CIRR", "original", "a"), ("CIRR", "diverse_instruction", "b"), ("VOC2007", "original", "c")):
        path = tmp_path / config / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row | {"qry": f"<|image_1|>{asks}"}]), path)

    def opened(subset: str | None, split: str, path: Path = tmp_path) -> Source:
        return open_source("mmeb-train", path=path, subset=subset, split=split)

    for config, split, asks in (("CIRR", "original", "a"), ("CIRR", "diverse_instruction", "b"), ("VOC2007", "original", "c")):
        assert opened(config, split).group(0).query.text == asks
    assert opened("CIRR", "original").group(0).negatives == (), "some configs have no columns of negatives"
    for subset, split, message in (
        (None, "original", "subset is None, a config is needed; .* has CIRR, VOC2007"),
        ("CIR", "original", "did you mean 'CIRR'"),
        ("../CIRR", "original", "a config is needed"),
        ("CIRR", "train", "no split 'train'; set split to diverse_instruction or original"),
    ):
        with pytest.raises(DataError, match=message):
            opened(subset, split)
    with pytest.raises(DataError, match="there is no folder"):
        opened("CIRR", "original", tmp_path / "nowhere")
    path = tmp_path / "CIRR" / "original-00001-of-00002.parquet"
    for columns, message in (
        ({**row, "qry": 3}, r"column 'qry' is string in .*original-00000.* and int64 in .*original-00001"),
        ({"qry": "a"}, r"original-00001-of-00002\.parquet has no column 'qry_image_path'"),
    ):
        pq.write_table(pa.Table.from_pylist([columns]), path)
        with pytest.raises(DataError, match=message):
            opened("CIRR", "original")
    pq.write_table(pa.table({"qry": ["a"], "pos_text": ["b"]}), tmp_path / "VOC2007" / "original-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no column qry_image_path, pos_image_path; MMEB-train has qry"):
        opened("VOC2007", "original")


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ("[]", []), ("['a']", ["a"]), ("['a', 'b',]", ["a", "b"]), ('["it\'s", \'say "x"\']', ["it's", 'say "x"']),
        (r"['line\nbreak', 'back\\slash', '\u65e5']", ["line\nbreak", "back\\slash", "日"]),
        ("['', None]", ["", ""]), ('["a", null]', ["a", ""]),
        (str(odd := ["]", "', '", '"', "a,b", "\\", "\x00", "{[(", "日本"]), odd), (json.dumps(odd), odd),
    ],
)  # fmt: skip
def test_lists_in_a_cell_are_read_as_they_were_written(cell: str, wanted: list[str]) -> None:
    assert texts_of(cell) == wanted


@pytest.mark.parametrize(
    "cell",
    [
        "[1, 2]", "['a', 1]", "[['a']]", "['a' 'b']", "['a'; 'b']", "['a', b]", "[f'{x}']", "[b'a']", "['a' + 'b']", "['a'] * 9", "['a'",
        "[__import__('os').system('touch canary')]", "['a', *[]]", r"['\xZZ']", "[" * 100_000 + "]" * 100_000, "['a'," + "(" * 5_000 + ")]",
        "[" + "'', " * 200_000 + "x]",
        "['" + "a" * 1_000_000 + "']",
    ],
)  # fmt: skip
def test_anything_but_a_flat_list_of_texts_is_refused(cell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ContentError, match="list of"):
        texts_of(cell)
    assert not (tmp_path / "canary").exists()


# --- files that end too early, and files that are long


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_a_cut_file_is_refused_or_used_as_far_as_it_goes(name: str, tmp_path: Path) -> None:
    rows, path = [{"id": i, **llava_row()} for i in range(5)], pictures(tmp_path, PAIRS) / name
    parts = [json.dumps(row) for row in rows]
    text = "\n".join(parts) if name == "t.jsonl" else "[" + ",\n".join(parts)
    ends = [text.index(part) + len(part) for part in parts]
    for length in range(1, len(text) + (name == "t.json"), 7):
        path.write_text(text[:length])
        n = sum(end <= length for end in ends)
        if name == "t.jsonl" and (length in ends or text[length - 1] == "\n"):
            assert len(open_source("llava", path=path)) == n, "a line without a line break is whole where its JSON is"
            continue
        with pytest.raises(DataError, match=rf"{name}, line \d+: .*cut off.*allow_cut"):
            open_source("llava", path=path)
        if n:
            with pytest.warns(UserWarning, match=r"cut off.*what comes before is used"):
                source = open_source("llava", path=path, allow_cut=True)
            assert [source.rows[i] for i in range(len(source))] == rows[:n]


def test_a_json_array_reads_as_the_same_rows_as_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [llava_row(id=i, note="ä日\U0001f600 [{,]\\\"" * (i % 7) + "x" * (997 * i % 5_000)) for i in range(300)]
    ways = [json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False), "\ufeff \n" + json.dumps(rows, ensure_ascii=False) + "\n\n"]
    for text in ways:
        (tmp_path / "t.json").write_text(text, encoding="utf-8")
        source = open_source("llava", path=tmp_path / "t.json")
        assert [source.rows[i] for i in range(len(source))] == rows
    for text, message in (
        ('{"a": 1}', r"t\.json: found '{'"), ("[]", "holds no rows"), ("[1]", "line 1: found '1'; each entry"),
        ('[{"a": 1}\n {"a": 2}]', "line 2: .*commas"), ('[{"a": 1},\n{"a": 2}\n]\nx', "line 4: found 'x' after the end"),
        ('[{"a": 1},\n{"a" 2, "b": "long enough to see"}]', "line 2: Expecting ':'"),
        ("", "found ''"), ("[" + '{"a":' * 100_000, "cut off|recursion"), ("[null]", "found 'n'"),
    ):  # fmt: skip
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(DataError, match=message):
            open_source("llava", path=tmp_path / "t.json")
    (tmp_path / "t.json").write_bytes(b'[{"a": "\xe4"}]')
    with pytest.raises(DataError, match="byte 0xe4 is not UTF-8"):
        open_source("llava", path=tmp_path / "t.json")
    monkeypatch.setattr("comatch.data.json_arrays._LARGEST_ROW", 2**16)
    (tmp_path / "t.json").write_text('[{"a": "' + "x" * 2**22)
    with pytest.raises(DataError, match="more than 65,536 characters"):
        open_source("llava", path=tmp_path / "t.json")


def test_a_hundred_thousand_lines_open_at_once(tmp_path: Path) -> None:
    text = "".join(json.dumps(swift_row(id=i)) + "\n" for i in range(1_000))
    (tmp_path / "t.jsonl").write_text(text * 100)
    start = time.process_time()
    source = open_source("ms-swift", path=tmp_path / "t.jsonl")
    took = time.process_time() - start
    assert len(source) == 100_000 and source.rows[99_999]["id"] == 999
    assert took < 4, f"{took:.1f} s; about one second is usual"


def test_a_pattern_names_shards(tmp_path: Path) -> None:
    for name, asks in (("train-0", "a"), ("train-1", "b"), ("dev-0", "c")):
        lines(tmp_path / f"{name}.jsonl", [st_row(anchor=asks)])
    source = open_source("sentence-transformers", path=tmp_path / "train-*.jsonl")
    assert [source.group(i).query.text for i in range(len(source))] == ["a", "b"]
    with pytest.raises(DataError, match="0 kinds"):
        open_source("sentence-transformers", path=tmp_path / "test-*.jsonl")
