"""What a config may say about the ranking tasks that models are scored on."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from comatch.config.part import Part


class SuiteConfig(Part):
    """Ranking tasks of `comatch evaluate`."""

    of_scenes: ClassVar[tuple[str, ...]] = ("n", "candidates")
    """Settings that mean nothing on emoji."""

    suite: Literal["scenes", "emoji"] = "scenes"
    data: str | None = None
    """The emoji table, a Parquet file."""
    n: int = Field(default=100, ge=1)
    """Test scenes."""
    candidates: int = Field(default=400, ge=1)
    """Scenes that retrieval ranks."""

    @model_validator(mode="after")
    def _fits_suite(self) -> SuiteConfig:
        if self.suite == "emoji":
            self.refuse_changed(self.of_scenes, "has no effect on emoji; remove it")
            if self.data is None:
                raise ValueError("suite 'emoji' needs data, the path of its table")
        else:
            self.refuse_changed(("data",), "has no effect on scenes, which are generated; remove it")
            if self.candidates < self.n:
                raise ValueError(f"candidates is {self.candidates}; it must be at least n, {self.n}")
        return self


class EvaluateConfig(SuiteConfig):
    """Tasks of the dev split for the last stage while it trains; the best checkpoint by them becomes `best` in the run folder."""

    every: int = Field(default=100, ge=1)
    """Steps from one evaluation to the next; the last step has one in any case."""
    metric: str = Field(default="mean", min_length=1)
    """Which score decides what is best: the name of a task, or the mean of all."""
