"""`comatch quickstart`: the whole method at nano scale, from a VLM to a report, in minutes on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from comatch.config import RunConfig
    from comatch.data.scenes import Scene
    from comatch.drawing.page import Section
    from comatch.encoder import Encoder
    from comatch.evaluation.metrics import Score

_MATCH = {
    "steps": 150,
    "batch": 64,
    "tokens_per_pass": 16384,
    "loss": {"temperature": 0.05, "symmetric": True},
    "data": {"source": "scenes", "limit": 4000, "columns": {"direction": "image-to-text"}},
    "optim": {"lr": 5e-4, "betas": (0.9, 0.98)},
}
_COMPRESS = {"steps": 700, "batch": 32, "tokens_per_pass": 8192, "optim": {"lr": 1e-3, "betas": (0.9, 0.98)}}
_NAMES = {"matching": "contrastive only", "coma": "CoMa, then contrastive"}
_WORDS = ("a large red circle at the top left", "a small blue star with letter k", "two green squares")


@dataclass
class Results:
    """What the steps of the quickstart hand on to the report."""

    folders: dict[str, Path]
    encoders: dict[str, Encoder]
    scores: dict[str, list[Score]]
    found: list[tuple[Any, list[tuple[str, float]]]]


def command(
    out: Annotated[Path, typer.Option(help="Folder for models, pictures, index and report.")] = Path("quickstart"),
    fast: Annotated[bool, typer.Option("--fast", help="A few steps only: shows that everything runs, scores mean nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Make two embedding models from one nano VLM, compare them, index pictures, search, and write report.html."""
    import time

    from rich.console import Console

    from comatch.cli._items import quiet_libraries

    quiet_libraries()
    console = Console(stderr=True)
    began = time.perf_counter()
    folders = {}
    for recipe, name in _NAMES.items():
        console.print(f"[bold]training:[/bold] {name}")
        folders[recipe] = _train(recipe, out, fast, quiet)
    encoders = _encoders(folders)
    scores = {
        recipe: _evaluate(encoder, name, fast, quiet) for (recipe, name), encoder in zip(_NAMES.items(), encoders.values(), strict=True)
    }
    pictures = _draw_pictures(out / "pictures", 60 if fast else 300)
    found = _search(encoders["coma"], folders["coma"], out, pictures)
    results = Results(folders, encoders, scores, found)
    page = _report(results, out)
    console.print(_table(scores))
    console.print(f"\n{page} written; {time.perf_counter() - began:.0f} s in all, {_peak():.1f} GiB at most. Next:")
    for line in _next(out, folders["coma"]):
        console.print("  " + line, highlight=False, soft_wrap=True)
    typer.echo(page)


def _config(recipe: str, out: Path, fast: bool) -> RunConfig:
    from comatch.config import RunConfig

    stages = {"match": _MATCH} if recipe == "matching" else {"compress": _COMPRESS, "match": _MATCH}
    if fast:
        stages = {name: {**stage, "steps": 3, "batch": 8} for name, stage in stages.items()}
    values = {"name": recipe, "model": "comatch-nano", "recipe": recipe, "tokens": 8, "device": "cpu", "adapter": {"kind": "full"}}
    return RunConfig.model_validate({**values, "output": str(out / recipe), "stages": stages})


def _train(recipe: str, out: Path, fast: bool, quiet: bool) -> Path:
    from comatch.training.loop import train

    return train(_config(recipe, out, fast), overwrite=True, quiet=quiet)


def _encoders(folders: dict[str, Path]) -> dict[str, Encoder]:
    from comatch.encoder import Encoder

    return {recipe: Encoder.load(folder) for recipe, folder in folders.items()}


