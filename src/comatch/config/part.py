"""What every part of a run config is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """What all parts share: unknown keys, wrong types, infinities and later changes are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def refuse_changed(self, names: Sequence[str], why: str) -> None:
        """Raise ValueError if one of these fields is not at its default: no setting is ignored in silence."""
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {show(value)}, which {why}")


def show(value: Any) -> str:
    """A value as error messages show it, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
