"""An ablation file as checked runs: every arm, at every point of the grid."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from comatch import plain_yaml
from comatch.config import AblateConfig, RunConfig, check_part, check_run, put, read_data
from comatch.errors import ConfigError, RecipeError
from comatch.recipe import Recipe
from comatch.recipes import load_recipe
from comatch.training.origin import data_digests, deciding

_RECIPE = "recipe."


@dataclass(frozen=True)
class Arm:
    """One row of a study: an arm of the file at a point of the grid. name: of both. config: its run with seed 0, without a folder yet."""

    name: str
    arm: str
    point: Mapping[str, Any]
    config: RunConfig
    recipe: Recipe

    @property
    def slug(self) -> str:
        """Its name as a folder has it."""
        return slug(self.name)

    def run(self, seed: int, folder: Path) -> RunConfig:
        """The run of one seed, which writes into `folder`."""
        return self.config.model_copy(update={"name": f"{self.slug}-{seed}", "seed": seed, "output": str(folder)})

    @property
    def record(self) -> dict[str, Any]:
        """All that decides its results, as plain data: settings, recipe and data."""
        run = {name: value for name, value in deciding(self.config).items() if name not in ("seed", "recipe")}
        return {"arm": self.arm, "point": dict(self.point), "run": run, "recipe": self.recipe.to_dict(), "data": data_digests(self.config)}


@dataclass(frozen=True)
class Study:
    """An ablation file, read: its settings and its arms in order."""

    config: AblateConfig
    arms: tuple[Arm, ...]

    @property
    def runs(self) -> list[tuple[Arm, int]]:
        """All arms with all seeds: a seed of every arm before the next, so that a part of a study compares all arms."""
        return [(arm, seed) for seed in range(self.config.seeds) for arm in self.arms]


def read_study(path: str | Path, out: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in YAML file `path`, with `key=value` overrides on top.

    Recipes that the file changes are written to `out`/recipes. Raises ConfigError for whatever does not fit, with the arm's name.
    """
    data, origins = read_data(path, overrides)
    config = check_part(AblateConfig, data, origins, str(path))
    base = Path(path).parent / config.base
    _inside(config, path)
    arms = []
    for name, arm, settings, point in _points(config):
        try:
            arms.append(Arm(name, arm, point, *_run(name, settings, base, out)))
        except ConfigError as error:
            raise ConfigError(f"{path}, arm {name!r}: {error}") from error
    names = [arm.name for arm in arms]
    if config.baseline is not None and config.baseline not in (*names, *config.arms):
        raise ConfigError(f"{path}: baseline is {config.baseline!r}; the arms are {names}")
    if len({arm.slug for arm in arms}) < len(arms):
        raise ConfigError(f"{path}: names of arms differ in signs only, and would share a folder: {names}")
    return Study(config, tuple(arms))


def _inside(config: AblateConfig, path: str | Path) -> None:
    """No value of the grid is also said elsewhere, itself or as a part of something larger: the later one would silently win."""
    for name, settings in {"settings": config.settings, **{f"arm {arm!r}": said for arm, said in config.arms.items()}}.items():
        pairs = ((key, point) for key in settings for point in config.grid)
        if twice := sorted(key for key, point in pairs if f"{point}.".startswith(f"{key}.") or key.startswith(f"{point}.")):
            raise ConfigError(f"{path}: {twice} stand in {name} and in the grid {sorted(config.grid)}; keep one")


def _points(config: AblateConfig) -> Iterator[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Whole name, name in the file, settings and point of the grid of every arm."""
    for name, settings in (config.arms or {"": {}}).items():
        for values in product(*config.grid.values()):
            point = dict(zip(config.grid, values, strict=True))
            told = [f"{key.removeprefix('stages.')}={_short(value)}" for key, value in point.items()]
            yield ", ".join(filter(None, [name, *told])), name, {**config.settings, **point, **settings}, point


def _run(name: str, settings: Mapping[str, Any], base: Path, out: Path) -> tuple[RunConfig, Recipe]:
    data, origins = read_data(base)
    data = deepcopy(data)
    changes = {key: value for key, value in settings.items() if key.startswith(_RECIPE)}
    for key, value in settings.items():
        if key not in changes:
            put(data, origins, key, deepcopy(value), "its settings")
    # Neither a stage nor the data of all stages can be null, so null says here what it says nowhere else: this arm goes without it.
    data["stages"] = {stage: run for stage, run in (data.get("stages") or {}).items() if run is not None}
    if data.get("data", ...) is None:
        del data["data"]
    data.update(seed=0, name="arm", output="arm")
    if changes:
        data["recipe"] = str(_changed_recipe(str(data.get("recipe")), changes, name, out))
    config = check_run(data, origins, str(base))
    return config, load_recipe(config.recipe).with_tokens(config.tokens)


def _changed_recipe(recipe: str, changes: Mapping[str, Any], name: str, out: Path) -> Path:
    """Write a recipe with other values at places like `recipe.stages.compress.supervise`."""
    try:
        data = load_recipe(recipe).to_dict()
        data["name"] = f"{data['name']}, {name}"
        data["stages"] = {stage["name"]: stage for stage in data["stages"]}
        for key, value in changes.items():
            path = key.removeprefix(_RECIPE).split(".")
            if path[0] == "stages" and (len(path) < 3 or path[1] not in data["stages"]):
                raise ConfigError(f"{key}: name one of the stages {list(data['stages'])} and what of it changes")
            put(data, {}, key.removeprefix(_RECIPE), deepcopy(value), "its settings")
        data["stages"] = list(data["stages"].values())
        text = plain_yaml.dump(Recipe.from_dict(data).to_dict())
    except RecipeError as error:
        raise ConfigError(str(error)) from error
    file = out / "recipes" / (slug(name) + ".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def slug(name: str) -> str:
    """A name as a folder can have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "arm"


def _short(value: Any) -> str:
    return plain_yaml.dump(value, one_line=True).strip()
