"""`comatch inspect MODEL`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comatch.cli import FAILED
from comatch.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from comatch.analysis.look import Look
    from comatch.analysis.masks import MaskReport
    from comatch.encoder import Encoder
    from comatch.recipe import Recipe

_BASE = "base"


def command(
    model: Annotated[str, typer.Argument(help="A shipped name, a folder or a hub id; or a run folder, for its base and all its stages.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("inspect"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    n: Annotated[int, typer.Option("--n", min=1, help="Generated scenes to look at.")] = 32,
    recipe: Annotated[str | None, typer.Option("--recipe", help="For a plain VLM: what to treat it as, such as coma.")] = None,
    answers: Annotated[int, typer.Option("--answers", min=0, help="Questions to answer from the compression tokens; 900 say much.")] = 0,
    probes: Annotated[int, typer.Option("--probes", min=0, help="Scenes for linear probes to learn from; 2000 say much.")] = 0,
    umap: Annotated[bool, typer.Option("--umap", help="Draw UMAP beside the principal components.")] = False,
) -> None:
    """Look inside a model: is its bottleneck real, do its compression tokens differ, and what do they hold?

    Answers and probes take longer and run when asked for. Ends with exit code 1 where a bottleneck that the recipe promises does not hold.
    """
    from comatch.analysis.look import look
    from comatch.analysis.probes import classifier
    from comatch.analysis.projection import load_umap
    from comatch.analysis.survival import scene_questions
    from comatch.cli._items import quiet_libraries
    from comatch.data.sources import open_source
    from comatch.recipes import load_recipe

    quiet_libraries()
    # A missing extra is told now and not after the work.
    if probes:
        classifier()
    if umap:
        load_umap()
    source = open_source("scenes", split="test", limit=n)
    dialogues, captions = [source.dialogue(i) for i in range(n)], [source.rows[i].caption(0) for i in range(n)]
    questions = scene_questions(answers) if answers else []
    looks = []
    for name, encoder in _encoders(model, load_recipe(recipe) if recipe else None):
        looks.append(look(name, encoder, dialogues, captions, questions=questions, probes=probes))
        if not as_json:
            typer.echo(_told(looks[-1], asked=bool(questions)))
    pictures = _draw(looks, [source.rows[i].classes()["background"] for i in range(n)], out, umap)
    if as_json:
        stages = [one.to_dict() for one in looks]
        typer.echo(json.dumps({"model": model, "scenes": n, "stages": stages, "pictures": [str(path) for path in pictures]}))
    else:
        typer.echo("pictures: " + " ".join(str(path) for path in pictures))
    if any(one.mask and one.mask.declared and not one.mask.ok for one in looks):
        raise typer.Exit(FAILED)


def _encoders(model: str, recipe: Recipe | None) -> Iterator[tuple[str, Encoder]]:
    """The model; of a run folder the base as its recipe sees it before training, where it can still be read, and every finished stage."""
    from comatch.encoder import Encoder

    folder = Path(model)
    manifest = folder / "manifest.json"
    if not manifest.is_file() or (folder / "comatch.json").is_file():
        yield folder.name or "model", Encoder.load(model, recipe=recipe)
        return
    record = json.loads(manifest.read_text(encoding="utf-8"))
    if not record["done"]:
        raise ModelError(f"run folder {folder} has no finished stage to look at; wait for the first, or name a model")
    # The first stage says what the recipe became; what it began from stands in the run's own config.
    first = Encoder.load(folder / record["done"][0], recipe=recipe)
    base = record.get("config", {}).get("model")
    try:
        if base is not None:
            yield _BASE, Encoder.load(base, recipe=first.recipe)
    except (ModelError, RecipeError) as error:
        typer.echo(f"the base {base} is left out: {error}", err=True)
    yield record["done"][0], first
    for name in record["done"][1:]:
        yield name, Encoder.load(folder / name, recipe=recipe)


def _told(look: Look, asked: bool) -> str:
    lines = [f"{look.name} (recipe {look.recipe.name})"]
    if look.mask is None:
        lines.append("  mask       no stage has a dialogue after compression tokens, so there is no bottleneck to check")
    else:
        lines += _mask_lines(look.mask)
    if look.tokens is None:
        lines.append("  tokens     fewer than two compression tokens, so nothing to compare")
    else:
        t = look.tokens
        lines.append(f"  tokens     {'mean cosine':>24}  effective rank of {t.tokens}")
        lines.append(f"             as they are  {t.mean_cosine:>11.3f}  {t.rank:.1f}" + ("   REDUNDANT" if t.redundant else ""))
        lines.append(f"             mean removed {t.mean_cosine_centred:>11.3f}  {t.rank_centred:.1f}")
    if look.aligned:
        a = look.aligned
        lines.append(f"  pairs      picture to its caption {a.alignment:.3f}, to another's {a.mismatched:.3f} (squared distance, 0 to 4)")
        lines.append(f"             uniformity of pictures {a.uniformity[0]:.2f}, of captions {a.uniformity[1]:.2f} (0: all equal)")
    if look.survival:
        lines.append(f"  answers    {'from tokens alone':>29}{'looking too':>13}{'others tokens':>15}{'commonest':>11}")
        for kind, row in look.survival.by_kind.items():
            shares = f"{row.kept:>14.1%}{row.looking:>13.1%}{row.another:>15.1%}{row.commonest:>11.1%}"
            lines.append(f"             {kind:<15}{shares}   of {row.n}")
    elif asked:
        lines.append("  answers    this recipe never learned to answer from compression tokens; --probes reads its vectors")
    for i, (kind, probe) in enumerate((look.probes or {}).items()):
        lines.append(f"  {'probes' if i == 0 else '':<11}{kind:<15}{probe.accuracy:>14.1%}, guessing {probe.chance:.1%}, of {probe.n}")
    return "\n".join(lines)


def _mask_lines(report: MaskReport) -> list[str]:
    b, (layers, heads) = report.bottleneck, report.leak.shape
    if report.ok:
        state = "holds"
    else:
        state = "FAILS" if report.declared else "none is promised, and this is what passes"
    lines = [f"  mask       stage {report.stage}, {layers} layers of {heads} heads, {report.dialogues} dialogues: bottleneck {state}"]
    if report.ok:
        lines.append(
            f"             {b.reader} attends to {b.hidden} with weight 0; its loss has gradient {report.gradient:.2g} at the picture,"
        )
        lines.append(f"             and 0 once {b.through} is cut out")
    if report.shortcut:
        lines.append(
            f"             but {b.through} gives {report.shortcut:.0%} of its attention to {b.reader}, which can so tell itself"
        )
    lines += [f"             {fault}" for fault in report.faults]
    for role, row in zip(report.roles, report.mass.mean((0, 1)), strict=True):
        shares = ", ".join(f"{other} {share:.0%}" for other, share in zip(report.roles, row, strict=True) if share > 0)
        lines.append(f"             attention of {role:<12}{shares}")
    return lines


def _draw(looks: list[Look], classes: list[str], out: Path, with_umap: bool) -> list[Path]:
    from comatch.analysis import figures, levels
    from comatch.analysis.projection import pca, umap

    drawn = {}
    for look in looks:
        if look.mask and look.stage and look.example:
            drawn[f"{look.name}-mask"] = figures.mask(look.example, look.stage.visibility)
            drawn[f"{look.name}-attention"] = figures.attention(look.mask)
        if look.tokens:
            drawn[f"{look.name}-tokens"] = figures.similarity(look.tokens)
    clouds = {look.name: look.vectors - look.vectors.mean(0) for look in looks if look.vectors is not None}
    for name, project in {"vectors": pca, "umap": umap}.items():
        if clouds and (with_umap or name == "vectors"):
            drawn[name] = figures.projection(project(list(clouds.values())), list(clouds), [classes] * len(clouds))
    if answered := {look.name: look.survival for look in looks if look.survival}:
        drawn["answers"] = levels.survived(answered)
    if probed := {look.name: look.probes for look in looks if look.probes}:
        drawn["probes"] = levels.probed(probed)
    return [figures.save(figure, out / f"{name}.png") for name, figure in drawn.items()]
