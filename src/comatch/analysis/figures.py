"""What the analysis finds, as figures. Each function takes plain data or a report and returns a matplotlib Figure; see also `style`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from comatch.analysis.masks import MaskReport
from comatch.analysis.projection import Projection
from comatch.analysis.redundancy import RedundancyReport
from comatch.analysis.style import INK, MARKERS, PALE, PALETTE, RIGHT, ROLE_COLOUR, Axes, Figure, data_uri, legend, save, styled
from comatch.content import as_message
from comatch.core.batch import ROLE_ID, Example
from comatch.core.masks import dense
from comatch.errors import EvaluationError
from comatch.recipe import ROLES, Visibility

__all__ = ["Search", "attention", "data_uri", "losses", "mask", "projection", "save", "scores", "searches", "similarity"]

Estimate = tuple[float, float, float]


@dataclass(frozen=True)
class Search:
    """One search to show. query: anything that can be embedded. results: best first, as (item, score, right); right is None where unknown."""

    query: Any
    results: Sequence[tuple[Any, float, bool | None]]


@styled
def mask(example: Example, visibility: Visibility) -> Figure:
    """Who sees whom in one example: the mask that attention gets, coloured by the role that is looked at, with bands of roles at its edges."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    roles = torch.from_numpy(example.roles)[None]
    allowed = dense(roles, torch.zeros_like(roles), visibility)[0, 0].numpy()
    names = [ROLES[int(role)] for role in example.roles]
    colour = np.array([to_rgb(ROLE_COLOUR[name]) for name in names])
    figure = Figure(figsize=(7.6, 5.4))
    axes = figure.subplots()
    n, band = len(names), max(1, round(len(names) / 30))
    picture = np.ones((n + band, n + band, 3))
    picture[band:, band:] = np.where(allowed[:, :, None], colour[None], to_rgb("#F2F2F2"))
    picture[:band, band:], picture[band:, :band] = colour[None], colour[:, None]
    axes.imshow(picture, interpolation="nearest", extent=(-band, n, n, -band))
    spans = [(name, len(list(group))) for name, group in groupby(names)]
    for edge in np.cumsum([length for _, length in spans])[:-1]:
        axes.axhline(edge, color="white", linewidth=1.2)
        axes.axvline(edge, color="white", linewidth=1.2)
    axes.set(title="Who sees whom", xlabel="token that is looked at", ylabel="token that looks")
    axes.spines[:].set_visible(False)
    lengths = [f"{name}: {length} token{'s' * (length > 1)}" for name, length in spans]
    patches = [*(Patch(color=ROLE_COLOUR[name]) for name, _ in spans), Patch(facecolor="#F2F2F2", edgecolor=PALE)]
    legend(figure, patches, [*lengths, "not seen"], loc="outside right upper")
    return figure


@styled
def attention(report: MaskReport) -> Figure:
    """How each role's attention is shared out among the roles, layer by layer, mean over heads; a row of one role sums to 1."""
    pairs = [(i, j) for i in range(len(report.roles)) for j in range(len(report.roles)) if j <= i or (report.mass[:, :, i, j] > 0).any()]
    mass = report.mass.mean(1)
    grid = np.stack([mass[:, i, j] for i, j in pairs], axis=1)
    layers = len(grid)
    figure = Figure(figsize=(8, 2.6 + 0.3 * layers))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for layer, column in np.ndindex(grid.shape) if layers <= 40 else ():
        value = grid[layer, column]
        axes.text(column, layer, _share(value), ha="center", va="center", color="white" if value < 0.55 else INK, fontsize=9)
    axes.set_xticks(range(len(pairs)), [f"{report.roles[i]}\nto {report.roles[j]}" for i, j in pairs], fontsize=8)
    axes.set_yticks(range(layers), [str(layer) for layer in range(layers)])
    b = report.bottleneck
    told = "exactly 0 in every layer and head" if (report.leak == 0).all() else f"up to {report.leak.max():.3g}, LEAKS"
    axes.set(title=f"Share of attention by role ({report.recipe}, stage {report.stage})\n{b.reader} to {b.hidden}: {told}", ylabel="layer")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="share")
    return figure


