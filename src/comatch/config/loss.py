"""What a run may say about the contrastive loss."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from comatch.config.part import Part

_STRENGTH = {"llave": 9.0, "focal": 0.5}


class LossConfig(Part):
    """InfoNCE and its additions; the formulas stand in `comatch.objectives.contrastive`."""

    temperature: float = Field(default=0.03, gt=0)
    """Cosines are divided by this; the value at the start where it is learned."""
    learn_temperature: bool = False
    temperature_range: tuple[float, float] = Field(default=(0.01, 1.0), strict=False)  # lax: YAML has no tuples
    """A learned temperature stays within these."""
    temperature_lr: float | None = Field(default=None, gt=0)
    """Learning rate of the temperature's logarithm; None is optim.lr."""
    symmetric: bool = False
    """Also match positives to queries."""
    negatives: Literal["batch", "own"] = "batch"
    """Who sees a query's explicit negatives: every query of the batch, or that one alone."""
    mask_duplicates: bool = True
    """Items equal to the query, or to one of its positives, are not its negatives."""
    mask_margin: float | None = Field(default=None, ge=-2, le=2)
    """Candidates whose cosine is above that of the positive by more than this are not negatives; None masks none.
    Without a guide the model judges itself: one that does not rank well yet masks its own mistakes."""
    guide: str | None = None
    """A folder with a trained embedding model, made from the same base: its cosines decide what mask_margin masks."""
    hardness: Literal["llave", "focal"] | None = None
    """Weigh negatives by their cosine (llave), or queries by how badly they are answered (focal)."""
    hardness_strength: float | None = Field(default=None, gt=0)
    """Alpha of llave, gamma of focal; None is 9 for llave, 0.5 for focal."""
    dims: list[int] = Field(default=[])
    """Matryoshka: shorter lengths whose prefixes are matched too; the full length always is."""
    dim_weights: list[float] = Field(default=[])
    """Weight of each of `dims` beside the full length's 1; empty is 1 for each."""
    vectors: list[int] = Field(default=[1], min_length=1)
    """How many vectors an item is matched with, one loss for each number; above 1 only where a stage pools mean_compression."""

    @model_validator(mode="after")
    def _consistent(self) -> LossConfig:
        low, high = self.temperature_range
        if not 0 < low <= self.temperature <= high and self.learn_temperature:
            raise ValueError(f"temperature {self.temperature} is outside temperature_range {[low, high]}; widen the range")
        if not self.learn_temperature:
            self.refuse_changed(("temperature_range", "temperature_lr"), "has no effect without learn_temperature: true; remove it")
        if self.mask_margin is None:
            self.refuse_changed(("guide",), "has no effect without mask_margin; remove it, or set mask_margin")
        if self.hardness is None:
            self.refuse_changed(("hardness_strength",), "has no effect without hardness; remove it, or set hardness to 'llave' or 'focal'")
        for name in ("dims", "vectors"):
            values = getattr(self, name)
            if min(values, default=1) < 1 or len(set(values)) < len(values):
                raise ValueError(f"{name} is {values}; every number must be at least 1 and stand there once")
        if self.dim_weights and (len(self.dim_weights) != len(self.dims) or min(self.dim_weights) <= 0):
            raise ValueError(f"dim_weights is {self.dim_weights}; give one number above 0 for each of dims {self.dims}, or none")
        return self

    @property
    def strength(self) -> float:
        """`hardness_strength`, or the default of the kind; 0 without one."""
        return self.hardness_strength if self.hardness_strength is not None else _STRENGTH.get(self.hardness or "", 0.0)

    def prefixes(self, width: int) -> list[tuple[int, float]]:
        """The lengths to match and their weights, which add up to 1. Raises ValueError where one is not below `width`."""
        if high := [d for d in self.dims if d >= width]:
            raise ValueError(f"loss.dims {high}: the model's vectors have {width} numbers; every shorter length must be below that")
        pairs = [(width, 1.0), *zip(self.dims, self.dim_weights or [1.0] * len(self.dims), strict=True)]
        total = sum(weight for _, weight in pairs)
        return [(d, weight / total) for d, weight in pairs]
