"""The named recipes, and one loader for them and for a person's own YAML file."""

from __future__ import annotations

import difflib
from pathlib import Path

from comatch.errors import ConfigError, RecipeError
from comatch.recipe import Recipe
from comatch.recipes import cocoa, coma, matching, moca, vlm

RECIPES: dict[str, Recipe] = {r.name: r for module in (coma, cocoa, moca, matching, vlm) for r in module.RECIPES}


def load_recipe(name: str | Path) -> Recipe:
    """A named recipe ("coma"), or one read from a YAML or JSON file. Raises RecipeError."""
    if isinstance(name, str) and name in RECIPES:
        return RECIPES[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml", ".json"):
        near = difflib.get_close_matches(str(name), RECIPES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"no recipe {str(name)!r}; {hint}known: {sorted(RECIPES)}, or a path ending in .yaml")
    if not path.is_file():
        raise RecipeError(f"recipe file {str(name)!r} does not exist; known names: {sorted(RECIPES)}")
    from comatch.plain_yaml import parse

    try:
        data, _ = parse(path.read_text(encoding="utf-8"), str(name))
    except (ConfigError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {error}") from error
    return Recipe.from_dict(data)
