"""One small dataset, written in every format that a source reads."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from table_files import png

from comatch.content import Group, Image, Message, Text
from comatch.data.sources import Source, open_source

Data = list[dict[str, Any]]

PAIRS: Data = [
    {"picture": "0.png", "ask": "what is \"it\"?\n", "right": ["a red cat"], "wrong": ["a dog", "it's a 'bird', 日本"]},
    {"picture": "1.png", "ask": "and it?", "right": ["[a dog]"], "wrong": []},
    {"picture": "2.png", "ask": "α\nβ", "right": ["a \\ bird"], "wrong": ["a cat"]},
]
TOLD: Data = [
    {"picture": "0.png", "turns": [["what is it?", "a cat"], ["which colour?", "red"]]},
    {"picture": "1.png", "turns": [["and this?", "a dog"]]},
]


def shape(message: Message) -> tuple[str, ...]:
    """What a message says, however it was stored: texts, and hashes of the bytes of pictures."""
    return tuple(part.text if isinstance(part, Text) else part.digest for part in message.parts if isinstance(part, Text | Image))


def shapes(group: Group) -> tuple[Any, ...]:
    return shape(group.query), [shape(m) for m in group.positives], [shape(m) for m in group.negatives]


def pictures(folder: Path, data: Data) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in data:
        if row["picture"][0].isdigit():  # others are not there, or not ours to write
            (folder / row["picture"]).write_bytes(png(40 * int(row["picture"][0])))
        elif row["picture"] == "cut.png":
            (folder / "cut.png").write_bytes(png(1)[:60])
    return folder


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def packed(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def table(folder: Path, data: Data) -> Source:
    rows = [{"q": r["ask"], "i": r["picture"], "p": r["right"], "n": r["wrong"]} for r in data]
    columns = {"query.text": "q", "query.image": "i", "positive.text": "p", "negative.text": "n"}
    return open_source("table", path=lines(pictures(folder, data) / "t.jsonl", rows), columns=columns)


def arrow(folder: Path, data: Data) -> Source:
    """Parquet with the pictures in it where they are there, and their paths alone where not."""
    pictures(folder, data)
    there = {r["picture"]: r["picture"][0].isdigit() for r in data}
    rows = [
        {"q": r["ask"], "i": {"bytes": (folder / r["picture"]).read_bytes() if there[r["picture"]] else None, "path": r["picture"]},
         "p": r["right"], "n": r["wrong"]}
        for r in data
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    columns = {"query.text": "q", "query.image": "i", "positive.text": "p", "negative.text": "n"}
    return open_source("table", path=folder / "t.parquet", columns=columns)


def mmeb(folder: Path, data: Data) -> Source:
    pictures(folder / "images" / "CIRR" / "Train", data)
    prefix = "images/CIRR/Train/"
    rows = [
        {"qry": f"<|image_1|>{r['ask']}", "qry_image_path": r["picture"] if "/" in r["picture"] else prefix + r["picture"],
         "pos_text": r["right"] if len(r["right"]) > 1 else r["right"][0], "pos_image_path": "",
         "neg_text": str(r["wrong"]), "neg_image_path": str([""] * len(r["wrong"]))}
        for r in data
    ]  # fmt: skip
    (folder / "CIRR").mkdir()
    if any(isinstance(row["pos_text"], list) for row in rows):
        lines(folder / "CIRR" / "original-00000-of-00001.jsonl", rows)
    else:
        for part in (0, 1):
            shard = rows[: len(rows) // 2] if part == 0 else rows[len(rows) // 2 :]
            pq.write_table(pa.Table.from_pylist(shard), folder / "CIRR" / f"original-0000{part}-of-00002.parquet")
    return open_source("mmeb-train", path=folder, subset="CIRR", split="original")


def st(folder: Path, data: Data) -> Source:
    rows = []
    for r in data:
        row = {"anchor": {"image": r["picture"], "text": r["ask"]}, "positive": r["right"]}
        rows.append(row | {f"negative_{i + 1}": text for i, text in enumerate(r["wrong"])})
    return open_source("sentence-transformers", path=lines(pictures(folder, data) / "t.jsonl", rows))


def tevatron(folder: Path, data: Data) -> Source:
    pictures(folder / "assets", data)
    rows, corpus = [], []
    for n, r in enumerate(data):
        ids = {side: [f"{n}{side}{i}" for i in range(len(r[side]))] for side in ("right", "wrong")}
        corpus += [{"docid": id, "text": text} for side in ids for id, text in zip(ids[side], r[side], strict=True)]
        asks = {"query_id": str(n), "query_text": r["ask"], "query_image": r["picture"]}
        rows.append(asks | {"positive_document_ids": ids["right"], "negative_document_ids": ids["wrong"]})
    path, documents = lines(folder / "train.jsonl", rows), lines(folder / "corpus.jsonl", corpus[::-1])
    return open_source("tevatron", path=path, corpus=documents, root=folder / "assets")


def tevatron_inline(folder: Path, data: Data) -> Source:
    pictures(folder, data)
    rows = [
        {"query_id": str(n), "query_text": r["ask"], "query_image": r["picture"],
         "positive_passages": [{"docid": "p", "title": "", "text": text} for text in r["right"]],
         "negative_passages": [{"docid": "n", "title": "", "text": text} for text in r["wrong"]]}
        for n, r in enumerate(data)
    ]  # fmt: skip
    return open_source("tevatron", path=lines(folder / "train.jsonl", rows))


def says(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def swift(folder: Path, data: Data) -> Source:
    rows = [
        {"messages": says(f"<image>{r['ask']}"), "images": [r["picture"]], "positive_messages": [says(text) for text in r["right"]],
         "negative_messages": [says(text) for text in r["wrong"]]}
        for r in data
    ]  # fmt: skip
    return open_source("ms-swift", path=lines(pictures(folder, data) / "t.jsonl", rows))


def swift_older(folder: Path, data: Data) -> Source:
    rows = [
        {"query": f"<image>{r['ask']}", "response": r["right"][0], "rejected_response": r["wrong"], "images": [r["picture"]]} for r in data
    ]
    return open_source("ms-swift", path=lines(pictures(folder, data) / "t.jsonl", rows))


def webdataset(folder: Path, data: Data) -> Source:
    """Two archives, with the pictures in them; where one of the data is named by a path, all are, in the JSON."""
    pictures(folder / "aside", data)
    named = any("/" in r["picture"] for r in data)
    columns = {"query.image": "image", "query.text": "json.q", "positive.text": "json.p", "negative.text": "json.n"}
    for part, rows in enumerate((data[:1], data[1:])):
        members = []
        for n, r in enumerate(rows):
            picture = folder / "aside" / r["picture"]
            about = {"q": r["ask"], "p": r["right"], "n": r["wrong"]}
            if named:
                columns["query.image"] = "json.i"
                about["i"] = r["picture"] if "/" in r["picture"] else f"aside/{r['picture']}"
            elif picture.is_file():
                members.append((f"./{n:04}.png", picture.read_bytes()))
            members.append((f"./{n:04}.json", json.dumps(about).encode()))
        packed(folder / f"shard-{part}.tar", members)
    return open_source("webdataset", path=folder, columns=columns)


GROUPS: Mapping[str, Callable[[Path, Data], Source]] = {
    "table": table, "arrow": arrow, "mmeb-train": mmeb, "sentence-transformers": st, "tevatron": tevatron,
    "tevatron inline": tevatron_inline, "ms-swift": swift, "ms-swift older": swift_older, "webdataset": webdataset,
}  # fmt: skip


def _llava_row(r: dict[str, Any]) -> dict[str, Any]:
    said = []
    for i, (question, answer) in enumerate(r["turns"]):
        said += [{"from": "human", "value": f"<image>\n{question}" if i == 0 else question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "image": r["picture"], "conversations": said}


def llava(folder: Path, data: Data) -> Source:
    path = pictures(folder, data) / "llava.json"
    path.write_text(json.dumps([_llava_row(r) for r in data], indent=1, ensure_ascii=False))
    return open_source("llava", path=path)


def llava_lines(folder: Path, data: Data) -> Source:
    return open_source("llava", path=lines(pictures(folder, data) / "llava.jsonl", [_llava_row(r) for r in data]))


def swift_chat(folder: Path, data: Data) -> Source:
    rows = []
    for r in data:
        said = [{"role": "system", "content": "be brief"}]
        for i, (question, answer) in enumerate(r["turns"]):
            asked = f"{question}<image>" if i == 0 else question
            said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        rows.append({"messages": said, "images": [r["picture"]]})
    return open_source("ms-swift", path=lines(pictures(folder, data) / "t.jsonl", rows))


def table_chat(folder: Path, data: Data) -> Source:
    rows = [{"i": r["picture"], "t": [{"question": q, "answer": a} for q, a in r["turns"]]} for r in data]
    columns = {"dialogue.image": "i", "dialogue.turns": "t"}
    return open_source("table", path=lines(pictures(folder, data) / "t.jsonl", rows), columns=columns)


def webdataset_chat(folder: Path, data: Data) -> Source:
    pictures(folder / "aside", data)
    members = []
    for n, r in enumerate(data):
        members.append((f"{n:04}.json", json.dumps({"conversations": _llava_row(r)["conversations"]}).encode()))
        if (picture := folder / "aside" / r["picture"]).is_file():
            members.append((f"{n:04}.png", picture.read_bytes()))
    return open_source("webdataset", path=packed(folder / "t.tar", members))


DIALOGUES: Mapping[str, Callable[[Path, Data], Source]] = {
    "llava": llava, "llava lines": llava_lines, "ms-swift": swift_chat, "table": table_chat, "webdataset": webdataset_chat,
}  # fmt: skip
