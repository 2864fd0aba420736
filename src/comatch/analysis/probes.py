"""What can be read off frozen vectors by a straight line? Linear classifiers of what is true of a scene, beside guessing.

A probe is scikit-learn's logistic regression on standardised vectors. Least squares would be shorter, and closed, but hides the middle of
three classes in a row behind the outer two, and counts are such classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from comatch.data.scene_truth import PLACES
from comatch.data.scenes import Scene, scene
from comatch.encoder import Encoder
from comatch.errors import EvaluationError, MissingExtra

_STEPS = 2000
_LOOKS = ("colour", "shape", "size", "letter")


@dataclass(frozen=True)
class Probe:
    """What a linear classifier reads off. accuracy: share of n unseen items that it gets right. chance: the commonest class, always."""

    accuracy: float
    chance: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


def probe(vectors: npt.ArrayLike, labels: Sequence[str], unseen: npt.ArrayLike, unseen_labels: Sequence[str]) -> Probe:
    """Fit a linear classifier to vectors [n, dim] and their labels, and score it on unseen ones.

    Multinomial logistic regression, l2 with C = 1, on vectors standardised by the first set; it is deterministic. chance: share of
    the unseen that have the class commonest in the first set. Raises MissingExtra without scikit-learn, EvaluationError where labels
    do not fit, a set is empty, or there is one class only.
    """
    x, y = np.asarray(vectors, dtype=np.float64), np.asarray(unseen, dtype=np.float64)
    fits = x.ndim == y.ndim == 2 and len(x) == len(labels) and len(y) == len(unseen_labels) > 0 and x.shape[1] == y.shape[1]
    if not fits:
        raise EvaluationError(
            f"vectors {x.shape} with {len(labels)} labels, unseen vectors {y.shape} with {len(unseen_labels)}; each [n, dim] needs n "
            "labels, n at least 1, and both the same dim"
        )
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    if len(classes) < 2:
        raise EvaluationError(f"all {len(labels)} labels are {classes[:1].tolist()}; a probe tells at least two classes apart")
    model = classifier().fit(x, np.asarray(labels))
    truth = np.asarray(unseen_labels)
    commonest = classes[counts.argmax()]
    return Probe(float((model.predict(y) == truth).mean()), float((truth == commonest).mean()), len(truth))


def classifier() -> Any:
    """An untrained probe, with scikit-learn's `fit` and `predict`. Raises MissingExtra without scikit-learn."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ModuleNotFoundError as error:
        raise MissingExtra("scikit-learn", "analysis") from error
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=_STEPS))


def scene_probes(encoder: Encoder, n: int = 2000, *, unseen: int = 500, seed: int = 0) -> dict[str, Probe]:
    """Probe the encoder's vectors of drawn scenes, `n` of the train split to learn from and `unseen` of the test split to score on.

    count, background   of the scene
    place               whether an object is at a place
    colour, shape, size, letter   of the object at a place, over the scenes that have one there

    The last five have one probe for each of the four places, and are means over all their unseen cases. No truth is in both splits. A few
    hundred scenes are the least that makes sense. Raises what `probe` raises.
    """
    sets = [[scene(seed, i, split) for i in range(count)] for split, count in (("train", n), ("test", unseen))]
    vectors = [encoder.encode([one.draw() for one in scenes]) for scenes in sets]
    found: dict[str, list[Probe]] = {}
    for kind, labels in _tasks():
        rows = [[(i, label) for i, one in enumerate(scenes) if (label := labels(one)) is not None] for scenes in sets]
        (x, seen), (y, true) = ((v[[i for i, _ in r]], [label for _, label in r]) for v, r in zip(vectors, rows, strict=True))
        found.setdefault(kind, []).append(probe(x, seen, y, true))
    return {kind: _mean(probes) for kind, probes in found.items()}


def _tasks() -> Iterator[tuple[str, Callable[[Scene], str | None]]]:
    """Kinds, each with what gives the label of a scene, or None where the scene has none."""
    yield "count", lambda one: one.classes()["count"]
    yield "background", lambda one: one.background
    for place in PLACES:
        yield "place", partial(_taken, place=place)
        for name in _LOOKS:
            yield name, partial(_look, place=place, name=name)


def _taken(one: Scene, place: str) -> str:
    return str(any(thing.place == place for thing in one.things))


def _look(one: Scene, place: str, name: str) -> str | None:
    return next((getattr(thing, name) for thing in one.things if thing.place == place), None)


def _mean(probes: Sequence[Probe]) -> Probe:
    """Over all cases of several probes."""
    n = sum(probe.n for probe in probes)
    return Probe(sum(probe.accuracy * probe.n for probe in probes) / n, sum(probe.chance * probe.n for probe in probes) / n, n)
