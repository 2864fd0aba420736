"""Messages and dialogues become Examples: rendered, positioned, pictures cut. Runs in loader workers and needs no weights."""

from __future__ import annotations

import numpy as np

from comatch.content import Dialogue, Message
from comatch.core.batch import IGNORE, ROLE_ID, Example
from comatch.core.positions import mrope
from comatch.data.images import ImageSettings
from comatch.recipe import Stage
from comatch.render import Renderer, Row


class Preparer:
    """One renderer and one set of image settings, shared by training, evaluation and encoding."""

    def __init__(self, renderer: Renderer, images: ImageSettings) -> None:
        self.renderer, self.images = renderer, images

    def item(self, message: Message, stage: Stage) -> Example:
        """One item to embed. Raises ContentError or ImageError."""
        return self.finish(self.renderer.item(message, stage))

    def dialogue(self, dialogue: Dialogue, stage: Stage) -> Example:
        """One context with its supervised turns. Raises ContentError or ImageError."""
        return self.finish(self.renderer.dialogue(dialogue, stage))

    def finish(self, row: Row) -> Example:
        """Add labels, positions and patches to a rendered row."""
        ids = np.asarray(row.ids, dtype=np.int64)
        labels = np.full_like(ids, IGNORE)
        supervised = np.asarray(row.supervised, dtype=bool)
        labels[:-1][supervised[1:]] = ids[1:][supervised[1:]]
        cut = [self.images.cut(image) for image in row.images]
        grids = tuple(grid for _, grid in cut)
        return Example(
            ids=ids,
            roles=np.asarray([ROLE_ID[role] for role in row.roles], dtype=np.int8),
            labels=labels,
            positions=mrope(ids == self.renderer.image_id, grids, self.images.merge),
            patches=tuple(patches for patches, _ in cut),
            grids=grids,
            cut=row.cut,
        )
