"""Do the two sides of a pair meet, and do all vectors use the sphere? Alignment and uniformity (Wang and Isola 2020, arXiv 2005.10242)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from comatch.encoder import Encoder
from comatch.errors import EvaluationError

_BLOCK = 512
_LENGTH = 1e-3


@dataclass(frozen=True)
class Alignment:
    """How the two sides of some pairs lie on the sphere.

    alignment     mean squared distance within a pair, from 0 (equal) to 4
    mismatched    the same between the sides of different pairs: where it is not larger, low alignment is collapse
    uniformity    of the first side, of the second: 0 where all vectors are equal, lower the better they are spread
    gap           distance between the means of the two sides, from 0 to 2
    """

    pairs: int
    alignment: float
    mismatched: float
    uniformity: tuple[float, float]
    gap: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self) | {"uniformity": list(self.uniformity)}


def aligned(encoder: Encoder, pairs: Sequence[tuple[Any, Any]]) -> Alignment:
    """Measure pairs of items, such as pictures and their captions, under an encoder.

    pairs: at least two, of what `as_message` reads. Raises EvaluationError for fewer, ContentError for an item that cannot be read.
    """
    if len(pairs) < 2:
        raise EvaluationError(f"{len(pairs)} pairs; alignment and uniformity need at least 2")
    first, second = (encoder.encode([pair[side] for pair in pairs]) for side in (0, 1))
    return Alignment(
        pairs=len(pairs),
        alignment=alignment(first, second),
        mismatched=_mismatched(first, second),
        uniformity=(uniformity(first), uniformity(second)),
        gap=float(np.linalg.norm(first.mean(0, dtype=np.float64) - second.mean(0, dtype=np.float64))),
    )


def alignment(first: npt.ArrayLike, second: npt.ArrayLike, power: float = 2.0) -> float:
    """How far the two sides of a pair are apart: the mean over i of ||x_i - y_i||^power, their l_align with alpha = power.

    first, second: [n, dim] of unit length, n at least 1. 0 is best. Raises EvaluationError for anything else.
    """
    a, b = _unit(first, 1), _unit(second, 1)
    if a.shape != b.shape:
        raise EvaluationError(f"sides of shape {a.shape} and {b.shape} are no pairs; give row i of both the two sides of pair i")
    return float((np.linalg.norm(a - b, axis=1) ** power).mean())


def uniformity(vectors: npt.ArrayLike, t: float = 2.0) -> float:
    """How evenly vectors spread over the sphere: the log of the mean over i < j of exp(-t ||x_i - x_j||^2), their l_uniform.

    vectors: [n, dim] of unit length, n at least 2. 0 where all are equal, and lower the more even they lie: about -2t + 2t^2/dim for random
    directions in many dimensions. Raises EvaluationError for anything else.
    """
    x = _unit(vectors, 2)
    total = 0.0
    for start in range(0, len(x), _BLOCK):
        near = np.exp(-t * np.maximum(2 - 2 * x[start : start + _BLOCK] @ x.T, 0))
        # Row r of the block is vector start + r: what stands right of that is the pairs i < j.
        total += float(np.triu(near, start + 1).sum())
    return float(np.log(total / (len(x) * (len(x) - 1) / 2)))


def _mismatched(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Mean of ||x_i - y_j||^2 over i != j, which for unit vectors needs their sums only."""
    a, b = _unit(first, 2), _unit(second, 2)
    n = len(a)
    product = float(a.sum(0) @ b.sum(0) - (a * b).sum())
    return 2 - 2 * product / (n * (n - 1))


def _unit(vectors: npt.ArrayLike, least: int) -> npt.NDArray[np.float64]:
    x = np.asarray(vectors, dtype=np.float64)
    if x.ndim != 2 or len(x) < least:
        raise EvaluationError(f"vectors of shape {x.shape}; expected [n, dim] with n at least {least}")
    lengths = np.linalg.norm(x, axis=1)
    if not (np.abs(lengths - 1) <= _LENGTH).all():
        worst = int(np.nanargmax(np.where(np.isfinite(lengths), np.abs(lengths - 1), np.inf)))
        raise EvaluationError(f"vector {worst} has length {lengths[worst]:.4g}; both measures want unit vectors, divide each by its norm")
    unit: npt.NDArray[np.float64] = x / lengths[:, None]
    return unit
