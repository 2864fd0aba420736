"""A study told: Markdown tables, and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comatch.studies import figures
from comatch.studies.summary import MEAN, Gap, Key, Mean, gaps, means

_UNITS = {
    "scores": "hit@1 in percent",
    "redundancy": "cosine of compression tokens, and their effective rank",
    "carried": "loss of readers in nats, with the own and with another's picture, and the difference",
    "answers": "percent right from the compression tokens alone",
}
_PERCENT = ("scores", "answers")
_DETAILS = {
    "redundancy": "Compression tokens: their mean cosine, the same with the mean of all taken away, and their effective rank then",
    "carried": "What readers get from the compression tokens: loss in nats with the own and with another's picture, and the difference",
    "answers": "Answers from the compression tokens alone, percent right",
}


def markdown(results: Mapping[str, Any]) -> str:
    """The whole study: what was asked, scores, gaps to the baseline, cost, and what else was measured."""
    rows = means(results)
    seeds = sorted({run["seed"] for run in results["runs"]})
    lines = [f"# {results['name']}", ""]
    lines += [results["question"], ""] if results["question"] else []
    lines += [f"{len(results['runs'])} runs of {len(rows)} arms; seeds {seeds}. {_measured(results['measure'])}", "", score_table(results)]
    if text := gap_table(results):
        lines += ["", f"Differences to {results['baseline']}, paired by seed:", "", text]
    lines += ["", cost_table(results)]
    for kind, title in _DETAILS.items():
        if text := detail_table(results, kind):
            lines += ["", f"{title}:", "", text]
    return "\n".join([*lines, "", made_by(results)]) + "\n"


def made_by(results: Mapping[str, Any]) -> str:
    """Which versions of the code and of torch trained the runs, on what; where there are several, how many runs each.

    Runs of one study are compared with each other, so a reader should know where the code changed between them.
    """
    makers = Counter(
        f"code {by['code']}, torch {by['torch']}, {by['machine']}, {by['device']}" for by in (run["made_by"] for run in results["runs"])
    )
    if len(makers) == 1:
        return f"Made by {next(iter(makers))}."
    return f"Made by {len(makers)} versions: {'; '.join(f'{who} ({n} of the runs)' for who, n in makers.most_common())}."


def score_table(results: Mapping[str, Any]) -> str:
    """hit@1 in percent, arm by task: mean and half of the 95 % interval over seeds."""
    return _grid(means(results), "scores", "arm", lambda mean: _number(mean, 100))


def gap_table(results: Mapping[str, Any], baseline: str | None = None) -> str:
    """Percentage points more than the baseline, arm by task; `*` where Holm's p is below 0.05. "" without a baseline."""
    found = gaps(results, baseline)
    return _grid(found, "scores", "arm", _gap) if found else ""


def cost_table(results: Mapping[str, Any]) -> str:
    """What each arm took: useful TFLOP, items and tokens of all stages, minutes, and its last losses."""
    rows = means(results)
    stages = list(dict.fromkeys(key[1] for row in rows.values() for key in row if key[0] == "loss"))
    head = ["arm", "seeds", "TFLOP", "items", "tokens", "minutes", *(f"loss {stage}" for stage in stages)]
    lines = []
    for arm, row in rows.items():
        cost = {name: row["cost", name].value for name in ("tflop", "items", "tokens", "seconds")}
        cells = [arm, str(row["cost", "tflop"].seeds), f"{cost['tflop']:.1f}", f"{cost['items']:,.0f}", f"{cost['tokens'] / 1e6:.2f}M"]
        cells += [f"{cost['seconds'] / 60:.1f}"]
        cells += [_number(row[place], 1, 3) if (place := ("loss", stage)) in row else "-" for stage in stages]
        lines.append(cells)
    return _lines(head, lines)


def detail_table(results: Mapping[str, Any], kind: str) -> str:
    """Values measured after each stage, a key of _DETAILS; "" where none were."""
    rows: dict[str, dict[Key, Mean]] = {
        f"{arm} | {stage}": {(kind, key[2]): mean for key, mean in row.items() if key[0] == kind and key[1] == stage}
        for arm, row in means(results).items()
        for stage in dict.fromkeys(key[1] for key in row if key[0] == kind)
    }
    scale, digits = (100, 1) if kind in _PERCENT else (1, 2)
    return _grid(rows, kind, "arm | stage", lambda mean: _number(mean, scale, digits)) if rows else ""


