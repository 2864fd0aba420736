"""MoCa (arXiv 2506.23115): rebuild hidden words and patches while seeing in both directions, then match on the mean of all states.

Shares and weights are the paper's for 3B (specs/cocoa.md section 7); the label stands one place before the hidden word, as the paper says
and its code does not.
"""

from comatch.recipe import Corruption, Recipe, Stage, Visibility
from comatch.recipes.matching import BIDIRECTIONAL

_DENOISE = Stage(
    name="denoise",
    visibility=Visibility(("context",), ("f",)),
    objectives={"masked_token": 1.0, "masked_patch": 0.5},
    corruptions=(Corruption("context", text=0.4, patches=0.5),),
)

RECIPES = (Recipe("moca", (_DENOISE, BIDIRECTIONAL)),)
