"""Writes docs/performance.md and its plots from what benchmarks/results holds, and from nothing else.

    python benchmarks/report.py [--results benchmarks/results] [--out docs/performance.md]

claims.py lists the claims and the files that measure them. A claim without its file is "not measured". A file that nobody reads, a dry
run, and a ratio without equality in its own record end it with a message. `notes.json` beside the results may hold {claim: what the profile
shows}, printed where that claim is missed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from claims import CLAIMS, Claim, figures, strangers
from figures import Figure, Refused
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from measure import RESULTS, ROOT

PAGE = ROOT / "docs" / "performance.md"
OURS, THEIRS, TARGET = "#E69F00", "#999999", "#222222"
Found = list[tuple[Claim, list[Figure] | None]]

HEAD = """# Performance

Written by `python benchmarks/report.py` from the JSON files in `benchmarks/results`; change those, not this page.

A ratio is that of medians of alternating rounds in one process, with the lowest and highest of a round in brackets, between ways that were
found to give the same in the same run. Figures of a CPU say nothing about a GPU. *Reference-style path*: the stock Hugging Face model in
padded chunks of 8, dense 4-D mask through SDPA, PEFT's adapter, logits at every place, pictures by the stock processor in the main process.
"""
HELD = {
    "dense": "Equality is a test before it is a figure: `tests/test_fast_path.py` holds 1e-9 in float64 for every table, packed, on all "
    "three backbones, and runs the GPU's path with the kernel written out. Here: largest difference over the largest entry.",
    "stage2": "A batch of 1,024 pairs would take a CPU an hour, so it is measured at fewer there; both ways cut the batch to pieces.",
    "launches": "Absolute numbers: our calls, and those of the stock tower, which calls SDPA once a window.",
    "fill": "The target is held against best fit, the planner; `training` is what a training step does, pictures and texts apart.",
    "memory": "Peak of tensors beyond the weights in one forward and backward pass over all tokens at once.",
}


def collect(folder: Path) -> Found:
    """All claims with their figures. Raises Refused for files that cannot be shown."""
    if unknown := strangers(folder):
        raise Refused(f"{folder} holds {unknown}, which no claim reads; name them in benchmarks/claims.py, or delete them")
    return [(claim, figures(claim, folder)) for claim in CLAIMS]


def verdict(claim: Claim, found: Sequence[Figure] | None) -> str:
    """Reached, missed by how much, or why neither can be said."""
    if found is None:
        return "not measured" + (" (no GPU was lent)" if claim.place == "GPU" else f" (no {claim.file})")
    if claim.target is None:
        return "see below"
    counted = [figure for figure in found if figure.counted]
    values, said = _values(found), []
    if values:
        worst = values[0] if claim.at_least else values[-1]
        if not (worst >= claim.target if claim.at_least else worst <= claim.target):
            off = 1 - worst / claim.target if claim.at_least else worst / claim.target - 1
            said.append(f"**missed by {off:.1%}**: {number(worst, claim.unit)} of {number(claim.target, claim.unit)}")
        elif len(values) < len(counted):
            said.append(f"{len(values)} of {len(counted)} reached")
    if noisy := sum(figure.noise is not None for figure in counted):
        said.append(f"{noisy} of {len(counted)} within noise, which shows nothing")
    if without := sum(figure.value is None for figure in counted):
        said.append(f"{without} of {len(counted)} not measured, see below")
    return "; ".join(said) or ("reached" if counted else "not measured")


def _values(found: Sequence[Figure] | None) -> list[float]:
    """What is held against the target, the lowest first."""
    return sorted(figure.value for figure in found or () if figure.counted and figure.value is not None and figure.noise is None)


def number(value: float, unit: str) -> str:
    """A value with its unit."""
    digits = 4 if abs(value - 1) < 0.05 else 2
    return {"x": f"{value:.{digits}f}x", "%": f"{value:.1%}"}.get(unit, f"{value:.4g}")


def span(claim: Claim, found: Sequence[Figure] | None) -> str:
    """The lowest and the highest of the counted figures."""
    values = _values(found)
    return " to ".join(dict.fromkeys(number(value, claim.unit) for value in (values[0], values[-1]))) if values else ""


def summary(found: Found) -> list[str]:
    """One row for each claim with a target."""
    lines = ["| claim | where | target | measured | |", "|---|---|---|---|---|"]
    for claim, some in found:
        if claim.target is not None:
            target = f"{'at least' if claim.at_least else 'at most'} {number(claim.target, claim.unit)}"
            lines.append(f"| {claim.title} | {claim.place} | {target} | {span(claim, some)} | {verdict(claim, some)} |")
    return lines


def section(claim: Claim, found: Sequence[Figure], notes: Mapping[str, str], machine: str) -> list[str]:
    """All figures of a claim."""
    said = verdict(claim, found)
    told = [f"{said[0].upper()}{said[1:]}."] if claim.target is not None else []
    told += [HELD[claim.key]] if claim.key in HELD else []
    if "missed" in said:
        told.append(f"What the profile shows: {notes.get(name_of(claim), 'nobody has looked yet').rstrip('.')}.")
    told.append(f"From `benchmarks/results/{claim.file}`: {machine}.")
    lines = [f"### {claim.title} ({claim.place})", "", "\n".join(told), ""]
    lines += ["| case | figure | ours | peer | what was equal |", "|---|---|---|---|---|"]
    for figure in found:
        lines.append(f"| {figure.case} | {shown(claim, figure)} | {figure.ours} | {figure.theirs} | {figure.equal} |")
    return [*lines, ""]


def name_of(claim: Claim) -> str:
    """How notes.json names a claim."""
    return f"{claim.key} {claim.place}"


def shown(claim: Claim, figure: Figure) -> str:
    """A figure with its spread, or why it is none."""
    if figure.value is None:
        return f"none: {figure.missing}".replace("|", "/").replace("\n", " ")
    if figure.noise is not None:
        return f"within noise: our own rounds differ by {figure.noise:.2f}x"
    if figure.low is None or figure.high is None:
        return number(figure.value, claim.unit)
    return f"{number(figure.value, claim.unit)} ({number(figure.low, claim.unit)} to {number(figure.high, claim.unit)})"


def told_machine(path: Path) -> str:
    """What a file was measured on."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("machine", {})
    packages = ", ".join(f"{name} {version}" for name, version in found.get("packages", {}).items())
    where = found.get("processor") if found.get("device") == "cpu" else found.get("device")
    threads = f"{found['threads']} of {found['cores']} cores" if "threads" in found else ""
    parts = [str(where), threads, f"load {found['load_before']:.1f} before" if "load_before" in found else "", packages]
    return ", ".join(part for part in parts if part)


