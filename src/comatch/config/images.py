"""What a run config may say about pictures."""

from __future__ import annotations

from pydantic import Field, model_validator

from comatch.config.part import Part


class ImagesConfig(Part):
    """How large pictures may be, in pixels (None keeps the model's own setting), how they are read, and what is kept of them."""

    min_pixels: int | None = Field(default=None, ge=1)
    """Smaller pictures are scaled up to this."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Larger pictures are scaled down to this."""
    draft: bool = False
    """Decode a large JPEG at 1/2, 1/4 or 1/8 of its size; quicker, with slightly other pixels."""
    store: str | None = Field(default=None, min_length=1)
    """Folder that keeps what a frozen vision tower makes of each picture, for later epochs and runs; None keeps nothing."""
    store_gigabytes: float = Field(default=50, gt=0)
    """Size of that folder, in 2**30 bytes; what was used least recently makes room."""

    @model_validator(mode="after")
    def _ordered(self) -> ImagesConfig:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            both = f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}"
            raise ValueError(f"{both}; lower the first or raise the second")
        if self.store is None:
            self.refuse_changed(("store_gigabytes",), "has no effect without a store; remove it, or name a folder in store")
        return self
