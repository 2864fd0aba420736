"""Scores as charts: a radar and bars against published models, and every dataset with its interval. All numbers in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from comatch.drawing.style import GREY, INK, MARKERS, PALE, Axes, Figure, colour, legend, styled
from comatch.errors import EvaluationError

Estimate = tuple[float, float, float]


@styled
def radar(models: Mapping[str, Mapping[str, float]], keys: Sequence[str]) -> Figure:
    """One ring per model over the same spokes; the first model is drawn bold. models: name to key to score.

    Raises EvaluationError for fewer than three keys, which make no area, and for a model that lacks one.
    """
    lacking = [f"{name} ({key})" for name, row in models.items() for key in keys if key not in row]
    if len(keys) < 3 or lacking or not models:
        raise EvaluationError(f"a radar needs three scores or more of every model; got {list(keys)}, missing {lacking}")
    angles = np.linspace(0, 2 * np.pi, len(keys), endpoint=False)
    figure = Figure(figsize=(8.6, 5.2))
    axes: Any = figure.add_subplot(projection="polar")
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    lines = []
    for i, row in reversed(list(enumerate(models.values()))):  # the first model on top of the others
        heights = [row[key] for key in keys]
        how: dict[str, Any] = {"linewidth": 2.6} if i == 0 else {"linewidth": 1.4, "linestyle": ("--", ":", "-.")[i % 3]}
        how |= {"color": colour(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
        lines += axes.plot([*angles, angles[0]], [*heights, heights[0]], **how)
        if i == 0:
            axes.fill(angles, heights, color=colour(0), alpha=0.12)
    top = max(max(row[key] for key in keys) for row in models.values())
    edge = min(100, 10 * int(np.ceil((top + 2) / 10)))
    axes.set_ylim(0, edge)
    axes.set_yticks(range(20, edge + 1, 20))
    axes.set_xticks(angles, [str(key) for key in keys], fontsize=11)
    axes.tick_params(axis="x", pad=8)
    axes.set_rlabel_position(180 / len(keys))
    axes.tick_params(axis="y", labelsize=8, labelcolor=GREY, labelfontfamily="DejaVu Sans")
    axes.grid(color=PALE, linewidth=1)
    axes.spines["polar"].set_color(PALE)
    legend(figure, reversed(lines), list(models), loc="outside right upper")
    return figure


@styled
def bars(models: Mapping[str, Mapping[str, float | Estimate]], keys: Sequence[str]) -> Figure:
    """One panel per key, one bar per model, best of a panel in bold. models: name to key to score, or (score, low, high).

    What a model lacks is marked, not drawn as 0. Raises EvaluationError where there is nothing to draw.
    """
    if not models or not keys:
        raise EvaluationError(f"no bars to draw for models {list(models)} and scores {list(keys)}")
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(10, rows * (0.75 + 0.27 * len(models))))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place < len(keys):
            _panel(axes, models, keys[place])
        else:
            axes.set_visible(False)
    for line in grid:
        line[0].set_yticks(range(len(models)), list(models))
    grid[0, 0].invert_yaxis()
    layout: Any = figure.get_layout_engine()
    layout.set(hspace=0.08, h_pad=0.08)
    return figure


def _panel(axes: Axes, models: Mapping[str, Mapping[str, float | Estimate]], key: str) -> None:
    found = [_estimate(row[key]) if key in row else None for row in models.values()]
    best = max((value[0] for value in found if value), default=0)
    for i, value in enumerate(found):
        if value is None:
            axes.text(1, i, "not published", va="center", fontsize=8, color=GREY)
            continue
        middle, low, high = value
        axes.barh(i, middle, 0.72, color=colour(0) if i == 0 else "#B9BEC6")
        if low < high:
            axes.errorbar([(low + high) / 2], [i], xerr=[(high - low) / 2], fmt="none", color=INK, capsize=2, linewidth=1)
        axes.text(max(high, middle) + 2.5, i, f"{middle:.1f}", va="center", fontsize=9, fontweight="bold" if middle == best else "normal")
    axes.set(title=key, xlim=(0, 116), xticks=[])
    axes.spines[["bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


@styled
def datasets(ours: Mapping[str, Estimate], groups: Mapping[str, str], others: Mapping[str, Mapping[str, float]], *, name: str) -> Figure:
    """Every dataset as a line: our score with its interval, and published models as marks.

    ours: dataset to (score, low, high); groups: dataset to the heading it stands under, equal ones side by
    side; others: model to dataset to score; name: of our model.
    """
    if not ours:
        raise EvaluationError("no datasets to draw")
    figure = Figure(figsize=(9.4, 1.3 + 0.25 * len(ours)))
    axes = figure.subplots()
    places = np.arange(len(ours))
    middle, low, high = np.array(list(ours.values())).T
    axes.hlines(places, 0, 100, color=PALE, linewidth=0.8, zorder=0)
    handles = []
    for i, row in enumerate(others.values(), start=1):
        shown = [y for y, task in enumerate(ours) if task in row]
        scores = [row[task] for task in ours if task in row]
        handles.append(axes.scatter(scores, shown, s=26, color=colour(i), marker=MARKERS[i % len(MARKERS)], alpha=0.9))
    axes.errorbar((low + high) / 2, places, xerr=(high - low) / 2, fmt="none", color=colour(0), linewidth=2, capsize=2.5)
    handles.insert(0, axes.scatter(middle, places, s=40, color=colour(0), marker="o", edgecolors="white", linewidths=0.8, zorder=5))
    heads = [groups[task] for task in ours]
    for y, head in enumerate(heads):
        if y and head != heads[y - 1]:
            axes.axhline(y - 0.5, color=GREY, linewidth=0.8)
        if not y or head != heads[y - 1]:
            axes.text(101, y, head, fontsize=9, fontweight="bold", color=GREY, va="center")
    axes.set(xlim=(0, 100), ylim=(len(ours) - 0.4, -0.6), xlabel="score in percent, line: 95 % interval")
    axes.set_yticks(places, list(ours))
    axes.tick_params(axis="y", length=0)
    legend(figure, handles, [name, *others], loc="outside lower center", ncols=2)
    return figure


def _estimate(value: float | Estimate) -> Estimate:
    return value if isinstance(value, tuple) else (value, value, value)
