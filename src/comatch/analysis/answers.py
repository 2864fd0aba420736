"""Answers in words: from a plain VLM, or through the bottleneck of a compression stage, and how many of them are right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from comatch.content import Message
from comatch.core.packing import budget, collate
from comatch.encoder import Encoder
from comatch.recipe import Stage


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
    Raises ContentError for a context that cannot be read.
    """
    preparer, tokenizer, backbone = encoder.preparer, encoder.backbone.tokenizer, encoder.backbone
    rows = [preparer.renderer.question(message, question, stage) for message, question in questions]
    written: list[list[int]] = [[] for _ in rows]
    end = preparer.renderer.end
    open_ = list(range(len(rows)))
    while open_:
        examples = {i: preparer.finish(rows[i]) for i in open_}
        for group in budget([len(examples[i]) for i in open_], batch_tokens):
            chosen = [open_[g] for g in group]
            batch = collate([examples[i] for i in chosen], pack=False).to(backbone.device)
            hidden = backbone(batch, stage.visibility)
            last = torch.tensor([len(examples[i]) - 1 for i in chosen], device=hidden.device)
            best = backbone.head(hidden[torch.arange(len(chosen), device=hidden.device), last]).argmax(-1).tolist()
            for i, token in zip(chosen, best, strict=True):
                written[i].append(token)
                rows[i].add([token], "dialogue")
        open_ = [i for i in open_ if written[i][-1] != end and len(written[i]) < longest]
    return [tokenizer.decode([t for t in tokens if t != end]).strip() for tokens in written]


def accuracy(answers: Sequence[str], truth: Sequence[str], kinds: Sequence[str]) -> dict[str, tuple[float, int]]:
    """Share of answers equal to the truth, letter by letter, and their number: of each kind, and of "all"."""
    right: dict[str, list[bool]] = defaultdict(list)
    for said, true, kind in zip(answers, truth, kinds, strict=True):
        right[kind].append(said == true)
        right["all"].append(said == true)
    return {kind: (sum(values) / len(values), len(values)) for kind, values in sorted(right.items())}
