"""Published embedding models, one record each: what their checkpoints do not say of how an item becomes a vector.

Read off the released code (specs/mmeb.md 1.4 and 5, specs/coma.md 1.3, specs/cocoa.md 3, 5 and 7); no weights could be had, so what is
not verified stands in docs/models.md. Texts of tasks are the protocol's affair (`comatch.evaluation.protocols`), not ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from comatch.errors import ModelError
from comatch.recipe import Prompt, Recipe, Stage, Visibility
from comatch.recipes import load_recipe

_TOKEN = 28 * 28
_LAST = load_recipe("matching-last")
_MARKED = Prompt()
# Without `<|vision_start|>` the released code finds no picture when it numbers positions, and numbers the visual tokens like text.
_BARE = Prompt(picture="<|image_pad|>", grid=False)


@dataclass(frozen=True)
class Release:
    """One family of published checkpoints.

    name       what it is called by, also the evaluation protocol that its authors used
    recipe     visibility, pooling and prompt; K is read off the checkpoint's vocabulary where there are compression tokens
    families   model types of the backbones that were published
    pixels     least and most pixels of a picture, or None where `square` is set
    square     side in pixels of the square that every picture is squashed to, or 0; small: as in ImageSettings
    adapter    only a LoRA adapter is known, so that the base alone would be a mistake
    template   the prompt is the checkpoint's own chat template, around `recipe.prompt`'s instruction
    """

    name: str
    recipe: Recipe
    families: tuple[str, ...]
    pixels: tuple[int, int] | None = None
    square: int = 0
    small: str = ""
    adapter: bool = False
    template: bool = False


def _full(name: str, pooling: str, prompt: Prompt = _MARKED) -> Recipe:
    """Every token sees every other one."""
    return Recipe(name, (Stage("match", Visibility(("context",), ("f",)), {"contrastive": 1.0}, pooling=pooling),), prompt=prompt)


RELEASES = {
    release.name: release
    for release in (
        Release("coma", load_recipe("coma-released"), ("qwen2_5_vl",), (256 * _TOKEN, 1024 * _TOKEN), small="square"),
        # The end token is an argument of their script; its default is taken.
        Release("cocoa", _full("cocoa-released", "last", replace(_BARE, after="<|im_end|>")), ("qwen2_vl", "qwen2_5_vl"), square=672),
        Release("moca", _full("moca-released", "mean"), ("qwen2_5_vl",), (256 * _TOKEN, 1024 * _TOKEN), small="raise"),
        Release("vlm2vec-v1", replace(_LAST, name="vlm2vec-v1", prompt=_BARE), ("qwen2_vl",), square=1344, adapter=True),
        Release(
            "vlm2vec-v2",
            replace(_LAST, name="vlm2vec-v2", prompt=_BARE),
            ("qwen2_vl",),
            (4 * _TOKEN, 1280 * _TOKEN),
            small="square",
            adapter=True,
        ),
        Release(
            "qwen3-vl-embedding",
            replace(
                _LAST,
                name="qwen3-vl-embedding",
                prompt=Prompt(before="{instruction}", join="", instruction="Represent the user's input.", stop="."),
            ),
            ("qwen3_vl",),
            (4 * 32 * 32, 1800 * 32 * 32),
            small="raise",
            template=True,
        ),
    )
}

SENTENCE = "sentence-transformers"
NAMES = (*RELEASES, SENTENCE)


def release_of(name: str) -> Release:
    """The record of that name. Raises ModelError."""
    if name not in RELEASES:
        raise ModelError(f"no kind of released model {name!r}; known: {list(NAMES)}")
    return RELEASES[name]
