"""Figures of studies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from comatch.drawing.style import GREY, MARKERS, PALE, Figure, colour, legend, save, styled
from comatch.errors import StudyError
from comatch.studies.summary import Mean

__all__ = ["arms", "curves", "save"]


@styled
def arms(rows: Mapping[str, Mapping[str, Mean]], chance: Mapping[str, float]) -> Figure:
    """hit@1 of every arm, one panel for each task: points with their 95 % intervals, guessing dotted.

    rows: arm to task to its mean. Raises StudyError where there is nothing to draw.
    """
    tasks = list(dict.fromkeys(task for row in rows.values() for task in row))
    if not tasks:
        raise StudyError("no scores to draw; the study has no finished run")
    across = min(5, len(tasks))
    down = math.ceil(len(tasks) / across)
    figure = Figure(figsize=(2.2 + 2.3 * across, down * (0.9 + 0.27 * len(rows))))
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    names = list(rows)
    for i, axes in enumerate(panels.flat):
        if i >= len(tasks):
            axes.set_axis_off()
            continue
        task = tasks[i]
        for y, row in enumerate(rows.values()):
            if task in row:
                mean, half = 100 * row[task].value, 100 * (row[task].half or 0)
                axes.errorbar(mean, y, xerr=half, fmt="o", color=colour(y), capsize=2.5, markersize=5)
        axes.axvline(100 * chance[task], color=GREY, linestyle=":", linewidth=1.2)
        axes.set_title(task, fontsize=10)
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=PALE, linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
    panels[0][0].invert_yaxis()
    figure.supxlabel("hit@1 in percent; bars: 95 % interval over seeds; dotted: guessing", fontsize=9)
    return figure


@styled
def curves(tasks: Mapping[str, Mapping[str, Mapping[float, Mean]]], setting: str, unit: str, scale: float) -> Figure:
    """What was measured as one setting grows, one panel for each task: task to arm to value to mean, drawn times `scale`."""
    across = min(5, len(tasks))
    down = math.ceil(len(tasks) / across)
    figure = Figure(figsize=(0.6 + 2.6 * across, 0.7 + 2.2 * down))
    panels = figure.subplots(down, across, squeeze=False)
    handles: dict[str, Any] = {}
    for i, axes in enumerate(panels.flat):
        if i >= len(tasks):
            axes.set_axis_off()
            continue
        task, lines = list(tasks.items())[i]
        for j, (arm, line) in enumerate(lines.items()):
            xs = sorted(line)
            heights, halves = [scale * line[x].value for x in xs], [scale * (line[x].half or 0) for x in xs]
            look = {"color": colour(j), "marker": MARKERS[j % len(MARKERS)], "markersize": 4, "capsize": 2.5}
            handles[arm] = axes.errorbar(xs, heights, yerr=halves, **look)
        every = sorted({x for line in lines.values() for x in line})
        if every[0] > 0 and every[-1] / every[0] >= 8:
            axes.set_xscale("log", base=2)
            axes.set_xticks(every, [f"{x:g}" for x in every])
        axes.set_title(task, fontsize=10)
        if all(mean.value >= 0 for line in lines.values() for mean in line.values()):
            axes.set_ylim(bottom=0)
        axes.grid(color=PALE, linewidth=0.8)
    figure.supxlabel(f"{setting}; {unit}, bars: 95 % interval over seeds", fontsize=9)
    if any(handles):
        legend(figure, handles.values(), list(handles), loc="outside upper center", ncols=min(len(handles), 4))
    return figure