@styled
def similarity(report: RedundancyReport) -> Figure:
    """Cosine between the compression tokens of one item, mean over items: as the states are, and without what all states share."""
    figure = Figure(figsize=(9, 4.6))
    panels = figure.subplots(1, 2, sharey=True)
    kinds = (
        ("as they are", report.cosine, report.mean_cosine, report.rank),
        ("mean state taken away", report.cosine_centred, report.mean_cosine_centred, report.rank_centred),
    )
    for axes, (name, cosine, mean, rank) in zip(panels, kinds, strict=True):
        image = axes.imshow(cosine, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axes.set(title=f"{name}\nmean cosine {mean:.2f}, effective rank {rank:.1f} of {report.tokens}", xlabel="compression token")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[:].set_visible(False)
    panels[0].set_ylabel("compression token")
    panels[0].yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=panels, label="cosine", shrink=0.8)
    figure.suptitle(f"How alike compression tokens end up ({report.items} items)", x=0.01, ha="left")
    return figure


@styled
def projection(points: Projection, titles: Sequence[str], labels: Sequence[Sequence[str]], *, shared: bool = True) -> Figure:
    """One panel per cloud, points coloured by class. labels: per cloud one class name per point.

    `shared` gives all panels the same scale, so that they can be compared; without it each cloud fills its panel. Raises EvaluationError
    where titles or labels do not fit the clouds, or there are more classes than colours and marks to tell them apart.
    """
    counts = [len(cloud) for cloud in points.coordinates]
    if len(titles) != len(counts) or [len(names) for names in labels] != counts:
        raise EvaluationError(f"{len(titles)} titles and labels of length {[len(names) for names in labels]} do not fit clouds of {counts} points")
    classes = sorted({name for names in labels for name in names})
    if len(classes) > len(PALETTE) * len(MARKERS):
        raise EvaluationError(f"{len(classes)} classes cannot be told apart in one figure; show at most {len(PALETTE) * len(MARKERS)}")
    figure = Figure(figsize=(3.6 * len(counts) + 0.4, 4.4))
    panels = figure.subplots(1, len(counts), squeeze=False, sharex=shared, sharey=shared)[0]
    handles = []
    for panel, (axes, cloud) in enumerate(zip(panels, points.coordinates, strict=True)):
        for i, name in enumerate(classes):
            mine = cloud[[label == name for label in labels[panel]]]
            # 8 colours and 7 marks have no common divisor, so every class gets a pair of its own.
            look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "edgecolors": "white", "linewidths": 0.4}
            dots = axes.scatter(mine[:, 0], mine[:, 1], s=34, alpha=0.9, **look)
            handles += [dots] if panel == 0 else []
        axes.set(title=titles[panel], xlabel=f"component 1 ({points.explained[0]:.0%} of variance)")
    panels[0].set_ylabel(f"component 2 ({points.explained[1]:.0%} of variance)")
    legend(figure, handles, classes, loc="outside lower center", ncols=min(len(classes), 4))
    return figure


