"""What a run may say about its data: one source, or several and how batches are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from comatch.config.part import Part


class SourceConfig(Part):
    """One source of examples."""

    source: str = "scenes"
    """A source's name: the generated world, or a format that `path` is read as."""
    path: str | None = None
    """File, folder or pattern of files, for sources that read one."""
    subset: str | None = None
    """A part of the source by its name, for sources that have such."""
    root: str | None = None
    """Folder that pictures named in the data must lie below; None is the folder of the data."""
    corpus: str | None = None
    """The table of documents, for sources that have one."""
    allow_cut: bool = False
    """Use a file that is cut off at its end as far as it goes."""
    split: str = "train"
    limit: int | None = Field(default=None, ge=1)
    """Use only this many examples."""
    columns: dict[str, str] | None = None
    """Our column names to the file's, where they differ."""
    dialogue: Literal["multi-turn", "single-turn", "description", "caption", "mixed"] = "multi-turn"
    """What a dialogue is made of."""
    prompt: str = ""
    """Contrastive stages only: a line put before the text of every query of this source."""


class MixedSource(SourceConfig):
    """One source among others."""

    weight: float | None = Field(default=None, gt=0)
    """Its share beside the other weights; None, then for all of the mixture, is its number of rows."""


class DataConfig(SourceConfig):
    """One source, or a mixture of several."""

    max_bad: float = Field(default=0.001, ge=0, le=1)
    """Stop when a larger share of rows than this is unreadable."""
    positives: int = Field(default=1, ge=1)
    """Contrastive stages only: how many positives of a row a sample carries, drawn in each epoch where the row has more."""
    negatives: int = Field(default=0, ge=0)
    """Contrastive stages only: likewise for hard negatives; a row with fewer gives what it has, and is counted."""
    mixture: dict[str, MixedSource] | None = None
    """Several sources by names of your own, in the place of the one above."""
    compose: Literal["free", "homogeneous", "blocks"] = "free"
    """Mixtures only: every batch of all sources, every batch of one source, or batches made of blocks of one source each."""
    block: int | None = Field(default=None, ge=1)
    """Examples in one block; the batch must be a multiple of it."""
    temperature: float = Field(default=1.0, gt=0)
    """Mixtures only: shares are weight ** (1 / temperature), so 1 keeps the weights and a high one evens them out."""

    @property
    def sources(self) -> Mapping[str, SourceConfig]:
        """All sources by name; a single one has no name of its own but its kind."""
        return {self.source: self} if self.mixture is None else self.mixture

    @model_validator(mode="after")
    def _no_effect(self) -> DataConfig:
        if self.mixture is None:
            why = "has no effect without a mixture; remove it, or name several sources in mixture"
            self.refuse_changed(("compose", "block", "temperature"), why)
        else:
            own = tuple(SourceConfig.model_fields)
            self.refuse_changed(own, "has no effect beside a mixture; say it for each of its sources")
            self._mixed(self.mixture)
        return self

    def _mixed(self, mixture: dict[str, MixedSource]) -> None:
        if len(mixture) < 2:
            raise ValueError(f"mixture has {len(mixture)} sources; give two or more, or one without mixture")
        bare = sorted(name for name, part in mixture.items() if part.weight is None)
        if 0 < len(bare) < len(mixture):
            raise ValueError(f"mixture: {bare} have no weight and the others have; give all of them one, or none")
        if (self.compose == "blocks") != (self.block is not None):
            raise ValueError(f"block is {self.block} and compose is {self.compose!r}; compose: blocks needs it, and nothing else takes it")
