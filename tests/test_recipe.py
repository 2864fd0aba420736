"""Recipes check themselves: tables, bottlenecks and round trips."""

from __future__ import annotations

import itertools
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import yaml

import comatch
from comatch.errors import RecipeError
from comatch.recipe import Bottleneck, Recipe, Stage, Visibility
from comatch.recipes import RECIPES, load_recipe

ROLES = ("context", "compression", "dialogue")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert Recipe.from_json(recipe.to_json()) == recipe
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert comatch.load_recipe(path) == recipe
    assert recipe.with_tokens(None) is recipe
    with pytest.raises(FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]


def test_the_papers_table_is_the_default_and_the_released_one_is_named() -> None:
    coma, released = load_recipe("coma"), load_recipe("coma-released")
    assert coma.stage("compress").visibility.table == ("c..", "cc.", ".cc")
    assert (coma.tokens, coma.stage("compress").supervise, coma.stage("match").pooling) == (32, "answers", "mean_compression")
    assert released.stage("compress").visibility.table == ("c..", "cc.", "ccc")
    assert (released.stage("compress").supervise, released.stage("compress").bottleneck) == ("dialogue", None)
    assert released.stage("match") == coma.stage("match") == load_recipe("matching").stage("match")


def test_reach_equals_the_power_of_the_one_layer_relation() -> None:
    """Transitive closure against brute force: repeated products of the relation, for every table of three roles."""
    differs = 0
    for letters in itertools.product(".cf", repeat=6):
        a, b, c, d, e, f = letters
        v = Visibility(ROLES, (f"c{a}{b}", f"{c}c{d}", f"{e}{f}c"))
        one = {(q, k) for q in ROLES for k in ROLES if v.sees(q, k)}
        reach = set(one)
        for _ in ROLES:
            reach |= {(q, k) for q, m in reach for m2, k in one if m == m2}
        assert reach == {(q, k) for q in ROLES for k in ROLES if v.reaches(q, k)}
        differs += reach != one
    assert differs > 50, "deep layers must reach further than one for some tables"


@pytest.mark.parametrize(
    ("roles", "table", "told"),
    [
        (ROLES, ("c..", "cc."), "3 rows of 3 letters"),
        (ROLES, ("c..", "cc", ".cc"), "3 rows of 3 letters"),
        (ROLES, ("c..", "cx.", ".cc"), "unknown letters ['x']"),
        (("context", "picture"), ("c.", "cc"), "each must be one of"),
        (("context", "context"), ("c.", "cc"), "at most once"),
        ((), (), "at least one"),
        (ROLES, ("...", "cc.", ".cc"), "cannot see itself"),
    ],
)
def test_tables_that_do_not_fit(roles: tuple[str, ...], table: tuple[str, ...], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        Visibility(roles, table)
    assert told in str(error.value)


def compress(*table: str, **changes: object) -> Stage:
    values = {"objectives": {"next_token": 1.0}, "bottleneck": Bottleneck(), **changes}
    return Stage("compress", Visibility(ROLES, table), **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (("c..", "cc.", "ccc"), "leaks"),
        (("c..", "cc.", "fcc"), "leaks"),
        (("c..", ".c.", ".cc"), "does not carry"),
        (("c..", "cc.", "..c"), "does not carry"),
        (("c..", "cf.", ".cf"), "see its own answer"),
        (("c..", "ccf", ".cc"), "see its own answer"),
        (("f.f", "cc.", ".cc"), "see its own answer"),
    ],
)
def test_bottlenecks_and_answers_that_leak(table: tuple[str, ...], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        compress(*table)
    assert told in str(error.value)
    compress("c..", "cc.", ".cc")


def test_stages_that_contradict_themselves() -> None:
    match = load_recipe("coma").stage("match")
    for change, told in [
        ({"pooling": None}, "needs a pooling"),
        ({"pooling": "median"}, "mean_compression"),
        ({"objectives": {}}, "trains nothing"),
        ({"objectives": {"contrastive": 0.0}}, "above 0"),
        ({"objectives": {"triplet": 1.0}}, "allowed"),
        ({"objectives": {"next_token": 1.0}}, "needs the role 'dialogue'"),
        ({"supervise": "questions"}, "answers"),
        ({"layout": "spiral"}, "raw"),
        ({"visibility": Visibility(("context",), ("c",))}, "needs the role 'compression'"),
    ]:
        with pytest.raises(RecipeError) as error:
            replace(match, **change)  # type: ignore[arg-type]
        assert told in str(error.value), change


def test_recipes_that_contradict_themselves() -> None:
    coma = load_recipe("coma")
    for change, told in [
        ({"tokens": 0}, "set tokens to 1 or more"),
        ({"stages": ()}, "no stages"),
        ({"stages": (coma.stages[0], coma.stages[0])}, "same name"),
    ]:
        with pytest.raises(RecipeError) as error:
            replace(coma, **change)  # type: ignore[arg-type]
        assert told in str(error.value)
    with pytest.raises(RecipeError, match="set tokens to 0"):
        replace(load_recipe("matching-last"), tokens=4)


def test_names_and_files_that_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'coma'"):
        load_recipe("cma")
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    bad = tmp_path / "bad.yaml"
    for text, told in [
        ("name: [", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']", "tag is refused"),
        ("name: x\nstage: []", "unknown keys ['stage'], missing keys ['stages']"),
        ("name: x\ntokens: 4\nstages: [{name: a, roles: [context], visibilty: [c], objectives: {contrastive: 1}}]", "visibilty"),
        ("- 1", "must be a mapping"),
    ]:
        bad.write_text(text)
        with pytest.raises(RecipeError) as error:
            load_recipe(bad)
        assert told in str(error.value)
