"""What the analysis finds, as figures.

Each function takes plain data or a report and returns a matplotlib Figure, all in the look of `style`; `save`
writes it as PNG, `data_uri` puts it on a page.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch

from comatch.analysis.masks import MaskReport
from comatch.analysis.projection import Projection
from comatch.analysis.redundancy import RedundancyReport
from comatch.content import Video, as_message
from comatch.core.batch import Example
from comatch.core.masks import dense
from comatch.drawing.style import (
    GREY,
    INK,
    MARKERS,
    PALE,
    PALETTE,
    RIGHT,
    ROLE_COLOUR,
    Axes,
    Figure,
    colour,
    data_uri,
    legend,
    save,
    styled,
)
from comatch.errors import EvaluationError
from comatch.recipe import ROLES, Visibility

__all__ = [
    "Search",
    "attention",
    "data_uri",
    "losses",
    "mask",
    "projection",
    "save",
    "scores",
    "searches",
    "similarity",
]

Estimate = tuple[float, float, float]


@styled
def mask(example: Example, visibility: Visibility) -> Figure:
    """Who sees whom in one example: the mask that attention gets, coloured by the role that is looked at.

    Bands at the upper and left edge tell the role of each token.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    roles = torch.from_numpy(example.roles)[None]
    allowed = dense(roles, torch.zeros_like(roles), visibility)[0, 0].numpy()
    names = [ROLES[int(role)] for role in example.roles]
    bands = np.array([to_rgb(ROLE_COLOUR[name]) for name in names])
    n, thick = len(names), max(1, round(len(names) / 30))
    picture = np.ones((n + thick, n + thick, 3))
    picture[thick:, thick:] = np.where(allowed[:, :, None], bands[None], to_rgb(PALE))
    picture[:thick, thick:], picture[thick:, :thick] = bands[None], bands[:, None]
    figure = Figure(figsize=(7.6, 5.2))
    axes = figure.subplots()
    axes.imshow(picture, interpolation="nearest", extent=(-thick, n, n, -thick))
    spans = [(name, len(list(group))) for name, group in groupby(names)]
    for edge in np.cumsum([length for _, length in spans])[:-1]:
        axes.axhline(edge, color="white", linewidth=1.2)
        axes.axvline(edge, color="white", linewidth=1.2)
    axes.set(title="Who sees whom", xlabel="token that is looked at", ylabel="token that looks")
    axes.spines[:].set_visible(False)
    patches = [Patch(color=ROLE_COLOUR[name]) for name, _ in spans]
    told = [f"{name}: {length} token{'s' * (length > 1)}" for name, length in spans]
    legend(figure, [*patches, Patch(color=PALE)], [*told, "not seen"], loc="outside right upper")
    return figure


@styled
def attention(report: MaskReport) -> Figure:
    """How each role's attention is shared out among the roles, layer by layer, mean over heads.

    The columns of one role sum to 1 in every layer.
    """
    roles, mass = report.roles, report.mass.mean(1)
    pairs = [(i, j) for i in range(len(roles)) for j in range(len(roles)) if j <= i or mass[:, i, j].any()]
    grid = np.stack([mass[:, i, j] for i, j in pairs], axis=1)
    layers = len(grid)
    figure = Figure(figsize=(8, 2.4 + 0.3 * layers))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for layer, column in np.ndindex(*grid.shape):
        value = float(grid[layer, column])
        ink = "white" if value < 0.55 else INK
        axes.text(column, layer, _share(value), ha="center", va="center", color=ink, fontsize=9)
    for column, (left, right) in enumerate(pairwise(pairs)):
        if left[0] != right[0]:
            axes.axvline(column + 0.5, color="white", linewidth=3)
    axes.set_xticks(range(len(pairs)), [f"{roles[i]}\nto {roles[j]}" for i, j in pairs], fontsize=8)
    axes.set_yticks(range(layers), [str(layer) for layer in range(layers)])
    b = report.bottleneck
    leak = float(report.leak.max())
    told = f"single weights up to {leak:.2g}" if leak else "exactly 0 everywhere"
    axes.set(
        title=f"Share of attention by role, recipe {report.recipe}\n{b.reader} to {b.hidden}: {told}",
        ylabel="layer",
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="share")
    return figure


