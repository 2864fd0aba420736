"""What is hidden of a row before the model sees it, as frozen data that checks itself. The drawing is `comatch.core.corruption`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from comatch.errors import RecipeError

if TYPE_CHECKING:
    from comatch.recipe import Stage

ROLES = ("context", "compression", "dialogue", "target")
NESTED = ("none", "any", "doubling")
FILLS = ("noise", "mean", "zero")
PATCH_TARGETS = ("raw", "normalised")
_SHARE = {"masked_token": "text", "masked_patch": "patches"}


@dataclass(frozen=True)
class Corruption:
    """What of one role is hidden before the model sees it, drawn anew for each (seed, epoch, row).

    `text`, `patches`: the share of ordinary text tokens, and of pictures' visual tokens. A hidden text token gives way to the mask token;
    special, vision and compression tokens never do. The pixels of a hidden visual token, merge x merge patches, are filled before the
    vision tower sees them: with "noise" (normal about the processor's mean, cut to 0..255), that "mean", or black ("zero").
    """

    role: str
    text: float = 0.0
    patches: float = 0.0
    fill: str = "noise"
    at_least_one: bool = True
    """Hide one text token where none was drawn; a sample that has none to hide is counted as such."""

    def __post_init__(self) -> None:
        check_choice("corruption: role", self.role, ROLES)
        check_choice(f"corruption of {self.role!r}: fill", self.fill, FILLS)
        for name in ("text", "patches"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"corruption of {self.role!r}: {name} is {getattr(self, name)}; it must be a share from 0 to 1")
        if self.patches and self.role != "context":
            raise RecipeError(f"corruption of {self.role!r}: patches={self.patches:g}, but pictures stand in the context; hide them there")
        if not self.text and not self.patches:
            raise RecipeError(f"corruption of {self.role!r} hides nothing; set text or patches above 0, or leave it out")


def check_corruptions(stage: Stage) -> None:
    """Raise RecipeError where a stage's corruptions do not fit its roles and objectives."""
    roles = stage.visibility.roles
    for name, low, given in (("shift", 0, stage.shift), ("decoder_layers", 0, stage.decoder_layers)):
        if given < low or (name == "shift" and given > 1):
            raise RecipeError(f"stage {stage.name!r}: {name} is {given}; allowed: {'0 or 1' if name == 'shift' else '0 or more'}")
    check_choice(f"stage {stage.name!r}: patch_target", stage.patch_target, PATCH_TARGETS)
    if not stage.kl_temperature > 0:
        raise RecipeError(f"stage {stage.name!r}: kl_temperature is {stage.kl_temperature}; it must be above 0")
    spoiled = [c.role for c in stage.corruptions]
    if len(set(spoiled)) < len(spoiled) or set(spoiled) - set(roles):
        raise RecipeError(f"stage {stage.name!r}: corruptions of {spoiled}; name each of its roles {list(roles)} at most once")
    hidden = {"masked_token": any(c.text for c in stage.corruptions), "masked_patch": any(c.patches for c in stage.corruptions)}
    for name, there in hidden.items():
        if name in stage.objectives and not there:
            raise RecipeError(f"stage {stage.name!r}: {name} has nothing to predict; give a corruption with {_SHARE[name]} above 0")
    if hidden["masked_token"] and "masked_token" not in stage.objectives:
        raise RecipeError(f"stage {stage.name!r} hides text and nobody predicts it; add the objective masked_token, or set text to 0")
    if hidden["masked_token"] and stage.tells == "dialogue":
        _check_one_label(stage)
    if {"dialogue", "target"} <= set(roles):
        _check_readers(stage)


def _check_one_label(stage: Stage) -> None:
    """Hidden words beside a dialogue: its places say its next tokens, so no other label may fall there, nor one of these elsewhere."""
    if stage.supervise == "dialogue" or any(c.text and c.role == "dialogue" for c in stage.corruptions):
        raise RecipeError(
            f"stage {stage.name!r}: masked_token beside {sorted(stage.objectives)}: a place has one label; "
            "hide no text of the dialogue, and let supervise be 'answers'"
        )


def _check_readers(stage: Stage) -> None:
    """A dialogue and a target in one row read the same and know nothing of one another."""
    seen, told = stage.visibility, f"stage {stage.name!r} has a dialogue and a target"
    if seen.roles.index("target") > seen.roles.index("dialogue"):
        raise RecipeError(f"{told} in the order {list(seen.roles)}; put 'target' first, so that what is before it predicts its first word")
    if seen.reaches("dialogue", "target") or seen.reaches("target", "dialogue"):
        raise RecipeError(f"{told}, and in {list(seen.table)} one learns of the other; let neither see the other, nor what does")
    if stage.tells != "dialogue" or not any(c.text and c.role == "target" for c in stage.corruptions):
        raise RecipeError(f"{told}; give it next_token or distillation for the one, and a corruption of the target's text for the other")


def check_nested(stage: Stage) -> None:
    """Raise RecipeError where compression tokens are told apart that are not there, or the first of them depend on later ones."""
    check_choice(f"stage {stage.name!r}: nested", stage.nested, NESTED)
    seen, row = stage.visibility, "compression" in stage.visibility.roles and stage.tells is not None
    if "orthogonality" in stage.objectives and not row:
        raise RecipeError(
            f"stage {stage.name!r}: orthogonality is of the compression tokens of rows with labels, and there are none; "
            "add the role 'compression' and an objective such as next_token, or leave it out"
        )
    if stage.nested == "none":
        return
    if not row:
        raise RecipeError(
            f"stage {stage.name!r}: nested is {stage.nested!r}, but it has no rows with labels and compression tokens; remove it"
        )
    others = [role for role in seen.roles if role != "compression" and seen.reaches("compression", role)]
    if seen.letter("compression", "compression") != "c" or any(seen.sees(role, "compression") for role in others):
        raise RecipeError(
            f"stage {stage.name!r}: nested is {stage.nested!r}, but in {list(seen.table)} the first compression tokens depend on later "
            "ones, so they change where those are left out; let 'compression' see itself as 'c', and nothing that it sees look at it"
        )


def check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise RecipeError for a name that is not allowed."""
    if value not in allowed:
        raise RecipeError(f"{what} is {value!r}; allowed: {list(allowed)}")
