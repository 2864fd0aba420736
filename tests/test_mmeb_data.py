"""MMEB's folders become tasks: every layout and archive to the same, every odd row as published, every fault with its name."""

from __future__ import annotations

import gzip
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fixtures.mmeb import pack, remove, write_documents, write_table, write_v1, write_v2

from comatch.content import Message, Text, Video
from comatch.errors import EvaluationError
from comatch.evaluation.archives import Member, Pictures
from comatch.evaluation.hub import inflate
from comatch.evaluation.mmeb import Suite, mmeb_tasks, pictures_of
from comatch.evaluation.specs import specs
from comatch.evaluation.tasks import Task


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v1(tmp_path_factory.mktemp("v1"))


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_v2(tmp_path_factory.mktemp("v2"))


@pytest.fixture(scope="module")
def tasks(v1: Path) -> dict[str, Task]:
    return {task.name: task for task in mmeb_tasks(v1)}


@pytest.fixture(scope="module")
def tasks2(v2: Path) -> dict[str, Task]:
    names = [name for name, spec in specs("mmeb-v2").items() if spec.repo]
    return {task.name: task for task in mmeb_tasks(v2, "mmeb-v2", names=names)}


def content(message: Message) -> tuple[object, ...]:
    """A message by what it shows, wherever that lies."""
    return message.instruction, message.text, tuple(image.digest for image in pictures_of(message))


def equal(one: Task, other: Task) -> bool:
    sides = [(list(map(content, task.queries)), list(map(content, task.pool))) for task in (one, other)]
    listed = [[list(some) for some in task.candidates] for task in (one, other)]
    return sides[0] == sides[1] and listed[0] == listed[1] and list(map(list, one.gold)) == list(map(list, other.gold))


# --- what is there


