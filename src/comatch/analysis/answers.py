"""Answers in words: from a plain VLM, or through the bottleneck of a compression stage, and how many of them are right.

What stands before the dialogue is read once for all questions about it. Of its keys and values those that the dialogue may look at are
kept, and the others are dropped (specs/coma.md 2.5): an answer through the bottleneck is made of K slots and nothing else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from comatch.backbones.base import Backbone
from comatch.content import Message
from comatch.core.batch import ROLE_ID, Example
from comatch.core.memory import Passes
from comatch.core.packing import collate
from comatch.devices import moved
from comatch.encoder import Encoder
from comatch.errors import ContentError, RecipeError
from comatch.recipe import Bottleneck, Stage, Visibility
from comatch.render import Row


def looking(stage: Stage, at_context: bool) -> Stage:
    """The stage with a dialogue that sees the compression tokens, and the context too or not at all, whatever it saw in training.

    Raises RecipeError where the stage lacks one of these roles, or where its compression tokens carry nothing of the context.
    """
    roles = stage.visibility.roles
    _check(stage, ("context", "compression", "dialogue"))
    seen = {"context": "c" if at_context else ".", "compression": "c"}
    row = "".join(seen.get(role, letter) for role, letter in zip(roles, stage.visibility.table[roles.index("dialogue")], strict=True))
    table = tuple(row if role == "dialogue" else old for role, old in zip(roles, stage.visibility.table, strict=True))
    return replace(stage, visibility=Visibility(roles, table), bottleneck=None if at_context else Bottleneck())


@torch.no_grad()
def answer(
    encoder: Encoder,
    questions: Sequence[tuple[Message, str]],
    stage: Stage,
    *,
    longest: int = 16,
    batch_tokens: int = 8192,
) -> list[str]:
    """Greedy answers, one per (context, question), of at most `longest` tokens.

    `stage` decides what the answer may look at: with CoMa's compression stage only the compression tokens (specs/coma.md 2.5).
    Raises RecipeError for a stage without dialogue, ContentError for a context that cannot be read.
    """
    _check(stage, ("dialogue",))
    renderer = encoder.preparer.renderer
    asked: list[_Asked] = []
    places: dict[tuple[object, ...], int] = {}
    for i, (message, question) in enumerate(questions):
        try:
            row = renderer.question(message, question, stage)
        except ContentError as error:
            raise error.at(i) from error
        begins = row.roles.index("dialogue")
        before = tuple(row.ids[:begins]), tuple(row.images)
        asked.append(_Asked(places.setdefault(before, len(places)), begins, row))
    written: list[list[int]] = [[] for _ in asked]

    def forward(chosen: list[int]) -> None:
        for i, tokens in zip(chosen, _written(encoder, [asked[i] for i in chosen], stage.visibility, longest), strict=True):
            written[i] = tokens

    # Questions about one context side by side, so that it is read once, and contexts of equal length, so that little is padding.
    order = sorted(range(len(asked)), key=lambda i: (asked[i].begins, asked[i].context, len(asked[i].row.ids)))
    Passes().run([len(one.row.ids) + longest for one in asked], order, batch_tokens, forward)
    return [encoder.backbone.tokenizer.decode(tokens).strip() for tokens in written]


def accuracy(answers: Sequence[str], truth: Sequence[str], kinds: Sequence[str | Sequence[str]]) -> dict[str, tuple[float, int]]:
    """Share of answers equal to the truth, letter by letter, and their number: of each kind, and of "all".

    kinds: of each answer its kind, or several; it counts in each of them, and once in "all".
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for said, true, kind in zip(answers, truth, kinds, strict=True):
        for name in ((kind,) if isinstance(kind, str) else kind):
            right[name].append(said == true)
        right["all"].append(said == true)
    return {kind: (sum(values) / len(values), len(values)) for kind, values in sorted(right.items())}


class _Asked(NamedTuple):
    """A question's row, the number of its context among the distinct ones, and where its dialogue begins."""

    context: int
    begins: int
    row: Row


