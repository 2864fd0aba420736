"""What an ablation file may say: a base run, arms that differ from it, seeds, and what is measured."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from comatch.config.evaluate import SuiteConfig
from comatch.config.part import Part


class MeasureConfig(SuiteConfig):
    """What is measured of every finished run."""

    of_scenes: ClassVar[tuple[str, ...]] = ("n", "candidates", "seed", "answers")

    split: Literal["dev", "test"] = "test"
    seed: int = Field(default=0, ge=0)
    """Of the test scenes."""
    tokens: int = Field(default=0, ge=0)
    """Pictures on which the similarity of compression tokens is measured, after each stage; 0 leaves it out."""
    carried: int = Field(default=0, ge=0)
    """Rows on which it is measured how much readers of the compression tokens lose with another's picture, after each stage that has such;
    0 leaves it out."""
    answers: int = Field(default=0, ge=0)
    """Questions about scenes that are answered from the compression tokens alone, after each stage of a recipe with dialogues; 0 leaves it
    out."""


class AblateConfig(Part):
    """Arms times grid times seeds. Settings are written with dots, as on the command line: `stages.match.steps: 100`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The study's name; it becomes a folder name."""
    question: str = ""
    """What the study is to answer; it heads the report."""
    base: str = Field(min_length=1)
    """The run that all arms begin from: a run's YAML file, beside this one or below."""
    settings: dict[str, Any] = Field(default={})
    """Settings of all arms, on top of the base."""
    arms: dict[str, dict[str, Any]] = Field(default={})
    """Settings of each arm, by a name of your own. `recipe.` goes into the recipe: `recipe.stages.compress.supervise: dialogue`."""
    grid: dict[str, list[Any]] = Field(default={})
    """Values of settings that are tried in all combinations, with every arm."""
    seeds: int = Field(default=5, ge=1)
    """Each arm is run with the seeds 0, 1 ..."""
    baseline: str | None = None
    """The arm that others are compared with, seed by seed and at the same point of the grid, or one point of it by its whole name, as in
    `coma, tokens=8`; None compares nothing."""
    measure: MeasureConfig = MeasureConfig()

    @model_validator(mode="after")
    def _something_differs(self) -> AblateConfig:
        if not self.arms and not self.grid:
            raise ValueError("neither arms nor grid is given, so nothing differs; name at least one arm, or a setting and its values")
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid: {empty} have no values; give at least one each")
        return self
