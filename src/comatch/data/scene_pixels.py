"""How a scene looks: shapes, letters and meaningless clutter on 84 x 84 pixels, painted with cached masks."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from comatch.data.scene_truth import PLACES, Dice, Thing

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

SIZE: Final = 84
CELL: Final = SIZE // 2
SIDE: Final = {"large": 34, "small": 20}
RGB: Final = {
    "red": (214, 36, 36), "green": (36, 146, 56), "blue": (40, 76, 214), "yellow": (240, 204, 16),
    "purple": (142, 52, 176), "orange": (246, 128, 24), "black": (24, 24, 24), "cyan": (24, 190, 212),
    "pale grey": (226, 226, 228), "pale yellow": (252, 246, 206),
    "pale pink": (252, 220, 228), "pale green": (214, 242, 214),
}  # fmt: skip
CLUTTER: Final = (160, 160, 160)
_DARK = frozenset(("red", "green", "blue", "purple", "black"))
_GLYPHS = {
    "a": (0b01110, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "e": (0b11111, 0b10000, 0b10000, 0b11110, 0b10000, 0b10000, 0b11111),
    "h": (0b10001, 0b10001, 0b10001, 0b11111, 0b10001, 0b10001, 0b10001),
    "k": (0b10001, 0b10010, 0b10100, 0b11000, 0b10100, 0b10010, 0b10001),
    "l": (0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b10000, 0b11111),
    "o": (0b01110, 0b10001, 0b10001, 0b10001, 0b10001, 0b10001, 0b01110),
    "t": (0b11111, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100, 0b00100),
    "x": (0b10001, 0b10001, 0b01010, 0b00100, 0b01010, 0b10001, 0b10001),
}
_GLYPH_W, _GLYPH_H, _GAP = 10, 14, 2
# A letter sits this many pixels below the middle of these shapes, where they are widest.
_GLYPH_DROP = {"triangle": 5, "star": 3, "heart": -2}


@cache
def shape_mask(shape: str, side: int) -> NDArray[np.bool_]:
    """The pixels a shape of `side` pixels fills: bool [height, width], cut to the shape's own extent."""
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    u, v = axis[None, :], axis[:, None]
    r = np.hypot(u, v)
    if shape == "circle":
        mask = r <= 1
    elif shape == "ring":
        mask = (r <= 1) & (r >= 0.62)
    elif shape == "square":
        mask = np.maximum(abs(u), abs(v)) <= 0.88
    elif shape == "diamond":
        mask = abs(u) * 1.3 + abs(v) <= 1
    elif shape == "cross":
        mask = np.minimum(abs(u), abs(v)) <= 0.34
    elif shape == "triangle":
        mask = (abs(u) <= (v + 1) / 1.88) & (v <= 0.88)
    elif shape == "heart":
        x, y = u * 1.16, 0.12 - v * 1.14
        mask = (x**2 + y**2 - 1) ** 3 - x**2 * y**3 <= 0
    else:
        mask = _star(u, v, r)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.ascontiguousarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _star(u: NDArray[np.float64], v: NDArray[np.float64], r: NDArray[np.float64]) -> NDArray[np.bool_]:
    """A five-pointed star: every tenth of it is the triangle middle, tip (radius 1), notch (radius 0.5)."""
    tenth = np.pi / 5
    angle = abs((np.arctan2(u, -v) + tenth) % (2 * tenth) - tenth)
    notch_x, notch_y = 0.5 * np.cos(tenth), 0.5 * np.sin(tenth)
    mask: NDArray[np.bool_] = (notch_x - 1) * r * np.sin(angle) - notch_y * (r * np.cos(angle) - 1) >= 0
    return mask


@cache
def glyph_mask(letter: str) -> NDArray[np.bool_]:
    """The capital letter as bool [14, 10]."""
    rows = [[bool(row >> bit & 1) for bit in range(4, -1, -1)] for row in _GLYPHS[letter]]
    return np.kron(np.array(rows), np.ones((2, 2), dtype=bool))


def blank(background: str, side: int = SIZE) -> Pixels:
    """A square of plain background, uint8 [side, side, 3]."""
    return _blank(background, side).copy()


@cache
def _blank(background: str, side: int) -> Pixels:
    return np.full((side, side, 3), RGB[background], dtype=np.uint8)


def boxes(things: tuple[Thing, ...], dice: Dice) -> list[Box]:
    """Each object's (left, top, right, bottom) in pixels, right and bottom excluded, inside its quadrant."""
    found = []
    for thing in things:
        height, width = shape_mask(thing.shape, SIDE[thing.size]).shape
        room_x = CELL - width - (_GLYPH_W + _GAP if _beside(thing) else 0)
        room_y = CELL - height
        row, column = divmod(PLACES.index(thing.place), 2)
        left, top = (cell * CELL + _jitter(room, dice) for cell, room in ((column, room_x), (row, room_y)))
        found.append((left, top, left + width, top + height))
    return found


def _beside(thing: Thing) -> bool:
    """A small object is too small to carry a letter of readable size; the letter stands to its right."""
    return bool(thing.letter) and thing.size == "small"


def _jitter(room: int, dice: Dice) -> int:
    """An offset within `room` free pixels: 1 or more from each edge, 5 or fewer from the middle."""
    reach = min(room // 2 - 1, 5)
    return room // 2 - reach + dice.below(2 * reach + 1)


def paint(background: str, things: tuple[Thing, ...], dice: Dice) -> Pixels:
    """The picture, uint8 [84, 84, 3]; clutter lies below the objects and hides nothing."""
    places = boxes(things, dice)
    picture = blank(background)
    _scatter(picture, dice)
    for thing, (left, top, right, bottom) in zip(things, places, strict=True):
        mask = shape_mask(thing.shape, SIDE[thing.size])
        picture[top:bottom, left:right][mask] = RGB[thing.colour]
        if thing.letter:
            middle = (top + bottom - _GLYPH_H) // 2
            if _beside(thing):
                x, y, ink = right + _GAP, middle, 0
            else:
                x, y = (left + right - _GLYPH_W) // 2, middle + _GLYPH_DROP.get(thing.shape, 0)
                ink = 255 if thing.colour in _DARK and thing.shape != "ring" else 0
            picture[y : y + _GLYPH_H, x : x + _GLYPH_W][glyph_mask(thing.letter)] = ink
    return picture


def _scatter(picture: Pixels, dice: Dice) -> None:
    """Paint up to four grey dots and lines, which mean nothing; half of the pictures have none."""
    if dice.chance(50):
        return
    for _ in range(1 + dice.below(4)):
        length = 6 + dice.below(10) if dice.chance(50) else 1
        x, y = dice.below(SIZE - length - 1), dice.below(SIZE - length - 1)
        step_x, step_y = dice.pick(((1, 0), (0, 1), (1, 1)))
        for i in range(length):
            picture[y + i * step_y : y + i * step_y + 2, x + i * step_x : x + i * step_x + 2] = CLUTTER
