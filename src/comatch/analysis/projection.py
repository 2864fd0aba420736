"""Several clouds of vectors seen from one side (CoMa, figure 4: specs/coma.md section 7.2).

`pca` turns them, so that distances in the picture are true as far as they go. `umap` lays neighbours beside neighbours: it shows groups,
and neither distances between groups nor their sizes mean anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comatch.errors import EvaluationError, MissingExtra

NEIGHBOURS = 15


@dataclass(frozen=True, eq=False)
class Projection:
    """coordinates: one float64 [n, 2] per cloud, on one basis.

    explained: share of the variance of all clouds together, per axis; None where axes have no such meaning.
    """

    coordinates: tuple[np.ndarray, ...]
    explained: tuple[float, float] | None


def pca(clouds: Sequence[np.ndarray]) -> Projection:
    """Project clouds [n, dim] onto the two directions in which all of them together vary most.

    To see how clouds are spread rather than where they lie, take each cloud's own mean away first. The sign of an axis is fixed by its
    largest entry, which is made positive. Raises EvaluationError for clouds that are empty, of different width, or not finite.
    """
    points = _together(clouds)
    points -= points.mean(0)
    _, values, axes = np.linalg.svd(points, full_matrices=False)
    axes = axes[:2] * np.sign([axis[np.abs(axis).argmax()] for axis in axes[:2]])[:, None]
    flat = np.zeros((len(points), 2))
    flat[:, : len(axes)] = points @ axes.T
    total = float((values**2).sum())
    shares = [float(value**2) / total if total else 0.0 for value in [*values[:2], 0.0, 0.0][:2]]
    return Projection(_apart(flat, clouds), (shares[0], shares[1]))


def umap(clouds: Sequence[np.ndarray], *, neighbours: int = NEIGHBOURS, seed: int = 0) -> Projection:
    """Lay the points of all clouds [n, dim] out in one plane so that neighbours by cosine stay neighbours (UMAP, arXiv 1802.03426).

    neighbours: how many of each point, fewer where there are not as many. Equal seeds give equal pictures with one version of umap-learn
    on one machine. Raises MissingExtra without umap-learn, EvaluationError for fewer than 4 points and for what `pca` refuses.
    """
    points = _together(clouds)
    if len(points) < 4 or neighbours < 2:
        raise EvaluationError(f"{len(points)} points with {neighbours} neighbours; UMAP needs at least 4 points and 2 neighbours")
    # One job, because a seed has no effect on several. Below 10 points its spectral start has too few eigenvectors.
    start = "spectral" if len(points) >= 10 else "random"
    model = load_umap()(n_neighbors=min(neighbours, len(points) - 1), metric="cosine", init=start, random_state=seed, n_jobs=1)
    return Projection(_apart(np.asarray(model.fit_transform(points), dtype=np.float64), clouds), None)


def load_umap() -> Any:
    """The class UMAP of umap-learn. Raises MissingExtra without it."""
    try:
        from umap import UMAP
    except ModuleNotFoundError as error:
        raise MissingExtra("umap-learn", "analysis") from error
    return UMAP


def _together(clouds: Sequence[np.ndarray]) -> np.ndarray:
    shapes = [np.shape(cloud) for cloud in clouds]
    if not shapes or any(len(shape) != 2 or shape[0] == 0 or shape[1] != shapes[0][1] for shape in shapes):
        raise EvaluationError(f"clouds of shape {shapes} cannot be projected together; each must be [n, dim], n at least 1, dim the same")
    points: np.ndarray = np.concatenate([np.asarray(cloud, dtype=np.float64) for cloud in clouds])
    if not np.isfinite(points).all():
        raise EvaluationError("vectors with NaN or infinity cannot be projected; find the items that they belong to")
    return points


def _apart(points: np.ndarray, clouds: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(np.split(points, np.cumsum([len(cloud) for cloud in clouds])[:-1]))
