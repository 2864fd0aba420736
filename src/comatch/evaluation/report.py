"""A result for people: a Markdown table, or one self-contained HTML page with charts and wrong answers as pictures.

Both say the same: what was measured and how, every aggregate with its interval under its own name, published
models beside it, and each task. An aggregate that lacks a task is not printed anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comatch.drawing.page import Picture, Section, cell_text, write_page
from comatch.evaluation.aggregate import OVERALL, Mean, Summary, summarise, task_mean
from comatch.evaluation.mistakes import Show, mistakes
from comatch.evaluation.published import Published, columns, peers
from comatch.evaluation.records import SuiteResult, TaskResult
from comatch.evaluation.suites import places

KEYS: Mapping[str, tuple[str, ...]] = {
    "mmeb-v1": ("CLS", "VQA", "RET", "VG", "IND", "OOD", OVERALL),
    "mmeb-v2": ("image", "video", "visdoc", "All"),
}
"""The columns of the published tables; the last is the mean over all datasets."""

_MARKS = ("CLIP ViT-L/14", "VLM2Vec Qwen2-VL-7B, V2 code", "GME-7B, V2 code")
_MEANINGS = {"metas": "the plain mean of CLS, VQA, RET, VG", "halves": "(IND + OOD) / 2"}
_HOW = (
    "hit@1 counts a query only where a right answer beats every other one clearly: ties are misses, and what a fair coin would make of "
    "them stands beside it as the expected value. Intervals hold 95 % of the values that appear when queries are drawn anew; the choice "
    "of datasets is not part of them."
)
_OTHERS = (
    "Published figures come from other code, prompts and image sizes; a rerun of the same model moves the mean by 0.1 and a dataset by "
    "1.2 points. The last column of scores is always the mean over datasets; where a print means something else, the note says what."
)

_TASKS = (
    "Scores in percent: hit@1, for visual documents linear nDCG@5. Expected: hit@1 with ties broken by a fair coin. "
    "Chance: hit@1 of a random ranking."
)


def markdown(result: SuiteResult, *, against: Sequence[str] | None = None, seed: int = 0) -> str:
    """The result as Markdown tables. against: published models by name, by default `published.PEERS`."""
    lines = [f"# {_title(result)}"]
    for section in _sections(result, summarise(result, seed=seed), against, seed):
        lines += ["", f"## {section.title}", "", section.text, *([""] if section.table else []), *_table(section.table)]
    return "\n".join(lines) + "\n"


def write_report(
    path: str | Path, result: SuiteResult, *, show: Show | None = None, against: Sequence[str] | None = None, wrong: int = 2, seed: int = 0
) -> Path:
    """Write the HTML page: self-contained, no script, below 5 MB; needs the extra `plots`.

    show: gives the item of a query or candidate, see `mistakes.showing`; without it wrong answers stand as text. wrong: how many to show
    of each task. Raises EvaluationError for a result that is not of the suite, and for unknown names in `against`.
    """
    summary = summarise(result, seed=seed)
    overview, compared, tasks = _sections(result, summary, against, seed)
    compared = Section(compared.title, compared.text, compared.table, _charts(result, summary, against))
    tasks = Section(tasks.title, tasks.text, tasks.table, _datasets(result, seed))
    rows, left = mistakes(result.tasks, show, wrong)
    text = f"Up to {wrong} of each task: where a wrong answer won by the largest margin (the right one's score minus the chosen one's)."
    text += f" {left} more are left out to keep the page small." * bool(left)
    shown = Section("Wrong answers", text if rows else "There are none.", rows)
    return write_page(path, _title(result), [overview, compared, tasks, shown])


def _title(result: SuiteResult) -> str:
    return f"{result.model} on {result.suite}"


def _sections(result: SuiteResult, summary: Summary, against: Sequence[str] | None, seed: int) -> list[Section]:
    table = places(result.suite)
    told = f"Protocol {result.protocol}, data {result.revision}, model fingerprint {result.fingerprint}. "
    if summary.missing:
        missing = ", ".join(summary.missing)
        told += f"{len(summary.missing)} of {len(table)} datasets are missing, so what needs them is not printed: {missing}."
    else:
        told += f"All {len(table)} datasets are there."
    means = [{"mean": one.label, "score": _percent(one.value), "95 % interval": _interval(one)} for one in summary.means]
    rows = [_task_row(task, seed) for task in result.tasks]
    return [
        Section("Result", f"{told}\n\n{_HOW}", means),
        Section("Beside published models", _OTHERS, _beside(result, summary, against)),
        Section("Task by task", _TASKS, rows),
    ]


def _beside(result: SuiteResult, summary: Summary, against: Sequence[str] | None) -> list[dict[str, Any]]:
    """Our row and the published ones, best mean first; ours first where it has none."""
    keys = KEYS[result.suite]
    means = {key: summary[key] for key in keys}
    ours = {key: _percent(mean.value) if mean else None for key, mean in means.items()}
    total = means[keys[-1]]
    note = "" if total else "incomplete"
    ranked = [(100 * total.value if total else 100.0, {"model": _ours(result), "size": None, **ours, "note": note})]
    for one in peers(result.suite, against):
        scores = {key: f"{one.scores[key]:.1f}" if key in one.scores else None for key in keys}
        mean = one.dataset_mean()
        ranked.append((mean, {"model": one.model, "size": one.size or None, **scores, keys[-1]: f"{mean:.1f}", "note": _note(one)}))
    rows = [row for _, row in sorted(ranked, key=lambda pair: -pair[0])]
    empty = {"note"} if not any(row["note"] for row in rows) else set()
    return [{key: value for key, value in row.items() if key not in empty} for row in rows]


def _note(one: Published) -> str:
    said = []
    if one.overall != "datasets":
        said.append(f"prints {one.printed:.1f}, {_MEANINGS[one.overall]}")
    elif one.off:
        said.append(f"its print does not add up ({', '.join(one.off)})")
    said += [one.remark] * (bool(one.remark) and one.overall == "datasets")
    said += ["second hand"] * one.source.startswith("S")
    return "; ".join(said)


def _task_row(task: TaskResult, seed: int) -> dict[str, Any]:
    mean = task_mean(task, seed=seed)
    return {
        "task": task.name,
        "group": " ".join([task.modality] * (task.modality != "image") + [task.meta] + [task.split] * bool(task.split)),
        "score": _percent(mean.value),
        "95 % interval": _interval(mean),
        "expected": _percent(task.score.expected),
        "chance": _percent(task.score.chance),
        "ties": task.score.ties,
        "n": task.score.n,
    }


def _ours(result: SuiteResult) -> str:
    return f"{result.model} (this result)"


# --- charts


def _charts(result: SuiteResult, summary: Summary, against: Sequence[str] | None) -> list[Picture]:
    from comatch.drawing.style import data_uri
    from comatch.evaluation import figures

    found = {key: mean for key in KEYS[result.suite] if (mean := summary[key])}
    if not found:
        return []
    ours, last = _ours(result), KEYS[result.suite][-1]
    others = peers(result.suite, against)
    spokes = [key for key in found if key not in (OVERALL, "All")]
    rings = {one.model: one.scores for one in others if all(key in one.scores for key in spokes)}
    pictures = []
    if len(spokes) >= 3:
        mine = {key: 100 * found[key].value for key in spokes}
        absent = [one.model for one in others if one.model not in rings]
        caption = "Percent, farther out is better." + f" Without all of these scores, and so not drawn: {', '.join(absent)}." * bool(absent)
        figure = figures.radar({ours: mine, **rings}, spokes)
        pictures.append(Picture(data_uri(figure), f"radar of {', '.join(spokes)}: this result and published models", caption))
    rows: dict[str, dict[str, float | figures.Estimate]] = {ours: {key: _points(mean) for key, mean in found.items()}}
    rows |= {one.model: {**one.scores, last: one.dataset_mean()} for one in others}
    alt = f"bars of {', '.join(found)}: this result and published models"
    caption = "Percent. Black line: 95 % interval, which published models do not give."
    return [*pictures, Picture(data_uri(figures.bars(rows, list(found))), alt, caption)]


def _datasets(result: SuiteResult, seed: int) -> list[Picture]:
    from comatch.drawing.style import data_uri
    from comatch.evaluation import figures

    pictures = []
    marks = {column.model: column.scores for column in columns() if column.model in _MARKS}
    for modality in dict.fromkeys(task.modality for task in result.tasks):
        tasks = [task for task in result.tasks if task.modality == modality]
        mine = {task.name: _points(task_mean(task, seed=seed)) for task in tasks}
        groups = {task.name: task.meta for task in tasks}
        others = marks if modality == "image" else {}
        figure = figures.datasets(mine, groups, others, name=_ours(result))
        pictures.append(Picture(data_uri(figure), f"{tasks[0].metric} of every {modality} dataset", f"{modality}: {tasks[0].metric}"))
    return pictures


# --- text


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table; the first column left, the others right."""
    if not rows:
        return []
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---", *["---:"] * (len(keys) - 1)], *([cell_text(row.get(key)) for key in keys] for row in rows)]
    return ["| " + " | ".join(_plain(cell) for cell in line) + " |" for line in lines]


def _plain(cell: str) -> str:
    """Text that cannot end a cell or begin another."""
    return " ".join(cell.replace("\\", "\\\\").replace("|", "\\|").split())


def _points(mean: Mean) -> tuple[float, float, float]:
    return 100 * mean.value, 100 * mean.low, 100 * mean.high


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(mean: Mean) -> str:
    return f"{_percent(mean.low)} to {_percent(mean.high)}"
