"""From a YAML file and overrides to a RunConfig.

Values come from the defaults, then the file, then `key.sub=value` overrides; the last one wins. An unknown
key is refused with the nearest known one, a wrong type with what is allowed, and every message says which
line or override it came from.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ValidationError

from comatch import plain_yaml
from comatch.config.data import DataConfig
from comatch.config.part import Part, show
from comatch.config.schema import RunConfig, StageRun
from comatch.errors import ConfigError, RecipeError
from comatch.plain_yaml import Key
from comatch.recipe import Recipe, Stage, check_vectors
from comatch.recipes import load_recipe

Origins = Mapping[Key, str]
P = TypeVar("P", bound=Part)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run in YAML file `path`, with `key.sub=value` overrides on top. Raises ConfigError."""
    return resolve(path, overrides)[0]


def resolve(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Origins]:
    """Like `load_config`, and where each value came from.

    Origins look like {("seed",): "run.yaml:9", ("adapter", "r"): "command line"}; a key that is missing there
    has its default.
    """
    data, origins = read_data(path, overrides)
    return check_run(data, origins, str(path)), origins


def read_data(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], dict[Key, str]]:
    """The mapping in YAML file `path` with overrides on top, unchecked, and where each value came from. Raises ConfigError."""
    data, lines = plain_yaml.parse(_read(Path(path)), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {show(data)}; expected a mapping that starts with `name: ...`")
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        _apply(override, data, origins)
    return data, origins


def check_run(data: Mapping[str, Any], origins: Origins, source: str) -> RunConfig:
    """The run that a mapping describes; `source` is where it came from. Raises ConfigError."""
    _check_stages(data, origins)
    config = check_part(RunConfig, data, origins, source)
    _check_idle(config, origins)
    return config


def check_part(part: type[P], data: Mapping[str, Any], origins: Origins, source: str) -> P:
    """A mapping as a part of a config. Raises ConfigError with the line and the nearest known name of whatever does not fit."""
    try:
        return part.model_validate(data)
    except ValidationError as error:
        problems = [_explain(part, problem, origins, source) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def dump(config: RunConfig) -> str:
    """All values as YAML text, defaults included; `load_config` reads it back to an equal config."""
    return plain_yaml.dump(config.model_dump(mode="json"))


def _check_stages(data: Mapping[str, Any], origins: Origins) -> None:
    """The stages named are the recipe's. Checked first: a misspelt stage would seem to lack its keys."""
    name, stages = data.get("recipe"), data.get("stages")
    if not isinstance(name, str) or not isinstance(stages, dict):
        return
    recipe = _recipe(name, None, origins)
    known = [stage.name for stage in recipe.stages]
    for stage in stages:
        if stage not in known:
            where = _origin(("stages", stage), origins, "stages")
            hint = f"{_nearest(stage, known)}its stages: {known}"
            raise ConfigError(f"{where}: recipe {recipe.name!r} has no stage {stage!r}; {hint}")


def _check_idle(config: RunConfig, origins: Origins) -> None:
    """K fits the recipe, each stage's loss fits the stage, and data of the run serve some stage."""
    recipe = _recipe(config.recipe, config.tokens, origins)
    _check_data(config, recipe, origins)
    for name, run in config.stages.items():
        stage = recipe.stage(name)
        try:
            if "contrastive" in stage.objectives:
                _check_vectors(run, stage, recipe.tokens)
            else:
                _refuse_loss(run)
        except ValueError as error:
            where = _origin(("stages", name, "loss"), origins, "stages")
            raise ConfigError(f"{where}: stages.{name}.{error}") from error


def _check_vectors(run: StageRun, stage: Stage, tokens: int) -> None:
    for count in run.loss.vectors:
        try:
            check_vectors(count, stage.pooling, tokens)
        except RecipeError as error:
            raise ValueError(f"loss.vectors: {error}") from error


def _refuse_loss(run: StageRun) -> None:
    why = "has no effect in a stage that is not contrastive; remove it"
    run.refuse_changed(("keep_passes",), why)
    try:
        run.loss.refuse_changed(tuple(type(run.loss).model_fields), why)
    except ValueError as error:
        raise ValueError(f"loss.{error}") from error


def _check_data(config: RunConfig, recipe: Recipe, origins: Origins) -> None:
    pairs = [name for name in config.stages if "contrastive" in recipe.stage(name).objectives]
    borrowing = [name for name, run in config.stages.items() if run.data is None]
    if not borrowing and config.data != DataConfig():
        where = _origin(("data",), origins, "data")
        raise ConfigError(f"{where}: data has no effect, because every stage has its own; remove one of them")
    places: list[tuple[Key, DataConfig, bool]] = [(("data",), config.data, not set(borrowing) & set(pairs))]
    places += [(("stages", name, "data"), run.data, name not in pairs) for name, run in config.stages.items() if run.data is not None]
    for at, data, idle in places:
        changed = [name for name in ("positives", "negatives") if getattr(data, name) != getattr(DataConfig(), name)]
        readers = [name for name, run in config.stages.items() if run.data is data or (run.data is None and at == ("data",))]
        asked = any(recipe.stage(name).tells == "pair" for name in readers)
        changed += ["prompt"] * (not asked and any(source.prompt for source in data.sources.values()))
        if idle and changed:
            where = _origin((*at, changed[0]), origins, "data")
            raise ConfigError(f"{where}: {_dotted(at)}.{changed[0]} has no effect; no contrastive stage reads these data; remove it")


def _recipe(name: str, tokens: int | None, origins: Origins) -> Recipe:
    try:
        return load_recipe(name).with_tokens(tokens)
    except RecipeError as error:
        where = _origin(("recipe",) if tokens is None else ("tokens",), origins, "recipe")
        raise ConfigError(f"{where}: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        hint = f"{_nearest(path.name, beside)}YAML files in {str(path.parent)!r}: {beside or 'none'}"
        raise ConfigError(f"config file {str(path)!r} does not exist; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read as UTF-8 text: {error}") from error


def _apply(override: str, data: dict[str, Any], origins: dict[Key, str]) -> None:
    """Put one `key.sub=value` into `data`, and note it in `origins`."""
    name, equals, text = override.partition("=")
    if not equals or not all(name.strip().split(".")):
        raise ConfigError(f"override {override!r} is not of the form key=value, as in seed=1 or adapter.r=8")
    value, inner = plain_yaml.parse(text, f"override {override!r}")
    put(data, origins, name.strip(), value, "command line", inner)


def put(data: dict[str, Any], origins: dict[Key, str], name: str, value: Any, source: str, inner: Iterable[Key] = ()) -> None:
    """Put a value at the dotted place `name` of nested data, and note that it, with its keys `inner`, came from `source`.

    Raises ConfigError where something that has no parts stands in the way.
    """
    parts = name.split(".")
    place = data
    for depth, part in enumerate(parts[:-1], 1):
        origins.setdefault(tuple(parts[:depth]), source)
        if place.get(part) is None:
            place[part] = {}
        if not isinstance(place[part], dict):
            whole = f"{_dotted(tuple(parts[:depth]))} is {show(place[part])}"
            raise ConfigError(f"{source}, {name!r}: {whole}, which has no parts to set")
        place = place[part]
    place[parts[-1]] = value
    path: Key = tuple(parts)
    for stale in [key for key in origins if key[: len(path)] == path]:
        del origins[stale]
    origins.update({(*path, *key): source for key in ((), *inner)})


# Explaining what pydantic refused


def _explain(root: type[Part], problem: Mapping[str, Any], origins: Origins, source: str) -> str:
    loc: Key = tuple(step for step in problem["loc"] if step != "[key]")
    where = _origin(loc, origins, source)
    if problem["type"] == "extra_forbidden":
        allowed = list(_fields(root, loc[:-1]))
        hint = f"{_nearest_key(root, str(loc[-1]), allowed)}allowed here: {', '.join(allowed)}"
        return f"{where}: unknown key {_dotted(loc)!r}; {hint}"
    if problem["type"] == "missing" and isinstance(loc[-1], str):
        return f"{where}: {_dotted(loc)} is missing; add it to {source} or give {_dotted(loc)}=..."
    if problem["type"] == "value_error":
        return f"{where}: {_dotted(loc) + ': ' if loc else ''}{problem['ctx']['error']}"
    rule = re.sub(r" or instance of \w+", "", problem["msg"]).replace("Input should", "it should")
    return f"{where}: {_dotted(loc)} is {show(problem['input'])}; {rule}"


def _origin(loc: Key, origins: Origins, default: str) -> str:
    """Where the value at `loc`, or else the nearest thing around it, was written."""
    return next((origins[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in origins), default)


def _inner(annotation: Any) -> Any:
    """The part inside `X | None` and `dict[str, X]`, or the annotation itself."""
    if get_origin(annotation) is dict:
        return _inner(get_args(annotation)[1])
    return next((_inner(arg) for arg in get_args(annotation) if arg is not type(None)), annotation)


def _fields(part: type[Part], loc: Key) -> Mapping[str, Any]:
    """The fields of the part at `loc` within a part, as pydantic knows them."""
    steps = iter(loc)
    for step in steps:
        annotation = part.model_fields[str(step)].annotation
        part = _inner(annotation)
        if any(get_origin(part_of) is dict for part_of in (annotation, *get_args(annotation))):
            next(steps, None)  # a name in a mapping of parts, as in stages.match; it may be that of a field
    return part.model_fields


def _all_keys(part: type[Part], prefix: str = "") -> Iterator[str]:
    for name, field in part.model_fields.items():
        yield prefix + name
        inner = _inner(field.annotation)
        if isinstance(inner, type) and issubclass(inner, Part):
            yield from _all_keys(inner, f"{prefix}{name}.{'STAGE.' if name == 'stages' else 'NAME.' if name == 'mixture' else ''}")


def _nearest_key(root: type[Part], key: str, allowed: Sequence[str]) -> str:
    """The nearest key here, or else keys of that name in other places."""
    elsewhere = [name for name in _all_keys(root) if name.split(".")[-1] == key]
    return _nearest(key, allowed) or "".join(f"did you mean {name!r}? " for name in elsewhere)


def _nearest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _dotted(loc: Key) -> str:
    return ".".join(str(step) for step in loc)
