"""Is the bottleneck real? Attention and gradients of the compression stage, measured on the model itself.

A recipe's table is a promise. Here a recording attention function sees how much the dialogue attends to the
context in every layer and head, and the gradient of the answer loss is followed back to the pictures, with
and without the way through the compression tokens (specs/coma.md sections 2.1 and 10).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from comatch.backbones.base import Backbone, Vision
from comatch.content import Dialogue, Message, Text
from comatch.core.batch import IGNORE, ROLE_ID, Batch, Example
from comatch.core.packing import budget, collate
from comatch.devices import moved
from comatch.encoder import Encoder
from comatch.errors import ContentError, RecipeError
from comatch.objectives.tokens import next_token
from comatch.recipe import Bottleneck, Recipe, Stage

TOKENS = 1024
_NAME = "comatch_watched"


@dataclass(frozen=True, eq=False)
class MaskReport:
    """What the layers of one stage do, over all dialogues that were shown.

    declared: whether the recipe promises this bottleneck (without it, the report tells how much leaks). roles:
    those that the shown dialogues have. leak: [layers, heads], the largest single attention weight from the
    bottleneck's reader to what is hidden. mass: [layers, heads, roles, roles], the share of a role's attention
    (third axis) that goes to a role (fourth), mean over its tokens. difference: largest gap between the model's
    attention and the recorded weights times the values, in parts of the largest value. gradient: of the answer
    loss with respect to the picture features, the largest entry of the dialogue where it is smallest.
    gradient_cut: the largest of all dialogues, with the keys and values of the compression tokens detached.
    """

    recipe: str
    stage: str
    declared: bool
    bottleneck: Bottleneck
    dialogues: int
    roles: tuple[str, ...]
    leak: np.ndarray
    mass: np.ndarray
    difference: float
    tolerance: float
    gradient: float
    gradient_cut: float

    @property
    def ok(self) -> bool:
        """Whether the bottleneck holds exactly, and carries something."""
        return not self.faults

    @property
    def leaked(self) -> float:
        """Mean share of the reader's attention that goes to what should be hidden, over layers and heads."""
        return self._share(self.bottleneck.reader, self.bottleneck.hidden)

    @property
    def shortcut(self) -> float:
        """Mean share of attention that the bottleneck gives to its reader; above 0, this can tell itself what it is to learn.

        No fault of the mask: the bridge of CoCoA's paper is drawn like that (specs/cocoa.md section 2).
        """
        return self._share(self.bottleneck.through, self.bottleneck.reader)

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong, one sentence each; empty where the bottleneck holds."""
        b, found = self.bottleneck, []
        if not self.difference <= self.tolerance:
            found.append(f"the recorded weights are not the model's attention: off by {self.difference:.2g}, allowed {self.tolerance:.2g}")
        if not (self.leak == 0).all():
            layer, head = np.unravel_index(np.argmax(self.leak), self.leak.shape)
            found.append(
                f"{b.reader} attends to {b.hidden}: weights up to {self.leak.max():.3g} (layer {layer}, head {head}), "
                f"{self.leaked:.1%} of its attention on average"
            )
        if not self.gradient > 0:
            found.append(f"no gradient from the answers to the picture ({self.gradient:.2g}): {b.through} carries nothing of {b.hidden}")
        if self.gradient_cut != 0:
            found.append(f"with {b.through} cut out, the answers still reach the picture: gradient up to {self.gradient_cut:.2g}")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = asdict(self) | {
            "leak": self.leak.tolist(),
            "mass": self.mass.tolist(),
            "roles": list(self.roles),
        }
        return plain | {"ok": self.ok, "leaked": self.leaked, "shortcut": self.shortcut, "faults": list(self.faults)}

    def _share(self, query: str, key: str) -> float:
        return float(self.mass[:, :, self.roles.index(query), self.roles.index(key)].mean())


def dialogue_stage(recipe: Recipe) -> Stage | None:
    """The stage that answers questions after compression tokens: the first with a bottleneck, else the first; None where none does."""
    able = [stage for stage in recipe.stages if {"context", "compression", "dialogue"} <= set(stage.visibility.roles)]
    return next((stage for stage in able if stage.bottleneck), next(iter(able), None))


def promising_stage(recipe: Recipe) -> Stage | None:
    """The stage to check: the first that promises a bottleneck, of dialogues or of texts to rebuild, else `dialogue_stage`."""
    return next((stage for stage in recipe.stages if stage.bottleneck), dialogue_stage(recipe))


def shown(encoder: Encoder, dialogue: Dialogue, stage: Stage, seed: int = 0) -> Example:
    """A dialogue as a stage sees it in training; where the stage rebuilds a text, that is all that is said in the dialogue."""
    if stage.tells != "pair":
        return encoder.preparer.dialogue(dialogue, stage, seed)
    told = Message((Text("\n".join(f"{question} {answer}" for question, answer in dialogue.turns)),))
    return encoder.preparer.pair(dialogue.context, told, stage, seed)


def mask_check(encoder: Encoder, dialogues: Sequence[Dialogue]) -> MaskReport:
    """Run the stage with the bottleneck over dialogues about pictures, and report what attends to what and where gradients flow.

    A stage that rebuilds a text through the bottleneck (CoCoA's bridge) is given what the dialogue says as that text.

    Weights stay as they are. Raises RecipeError where the recipe has no such stage, ContentError where a
    dialogue shows no picture.
    """
    stage = promising_stage(encoder.recipe)
    if stage is None:
        raise RecipeError(
            f"recipe {encoder.recipe.name!r} has no stage that promises a bottleneck or answers after compression tokens, so no bottleneck "
            "to check; try a model of the recipe coma"
        )
    blind = [i for i, dialogue in enumerate(dialogues) if not dialogue.context.images]
    if blind or not dialogues:
        raise ContentError(f"the mask check needs dialogues about pictures; got {len(dialogues)}, without a picture: {blind[:10]}")
    promise = stage.bottleneck or Bottleneck()
    examples = [shown(encoder, dialogue, stage, seed) for seed, dialogue in enumerate(dialogues)]
    watch = _Watch(stage.visibility.roles, promise)
    free: list[float] = []
    cut: list[float] = []
    for chosen in budget([len(example) for example in examples], TOKENS):
        batch = collate([examples[i] for i in chosen])
        with torch.no_grad(), attending(encoder.backbone, watch.recorder(batch, encoder.backbone.device), dense_mask=True):
            encoder.backbone(batch, stage.visibility)
        free += _gradients(encoder.backbone, batch, stage, promise)
        with attending(encoder.backbone, _without(batch, promise.through, encoder.backbone.device)):
            cut += _gradients(encoder.backbone, batch, stage, promise)
    # A stage with two kinds of readers, as in coma-rebuild, is shown one; a role without tokens has no attention to tell of.
    there = [i for i, tokens in enumerate(watch.tokens.tolist()) if tokens]
    mass = torch.stack([watch.mass[layer] for layer in sorted(watch.mass)]).cpu() / watch.tokens[:, None]
    return MaskReport(
        recipe=encoder.recipe.name,
        stage=stage.name,
        declared=stage.bottleneck is not None,
        bottleneck=promise,
        dialogues=len(dialogues),
        roles=tuple(watch.roles[i] for i in there),
        leak=torch.stack([watch.leak[layer] for layer in sorted(watch.leak)]).cpu().numpy(),
        mass=mass[:, :, there][..., there].numpy(),
        difference=watch.difference,
        tolerance=watch.tolerance,
        gradient=min(free),
        gradient_cut=max(cut),
    )


def attention_weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax of the masked scores, written out.

    query: [batch, heads, seq, head_dim]. key: [batch, key_heads, seq, head_dim]. mask: bool [batch, 1, seq,
    seq]. Returns float32 [batch, heads, seq, seq]; rows sum to 1 and what the mask forbids is exactly 0.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query.float() @ key.float().transpose(2, 3) * scaling
    return scores.masked_fill(~mask, -torch.inf).softmax(-1)


@contextmanager
def attending(backbone: Backbone, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], dense_mask: bool = False) -> Iterator[None]:
    """Inside the block the language model's attention is `wrap(the function it has)`; with `dense_mask` it is called with the mask."""
    config = backbone.text.config
    before = config._attn_implementation, backbone.dense_mask
    AttentionInterface.register(_NAME, wrap(ALL_ATTENTION_FUNCTIONS[before[0]]))
    config._attn_implementation, backbone.dense_mask = _NAME, dense_mask or before[1]
    try:
        yield
    finally:
        config._attn_implementation, backbone.dense_mask = before


class _Watch:
    """Sums up attention weights over passes, layer by layer, so that no more than one layer's weights are in memory."""

    def __init__(self, roles: tuple[str, ...], promise: Bottleneck) -> None:
        self.roles, self.promise = roles, promise
        self.leak: dict[int, torch.Tensor] = {}
        self.mass: dict[int, torch.Tensor] = {}
        self.tokens = torch.zeros(len(roles))
        self.difference = self.tolerance = 0.0

    def recorder(self, batch: Batch, device: torch.device) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """What `attending` needs to record one batch."""
        places = (batch.roles.unsqueeze(-1) == torch.tensor([ROLE_ID[role] for role in self.roles])).float()
        reader, hidden = (places[..., self.roles.index(role)].bool() for role in (self.promise.reader, self.promise.hidden))
        self.tokens += places.sum((0, 1))
        places, forbidden = moved(places, device), moved((reader.unsqueeze(2) & hidden.unsqueeze(1)).unsqueeze(1), device)

        def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
            def record(
                module: Any,
                query: torch.Tensor,
                key: torch.Tensor,
                value: torch.Tensor,
                mask: Any,
                **rest: Any,
            ) -> Any:
                out, nothing = inner(module, query, key, value, mask, **rest)
                weights = attention_weights(query, key, rest["visibility_mask"], rest["scaling"])
                self._compare(weights, value, out)
                layer = module.layer_idx
                leak = torch.where(forbidden, weights, 0).amax((0, 2, 3))
                mass = torch.einsum("bhqk,bks,bqr->hrs", weights, places, places)
                self.leak[layer] = torch.maximum(self.leak[layer], leak) if layer in self.leak else leak
                self.mass[layer] = self.mass[layer] + mass if layer in self.mass else mass
                return out, nothing

            return record

        return wrap

    def _compare(self, weights: torch.Tensor, value: torch.Tensor, out: torch.Tensor) -> None:
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
        plain = (weights @ value.float()).transpose(1, 2)
        self.difference = max(self.difference, float((plain - out).abs().max() / value.abs().max()))
        self.tolerance = 1e-4 if out.dtype == torch.float32 else 2e-2


def _without(batch: Batch, role: str, device: torch.device) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Attention that passes the same numbers, but no gradient through keys and values of a role."""
    cut = moved((batch.roles == ROLE_ID[role])[:, None, :, None], device)

    def wrap(inner: Callable[..., Any]) -> Callable[..., Any]:
        def detached(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **rest: Any) -> Any:
            key, value = (torch.where(cut, x.detach(), x) for x in (key, value))
            return inner(module, query, key, value, mask, **rest)

        return detached

    return wrap


def _gradients(backbone: Backbone, batch: Batch, stage: Stage, promise: Bottleneck) -> list[float]:
    """Per dialogue the largest entry of the gradient of its answer loss with respect to its picture features (deepstack ones included)."""
    with torch.no_grad():
        seen = backbone.see(batch)
    if seen is None:
        raise ContentError("the mask check needs pictures, and this batch has none")
    leaves = [features.detach().requires_grad_() for features in (seen.tokens, *seen.deep)]
    hidden = backbone(batch, stage.visibility, Vision(leaves[0], tuple(leaves[1:])))
    # Only what the reader itself predicts: where a stage supervises every token, the last compression token predicts one too.
    labels = batch.labels.masked_fill(batch.roles != ROLE_ID[promise.reader], IGNORE)
    losses, _ = next_token(hidden, labels, batch.example, batch.size, backbone.head)
    found = torch.autograd.grad(losses.sum(), leaves)
    size = torch.stack([gradient.float().abs().amax(-1) for gradient in found]).amax(0).cpu()
    owner = batch.example[batch.ids == backbone.image_id]
    return torch.zeros(batch.size).scatter_reduce(0, owner, size, "amax").tolist()