def _check(stage: Stage, needed: tuple[str, ...]) -> None:
    if missing := [role for role in needed if role not in stage.visibility.roles]:
        raise RecipeError(
            f"stage {stage.name!r} has the roles {list(stage.visibility.roles)} and lacks {missing}: it never learned to answer that way; "
            "ask a stage such as compress of the recipe coma, or read vectors by probes (comatch.analysis.probes)"
        )


def _written(encoder: Encoder, asked: Sequence[_Asked], visibility: Visibility, longest: int) -> list[list[int]]:
    """Tokens of the answers up to their end, which is left out."""
    backbone, end = encoder.backbone, encoder.preparer.renderer.end
    contexts = {one.context: one for one in asked}
    number = {context: place for place, context in enumerate(contexts)}
    examples = [encoder.preparer.finish(_before(one)) for one in contexts.values()]
    owner = torch.tensor([number[one.context] for one in asked])
    cache, seen = _slots(backbone, examples, visibility, owner)
    dialogues = [torch.tensor(one.row.ids[one.begins :]) for one in asked]
    ids = pad_sequence(dialogues, batch_first=True)
    lengths = torch.tensor([len(dialogue) for dialogue in dialogues])
    # Text goes on by one on all three axes after the largest position so far, as in core/positions.py.
    position = torch.tensor([int(example.positions.max()) + 1 for example in examples])[owner]
    place = torch.arange(ids.shape[1])
    seen = torch.cat([seen, place < lengths[:, None]], dim=1)
    causal = torch.ones(ids.shape[1], seen.shape[1], dtype=torch.bool).tril(seen.shape[1] - ids.shape[1])
    hidden = backbone.further(ids, position[:, None] + place, seen[:, None, None] & causal, cache)
    states = hidden[torch.arange(len(ids)), lengths - 1]
    position = position + lengths
    tokens: list[torch.Tensor] = []
    ended = torch.zeros(len(ids), dtype=torch.bool)
    while len(tokens) < longest:
        tokens.append(backbone.head(states).argmax(-1).cpu())
        ended |= tokens[-1] == end
        if len(tokens) == longest or bool(ended.all()):
            break
        seen = torch.cat([seen, seen.new_ones(len(ids), 1)], dim=1)
        states = backbone.further(tokens[-1][:, None], position[:, None], seen[:, None, None], cache)[:, 0]
        position = position + 1
    table = torch.stack(tokens, dim=1).tolist() if tokens else [[] for _ in asked]
    return [row[: row.index(end)] if end in row else row for row in table]


def _slots(
    backbone: Backbone, examples: Sequence[Example], visibility: Visibility, owner: torch.Tensor
) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of what a dialogue may look at, all others dropped, one row per question, and which of a row's slots are filled.

    owner: [questions] int64, the example that each is about. Returns the cache and bool [questions, slots].
    """
    batch = collate(examples)
    whole = DynamicCache()
    backbone(batch, visibility, cache=whole)
    roles = [ROLE_ID[role] for role in visibility.roles if role != "dialogue" and visibility.sees("dialogue", role)]
    visible = torch.isin(batch.roles[0], torch.tensor(roles, dtype=batch.roles.dtype))
    places = [(visible & (batch.example[0] == i)).nonzero().squeeze(1) for i in range(len(examples))]
    table = pad_sequence(places, batch_first=True)[owner]
    filled = pad_sequence([torch.ones_like(place, dtype=torch.bool) for place in places], batch_first=True)[owner]
    kept = DynamicCache()
    for i, layer in enumerate(whole.layers):
        kept.update(*(x[0][:, moved(table, x.device)].transpose(0, 1) for x in (layer.keys, layer.values)), i)
    return kept, filled


def _before(one: _Asked) -> Row:
    row, n = one.row, one.begins
    return Row(row.ids[:n], row.roles[:n], row.supervised[:n], row.images, row.cut)
