"""CoMa (ACL 2026 long.169): compress a picture into K tokens by question answering, then match on their mean.

`coma` is the paper (specs/coma.md 2.1 and 3.1). `coma-released` is what the released code does (2.3 and 3.1): plain causal attention, so no
bottleneck, and loss on the whole dialogue. `coma-no-bottleneck` differs from `coma` in the bottleneck only: the fair control. Three more
change one thing each: `coma-full` lets compression tokens see one another in full, `coma-all-tokens` has loss on questions too, `coma-kl`
learns the words that the model itself expects when it sees the picture (3.2). `coma-joint` compresses and matches in one stage, as CREM
(arXiv 2602.19091). K is the run's `tokens`.

Three go beyond the papers. In `coma-nested` a dialogue sees the first 1, 2, 4, ... or all K tokens, so that any first few of them work. In
`coma-apart` tokens that are alike cost something. In `coma-rebuild` they also carry a text of which 0.7 is hidden, CoCoA's share: dialogue
and text read the same tokens and do not see one another. The text is causal like all of CoMa, so a layer is still one launch.
"""

from dataclasses import replace

from comatch.recipe import Bottleneck, Corruption, Recipe, Stage, Visibility

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
    Recipe(
        "coma-full",
        (
            replace(_COMPRESS, visibility=Visibility(_DIALOGUE, ("c..", "cf.", ".cc"))),
            replace(MATCH, visibility=Visibility(("context", "compression"), ("c.", "cf"))),
        ),
        tokens=32,
    ),
    Recipe("coma-all-tokens", (replace(_COMPRESS, supervise="dialogue"), MATCH), tokens=32),
    Recipe("coma-kl", (replace(_COMPRESS, objectives={"distillation": 1.0}), MATCH), tokens=32),
    Recipe(
        "coma-joint",
        (replace(_COMPRESS, name="joint", objectives={"next_token": 1.0, "contrastive": 1.0}, pooling=MATCH.pooling),),
        tokens=32,
    ),
    Recipe("coma-nested", (replace(_COMPRESS, nested="doubling"), MATCH), tokens=32),
    Recipe("coma-apart", (replace(_COMPRESS, objectives={"next_token": 1.0, "orthogonality": 0.1}), MATCH), tokens=32),
    Recipe(
        "coma-rebuild",
        (
            replace(
                _COMPRESS,
                visibility=Visibility(("context", "compression", "target", "dialogue"), ("c...", "cc..", ".cc.", ".c.c")),
                objectives={"next_token": 1.0, "masked_token": 1.0},
                corruptions=(Corruption("target", text=0.7),),
            ),
            MATCH,
        ),
        tokens=32,
    ),
)
