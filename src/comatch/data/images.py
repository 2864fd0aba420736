"""Pictures to uint8 patches, in loader workers; scaling and normalising wait for the device.

Equal, after normalisation, to the stock Qwen2-VL image processor's PIL backend (tests/test_images.py), at a fraction of its work
(benchmarks/images.py).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from PIL import Image as PILImage

from comatch.content import Image
from comatch.errors import ImageError, ModelError


@dataclass(frozen=True)
class ImageSettings:
    """How a picture is resized and cut. Pixels count one picture: width times height after resizing.

    draft: decode a JPEG at 1/2, 1/4 or 1/8 where the resized picture is no larger than that; quicker, and not the stock pixels.
    square: squash every picture to a square of so many pixels a side, and leave the limits aside (VLM2Vec V1, CoCoA); 0 keeps its shape.
    small: a picture with a side under one visual token is stretched to one token on that side ("raise"), becomes a square of two tokens a
    side ("square", VLM2Vec and CoMa), or goes on as it is ("").
    """

    patch: int = 14
    merge: int = 2
    temporal: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    draft: bool = False
    square: int = 0
    small: str = ""

    def __post_init__(self) -> None:
        if self.square % (self.patch * self.merge) or self.square < 0:
            raise ModelError(f"image square={self.square}; use a multiple of {self.patch * self.merge}, or 0 to keep the shape")
        if self.small not in ("", "raise", "square"):
            raise ModelError(f"image small={self.small!r}; allowed: 'raise', 'square', or '' to leave small pictures as they are")
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < (self.patch * self.merge) ** 2:
            raise ModelError(
                f"image limits min_pixels={self.min_pixels}, max_pixels={self.max_pixels} are impossible; "
                f"need 0 < min <= max and max >= {(self.patch * self.merge) ** 2}, one visual token"
            )

    @classmethod
    def from_processor(cls, processor: Any) -> ImageSettings:
        """Read the settings of a stock Qwen image processor. Raises ModelError where it does something that we do not."""
        for option in ("do_resize", "do_rescale", "do_normalize"):
            if not getattr(processor, option):
                raise ModelError(f"image processor with {option}=false: its pictures would be read otherwise than we do; set it to true")
        size = processor.size
        resample = PILImage.Resampling(processor.resample)
        if resample is not PILImage.Resampling.BICUBIC or abs(processor.rescale_factor * 255 - 1) > 1e-9:
            raise ModelError(
                f"image processor with resample={resample!r}, rescale_factor={processor.rescale_factor}: only bicubic and 1/255 are known"
            )
        return cls(
            patch=processor.patch_size,
            merge=processor.merge_size,
            temporal=processor.temporal_patch_size,
            min_pixels=size["shortest_edge"],
            max_pixels=size["longest_edge"],
            mean=tuple(processor.image_mean),
            std=tuple(processor.image_std),
        )

    def limited(self, min_pixels: int | None, max_pixels: int | None, draft: bool = False) -> ImageSettings:
        """The same settings with other pixel limits (None keeps a limit), or with `draft`."""
        low, high = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        return replace(self, min_pixels=low, max_pixels=high, draft=draft or self.draft)

    def to_dict(self) -> Mapping[str, Any]:
        """Plain data, for manifests and fingerprints."""
        values = asdict(self)
        for choice in ("draft", "square", "small"):
            if not values[choice]:  # so that what was saved before there was this choice keeps its fingerprint
                del values[choice]
        return values

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """Time, height and width in patches of a picture of that size in pixels (Qwen's smart resize)."""
        factor = self.patch * self.merge
        if self.square:
            return 1, self.square // self.patch, self.square // self.patch
        if self.small and min(width, height) < factor:
            width, height = (2 * factor, 2 * factor) if self.small == "square" else (max(width, factor), max(height, factor))
        if max(width, height) > 200 * min(width, height):
            raise ImageError(f"picture of {width} x {height} pixels: its sides differ more than 200-fold; crop it")
        h, w = round(height / factor) * factor, round(width / factor) * factor
        if h * w > self.max_pixels:
            beta = math.sqrt(height * width / self.max_pixels)
            h = max(factor, math.floor(height / beta / factor) * factor)
            w = max(factor, math.floor(width / beta / factor) * factor)
        elif h * w < self.min_pixels:
            beta = math.sqrt(self.min_pixels / (height * width))
            h, w = math.ceil(height * beta / factor) * factor, math.ceil(width * beta / factor) * factor
        return 1, h // self.patch, w // self.patch

    def tokens(self, image: Image) -> int:
        """Visual tokens of a picture, from its header alone."""
        time, height, width = self.grid(*image.size)
        return time * height * width // self.merge**2

    def cut(self, image: Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Decode, resize and cut: uint8 [patches, 3 * patch * patch] and its grid (time, height, width) in patches."""
        grid = self.grid(*image.size)
        size = grid[2] * self.patch, grid[1] * self.patch
        picture = image.load(size if self.draft else None)
        if picture.size != size:
            picture = picture.resize(size, PILImage.Resampling.BICUBIC)
        h, w, m, p = grid[1] // self.merge, grid[2] // self.merge, self.merge, self.patch
        pixels = np.asarray(picture).reshape(h, m, p, w, m, p, 3)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(-1, 3 * p * p), grid


def picture_key(patches: np.ndarray, grid: tuple[int, int, int]) -> bytes:
    """A content hash of what the vision tower gets of a picture: its pixels after all settings, and its grid."""
    digest = hashlib.sha256(b"%d %d %d " % grid)
    digest.update(np.ascontiguousarray(patches).data)
    return digest.digest()
