"""Contrastive training only: the yardsticks for every compression method.

`matching` has CoMa's layout without its first stage. `matching-last` is the causal last-token embedder of VLM2Vec and GME.
"""

from comatch.recipe import Recipe, Stage, Visibility
from comatch.recipes.coma import MATCH

RECIPES = (
    Recipe("matching", (MATCH,), tokens=32),
    Recipe(
        "matching-last",
        (Stage("match", Visibility(("context",), ("c",)), {"contrastive": 1.0}, pooling="last"),),
    ),
)