def test_all_names_and_their_groups(tasks: dict[str, Task]) -> None:
    assert (len(specs("mmeb-v1")), len(specs("mmeb-v2"))) == (36, 78)
    assert Counter(task.meta for task in tasks.values()) == {"CLS": 10, "VQA": 10, "RET": 12, "VG": 4}
    assert Counter(task.split for task in tasks.values()) == {"IND": 20, "OOD": 16}
    assert {spec.mode for name, spec in specs("mmeb-v2").items() if not spec.repo} == {"local"}
    local = {name for name, spec in specs("mmeb-v2").items() if spec.repo and spec.mode == "local"}
    assert local == {
        "SmthSmthV2", "MVBench", "Video-MME", "NExTQA", "EgoSchema", "ActivityNetQA", "QVHighlight", "Charades-STA", "MomentSeeker",
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["whole", "split"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("archive", ["", "images.zip", "images.tar"])
def test_layouts_kinds_and_archives_give_the_same(tasks: dict[str, Task], tmp_path: Path, layout: str, kind: str, archive: str) -> None:
    write_v1(tmp_path, layout, kind)
    if archive:
        pack(tmp_path / "images", tmp_path / archive)
    found = mmeb_tasks(tmp_path)
    assert [task.name for task in found] == list(tasks)
    assert all(equal(task, tasks[task.name]) for task in found)
    sources = {type(image.source) for task in found for message in task.pool for image in message.images}
    assert sources == ({Member} if archive else {type(tmp_path)})


def test_candidates_are_known_by_text_and_path(tasks: dict[str, Task]) -> None:
    web, ref = tasks["WebQA"], tasks["RefCOCO-Matching"]
    for task in (web, ref):  # one picture, two captions: two candidates
        shown = Counter(message.images[0] for message in task.pool)
        assert max(shown.values()) > 1 and len(set(task.pool)) == len(task.pool)
    chart = tasks["ChartQA"]
    assert [len(listed) - len(set(listed)) for listed in chart.candidates] == [2] * len(chart.queries)
    assert all(listed[0] == gold[0] and list(listed).count(gold[0]) == 2 for listed, gold in zip(chart.candidates, chart.gold, strict=True))
    assert len({tuple(listed) for listed in tasks["OK-VQA"].candidates}) == 6
    assert len({frozenset(listed) for listed in tasks["ImageNet-1K"].candidates}) == 1
    assert len({frozenset(listed) for listed in tasks["Visual7W-Pointing"].candidates}) == 1
    assert {len(set(listed)) for task in tasks.values() for listed in task.candidates} >= {2, 5, 7, 9, 43}


def test_the_oddities_are_kept(tasks: dict[str, Task]) -> None:
    assert Text("NULL") in [part for message in tasks["OK-VQA"].pool for part in message.parts]
    assert any("bell_pepper" in message.text for message in tasks["ImageNet-R"].pool)
    asked = "".join(query.text for query in tasks["VizWiz"].queries)
    assert all(odd in asked for odd in ('"sign"', "¿Qué señal?\n", "<|image_pad|>"))
    assert all(query.text.endswith("\n\n") and not query.images for query in tasks["VisDial"].queries)
    assert not any(query.images or "image_1" in query.text for name in ("WebQA", "EDIS") for query in tasks[name].queries)
    sizes = {query.images[0].size for query in tasks["ImageNet-1K"].queries}
    assert {(20, 20), (1, 500), (28, 56)} <= sizes and (3000, 200) in {query.images[0].size for query in tasks["DocVQA"].queries}
    assert {query.images[0].load().mode for query in tasks["ImageNet-1K"].queries} == {"RGB"}


def test_global_mode_ranks_every_candidate(v1: Path, tasks: dict[str, Task]) -> None:
    (task,) = mmeb_tasks(v1, names=["OK-VQA"], mode="global")
    assert all(list(listed) == list(range(len(task.pool))) for listed in task.candidates)
    assert len(task.pool) == len(tasks["OK-VQA"].pool) > len(tasks["OK-VQA"].candidates[0])


def test_videos_show_eight_frames_in_order(tasks2: dict[str, Task]) -> None:
    frames = [[Path(str(image.source)).name for image in pictures_of(query)] for query in tasks2["K700"].queries]
    places = np.linspace(0, 9, 8, dtype=int) + 1
    assert frames[0] == [f"frame_{place}.png" for place in places]
    assert [len(some) for some in frames] == [8, 8, 3, 1]
    assert all(isinstance(query.parts[0], Video) for query in tasks2["K700"].queries)


def test_videos_and_documents_have_their_candidates(tasks2: dict[str, Task]) -> None:
    assert len(tasks2["K700"].pool) == 8 and len(tasks2["NExTQA"].candidates[0]) == 5
    assert {name: task.metric for name, task in tasks2.items() if task.modality == "video"} == dict.fromkeys(
        [name for name, task in tasks2.items() if task.modality == "video"], "hit@1"
    )
    clips = tasks2["QVHighlight"]
    assert all(len(listed) == 4 and "positive" in clips.names[gold[0]] for listed, gold in zip(clips.candidates, clips.gold, strict=True))
    graded, plain = tasks2["ViDoSeek-doc"], tasks2["ViDoRe_docvqa"]
    assert graded.metric == plain.metric == "ndcg@5" and graded.ids == ["0", "1", "2", "3"]
    assert list(graded.gold[0]) == [0, 1, 2] and list(graded.relevance[0]) == [3, 2, 1]
    assert list(plain.gold[1]) == [1] and list(plain.relevance[1]) == [3]  # of two judgements the higher, and 0 counts nothing
    assert len({content(page) for page in plain.pool}) == 6


def test_frames_and_pages_may_lie_elsewhere(tmp_path: Path, tasks2: dict[str, Task]) -> None:
    names = ["MSR-VTT", "QVHighlight", "ViDoRe_docvqa"]
    write_v2(tmp_path, names[:2])
    for kind in ("video_ret", "video_mret"):
        pack(tmp_path / "video-tasks" / "frames" / kind, tmp_path / "video-tasks" / "frames" / f"{kind}.tar")
    write_documents(tmp_path, specs("mmeb-v2")["ViDoRe_docvqa"], "jsonl")
    for task in mmeb_tasks(tmp_path, "mmeb-v2", names=names):
        assert equal(task, tasks2[task.name]), task.name


def test_a_revision_names_the_tables(tmp_path: Path) -> None:
    write_v1(tmp_path / "data", names=["CIRR", "GQA"])
    first = Suite(tmp_path / "data").revision
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    assert Suite(tmp_path / "copy", names=["GQA"]).revision == first == Suite(tmp_path / "data", mode="global").revision
    change(tmp_path / "copy" / "MMEB-eval" / "GQA", lambda row: row | {"qry_text": row["qry_text"] + "?"})
    assert Suite(tmp_path / "copy").revision != first


# --- what is wrong


def change(folder: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write a table again with its first row changed."""
    file = next(folder.glob("*.parquet"))
    rows = pq.read_table(file).to_pylist()
    pq.write_table(pa.Table.from_pylist([how(rows[0]), *rows[1:]]), file)


def without(folder: Path, *columns: str) -> None:
    file = next(folder.glob("*.parquet"))
    pq.write_table(pq.read_table(file).drop_columns(list(columns)), file)


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no folder": ("GQA", lambda r: shutil.rmtree(r / "MMEB-eval/GQA"), r"GQA: there is no table GQA/test-\*\.parquet or \.jsonl in"),
    "no column": ("GQA", lambda r: without(r / "MMEB-eval/GQA", "tgt_text"), "GQA: .*has no column tgt_text; it has qry_text"),
    "two lengths": (
        "CIRR", lambda r: change(r / "MMEB-eval/CIRR", lambda row: row | {"tgt_img_path": row["tgt_img_path"][1:]}),
        "CIRR: .*row 0: 5 texts and 4 pictures",
    ),
    "no candidates": (
        "CIRR", lambda r: change(r / "MMEB-eval/CIRR", lambda row: row | {"tgt_text": [], "tgt_img_path": []}), "CIRR: .*row 0: 0 texts",
    ),
    "a number": ("GQA", lambda r: write_table(r / "MMEB-eval/GQA", [dict.fromkeys(("qry_text", "qry_img_path"), 3) | {
        "tgt_text": ["a"], "tgt_img_path": [""]}]), "GQA: .*row 0: qry_text holds int, needed is a text"),
    "no list": ("GQA", lambda r: change(r / "MMEB-eval/GQA", lambda row: row) or write_table(r / "MMEB-eval/GQA", [
        {"qry_text": "a", "qry_img_path": "", "tgt_text": "a", "tgt_img_path": ""}]), "tgt_text holds str, needed is a list of texts"),
    "no picture": ("NIGHTS", remove, r"NIGHTS: .*row 0: there is no picture 'NIGHTS/q-0\.png'; looked in"),
    "outside": (
        "CIRR", lambda r: change(r / "MMEB-eval/CIRR", lambda row: row | {"qry_img_path": "../../secret.png"}),
        r"CIRR: .*'\.\./\.\./secret\.png' is no path below",
    ),
    "no parquet": (
        "GQA", lambda r: next((r / "MMEB-eval/GQA").glob("*")).write_bytes(b"PAR1 no"), "GQA: .*is no readable Parquet file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_with_the_dataset(tmp_path: Path, fault: str) -> None:
    name, break_it, told = FAULTS[fault]
    write_v1(tmp_path, names=[name])
    mmeb_tasks(tmp_path, names=[name])
    break_it(tmp_path)
    with pytest.raises(EvaluationError, match=told):
        mmeb_tasks(tmp_path, names=[name])


FAULTS2: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no corpus": ("ViDoRe_docvqa", lambda r: shutil.rmtree(r / "docvqa_test_subsampled_beir/corpus"), r"has no table corpus/test-"),
    "page not there": (
        "ViDoRe_docvqa", lambda r: change(r / "docvqa_test_subsampled_beir/qrels", lambda row: row | {"corpus-id": 99}),
        "ViDoRe_docvqa: .*query 0 has gold '99', which is not in the pool of 6 candidates",
    ),
    "nothing counts": (
        "ViDoRe_docvqa", lambda r: change(r / "docvqa_test_subsampled_beir/qrels", lambda row: row | {"score": 0}),
        "query 0 has no page that counts",
    ),
}  # fmt: skip
VIDEO_FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no frames": ("K700", lambda r: shutil.rmtree(r / "frames/video_cls/K700/v0"), "row 0: there are no frames in video_cls/K700/v0"),
    "gold not in the pool": (
        "K700", lambda r: change(r / "Kinetics-700", lambda row: row | {"pos_text": "flying"}), "row 0 has gold 'flying', which is not in",
    ),
    "classes missing": ("K700", lambda r: (r / "Kinetics-700/labels.txt").unlink(), "the rows name 4 classes, all 700 are ranked; write"),
    "gold no option": (
        "SmthSmthV2", lambda r: change(r / "SmthSmthV2", lambda row: row | {"pos_text": "flying"}), "gold 'flying' is not among its 4",
    ),
    "answer no option": ("EgoSchema", lambda r: change(r / "EgoSchema/Subset", lambda row: row | {"answer": "7"}), "option 7, there are 4"),
    "odd answer": ("Video-MME", lambda r: change(r / "Video-MME", lambda row: row | {"answer": "E"}), "holds something else than needed"),
    "no positive clip": (
        "QVHighlight", lambda r: shutil.rmtree(r / "frames/video_mret/QVHighlight/v0/positive_0"), "query 0 has no right candidate",
    ),
    "another mode": ("MSVD", lambda r: None, "no lists of their own; it is ranked globally"),
}  # fmt: skip


@pytest.mark.parametrize("fault", [*FAULTS2, *VIDEO_FAULTS])
def test_faults_of_videos_and_documents(tmp_path: Path, fault: str) -> None:
    (name, break_it, told), room = (FAULTS2[fault], "visdoc-tasks") if fault in FAULTS2 else (VIDEO_FAULTS[fault], "video-tasks")
    write_v2(tmp_path, [name])
    mmeb_tasks(tmp_path, "mmeb-v2", names=[name])
    break_it(tmp_path / room)
    with pytest.raises(EvaluationError, match=told):
        mmeb_tasks(tmp_path, "mmeb-v2", names=[name], mode="local" if fault == "another mode" else "")


def test_what_is_no_suite_or_folder_is_told(tmp_path: Path) -> None:
    for arguments, told in (
        ({"data": tmp_path / "no"}, "there is no folder"),
        ({"suite": "mmeb-v3"}, "'mmeb-v3'.*mmeb-v1, mmeb-v2"),
        ({"names": ["GQA", "GQB"]}, "mmeb-v1 has no dataset 'GQB'; it has ImageNet-1K"),
        ({"mode": "both"}, "mode is 'both'; allowed: local, global"),
        ({"protocol": "clip"}, "no protocol 'clip'"),
    ):
        with pytest.raises(EvaluationError, match=told):
            mmeb_tasks(**({"data": tmp_path} | arguments))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damaged_archives_are_refused(tmp_path: Path, kind: str) -> None:
    write_v1(tmp_path, names=["CIRR"])
    archive = tmp_path / f"images.{kind}"
    pack(tmp_path / "images", archive)
    data = archive.read_bytes()
    archive.write_bytes(data[: len(data) // 2])
    with pytest.raises(EvaluationError, match=r"CIRR: .*images\.(zip is no readable zip archive|tar is cut off at its end)"):
        mmeb_tasks(tmp_path, names=["CIRR"])
    packed = tmp_path / "images.tar.gz"
    packed.write_bytes(gzip.compress(data))
    with pytest.raises(EvaluationError, match=r"is packed as a whole.*gunzip images\.tar\.gz"):
        Pictures([packed])


# --- the hub


def test_without_a_network_the_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    command = "hf download TIGER-Lab/MMEB-eval --repo-type dataset --revision abc --local-dir MMEB; then .*--data MMEB"
    with pytest.raises(EvaluationError, match=f"HF_HUB_OFFLINE is set.*{command}"):
        mmeb_tasks("hub@abc")


def test_the_hubs_folders_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: dict[str, Task]) -> None:
    import huggingface_hub

    snapshot = tmp_path / "snapshots" / "0123456789abcdef"
    write_v1(snapshot)
    shutil.move(snapshot / "images", tmp_path / "images")
    for folder in (snapshot / "MMEB-eval").iterdir():
        shutil.move(folder, snapshot / folder.name)
    pack(tmp_path / "images", snapshot / "images.zip")
    write_v2(tmp_path / "other", ["MSVD"])
    frames = tmp_path / "other" / "video-tasks" / "frames"
    pack(frames / "video_ret", frames / "video_ret.tar")
    (frames / "video_ret.tar.gz").write_bytes(gzip.compress((frames / "video_ret.tar").read_bytes()))
    (frames / "video_ret.tar").unlink()
    other = tmp_path / "other"
    folders = {"TIGER-Lab/MMEB-eval": snapshot, "TIGER-Lab/MMEB-V2": other, "VLM2Vec/MSVD": other / "video-tasks" / "MSVD"}
    asked: list[tuple[str, str | None]] = []

    def download(repo: str, *, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        return str(folders[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    suite = Suite("hub@0123", names=["GQA", "WebQA"])
    assert equal(suite.task("WebQA"), tasks["WebQA"]) and suite.revision.startswith("0123456789ab:")
    both = Suite("hub", "mmeb-v2", names=["GQA", "MSVD"], work=tmp_path / "work")
    assert len(both.task("MSVD").pool) == 4 and (tmp_path / "work/frames/video_ret.tar").is_file()
    assert asked == [
        ("TIGER-Lab/MMEB-eval", "0123"), ("TIGER-Lab/MMEB-eval", None), ("VLM2Vec/MSVD", None), ("TIGER-Lab/MMEB-V2", None),
    ]  # fmt: skip


def test_parts_of_a_packed_file_are_joined(tmp_path: Path) -> None:
    data = gzip.compress(bytes(range(256)) * 40)
    parts = [tmp_path / f"x.tar.gz-0{i}" for i in range(3)]
    for i, part in enumerate(parts):
        part.write_bytes(data[i * len(data) // 3 : (i + 1) * len(data) // 3])
    inflate(parts, tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == bytes(range(256)) * 40
    with pytest.raises(EvaluationError, match="does not unpack"):
        inflate(parts[:2], tmp_path / "y.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar", *(part.name for part in parts)]


