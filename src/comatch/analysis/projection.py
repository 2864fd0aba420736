"""Several clouds of vectors seen from one side: principal components on a common basis (CoMa, figure 4: specs/coma.md section 7.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from comatch.errors import EvaluationError


@dataclass(frozen=True, eq=False)
class Projection:
    """coordinates: one float64 [n, 2] per cloud, on one basis. explained: share of the variance of all clouds together, per axis."""

    coordinates: tuple[np.ndarray, ...]
    explained: tuple[float, float]


def pca(clouds: Sequence[np.ndarray]) -> Projection:
    """Project clouds [n, dim] onto the two directions in which all of them together vary most.

    To see how clouds are spread rather than where they lie, take each cloud's own mean away first. The sign of an axis is fixed by its
    largest entry, which is made positive. Raises EvaluationError for clouds that are empty, of different width, or not finite.
    """
    shapes = [np.shape(cloud) for cloud in clouds]
    if not shapes or any(len(shape) != 2 or shape[0] == 0 or shape[1] != shapes[0][1] for shape in shapes):
        raise EvaluationError(f"clouds of shape {shapes} cannot be projected together; each must be [n, dim], n at least 1, dim the same")
    points = np.concatenate([np.asarray(cloud, dtype=np.float64) for cloud in clouds])
    if not np.isfinite(points).all():
        raise EvaluationError("vectors with NaN or infinity cannot be projected; find the items that they belong to")
    points -= points.mean(0)
    _, values, axes = np.linalg.svd(points, full_matrices=False)
    axes = axes[:2] * np.sign([axis[np.abs(axis).argmax()] for axis in axes[:2]])[:, None]
    flat = np.zeros((len(points), 2))
    flat[:, : len(axes)] = points @ axes.T
    total = float((values**2).sum())
    shares = [float(value**2) / total if total else 0.0 for value in [*values[:2], 0.0, 0.0][:2]]
    ends = np.cumsum([shape[0] for shape in shapes])[:-1]
    return Projection(tuple(np.split(flat, ends)), (shares[0], shares[1]))
