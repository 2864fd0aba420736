"""Run configs: what is refused and how it is said, what wins, and that YAML there and back loses nothing.

Row 44 of the fault table (specs/ecosystem.md section 11).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from comatch import plain_yaml
from comatch.config import RunConfig, dump, load_config, resolve
from comatch.errors import ConfigError
from comatch.recipes import RECIPES

RUN = """\
name: tiny
model: comatch-nano
recipe: coma
adapter: {kind: dora, r: 8}
stages:
  compress:
    steps: 100
    batch: 8
  match:
    steps: 50
    batch: 16
    optim:
      lr: 1e-3
      betas: [0.9, 0.95]
    data: {source: scenes, limit: 100}
tracking: [wandb]
"""
LEAST = {"name": "n", "model": "m", "recipe": "coma", "stages": {"match": {"steps": 1, "batch": 1}}}

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def inner(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return inner


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    return str(refused.value)


def test_a_file_and_its_defaults(write: Write) -> None:
    config = load_config(write(RUN))
    assert (config.seed, config.precision, config.output) == (0, "bf16", "out/{name}")
    assert config.folder == Path("out/tiny")
    assert (config.adapter.kind, config.adapter.r, config.adapter.alpha) == ("dora", 8, 64)
    match = config.stages["match"]
    assert (match.optim.lr, match.optim.betas, match.optim.clip) == (1e-3, (0.9, 0.95), 1.0)
    assert match.data is not None
    assert match.data.limit == 100
    assert config.stages["compress"].data is None
    assert (match.loss.temperature, match.tokens_per_pass) == (0.03, 4096)


def test_overrides_win_and_are_typed_as_yaml(write: Write) -> None:
    path = write(RUN)
    config = load_config(
        path,
        [
            "seed=7",
            "stages.match.optim.lr=2e-4",
            "data.columns.text=caption",
            "images.max_pixels=50176",
            "seed=8",
        ],
    )
    assert (config.seed, config.images.max_pixels, config.data.columns) == (8, 50176, {"text": "caption"})
    assert config.stages["match"].optim.lr == 2e-4
    assert config.stages["match"].optim.betas == (0.9, 0.95)  # what stands beside an override stays
    assert (
        load_config(path, ["stages.match.optim={clip: 2.0}"]).stages["match"].optim.lr == 5e-5
    )  # a whole part
    assert load_config(path, ["tokens="]).tokens is None


def test_origins(write: Write) -> None:
    path = write(RUN)
    _, origins = resolve(path, ["adapter={r: 4}", "stages.match.batch=2"])
    assert origins["name",] == f"{path}:1"
    assert origins["stages", "match", "optim", "lr"] == f"{path}:13"
    assert origins["stages", "match", "batch"] == "command line"
    assert origins["adapter", "r"] == "command line"
    assert (
        "adapter",
        "kind",
    ) not in origins  # the override replaced the whole part, so this is a default again
    assert ("seed",) not in origins


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adaptr.r=8", ["command line", "'adaptr'", "did you mean 'adapter'?", "allowed here: name, model"]),
        ("stages.match.optim.lrr=1", ["'stages.match.optim.lrr'", "did you mean 'lr'?", "warmup"]),
        ("optim.lr=1", ["did you mean 'stages.STAGE.optim'?"]),
        ("stages.match.data.colums=1", ["did you mean 'columns'?"]),
        ("stages.mach.steps=1", ["no stage 'mach'", "did you mean 'match'?", "['compress', 'match']"]),
        ("recipe=comma", ["command line", "no recipe 'comma'", "did you mean 'coma'?"]),
        ("precision=fp8", ["precision is 'fp8'", "'fp32' or 'bf16'"]),
        ("stages.match.steps=many", ["stages.match.steps is 'many'", "valid integer"]),
        ("stages.match.steps=true", ["stages.match.steps is True", "valid integer"]),
        ("stages.match.steps=0", ["steps is 0", "epochs is None", "give one of the two"]),
        ("stages.match.steps=2.0", ["is 2.0", "valid integer"]),
        ("stages.match.optim.lr=.inf", ["is inf", "finite"]),
        ("stages.match.optim.betas=[0.9, 1.5]", ["betas are [0.9, 1.5]", "below 1"]),
        ("name=a/b", ["name is 'a/b'"]),
        ("output=out/{date}", ["out/{date}", "{name}"]),
        ("tracking=[tensorbord]", ["tracking.0 is 'tensorbord'", "'tensorboard' or 'wandb'"]),
        ("name.first=x", ["name is 'tiny'", "no parts"]),
        ("seed", ["'seed'", "key=value"]),
        ("=3", ["key=value"]),
        ("a..b=3", ["key=value"]),
        ("seed=[1", ["'seed=[1'", "not valid YAML"]),
        ("seed=!!python/object/apply:os.getpid []", ["tag is refused"]),
        ("seed=", ["seed is None", "valid integer"]),
    ],
)
def test_what_is_refused_on_the_command_line(override: str, said: list[str], write: Write) -> None:
    message = refusal(write(RUN), override)
    assert [part for part in said if part not in message] == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "name: tiny",
            "nam: tiny",
            [":1: unknown key 'nam'", "did you mean 'name'?", "name is missing", "name=..."],
        ),
        ("    steps: 50", "    stps: 50", [":10: unknown key 'stages.match.stps'", "did you mean 'steps'?"]),
        ("    steps: 50", "    steps: fifty", [":10: stages.match.steps is 'fifty'"]),
        (
            "    steps: 50",
            "    steps: 50\n    steps: 60",
            [":11: key 'stages.match.steps'", "first in line 10"],
        ),
        ("recipe: coma", "recipe: !!python/name:os.system", [":3: a YAML tag is refused"]),
        ("recipe: coma", "recipe: &r coma", [":3: a YAML anchor is refused"]),
        ("recipe: coma", "recipe: !!str coma", [":3: a YAML tag is refused"]),
        ("tracking: [wandb]", "tracking: [wandb", ["not valid YAML"]),
        ("tracking: [wandb]", "1: 2", [":16: key '1' is not text"]),
        ("tracking: [wandb]", "---\nname: two", ["not valid YAML"]),
    ],
)
def test_what_is_refused_in_a_file(old: str, new: str, said: list[str], write: Write) -> None:
    assert old in RUN
    message = refusal(write(RUN.replace(old, new)))
    assert [part for part in said if part not in message] == []


def test_no_code_runs(write: Write, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = f"name: !!python/object/apply:os.mkdir ['{canary}']\n"
    refusal(write(text))
    assert not canary.exists()
    yaml.unsafe_load(text)  # proof that this text can run code
    assert canary.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["adapter={kind: full, r: 8}"], ["r is 8", "no effect with kind 'full'"]),
        (["images={min_pixels: 9, max_pixels: 4}"], ["min_pixels 9 is above max_pixels 4"]),
        (["stages.compress.loss.temperature=0.1"], ["command line: stages.compress.loss.temperature is 0.1", "not contrastive"]),
        (["stages.compress.keep_passes=2"], ["run.yaml:6", "stages.compress.keep_passes is 2", "not contrastive"]),
        (["stages.match.loss.hardness_strength=2.0"], ["stages.match.loss", "hardness_strength is 2.0", "no effect without hardness"]),
        (["stages.match.loss.vectors=[1, 5]"], ["stages.match.loss.vectors", "tokens do not make 5 vectors", "allowed: [1, 2,"]),
        (["stages.match.loss={dims: [4, 4]}"], ["dims is [4, 4]", "stand there once"]),
        (["recipe=matching"], ["run.yaml:6", "no stage 'compress'"]),
        (["recipe=matching-last", "tokens=4", "stages={match: {steps: 1, batch: 1}}"], ["tokens=4"]),
    ],
)
def test_settings_that_contradict_each_other(changes: list[str], said: list[str], write: Write) -> None:
    message = refusal(write(RUN), *changes)
    assert [part for part in said if part not in message] == []


def test_the_same_settings_where_they_have_effect(write: Write) -> None:
    path = write(RUN)
    assert load_config(path, ["adapter={kind: lora, r: 8}"]).adapter.r == 8
    assert load_config(path, ["adapter={kind: full}"]).adapter.kind == "full"
    assert load_config(path, ["stages.match.loss.temperature=0.1"]).stages["match"].loss.temperature == 0.1
    assert load_config(path, ["stages.match.loss.vectors=[1, 4]"]).stages["match"].loss.vectors == [1, 4]
    learned = load_config(path, ["stages.match.loss={learn_temperature: true, temperature_range: [0.01, 0.5]}"])
    assert learned.stages["match"].loss.learn_temperature
    assert load_config(path, ["tokens=4"]).tokens == 4


def test_a_missing_file_names_what_is_there(write: Write, tmp_path: Path) -> None:
    write(RUN)
    message = refusal(tmp_path / "rum.yaml")
    assert "did you mean 'run.yaml'?" in message
    assert "['run.yaml']" in message
    assert "none" in refusal(tmp_path / "nowhere" / "run.yaml")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "[" * 5000])
def test_a_file_that_is_no_mapping(text: str, write: Write) -> None:
    assert "run.yaml" in refusal(write(text))


def test_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\xfe")
    assert "UTF-8" in refusal(path)


def test_every_recipe_can_be_run_from_a_config(write: Write) -> None:
    for recipe in RECIPES.values():
        stages = {stage.name: {"steps": 1, "batch": 1} for stage in recipe.stages}
        path = write(plain_yaml.dump({**LEAST, "recipe": recipe.name, "stages": stages}))
        assert list(load_config(path).stages) == list(stages)


def test_dump_and_back(write: Write) -> None:
    config = load_config(write(RUN))
    assert load_config(write(dump(config))) == config


def test_the_digest_is_that_of_the_values(write: Write) -> None:
    config = load_config(write(RUN))
    assert len(config.digest) == 64
    assert load_config(write(dump(config))).digest == config.digest
    assert load_config(write(RUN), ["seed=0"]).digest == config.digest  # a default said aloud is the same run
    assert load_config(write(RUN), ["seed=1"]).digest != config.digest


def test_a_config_is_frozen(write: Write) -> None:
    config = load_config(write(RUN))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5), ("1e5", 1e5), ("010", "010"), ("1:30", "1:30"), ("no", "no"), ("true", True),
        ("~", None), ("", None), ("2026-11-21", "2026-11-21"), ("-3", -3), (".5", 0.5), ("1_000", "1_000"),
        ("'5'", "5"), ("<<", "<<"), ("=", "="), ("1e5x", "1e5x"),
    ],
)  # fmt: skip
def test_values_mean_what_they_look_like(text: str, value: object) -> None:
    read, _ = plain_yaml.parse(text, "here")
    assert read == value
    assert type(read) is type(value)


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.sampled_from(
    [
        "1e5",
        "5e-5",
        "no",
        "null",
        "~",
        "",
        "0x1f",
        "1:30",
        "!!tag",
        "&a",
        "*a",
        "- a",
        "a: b",
        "# c",
        "'",
        '"',
        "\n",
        " x ",
    ]
)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@given(plain)
@settings(max_examples=150, deadline=None, database=None)
def test_plain_data_survives_yaml(value: Any) -> None:
    for one_line in (False, True):
        text = plain_yaml.dump(value, one_line=one_line)
        assert plain_yaml.parse(text, "here")[0] == value


def test_the_least_that_a_run_needs() -> None:
    assert RunConfig.model_validate(LEAST).stages["match"].batch == 1
    for key in LEAST:
        with pytest.raises(ValueError, match=key):
            RunConfig.model_validate({name: value for name, value in LEAST.items() if name != key})