def _evaluate(encoder: Encoder, name: str, fast: bool, quiet: bool) -> list[Score]:
    from rich.console import Console
    from rich.progress import Progress

    from comatch.evaluation.tasks import evaluate, scene_tasks

    tasks = scene_tasks(20, 60) if fast else scene_tasks(200, 600)
    with Progress(console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task(f"evaluating: {name}", total=None)
        return evaluate(encoder, tasks, progress=lambda done, total: bar.update(task, completed=done, total=total))


def _draw_pictures(folder: Path, n: int) -> dict[str, Scene]:
    from PIL import Image

    from comatch.data.scenes import scene

    folder.mkdir(parents=True, exist_ok=True)
    scenes = {f"scene-{i:03}.png": scene(99, i, "test") for i in range(n)}
    for name, one in scenes.items():
        Image.fromarray(one.draw()).save(folder / name)
    return scenes


def _search(encoder: Encoder, model: Path, out: Path, scenes: dict[str, Scene]) -> list[tuple[Any, list[tuple[str, float]]]]:
    import shutil

    from comatch.data.items import read_items
    from comatch.search.index import Index
    from comatch.search.update import update

    shutil.rmtree(out / "index", ignore_errors=True)
    index = Index.create(out / "index", encoder.fingerprint, encoder.dim, model=str(model.resolve()))
    update(index, encoder, read_items(out / "pictures"), source=str((out / "pictures").resolve()))
    names = list(scenes)
    queries = [scenes[names[0]].caption(1), scenes[names[1]].caption(1), *_WORDS, out / "pictures" / names[2]]
    vectors = encoder.encode(queries)
    return [(query, [(hit.id, hit.score) for hit in index.search(vector, 6)]) for query, vector in zip(queries, vectors, strict=True)]


def _report(results: Results, out: Path) -> Path:
    from comatch.drawing.page import Section, write_page

    sections = [
        Section(
            "Scores side by side",
            "hit@1 on held-out scenes: how often the right candidate comes first. Both models start from the same nano VLM and "
            "saw the same pairs for the same number of contrastive steps; one compressed first. This is a single seed: "
            "benchmarks/effect.py repeats it with several.",
            table=_rows(results.scores),
            pictures=[_score_picture(results.scores)],
        ),
        _loss_section(results),
        _token_section(results),
        _projection_section(results),
        _search_section(results, out),
    ]
    return write_page(out / "report.html", "comatch quickstart", sections)


def _rows(scores: dict[str, list[Score]]) -> list[dict[str, str]]:
    rows = []
    for pair in zip(*scores.values(), strict=True):
        row = {"task": pair[0].name, "kind": pair[0].meta, "guessing": f"{100 * pair[0].chance:.1f} %"}
        for recipe, score in zip(scores, pair, strict=True):
            row[_NAMES[recipe]] = f"{100 * score.hit:.1f} % ({100 * score.low:.0f} to {100 * score.high:.0f})"
        rows.append(row)
    return rows


def _score_picture(scores: dict[str, list[Score]]) -> Any:
    from comatch.analysis import figures
    from comatch.drawing.page import Picture

    table = {_NAMES[recipe]: {s.name: (s.hit, s.low, s.high) for s in mine} for recipe, mine in scores.items()}
    chance = {s.name: s.chance for s in scores["coma"]}
    return Picture(figures.data_uri(figures.scores(table, chance=chance)), "bars of hit@1 for both models, task by task")


def _loss_section(results: Results) -> Section:
    from comatch.analysis import figures
    from comatch.drawing.page import Picture, Section
    from comatch.training.loop import read_metrics

    runs = {_NAMES[recipe]: read_metrics(folder / "metrics.jsonl") for recipe, folder in results.folders.items()}
    picture = Picture(figures.data_uri(figures.losses(runs)), "training loss over steps, one panel per stage")
    return Section("Loss curves", "The compression loss lies on a plateau first and then falls.", pictures=[picture])


def _token_section(results: Results) -> Section:
    from comatch.analysis import figures
    from comatch.analysis.redundancy import redundancy
    from comatch.data.scenes import scene
    from comatch.drawing.page import Picture, Section

    report = redundancy(results.encoders["coma"], [scene(98, i, "test").draw() for i in range(64)])
    text = f"Mean cosine between different compression tokens of one picture: {report.mean_cosine:.2f}. "
    text += f"Effective rank: {report.rank:.1f} of {report.tokens}."
    return Section(
        "Similarity of the compression tokens",
        text,
        pictures=[Picture(figures.data_uri(figures.similarity(report)), "heat map of token similarity")],
    )


def _projection_section(results: Results) -> Section:
    from comatch.analysis import figures
    from comatch.analysis.projection import pca
    from comatch.data.scenes import scene
    from comatch.drawing.page import Picture, Section
    from comatch.encoder import Encoder
    from comatch.recipes import load_recipe

    scenes = [scene(97, i, "test") for i in range(300)]
    stages = {
        "before": Encoder.load("comatch-nano", recipe=load_recipe("coma").with_tokens(8)),
        "after compression": Encoder.load(results.folders["coma"] / "compress"),
        "after matching": results.encoders["coma"],
    }
    clouds = [encoder.encode([s.draw() for s in scenes]) for encoder in stages.values()]
    labels = [s.background for s in scenes]
    figure = figures.projection(pca(clouds), list(stages), [labels] * len(clouds))
    pictures = [Picture(figures.data_uri(figure), "principal components of 300 pictures on one basis, before and after each stage")]
    return Section("PCA before, after compression, after matching", "300 held-out pictures, coloured by background.", pictures=pictures)


def _search_section(results: Results, out: Path) -> Section:
    from comatch.analysis import figures
    from comatch.drawing.page import Picture, Section

    rows = [
        figures.Search(
            query, [(out / "pictures" / name, score, (isinstance(query, Path) and query.name == name) or None) for name, score in hits]
        )
        for query, hits in results.found
    ]
    picture = Picture(figures.data_uri(figures.searches(rows)), "six searches, the query left and the best pictures right")
    return Section("Searches", "Words and a picture, asked of an index of held-out pictures.", pictures=[picture])


def _table(scores: dict[str, list[Score]]) -> Any:
    from rich.table import Table

    rows = _rows(scores)
    table = Table(*rows[0], title="hit@1 on held-out scenes (95 % interval)")
    for row in rows:
        table.add_row(*row.values())
    return table


def _next(out: Path, model: Path) -> list[str]:
    return [
        f'comatch search {out / "index"} "a small yellow heart"',
        f"comatch inspect {model}",
        "comatch train runs/emoji-coma.yaml data.path=../shared/data/emoji/emoji.parquet",
        f"comatch index {model} PICTURES --out my-index",
    ]


def _peak() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