@styled
def similarity(report: RedundancyReport) -> Figure:
    """Cosine between the compression tokens of one item, mean over items.

    Left as the states are, right without what all states share.
    """
    figure = Figure(figsize=(9, 4.6))
    panels = figure.subplots(1, 2, sharey=True)
    kinds = (
        ("as they are", report.cosine, report.mean_cosine, report.rank),
        ("mean state taken away", report.cosine_centred, report.mean_cosine_centred, report.rank_centred),
    )
    for axes, (name, cosine, mean, rank) in zip(panels, kinds, strict=True):
        image = axes.imshow(cosine, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(f"{name}\nmean cosine {mean:.2f}, effective rank {rank:.1f} of {report.tokens}")
        axes.set_xlabel("compression token")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("compression token")
    figure.colorbar(image, ax=panels, label="cosine", shrink=0.8)
    items = f"{report.items} item{'s' * (report.items > 1)}"
    figure.suptitle(f"How alike compression tokens end up ({items})", x=0.01, ha="left")
    return figure


@styled
def projection(points: Projection, titles: Sequence[str], labels: Sequence[Sequence[str]], *, shared: bool = True) -> Figure:
    """One panel per cloud, points coloured by class. labels: per cloud one class name per point.

    `shared` gives all panels one scale, so that they can be compared; without it each cloud fills its panel.
    Raises EvaluationError where titles or labels do not fit the clouds, or there are more classes than pairs
    of colour and mark to tell them apart.
    """
    counts, given = [len(cloud) for cloud in points.coordinates], [len(names) for names in labels]
    if len(titles) != len(counts) or given != counts:
        raise EvaluationError(f"{len(titles)} titles and {given} labels, but clouds of {counts} points")
    classes = sorted({name for names in labels for name in names})
    most = len(PALETTE) * len(MARKERS)
    if len(classes) > most:
        raise EvaluationError(f"{len(classes)} classes are too many to tell apart; show at most {most}")
    figure = Figure(figsize=(3.6 * len(counts) + 0.4, 4.2))
    panels = figure.subplots(1, len(counts), squeeze=False, sharex=shared, sharey=shared)[0]
    for axes, title, cloud, names in zip(panels, titles, points.coordinates, labels, strict=True):
        # 8 colours and 7 marks have no common divisor, so every class gets a pair of its own.
        dots = [
            axes.scatter(
                *cloud[[name == mine for name in names]].T,
                s=34,
                color=colour(i),
                marker=MARKERS[i % len(MARKERS)],
                edgecolors="white",
                linewidths=0.4,
            )
            for i, mine in enumerate(classes)
        ]
        axes.set(title=title, xlabel=_axis(points, 0))
    panels[0].set_ylabel(_axis(points, 1))
    legend(figure, dots, classes, loc="outside lower center", ncols=2 * len(counts))
    return figure


@styled
def losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss over steps, one panel per stage, one line per run. runs: a run's name to its rows of metrics.jsonl.

    Raises EvaluationError where there are no rows at all.
    """
    stages = list(dict.fromkeys(str(row["stage"]) for rows in runs.values() for row in rows))
    if not stages:
        raise EvaluationError(f"no metrics to draw for {list(runs)}; pass rows with stage, step and loss")
    figure = Figure(figsize=(3.8 * len(stages) + 0.6, 3.6))
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    lines, smoothed = {}, False
    for axes, stage in zip(panels, stages, strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            mine = [(float(row["step"]), float(row["loss"])) for row in rows if row["stage"] == stage]
            if not mine:
                continue
            steps, values = np.array(mine).T
            window = max(1, len(mine) // 40)
            if window > 1:
                smoothed = True
                axes.plot(steps, values, color=colour(i), alpha=0.3, linewidth=0.8)
            dash = ("-", "--", ":", "-.")[i % 4]
            mean = running_mean(values, window)
            lines[name] = axes.plot(steps, mean, color=colour(i), linewidth=1.8, linestyle=dash)[0]
        axes.set(title=stage, xlabel="step")
        axes.grid(axis="y", color=PALE, linewidth=0.8)
    panels[0].set_ylabel("loss (bold: running mean)" if smoothed else "loss")
    if len(runs) > 1:
        legend(figure, lines.values(), list(lines), loc="outside lower center", ncols=2 * len(stages))
    return figure


@styled
def scores(
    table: Mapping[str, Mapping[str, float | Estimate]],
    *,
    label: str = "hit@1",
    chance: Mapping[str, float] | None = None,
) -> Figure:
    """Bars of several models side by side, task by task.

    table: model to task to a value, or to (value, low, high) with its 95 % interval. chance: the level of
    guessing per task, drawn as a dotted line. A task that a model lacks is marked, not drawn as 0. Raises
    EvaluationError where there are no scores.
    """
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    if not tasks:
        raise EvaluationError(f"no scores to draw for {list(table)}; pass model -> task -> value")
    width = 0.84 / len(table)
    figure = Figure(figsize=(max(6.0, 1.2 + 0.48 * len(tasks) * (len(table) + 1)), 4.2))
    axes = figure.subplots()
    handles = []
    for i, row in enumerate(table.values()):
        places = np.arange(len(tasks)) + (i - (len(table) - 1) / 2) * width
        found = {x: _estimate(row[task]) for x, task in zip(places, tasks, strict=True) if task in row}
        heights = [found.get(x, (0.0,))[0] for x in places]
        handles.append(axes.bar(places, heights, width * 0.92, color=colour(i)))
        for x in places:
            if x not in found:
                axes.text(x, 0, " not measured", rotation=90, ha="center", fontsize=8, color=GREY)
                continue
            value, low, high = found[x]
            if low < high:
                axes.errorbar([x], [(low + high) / 2], [(high - low) / 2], fmt="none", color=INK, capsize=2.5, linewidth=1)
            above: dict[str, Any] = {"xytext": (0, 2), "textcoords": "offset points"}
            axes.annotate(f"{value:.2f}", (x, high), ha="center", fontsize=8, **above)
    for x, task in enumerate(tasks):
        if chance and task in chance:
            axes.hlines(chance[task], x - 0.45, x + 0.45, color=INK, linestyle=":", linewidth=1.4)
    axes.set_xticks(range(len(tasks)), [textwrap.fill(task, 18) for task in tasks])
    measured = any(isinstance(value, tuple) for row in table.values() for value in row.values())
    notes = ["black lines: 95 % interval"] * measured + ["dotted: guessing"] * bool(chance)
    axes.set_title("; ".join(notes), fontsize=9)
    axes.set(ylabel=label, ylim=(0, None))
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    legend(figure, handles, list(table), loc="outside lower center", ncols=min(len(table), 4))
    return figure


@dataclass(frozen=True)
class Search:
    """One search to show. query: anything that can be embedded.

    results: best first, as (item, score, right); right is None where nobody knows.
    """

    query: Any
    results: Sequence[tuple[Any, float, bool | None]]


@styled
def searches(rows: Sequence[Search]) -> Figure:
    """Searches as pictures: the query left, its best results to the right with their scores.

    Right results have a green frame and a tick. Raises EvaluationError where there are none, and what an item
    that cannot be read raises.
    """
    if not rows:
        raise EvaluationError("no searches to draw; pass at least one Search")
    columns = 1 + max(len(row.results) for row in rows)
    figure = Figure(figsize=(1.5 * columns + 0.8, 1.8 * len(rows) + 0.3))
    shape = {"width_ratios": [1.4] + [1] * (columns - 1)}
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=shape)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], anchor="N")
        axes.spines[:].set_visible(False)
    for line, row in zip(grid, rows, strict=True):
        _show(line[0], row.query, letters=24)
        for axes, (item, score, right) in zip(line[1:], row.results, strict=False):
            _show(axes, item, letters=19)
            tick = " ✓" if right else ""
            axes.set_xlabel(f"{score:.2f}{tick}", fontsize=9, color=RIGHT if right else INK, labelpad=3)
            axes.spines[:].set(visible=True, color=RIGHT if right else PALE, linewidth=3.5 if right else 1)
    grid[0, 0].set_title("query", fontsize=9)
    if columns > 1:
        grid[0, 1].set_title("best results", fontsize=9)
    return figure


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the `window` values around each, over fewer at both ends; as long as `values` [n]. Centred, so that it does not lag."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    here = np.arange(len(values))
    starts, ends = np.maximum(here - window // 2, 0), np.minimum(here + (window - 1) // 2 + 1, len(values))
    mean: np.ndarray = (total[ends] - total[starts]) / (ends - starts)
    return mean


def _show(axes: Axes, item: Any, letters: int) -> None:
    """One item: its first picture and its text below, or its text alone, in lines of so many letters."""
    message = as_message(item)
    pictures = [*message.images, *(part.frames[0] for part in message.parts if isinstance(part, Video))]
    words = textwrap.shorten(message.text, 7 * letters, placeholder=" ...")
    text: dict[str, Any] = {"s": textwrap.fill(words, letters), "fontsize": 8, "ha": "center", "transform": axes.transAxes}
    if not pictures:
        axes.set(box_aspect=1)
        axes.text(0.5, 0.5, va="center", **text)
        return
    picture = pictures[0].load()
    picture.thumbnail((256, 256))
    axes.imshow(np.asarray(picture), interpolation="nearest")
    axes.text(0.5, -0.04, va="top", **text)


def _axis(points: Projection, i: int) -> str:
    return f"component {i + 1} ({points.explained[i]:.0%} of variance)" if points.explained else f"UMAP {i + 1}"


def _estimate(value: float | Estimate) -> Estimate:
    return value if isinstance(value, tuple) else (value, value, value)


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f}" if value >= 0.005 else "<.01"
