"""Positions of one example for Qwen's multimodal rotary embedding, counted before packing."""

from __future__ import annotations

import numpy as np


def mrope(image: np.ndarray, grids: tuple[tuple[int, int, int], ...], merge: int) -> np.ndarray:
    """Time, height and width position of every token (specs/coma.md 2.4).

    image: [n] bool, True on picture tokens. grids: per picture (time, height, width) in patches, in order. merge: patches per side of a
    visual token. Returns int64 [3, n]. Text counts on by one; a picture takes its grid, and the text after it goes on at its longest side.
    """
    out = np.empty((3, len(image)), dtype=np.int64)
    position, place = 0, 0
    for time, height, width in grids:
        start = place + int(np.argmax(image[place:]))
        out[:, place:start] = np.arange(position, position + start - place)
        position += start - place
        h, w = height // merge, width // merge
        end = start + time * h * w
        out[:, start:end] = np.indices((time, h, w)).reshape(3, -1) + position
        position += max(time, h, w)
        place = end
    out[:, place:] = np.arange(position, position + len(image) - place)
    return out
