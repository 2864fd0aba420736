"""`comatch inspect MODEL`"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comatch.cli import FAILED
from comatch.errors import ModelError

if TYPE_CHECKING:
    import numpy as np

    from comatch.analysis.masks import MaskReport
    from comatch.analysis.redundancy import RedundancyReport
    from comatch.content import Dialogue
    from comatch.core.batch import Example
    from comatch.encoder import Encoder
    from comatch.recipe import Recipe, Stage


def command(
    model: Annotated[str, typer.Argument(help="A shipped name, a folder or a hub id; or a run folder, for all its stages.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("inspect"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    n: Annotated[int, typer.Option("--n", min=1, help="Generated scenes to look at.")] = 32,
    recipe: Annotated[str | None, typer.Option("--recipe", help="For a plain VLM: what to treat it as, such as coma.")] = None,
) -> None:
    """Look inside a model: is its bottleneck real, and do its compression tokens differ?

    Ends with exit code 1 where a bottleneck that the recipe promises does not hold.
    """
    from comatch.cli._items import quiet_libraries
    from comatch.data.sources import open_source
    from comatch.encoder import Encoder
    from comatch.recipes import load_recipe

    quiet_libraries()
    source = open_source("scenes", split="test", limit=n)
    dialogues = [source.dialogue(i) for i in range(n)]
    chosen = load_recipe(recipe) if recipe else None
    looks = []
    for name, folder in _stages(model):
        looks.append(_look(name, Encoder.load(folder, recipe=chosen), dialogues))
        if not as_json:
            typer.echo(looks[-1].told())
    pictures = _draw(looks, [source.rows[i].classes()["background"] for i in range(n)], out)
    if as_json:
        stages = [look.to_dict() for look in looks]
        typer.echo(json.dumps({"model": model, "scenes": n, "stages": stages, "pictures": [str(path) for path in pictures]}))
    else:
        typer.echo("pictures: " + " ".join(str(path) for path in pictures))
    if any(look.mask and look.mask.declared and not look.mask.ok for look in looks):
        raise typer.Exit(FAILED)


@dataclass(frozen=True)
class _Look:
    """What was seen of one model, without the model. None where the recipe has nothing of the kind."""

    name: str
    recipe: Recipe
    stage: Stage | None
    example: Example | None
    mask: MaskReport | None
    tokens: RedundancyReport | None
    vectors: np.ndarray | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "recipe": self.recipe.name,
            "mask": self.mask.to_dict() if self.mask else None,
            "redundancy": self.tokens.to_dict() if self.tokens else None,
        }

    def told(self) -> str:
        lines = [f"{self.name} (recipe {self.recipe.name})"]
        if self.mask is None:
            lines.append("  mask       no stage has a dialogue after compression tokens, so there is no bottleneck to check")
        else:
            lines += _mask_lines(self.mask)
        if self.tokens is None:
            lines.append("  tokens     fewer than two compression tokens, so nothing to compare")
        else:
            t = self.tokens
            lines.append(f"  tokens     {'mean cosine':>24}  effective rank of {t.tokens}")
            lines.append(f"             as they are  {t.mean_cosine:>11.3f}  {t.rank:.1f}" + ("   REDUNDANT" if t.redundant else ""))
            lines.append(f"             mean removed {t.mean_cosine_centred:>11.3f}  {t.rank_centred:.1f}")
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
            f"             {b.reader} attends to {b.hidden} with weight 0; the answers' gradient to the picture is {report.gradient:.2g},"
        )
        lines.append(f"             and 0 once {b.through} is cut out")
    lines += [f"             {fault}" for fault in report.faults]
    for role, row in zip(report.roles, report.mass.mean((0, 1)), strict=True):
        shares = ", ".join(f"{other} {share:.0%}" for other, share in zip(report.roles, row, strict=True) if share > 0)
        lines.append(f"             attention of {role:<12}{shares}")
    return lines


def _stages(model: str) -> list[tuple[str, str | Path]]:
    folder = Path(model)
    manifest = folder / "manifest.json"
    if not manifest.is_file() or (folder / "comatch.json").is_file():
        return [(folder.name or "model", model)]
    done = json.loads(manifest.read_text(encoding="utf-8"))["done"]
    if not done:
        raise ModelError(f"run folder {folder} has no finished stage to look at; wait for the first, or name a model")
    return [(name, folder / name) for name in done]


def _look(name: str, encoder: Encoder, dialogues: list[Dialogue]) -> _Look:
    from comatch.analysis.masks import dialogue_stage, mask_check
    from comatch.analysis.redundancy import redundancy

    items = [dialogue.context for dialogue in dialogues]
    recipe = encoder.recipe
    stage = dialogue_stage(recipe)
    return _Look(
        name,
        recipe,
        stage,
        example=encoder.preparer.dialogue(dialogues[0], stage) if stage else None,
        mask=mask_check(encoder, dialogues) if stage else None,
        tokens=redundancy(encoder, items) if recipe.tokens > 1 else None,
        vectors=encoder.encode(items) if recipe.encoding else None,
    )


def _draw(looks: list[_Look], classes: list[str], out: Path) -> list[Path]:
    from comatch.analysis import figures
    from comatch.analysis.projection import pca

    pictures = []
    for look in looks:
        if look.mask and look.stage and look.example:
            pictures.append(figures.save(figures.mask(look.example, look.stage.visibility), out / f"{look.name}-mask.png"))
            pictures.append(figures.save(figures.attention(look.mask), out / f"{look.name}-attention.png"))
        if look.tokens:
            pictures.append(figures.save(figures.similarity(look.tokens), out / f"{look.name}-tokens.png"))
    clouds = {look.name: look.vectors - look.vectors.mean(0) for look in looks if look.vectors is not None}
    if clouds:
        panels = figures.projection(pca(list(clouds.values())), list(clouds), [classes] * len(clouds))
        pictures.append(figures.save(panels, out / "vectors.png"))
    return pictures
