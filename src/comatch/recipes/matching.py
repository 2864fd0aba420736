"""Contrastive training only: the yardsticks for every compression method.

`matching` has CoMa's layout without its first stage. `matching-last` is the causal last-token embedder of VLM2Vec and GME.
`matching-bidirectional` is MoCa's second stage alone: what turning to full attention costs without a warm-up.
"""

from comatch.recipe import Recipe, Stage, Visibility
from comatch.recipes.coma import MATCH

BIDIRECTIONAL = Stage("match", Visibility(("context",), ("f",)), {"contrastive": 1.0}, pooling="mean")

RECIPES = (
    Recipe("matching", (MATCH,), tokens=32),
    Recipe(
        "matching-last",
        (Stage("match", Visibility(("context",), ("c",)), {"contrastive": 1.0}, pooling="last"),),
    ),
    Recipe("matching-bidirectional", (BIDIRECTIONAL,)),
)