def draw(results: Mapping[str, Any], out: Path) -> list[Path]:
    """Save scores.png; where the grid has one setting of numbers, curve.png and what else was measured along it; the paths written."""
    pictures = [figures.save(figures.arms(*_shown(results)), out / "scores.png")]
    for kind, unit in _UNITS.items():
        if lines := curves(results, kind):
            setting = next(iter(next(iter(results["arms"].values()))["point"]))
            figure = figures.curves(lines, setting, unit, 100 if kind in _PERCENT else 1)
            pictures.append(figures.save(figure, out / f"{'curve' if kind == 'scores' else kind}.png"))
    return pictures


def _shown(results: Mapping[str, Any]) -> tuple[dict[str, dict[str, Mean]], dict[str, float]]:
    """hit@1 by arm and task, and guessing by task: what scores.png shows."""
    rows, tasks = means(results), _names(means(results), "scores")
    chance = {task: score["chance"] for run in results["runs"] for task, score in run["scores"].items()}
    chance |= {MEAN: sum(chance.values()) / len(chance)} if MEAN in tasks else {}
    return {arm: {task: row["scores", task] for task in tasks} for arm, row in rows.items()}, chance


def curves(results: Mapping[str, Any], kind: str = "scores") -> dict[str, dict[str, dict[float, Mean]]]:
    """{name: {arm without its point, and stage: {value of the grid's one setting: mean}}} of a kind of values.

    {} where the grid is not one setting of numbers, or nothing of this kind was measured at two of them.
    """
    points = {name: arm["point"] for name, arm in results["arms"].items()}
    if {len(point) for point in points.values()} != {1} or not all(_is_number(v) for point in points.values() for v in point.values()):
        return {}
    found: dict[str, dict[str, dict[float, Mean]]] = {}
    rows = means(results)
    for name in _names(rows, kind):
        for arm, row in rows.items():
            ((_, value),) = points[arm].items()
            for key in row:
                if key[0] == kind and key[-1] == name:
                    line = ", ".join([results["arms"][arm]["arm"], *key[1:-1]])
                    found.setdefault(name, {}).setdefault(line, {})[float(value)] = row[key]
    return found if any(len(line) > 1 for lines in found.values() for line in lines.values()) else {}


def _grid(rows: Mapping[str, Mapping[Key, Any]], kind: str, corner: str, tell: Any) -> str:
    names = _names(rows, kind)
    cells = [[arm, *(tell(row[place]) if (place := (kind, name)) in row else "-" for name in names)] for arm, row in rows.items()]
    return _lines([corner, *names], cells)


def _names(rows: Mapping[str, Mapping[Key, Any]], kind: str) -> list[str]:
    return list(dict.fromkeys(key[-1] for row in rows.values() for key in row if key[0] == kind))


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    bar = "|".join(["---"] * (1 + head[0].count("|")) + ["---:"] * (len(head) - 1))
    return "\n".join(["| " + " | ".join(head) + " |", f"|{bar}|", *("| " + " | ".join(row) + " |" for row in rows)])


def _number(mean: Mean, scale: float = 1, digits: int = 1) -> str:
    half = "" if mean.half is None else f" ± {scale * mean.half:.{digits}f}"
    return f"{scale * mean.value:.{digits}f}{half}"


def _gap(gap: Gap) -> str:
    half = "" if gap.mean.half is None else f" ± {100 * gap.mean.half:.1f}"
    return f"{100 * gap.mean.value:+.1f}{half}{' *' if gap.sure else ''}"


def _measured(measure: Mapping[str, Any]) -> str:
    where = f"{measure['n']} scenes, {measure['candidates']} candidates" if measure["suite"] == "scenes" else "emoji"
    return (
        f"hit@1 in percent on the {measure['split']} split ({where}); ± is half of the 95 % interval over seeds (Student's t), "
        "* a paired p below 0.05 after Holm's correction over all arms and tasks."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
