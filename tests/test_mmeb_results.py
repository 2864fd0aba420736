"""Results add up as published, survive the disk unchanged, never mix, and their report holds everything itself."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_run import run
from fixtures.mmeb import write_v1
from mmeb_results import exact_result, suite_result, task
from PIL import Image as PILImage

from comatch.content import Image, Message, Text, Video
from comatch.errors import ContentError, EvaluationError
from comatch.evaluation import figures
from comatch.evaluation.aggregate import OVERALL, OVERALL_HALVES, OVERALL_METAS, Summary, aggregates, estimate, per_query, summarise
from comatch.evaluation.metrics import hit_at_1, interval
from comatch.evaluation.mistakes import mistakes, showing
from comatch.evaluation.published import columns
from comatch.evaluation.records import SuiteResult, TaskResult
from comatch.evaluation.report import markdown, write_report
from comatch.evaluation.results import read_result, write_result
from comatch.evaluation.suites import SUITES
from comatch.evaluation.tasks import Task

V1, V2 = SUITES["mmeb-v1"], SUITES["mmeb-v2"]


@cache
def golden(model: str = "VLM2Vec Qwen2-VL-7B, V2 code") -> SuiteResult:
    return exact_result(next(column.scores for column in columns() if column.model == model))


def percent(summary: Summary) -> dict[str, float]:
    return {mean.key: round(100 * mean.value, 1) for mean in summary.means}


# --- suites and aggregates


def test_the_names_and_their_partition() -> None:
    assert len(V1) == 36 and len(V2) == 78 and list(V2)[:36] == list(V1)
    metas = [place.meta for place in V1.values()]
    assert [metas.count(meta) for meta in ("CLS", "VQA", "RET", "VG")] == [10, 10, 12, 4]
    assert [sum(place.split == split for place in V1.values()) for split in ("IND", "OOD")] == [20, 16]
    assert [sum(place.modality == m for place in V2.values()) for m in ("image", "video", "visdoc")] == [36, 18, 24]
    assert {place.metric for place in V2.values() if place.modality == "visdoc"} == {"ndcg@5"} and V1["EDIS"].metric == "hit@1"


def test_every_aggregate_is_a_mean() -> None:
    for suite, count in (("mmeb-v1", 9), ("mmeb-v2", 16)):
        found = aggregates(suite)
        assert len(found) == count and all(sum(one.weights.values()) == pytest.approx(1) for one in found)
        assert all(set(one.weights) <= set(SUITES[suite]) for one in found)


def test_a_result_of_the_golden_scores_gives_the_printed_aggregates() -> None:
    assert percent(summarise(golden())) == {
        "CLS": 62.8, "VQA": 56.5, "RET": 69.4, "VG": 81.9, "IND": 71.3, "OOD": 57.9,
        OVERALL: 65.4, OVERALL_METAS: 67.6, OVERALL_HALVES: 64.6,
    }  # fmt: skip


def test_v2_is_the_mean_of_78_and_not_of_three() -> None:
    result = suite_result("mmeb-v2")
    summary = percent(summarise(result))
    scores = [per_query(one).mean() for one in result.tasks]
    assert summary["All"] == round(100 * float(np.mean(scores)), 1)
    assert summary["visdoc"] == round(100 * float(np.mean([one.score.ndcg5 for one in result.tasks if one.modality == "visdoc"])), 1)
    assert abs(summary["All"] - (summary["image"] + summary["video"] + summary["visdoc"]) / 3) > 0.5


def test_no_mean_where_a_task_is_missing() -> None:
    for suite, gone, lost in (
        ("mmeb-v1", "HatefulMemes", {"CLS", "IND", OVERALL, OVERALL_METAS, OVERALL_HALVES}),
        ("mmeb-v2", "MSVD", {"video RET", "video", "All"}),
    ):
        summary = summarise(suite_result(suite, without=(gone,)))
        assert summary.missing == (gone,) and dict(summary.withheld) == dict.fromkeys(summary.withheld, (gone,))
        assert set(summary.withheld) == lost and not lost & {mean.key for mean in summary.means}
        assert len(summary.means) + len(lost) == len(aggregates(suite))
    whole = suite_result()
    silent = summarise(replace(whole, tasks=whole.tasks[1:], missing=()))
    assert silent.missing == ("ImageNet-1K",), "the names count, not what a run says of itself"


def test_what_is_not_of_the_suite_is_refused() -> None:
    result = suite_result()
    first = result.tasks[0]
    for change, told in (
        ((first, *result.tasks), "ImageNet-1K stands 2 times"),
        ((replace(first, name="CIFAR-100"),), "'CIFAR-100' is none of the 36"),
        ((replace(first, split="OOD"),), "ImageNet-1K says"),
        ((replace(first, meta="classification"),), "ImageNet-1K says"),
        ((replace(first, metric="ndcg@5"),), "ImageNet-1K says"),
                ((replace(first, score=replace(first.score, hits=first.score.hits[1:])),), "19 values for 20 queries"),
    ):
        with pytest.raises(EvaluationError, match=told):
            summarise(replace(result, tasks=change))
    with pytest.raises(EvaluationError, match="counts 'f1'; allowed: hit@1, ndcg@5"):
        per_query(replace(first, metric="f1"))
    with pytest.raises(EvaluationError, match="'scenes' has no published tables"):
        summarise(replace(result, suite="scenes"))


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    result = suite_result(n=60)
    mean = summarise(result, seed=1)[OVERALL]
    assert mean is not None
    rng = np.random.default_rng(7)
    hits = np.array([one.score.hits for one in result.tasks], dtype=float)
    draws = [np.mean([row[rng.integers(60, size=60)].mean() for row in hits]) for _ in range(1500)]
    assert (mean.low, mean.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])), abs=0.004)
    assert mean.high - mean.low < 0.06, "36 tasks tell more than one"
    assert summarise(result, seed=1)[OVERALL] == mean != summarise(result, seed=2)[OVERALL]


def test_the_interval_of_a_perfect_model_is_not_empty() -> None:
    perfect = suite_result(skill=2.0, n=10)
    mean = summarise(perfect)[OVERALL]
    assert mean is not None and mean.value == pytest.approx(1) and mean.high == 1
    assert mean.low == pytest.approx(interval(np.ones(360))[0]) and mean.low < 1
    (worse,) = estimate(aggregates("mmeb-v1")[:1], {name: np.full(5, -1.0) for name in V1}, floor=-1.0)
    assert worse.low == -1 < worse.high


# --- results on disk


def test_a_result_reads_back_equal(tmp_path: Path) -> None:
    for suite in SUITES:
        result = suite_result(suite, n=7, without=("EDIS",))
        assert write_result(tmp_path / "deep" / f"{suite}.json", result) == result
        back = read_result(tmp_path / "deep" / f"{suite}.json")
        assert back == result and back.missing == ("EDIS",)
        for mine, other in zip(back.tasks, result.tasks, strict=True):
            assert mine.score.hits.tolist() == other.score.hits.tolist() and mine.score.ndcgs.tolist() == other.score.ndcgs.tolist()
    assert len(list((tmp_path / "deep").iterdir())) == 4, "nothing is left aside"


def test_equal_means_equal() -> None:
    """Equality looks at every prediction."""
    result = suite_result(n=5)
    first = result.tasks[0]
    changed = (replace(first.predictions[0], margin=first.predictions[0].margin + 1e-12), *first.predictions[1:])
    assert replace(result, tasks=(replace(first, predictions=changed), *result.tasks[1:])) != result


def test_a_real_score_survives(tmp_path: Path) -> None:
    vectors = np.eye(6, dtype=np.float32)
    score = hit_at_1(vectors[[0, 1, 2]], vectors, [range(6)] * 3, [[0], [1], [5]], name="GQA", meta="VQA")
    made = replace(task("GQA", V1["GQA"], [1, 1, 6]), score=score)
    result = replace(suite_result(), tasks=(made,))
    write_result(tmp_path / "r.json", result)
    assert read_result(tmp_path / "r.json") == result


def test_the_leaderboard_finds_its_form(tmp_path: Path) -> None:
    result = suite_result("mmeb-v2", n=10)
    write_result(tmp_path / "r.json", result, about={"model_size": 3.8, "url": "https://x.example", "data_source": "Self-Reported"})
    content = json.loads((tmp_path / "r.json").read_text())
    assert set(content) == {"metadata", "metrics"}
    assert content["metadata"].items() >= {"model_name": "ours", "model_size": 3.8, "data_source": "Self-Reported"}.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", content["metadata"]["report_generated_date"])
    assert {key: len(value) for key, value in content["metrics"].items()} == {"image": 36, "video": 18, "visdoc": 24}
    keys = {f"{m}@{k}" for m in ("hit", "mrr", "recall") for k in (1, 5, 10)} | {"ndcg_linear@5", "num_pred", "num_data"}
    for one in result.tasks:
        row = content["metrics"][one.modality][one.name]
        ranks = [prediction.rank for prediction in one.predictions]
        assert set(row) == keys and row["num_pred"] == 10
        assert row["hit@1"] == one.score.hit and row["ndcg_linear@5"] == one.score.ndcg5
        assert row["hit@5"] == np.mean([rank <= 5 for rank in ranks]) == row["recall@5"]
        assert row["mrr@10"] == pytest.approx(one.score.mrr)
    ours = content["metadata"]["comatch"]
    assert (ours["protocol"], ours["fingerprint"], ours["revision"]) == (result.protocol, result.fingerprint, result.revision)
    assert set(ours["versions"]) == {"python", "comatch", "torch", "transformers", "numpy", "pillow"}


def test_predictions_are_a_table_that_others_can_read(tmp_path: Path) -> None:
    result = suite_result(n=4)
    write_result(tmp_path / "r.json", result)
    (path,) = tmp_path.glob("r.*.parquet")
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == 36 * 4
    assert list(rows[0]) == ["task", "query", "chosen", "gold", "correct", "rank", "margin", "tie", "candidates", "ndcg"]
    assert [row["task"] for row in rows[::4]] == list(V1)


def test_a_run_adds_task_by_task(tmp_path: Path) -> None:
    """Partial results are kept, in the order of the suite; the same task is replaced; what was said about the model stays."""
    whole = suite_result(n=6)
    thirds = [whole.tasks[i::3] for i in (2, 0, 1)]
    parts = [replace(whole, tasks=third, missing=tuple(one.name for one in whole.tasks if one not in third)) for third in thirds]
    path = tmp_path / "r.json"
    write_result(path, parts[0], about={"url": "https://x.example"})
    assert read_result(path) == parts[0]
    write_result(path, parts[1])
    half = write_result(path, parts[2])
    assert half == whole == read_result(path)
    better = replace(whole, tasks=(task("ImageNet-1K", V1["ImageNet-1K"], [1] * 6),))
    assert write_result(path, better).tasks == (*better.tasks, *whole.tasks[1:])
    assert json.loads(path.read_text())["metadata"]["url"] == "https://x.example"
    assert len(list(tmp_path.iterdir())) == 2, "tables that nobody names are gone"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fingerprint": "e" * 32, "model": "another"}, r"of ours on mmeb-v1 \(fingerprint ffff.*not of another .*eeee.*in fingerprint"),
        ({"protocol": "vlm2vec-v1"}, "protocol comatch.*protocol vlm2vec-v1.*differ in protocol"),
        ({"revision": "r2"}, "data r1.*data r2.*differ in revision"),
        ({"suite": "mmeb-v2"}, "on mmeb-v1.*on mmeb-v2.*differ in suite"),
    ],
)
def test_results_of_two_runs_never_mix(tmp_path: Path, change: dict[str, str], told: str) -> None:
    result = suite_result(n=5)
    write_result(tmp_path / "r.json", result)
    with pytest.raises(EvaluationError, match=told):
        write_result(tmp_path / "r.json", replace(result, **change))  # type: ignore[arg-type]
    assert read_result(tmp_path / "r.json") == result, "what was there is as it was"
    moved = replace(result, model="the same weights elsewhere")
    assert write_result(tmp_path / "r.json", moved) == moved


def test_a_killed_write_leaves_the_result_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result, later = suite_result(n=5), suite_result(n=6)
    path = tmp_path / "r.json"
    write_result(path, result)
    real = Path.replace
    for allowed in (0, 1):  # dies at the table, then between the table and the JSON
        calls = iter(range(9))

        def replaced(self: Path, target: Path, calls: object = calls, allowed: int = allowed) -> Path:
            if next(calls) >= allowed:  # type: ignore[call-overload]
                raise OSError("no space left on device")
            return real(self, target)

        monkeypatch.setattr(Path, "replace", replaced)
        with pytest.raises(OSError, match="no space"):
            write_result(path, later)
        monkeypatch.undo()
        assert read_result(path) == result
        assert not list(tmp_path.glob(".*"))
    assert write_result(path, later) == read_result(path) == later


def test_damaged_results_are_refused(tmp_path: Path) -> None:
    result = suite_result(n=5)
    path = tmp_path / "r.json"

    def fresh() -> dict[str, dict[str, dict[str, object]]]:
        path.unlink(missing_ok=True)
        write_result(path, result)
        return json.loads(path.read_text())  # type: ignore[no-any-return]

    def broken(content: object) -> None:
        path.write_text(json.dumps(content))
        with pytest.raises(EvaluationError, match=r"r\.json (cannot be read as a result|has format 9)"):
            read_result(path)

    content = fresh()
    del content["metadata"]["comatch"]
    broken(content)
    content = fresh()
    content["metadata"]["comatch"]["format"] = 9
    broken(content)
    content = fresh()
    content["metadata"]["comatch"]["tasks"][0]["score"]["hit"] = 0.99  # type: ignore[index]
    broken(content)
    content = fresh()
    content["metadata"]["comatch"]["predictions"] = "../../etc/passwd"
    broken(content)
    broken([])
    fresh()
    (table,) = tmp_path.glob("*.parquet")
    data = bytearray(table.read_bytes())
    data[len(data) // 2] ^= 1
    table.write_bytes(data)
    with pytest.raises(EvaluationError, match="other content than its name says"):
        read_result(path)
    table.unlink()
    with pytest.raises(EvaluationError, match="cannot be read as a result"):
        read_result(path)
    with pytest.raises(EvaluationError, match=r"\.json file, got 'r\.txt'"):
        read_result("r.txt")


def test_predictions_must_be_those_of_the_score(tmp_path: Path) -> None:
    result = suite_result(n=5)
    first = result.tasks[0]
    wrong = replace(first, predictions=tuple(replace(p, correct=not p.correct) for p in first.predictions))
    for bad in (wrong, replace(first, predictions=first.predictions[1:])):
        with pytest.raises(EvaluationError, match="ImageNet-1K has predictions"):
            write_result(tmp_path / "r.json", replace(result, tasks=(bad,)))
    assert not (tmp_path / "r.json").exists()


# --- the report


def test_markdown_says_the_three_overalls_by_name() -> None:
    text = markdown(golden())
    for line in (
        "| Overall: mean of the 36 datasets | 65.4 |",
        "| Overall as some print it: mean of CLS, VQA, RET, VG | 67.6 |",
        "| Overall as some print it: (IND + OOD) / 2 | 64.6 |",
        "| golden (this result) | – | 62.8 | 56.5 | 69.4 | 81.9 | 71.3 | 57.9 | 65.4 |",
        "| MoCa-3B | 3.8B | 59.8 | 62.9 | 70.6 | 88.6 | 72.3 | 61.5 | 67.5 |",
    ):
        assert line in text
    assert "Protocol vlm2vec-v2, data r1, model fingerprint gggg" in text and "All 36 datasets are there." in text
    assert sum(line.startswith(f"| {name} |") for line in text.splitlines() for name in V1) == 36
    order = [line.split(" |")[0][2:] for line in text.splitlines() if "MoCa-3B" in line or "CLIP" in line or "(this result)" in line]
    assert order == ["MoCa-3B", "golden (this result)", "CLIP ViT-L/14"], "best first"


def test_other_meanings_are_noted_and_brought_to_ours() -> None:
    text = markdown(golden(), against=["UniME Phi-3.5", "VLM2Vec Qwen2-VL-2B", "SigLIP base-p16-224", "CoMa-7B"])
    assert "| 61.3 | prints 64.2, the plain mean of CLS, VQA, RET, VG |" in text
    assert "| 60.1 | prints 59.3, (IND + OOD) / 2 |" in text
    assert "its print does not add up (metas); RET is a misprint" in text
    assert "| CoMa-7B | 8.3B | – | – | – | – | – | – | 72.2 |" in text and "second hand" in text
    with pytest.raises(EvaluationError, match="no published model 'GPT'"):
        markdown(golden(), against=["GPT"])


def test_an_incomplete_result_prints_no_overall() -> None:
    text = markdown(suite_result(without=("GQA", "EDIS")))
    assert "2 of 36 datasets are missing, so what needs them is not printed: GQA, EDIS." in text
    assert "Overall:" not in text and "VQA, mean" not in text and "CLS, mean of 10" in text and "IND, mean of 20" in text
    assert re.search(r"ours \(this result\) \| – \| [\d.]+ \| – \| – \| [\d.]+ \| [\d.]+ \| – \| – \| incomplete \|", text)


def test_names_cannot_break_the_table() -> None:
    text = markdown(replace(golden(), model="a|b\n| c"))
    assert "| a\\|b \\| c (this result) |" in text


def drawn(colour: str, size: tuple[int, int] = (300, 200)) -> Image:
    return Image(PILImage.new("RGB", size, colour))


def page(tmp_path: Path, result: SuiteResult, **how: object) -> str:
    return write_report(tmp_path / "r.html", result, **how).read_text(encoding="utf-8")  # type: ignore[arg-type]


def test_the_page_holds_everything_itself(tmp_path: Path) -> None:
    def show(name: str, side: str, key: str) -> Message:
        return Message((drawn("red" if side == "query" else "blue"), Text(f"<b>{key}</b> & more")))

    html = page(tmp_path, suite_result(n=12, without=("EDIS",)), show=show)
    assert not re.search(r"https?://|<script|<link|@import|url\(", html)
    assert html.count("data:image/png;base64,") == 3 and html.count("data:image/jpeg;base64,") == 3 * 2 * 35
    assert "&lt;b&gt;rival" in html and "<b>" not in html
    assert (tmp_path / "r.html").stat().st_size < 5_000_000
    for uri in re.findall(r"data:image/jpeg;base64,([^\"]+)", html)[:3]:
        assert PILImage.open(io.BytesIO(base64.b64decode(uri))).size == (176, 117)


def test_a_page_of_hostile_pictures_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = [Message((Image(rng.integers(256, size=(176, 176, 3), dtype=np.uint8)),)) for _ in range(4)]
    result = suite_result("mmeb-v2", n=12, skill=0.3)
    html = page(tmp_path, result, show=lambda name, side, key: noise[len(key) % 4], wrong=4)
    assert (tmp_path / "r.html").stat().st_size < 5_000_000
    (left,) = re.findall(r"(\d+) more are left out", html)
    shown = html.count("data:image/jpeg") // 3
    assert shown + int(left) == 4 * 78 and shown >= 30


def test_the_verb_writes_the_report(model: Path, tmp_path: Path) -> None:
    data, out = write_v1(tmp_path / "data", names=["EDIS"]), tmp_path / "out"
    ran = run("evaluate", model, "--suite", "mmeb-v1", "--data", data, "--task", "EDIS", "--out", out)
    assert ran.code == 0, ran.err
    text, html = (out / "report.md").read_text(encoding="utf-8"), (out / "report.html").read_text(encoding="utf-8")
    assert text == markdown(read_result(out / "result.json")) and "35 of 36 datasets are missing" in text
    wrong = [p for p in read_result(out / "result.json").tasks[0].predictions if not p.correct]
    assert html.count("data:image/jpeg") == 2 * min(2, len(wrong)) > 0, "its candidates are pictures, its queries are texts"
    assert "cannot be shown" not in html


def test_the_page_of_an_empty_result_is_a_page(tmp_path: Path) -> None:
    html = page(tmp_path, suite_result(without=tuple(V1)))
    assert "36 of 36 datasets are missing" in html and "There are none." in html and "data:image" not in html


def test_the_surest_mistakes_come_first() -> None:
    one = task("GQA", V1["GQA"], [1, 3, 9, 0, 2, 1], ties=(4,))
    rows, left = mistakes([one], None, most=9)
    assert left == 0 and [row["query"] for row in rows] == ["2", "1", "4", "3"]
    assert [row["margin"] for row in rows] == [f"{-9 / 64:+.3f}", f"{-3 / 64:+.3f}", "tie", "broken vector"]
    assert rows[0]["chosen"] == "rival 2 of GQA" and rows[0]["right"] == "gold 2" and rows[3]["rank"] == "– of 10"
    assert mistakes([one], None, most=1)[0] == rows[:1] and mistakes([task("GQA", V1["GQA"], [1, 1])], None) == ([], 0)


def test_items_are_shown_by_their_names() -> None:
    film = Message((Video(tuple(drawn(c) for c in ("red", "green", "blue"))), Text("what happens?")))
    pool = [Message((Text("a word"),)), Message((drawn("white"),))]
    made = Task("K700", "CLS", [film], pool, [[0, 1]], [[1]], ids=["q7"], names=["word", "white.png"])
    show = showing({"K700": made}.__getitem__)
    assert show("K700", "query", "q7") is film and show("K700", "candidate", "white.png") is pool[1]
    with pytest.raises(ContentError, match="K700 has no query of this name"):
        show("K700", "query", "word")
    missing: TaskResult = task("K700", V2["K700"], [2])
    asked = replace(missing, predictions=(replace(missing.predictions[0], query="q7", chosen="word", gold="gone.png"),))
    ((row,), _) = mistakes([asked], show)
    assert row["query"].caption == "what happens? (the first of 3 pictures)" and row["chosen"] == "a word"
    assert row["right"] == "gone.png (cannot be shown: K700 has no candidate of this name)"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: figures.radar({"a": {"x": 1.0, "y": 2.0}}, ["x", "y"]),
        lambda: figures.radar({"a": {"x": 1.0, "y": 2.0, "z": 3.0}, "b": {}}, ["x", "y", "z"]),
        lambda: figures.bars({}, ["x"]),
        lambda: figures.bars({"a": {"x": 1.0}}, []),
        lambda: figures.datasets({}, {}, {}, name="a"),
    ],
)
def test_charts_of_nothing_are_refused(draw: Callable[[], object]) -> None:
    with pytest.raises(EvaluationError):
        draw()


def test_bars_mark_what_is_not_published() -> None:
    texts = [t.get_text() for axes in figures.bars({"a": {"x": (50.0, 40.0, 60.0)}, "b": {}}, ["x"]).axes for t in axes.texts]
    assert texts == ["50.0", "not published"]
