"""Shares by kind as bars, each with the marks that tell what it is worth: what could be reached, and what guessing reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from comatch.analysis.probes import Probe
from comatch.analysis.survival import Survival
from comatch.drawing.style import GREY, INK, PALE, Figure, colour, legend, styled
from comatch.errors import EvaluationError

__all__ = ["levels", "probed", "survived"]

_MARKS: Final = (("_", INK, 2.4), ("_", GREY, 1.6), ("o", GREY, 0.8))


def survived(found: Mapping[str, Survival]) -> Figure:
    """What survives the bottleneck, kind by kind, one bar per model. found: model to its Survival."""
    names = ("", "ceiling: may look at the picture too", "floor: another item's tokens", "floor: commonest answer")
    rows = {name: {kind: (r.kept, r.looking, r.another, r.commonest) for kind, r in one.by_kind.items()} for name, one in found.items()}
    return levels(rows, names, title="Answered from the compression tokens alone", label="exact answers")


def probed(found: Mapping[str, Mapping[str, Probe]]) -> Figure:
    """What linear probes read off vectors, kind by kind, one bar per model. found: model to its `scene_probes`."""
    rows = {name: {kind: (probe.accuracy, probe.chance) for kind, probe in one.items()} for name, one in found.items()}
    return levels(rows, ("", "guessing: commonest class"), title="Read off the vectors by a linear probe", label="share right")


@styled
def levels(table: Mapping[str, Mapping[str, Sequence[float]]], marks: Sequence[str], *, title: str, label: str) -> Figure:
    """Bars of several models side by side, kind by kind, with marks on each.

    table: model to kind to (value of the bar, value of each mark). marks: what the values mean; the first is the bar's own, which the
    model's name stands for. All lie between 0 and 1. Raises EvaluationError where there is nothing to draw, models have other kinds, or
    values do not fit the marks.
    """
    kinds = list(next(iter(table.values()), ()))
    if not kinds or len(marks) - 1 > len(_MARKS):
        raise EvaluationError(f"{len(table)} models, kinds {kinds}, {len(marks)} values; draw at least one, at most {len(_MARKS)} marks")
    if any(list(row) != kinds or any(len(values) != len(marks) for values in row.values()) for row in table.values()):
        raise EvaluationError(f"models {list(table)} differ in their kinds, or have not {len(marks)} values each; measure all in one way")
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(max(6.0, 1.6 + len(kinds) * (0.3 + 0.3 * len(table))), 4.2))
    axes = figure.subplots()
    width = 0.8 / len(table)
    handles, names = list[Any](), list[str]()
    for i, (name, row) in enumerate(table.items()):
        places = np.arange(len(kinds)) + (i - (len(table) - 1) / 2) * width
        values = np.array(list(row.values()))
        handles.append(axes.bar(places, values[:, 0], width * 0.9, color=colour(i)))
        names.append(name)
        for (shape, ink, thick), column in zip(_MARKS, values[:, 1:].T, strict=False):
            size = 72 * figure.get_figwidth() * 0.75 * width / len(kinds) if shape == "_" else 4
            # A pale rim, so that a mark is seen on a bar of any colour.
            rim = [withStroke(linewidth=thick + 2, foreground="white")]
            axes.plot(places, column, shape, color=ink, markersize=size, markeredgewidth=thick, path_effects=rim)
    for mark, (shape, ink, thick) in zip(marks[1:], _MARKS, strict=False):
        handles += axes.plot([], [], shape, color=ink, markersize=14 if shape == "_" else 4, markeredgewidth=thick)
        names.append(mark)
    axes.set_xticks(range(len(kinds)), [kind.replace(" ", "\n") for kind in kinds])
    axes.set(title=title, ylabel=label, ylim=(0, 1.04))
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    legend(figure, handles, names, loc="outside lower center", ncols=2)
    return figure
