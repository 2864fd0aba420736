"""CoMa (ACL 2026 long.169): compress a picture into K tokens by question answering, then match on their mean.

`coma` is the paper (specs/coma.md 2.1 and 3.1). `coma-released` is what the released code does (2.3 and 3.1): plain causal attention, so no
bottleneck, and loss on the whole dialogue. `coma-no-bottleneck` differs from `coma` in the bottleneck only: the fair control.
"""

from comatch.recipe import Bottleneck, Recipe, Stage, Visibility

_DIALOGUE = ("context", "compression", "dialogue")

MATCH = Stage(
    name="match",
    visibility=Visibility(("context", "compression"), ("c.", "cc")),
    objectives={"contrastive": 1.0},
    pooling="mean_compression",
)

_COMPRESS = Stage(
    name="compress",
    visibility=Visibility(_DIALOGUE, ("c..", "cc.", ".cc")),
    objectives={"next_token": 1.0},
    bottleneck=Bottleneck(),
)

_OPEN = Visibility(_DIALOGUE, ("c..", "cc.", "ccc"))

RECIPES = (
    Recipe("coma", (_COMPRESS, MATCH), tokens=32),
    Recipe(
        "coma-released",
        (Stage("compress", _OPEN, {"next_token": 1.0}, supervise="dialogue"), MATCH),
        tokens=32,
    ),
    Recipe("coma-no-bottleneck", (Stage("compress", _OPEN, {"next_token": 1.0}), MATCH), tokens=32),
)