@styled
def losses(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss over steps, one panel per stage, one line per run. runs: name of a run to the rows of its metrics.jsonl."""
    stages = list(dict.fromkeys(str(row["stage"]) for rows in runs.values() for row in rows))
    if not stages:
        raise EvaluationError(f"no metrics to draw for {list(runs)}; pass rows of metrics.jsonl with stage, step and loss")
    figure = Figure(figsize=(4.6 * len(stages) + 0.4, 3.8))
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    lines = {}
    for axes, stage in zip(panels, stages, strict=True):
        for i, (name, rows) in enumerate(runs.items()):
            mine = [row for row in rows if row["stage"] == stage]
            steps, values = [float(row["step"]) for row in mine], np.array([float(row["loss"]) for row in mine])
            colour, window = PALETTE[i % len(PALETTE)], max(1, len(values) // 40)
            if window > 1:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            dash = ("-", "--", ":", "-.")[i % 4]
            drawn = axes.plot(steps, running_mean(values, window), color=colour, linewidth=1.8, linestyle=dash)
            if mine:
                lines[name] = drawn[0]
        axes.set(title=stage, xlabel="step")
        axes.grid(axis="y", color=PALE, linewidth=0.6)
    panels[0].set_ylabel("loss (bold: running mean)")
    if len(runs) > 1:
        legend(figure, lines.values(), list(lines), loc="outside lower center", ncols=min(len(lines), 4))
    return figure


@styled
def scores(table: Mapping[str, Mapping[str, float | Estimate]], *, label: str = "hit@1", chance: Mapping[str, float] | None = None) -> Figure:
    """Bars of several models side by side, task by task. table: model to task to a value, or (value, low, high) with its 95 % interval.

    chance: level of guessing per task, drawn as a line through the task's bars. A task that a model lacks is marked, not drawn as 0.
    """
    tasks = list(dict.fromkeys(task for row in table.values() for task in row))
    if not tasks:
        raise EvaluationError(f"no scores to draw for {list(table)}; pass model -> task -> value or (value, low, high)")
    width = 0.8 / len(table)
    figure = Figure(figsize=(max(6.0, 1.4 + 0.5 * len(tasks) * (len(table) + 1)), 4.4))
    axes = figure.subplots()
    handles = []
    for i, row in enumerate(table.values()):
        places = np.arange(len(tasks)) + (i - (len(table) - 1) / 2) * width
        triples = [_estimate(row[task]) if task in row else None for task in tasks]
        values = [t[0] if t else 0.0 for t in triples]
        handles.append(axes.bar(places, values, width * 0.92, color=PALETTE[i % len(PALETTE)]))
        for x, t in zip(places, triples, strict=True):
            if t is None:
                axes.text(x, 0, "not\nmeasured", ha="center", va="bottom", fontsize=7, color="#666666")
                continue
            axes.errorbar([x], [t[0]], [[t[0] - t[1]], [t[2] - t[0]]], color=INK, capsize=2.5, linewidth=1)
            axes.annotate(f"{t[0]:.2f}", (x, t[2]), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8)
    for x, task in enumerate(tasks):
        if chance and task in chance:
            axes.hlines(chance[task], x - 0.45, x + 0.45, color=INK, linestyle=":", linewidth=1.2)
    axes.set_xticks(range(len(tasks)), [textwrap.fill(task, 18) for task in tasks])
    note = "lines: 95 % interval" + ("; dotted: guessing" if chance else "")
    axes.set(ylabel=label, title=f"{label} ({note})", ylim=(0, None))
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    legend(figure, handles, list(table), loc="outside lower center", ncols=min(len(table), 4))
    return figure


@styled
def searches(rows: Sequence[Search], *, title: str = "") -> Figure:
    """Searches as pictures: the query left, its best results to the right with their scores; right ones have a green frame and a tick."""
    if not rows:
        raise EvaluationError("no searches to draw; pass at least one Search")
    columns = 1 + max(len(row.results) for row in rows)
    figure = Figure(figsize=(1.55 * columns + 0.7, 1.85 * len(rows) + (0.4 if title else 0.1)))
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)  # type: ignore[union-attr]
    grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"width_ratios": [1.4] + [1] * (columns - 1)})
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for line, row in zip(grid, rows, strict=True):
        _show(line[0], row.query, "")
        for axes, (item, score, right) in zip(line[1:], row.results, strict=False):
            _show(axes, item, f"{score:.2f}" + (" ✓" if right else ""), RIGHT if right else INK)
            axes.spines[:].set(visible=True, color=RIGHT if right else PALE, linewidth=3.5 if right else 1)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values, over fewer at the start; as long as `values` [n]."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    mean: np.ndarray = (total[ends] - total[starts]) / (ends - starts)
    return mean


def _show(axes: Axes, item: Any, score: str, colour: str = INK) -> None:
    message = as_message(item)
    words = textwrap.shorten(message.text, 90, placeholder="...")
    if message.images:
        picture = message.images[0].load()
        picture.thumbnail((256, 256))
        axes.imshow(np.asarray(picture))
        axes.set_title(textwrap.fill(words, 20), fontsize=8, loc="center")
    else:
        axes.set(xlim=(0, 1), ylim=(0, 1), box_aspect=1)
        axes.text(0.5, 0.5, textwrap.fill(words, 17), ha="center", va="center", fontsize=9)
    axes.set_xlabel(score, fontsize=9, color=colour, labelpad=2)


def _estimate(value: float | Estimate) -> Estimate:
    return value if isinstance(value, tuple) else (value, value, value)


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.2f}" if value >= 0.005 else "<.01"
