"""Everything that can be seen of one model at once: what `comatch inspect` tells and draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from comatch.analysis.alignment import Alignment, aligned
from comatch.analysis.masks import MaskReport, dialogue_stage, mask_check, promising_stage, shown
from comatch.analysis.probes import Probe, scene_probes
from comatch.analysis.redundancy import RedundancyReport, redundancy
from comatch.analysis.survival import Question, Survival, survival
from comatch.content import Dialogue
from comatch.core.batch import Example
from comatch.encoder import Encoder
from comatch.recipe import Recipe, Stage


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen of one model, without the model. None where the recipe has nothing of the kind, or nobody asked.

    stage, example: what the mask check ran, and its first row. vectors: float32 [pictures, dim].
    """

    name: str
    recipe: Recipe
    stage: Stage | None
    example: Example | None = field(repr=False)
    mask: MaskReport | None
    tokens: RedundancyReport | None
    vectors: np.ndarray | None = field(repr=False)
    aligned: Alignment | None
    survival: Survival | None
    probes: dict[str, Probe] | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.name,
            "recipe": self.recipe.name,
            "mask": self.mask.to_dict() if self.mask else None,
            "redundancy": self.tokens.to_dict() if self.tokens else None,
            "alignment": self.aligned.to_dict() if self.aligned else None,
            "survival": self.survival.to_dict() if self.survival else None,
            "probes": {kind: probe.to_dict() for kind, probe in self.probes.items()} if self.probes else None,
        }


def look(
    name: str,
    encoder: Encoder,
    dialogues: Sequence[Dialogue],
    captions: Sequence[str],
    *,
    questions: Sequence[Question] = (),
    probes: int = 0,
) -> Look:
    """Measure all that the recipe has.

    dialogues: about pictures; captions: one for each. questions: to answer from the compression tokens, none to leave that out. probes:
    scenes that linear probes learn from, 0 to leave them out.
    """
    items = [dialogue.context for dialogue in dialogues]
    recipe = encoder.recipe
    stage = promising_stage(recipe)
    embeds = recipe.encoding is not None
    compares = recipe.encoding is not None and "compression" in recipe.encoding.visibility.roles and recipe.tokens > 1
    return Look(
        name,
        recipe,
        stage,
        example=shown(encoder, dialogues[0], stage) if stage else None,
        mask=mask_check(encoder, dialogues) if stage else None,
        tokens=redundancy(encoder, items) if compares else None,
        vectors=encoder.encode(items) if embeds else None,
        aligned=aligned(encoder, list(zip(items, captions, strict=True))) if embeds and len(items) > 1 else None,
        survival=survival(encoder, questions) if questions and dialogue_stage(recipe) else None,
        probes=scene_probes(encoder, probes, unseen=max(1, probes // 4)) if probes and embeds else None,
    )
