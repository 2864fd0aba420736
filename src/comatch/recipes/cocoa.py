"""CoCoA (arXiv 2603.01471): learn to see in both directions, rebuild a text through one bridge token, then match on that token.

`cocoa` has the paper's bridge, which sees the text it is to rebuild (specs/cocoa.md section 2): from the second layer on everything reaches
everything. In `cocoa-sealed` the bridge is blind to the text, so that it is the same token in all stages. In `cocoa-strict` the context is
blind to the bridge as well. What the release leaves open (fill, decoder, mask token) is MoCa's here; patches hidden are the figure's half.
"""

from comatch.recipe import Bottleneck, Corruption, Recipe, Stage, Visibility

_PAIR = ("context", "compression")

WARMUP = Stage(
    name="warmup",
    visibility=Visibility(("context",), ("f",)),
    objectives={"masked_token": 1.0, "masked_patch": 0.5},
    corruptions=(Corruption("context", text=0.2, patches=0.5),),
)


def _cocoa(name: str, bridge: tuple[str, str, str], match: tuple[str, str]) -> Recipe:
    rebuild = Stage(
        name="bridge",
        visibility=Visibility((*_PAIR, "target"), bridge),
        objectives={"masked_token": 1.0},
        corruptions=(Corruption("target", text=0.7),),
        bottleneck=Bottleneck(reader="target"),
    )
    matching = Stage("match", Visibility(_PAIR, match), {"contrastive": 1.0}, pooling="last_compression")
    return Recipe(name, (WARMUP, rebuild, matching), tokens=1)


RECIPES = (
    _cocoa("cocoa", ("ff.", "fff", ".ff"), ("ff", "ff")),
    _cocoa("cocoa-sealed", ("ff.", "ff.", ".ff"), ("ff", "ff")),
    _cocoa("cocoa-strict", ("f..", "ff.", ".ff"), ("f.", "ff")),
)