def page(found: Found, folder: Path, plots: Sequence[str]) -> str:
    """The whole page. plots: names of pictures beside it."""
    notes: dict[str, str] = {}
    if (folder / "notes.json").is_file():
        notes = json.loads((folder / "notes.json").read_text(encoding="utf-8"))
    if strange := sorted(set(notes) - set(map(name_of, CLAIMS))):
        raise Refused(f"notes.json speaks of {strange}, which are no claims; they are named like {name_of(CLAIMS[0])!r}")
    lines = [HEAD, *summary(found), "", *(f"![{name}](performance/{name}.png)\n" for name in plots), "## Claims", ""]
    further, absent = ["## Further figures", ""], []
    for claim, some in found:
        if some is None:
            absent.append(f"- {claim.title} ({claim.place}): {verdict(claim, some)}")
        else:
            part = section(claim, some, notes, told_machine(folder / claim.file))
            (lines if claim.target is not None else further).extend(part)
    if absent:
        further += ["## Not measured", "", "What runs on a GPU has its scripts ready, `benchmarks/gpu/README.md`.", "", *absent]
    return "\n".join([*lines, *further]).rstrip() + "\n"


def draw(found: Found, folder: Path) -> list[str]:
    """Plots into a folder; returns the names of those for which there are figures."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, what in (("speed", _speed_plot), ("memory", _memory_plot), ("packing", _packing_plot)):
        canvas = Canvas(figsize=(9, 3), layout="constrained")
        if what(canvas.add_subplot(), found):
            rows = max(1, len(canvas.axes[0].get_yticklabels()))
            canvas.set_size_inches(9, 1.2 + 0.26 * rows)
            canvas.savefig(folder / f"{name}.png", dpi=120, metadata={"Software": None})
            made.append(name)
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)
    return made


def _speed_plot(axes: Axes, found: Found) -> bool:
    """Ratios of speed that have a target, with the spread of rounds; those within noise are left out."""
    rows = [(c, f) for c, some in found if c.unit == "x" and c.at_least and c.target for f in some or () if f.noise is None]
    _dots(axes, [(f"{c.title.split(':')[0]} ({c.place}): {f.case}", f, c.target, OURS) for c, f in rows if f.value is not None])
    axes.axvline(1, color=TARGET, linewidth=0.6)
    axes.set(xlabel="times faster; line: rounds, upright: target", xlim=(0, None))
    return bool(axes.lines[1:])


def _memory_plot(axes: Axes, found: Found) -> bool:
    """Peaks over the reference's."""
    rows = [(f"{c.place}: {f.case.split(';')[0]}", f, c.target, OURS) for c, some in found if c.key == "memory" for f in some or ()]
    _dots(axes, rows)
    axes.set(xlabel="peak memory over the reference-style path; upright: target", xlim=(0, 1))
    return bool(rows)


def _packing_plot(axes: Axes, found: Found) -> bool:
    """Fill of all planners."""
    rows = [(f.case, f, c.target, OURS if f.counted else THEIRS) for c, some in found if c.key == "fill" for f in some or ()]
    _dots(axes, rows)
    axes.set(xlabel="share of the passes' room that is filled; upright: target")
    return bool(rows)


def _dots(axes: Axes, rows: Sequence[tuple[str, Figure, float | None, str]]) -> None:
    """One row for each figure, from top to bottom: its value, lowest and highest, and its target."""
    for y, (_, figure, target, colour) in enumerate(reversed(rows)):
        if figure.value is not None:
            if figure.low is not None and figure.high is not None:
                axes.plot([figure.low, figure.high], [y, y], color=colour, linewidth=2)
            axes.plot(figure.value, y, "o", color=colour, markersize=5)
            axes.plot(target, y, "|", color=TARGET, markersize=11)
    axes.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)], fontsize=7)
    axes.set_ylim(-0.7, len(rows) - 0.3)


def main(given: Sequence[str] | None = None) -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args(given)
    found = collect(asked.results)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    plots = draw(found, asked.out.parent / "performance")
    asked.out.write_text(page(found, asked.results, plots), encoding="utf-8")
    print("\n".join(summary(found)))
    print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
