"""Hiding words and pixels of one Example, as a pure function of the Example and a seed.

Everything stays as it travels anyway: a hidden word is another token id, a hidden visual token is other uint8 pixels, so neither packing
nor the model knows of it. What was hidden comes along: words as labels, pixels as `targets`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from comatch.core.batch import ROLE_ID, Example
from comatch.recipe import Corruption, Stage


@dataclass(frozen=True)
class Hiding:
    """What drawing needs to know of a model. mask: id of the mask token. protected: ids that are never hidden (special, vision and
    compression tokens). image: id of a picture's tokens. group: patches of one visual token. mean, std: of the processor, [3], of 0..1.
    """

    mask: int
    protected: Collection[int]
    image: int
    group: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def corrupt(example: Example, stage: Stage, hiding: Hiding, seed: int) -> Example:
    """The Example with what its stage hides: masked ids with their labels, filled patches with their targets.

    The draw depends on the seed and on the Example's shape alone. Pictures that were touched lose their name, which was of other pixels.
    """
    rng = np.random.default_rng(seed)
    for corruption in stage.corruptions:
        # Both are always drawn, so that turning one off does not change what the other hides.
        words, pixels = rng.spawn(2)
        if corruption.text:
            example = _hide_words(example, corruption, stage.shift, hiding, words)
        if corruption.patches:
            example = _hide_patches(example, corruption, hiding, pixels)
    return example


def _hide_words(example: Example, corruption: Corruption, shift: int, hiding: Hiding, rng: np.random.Generator) -> Example:
    allowed = (example.roles == ROLE_ID[corruption.role]) & ~np.isin(example.ids, [*hiding.protected, hiding.mask, hiding.image])
    allowed[:shift] = False  # with a shift the first token of a row has no state to predict it from
    draws = rng.random(len(example))
    chosen = allowed & (draws < corruption.text)
    if corruption.at_least_one and not chosen.any():
        if not allowed.any():
            return replace(example, untouched=example.untouched + 1)
        # The place that came nearest to being drawn: as likely as any other.
        chosen[np.where(allowed, draws, 2.0).argmin()] = True
    place = chosen.nonzero()[0]
    ids, labels = example.ids.copy(), example.labels.copy()
    labels[place - shift] = ids[place]
    ids[place] = hiding.mask
    return replace(example, ids=ids, labels=labels)


def _hide_patches(example: Example, corruption: Corruption, hiding: Hiding, rng: np.random.Generator) -> Example:
    places = (example.ids == hiding.image).nonzero()[0]
    chosen = rng.random(len(places)) < corruption.patches
    whole = np.concatenate(example.patches) if example.patches else np.zeros((0, 0), np.uint8)
    rows = np.repeat(chosen, hiding.group)
    targets = whole[rows]
    whole[rows] = fill(targets.shape, corruption.fill, hiding, rng)
    bounds = np.cumsum([len(picture) for picture in example.patches])[:-1]
    return replace(
        example,
        patches=tuple(np.split(whole, bounds)) if example.patches else (),
        pictures=(),
        targets=targets,
        target_places=places[chosen],
    )


def fill(shape: tuple[int, ...], how: str, hiding: Hiding, rng: np.random.Generator) -> np.ndarray:
    """Pixels in the place of hidden ones: uint8 [patches, 3 * patch * patch], a channel after the other. how: one of FILLS."""
    if how == "zero" or not shape[0]:
        return np.zeros(shape, np.uint8)
    each = shape[0], 3, shape[1] // 3
    mean, std = (np.asarray(x)[None, :, None] for x in (hiding.mean, hiding.std))
    noise = rng.standard_normal(each, dtype=np.float32) if how == "noise" else 0.0
    pixels: np.ndarray = np.broadcast_to((mean + std * noise) * 255, each)
    return pixels.round().clip(0, 255).astype(np.uint8).reshape(shape)
