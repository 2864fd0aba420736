"""CoCoA's objective with several compression tokens, and CoMa's with one: K is data, and the step is what plain loops say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from comatch.core.batch import IGNORE, ROLE_ID, Example
from comatch.core.packing import collate
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.recipes import load_recipe
from comatch.training.rows import token_step

Folders = Callable[[str], Path]



def by_hand(encoder: Encoder, stage: Any, some: list[Example]) -> torch.Tensor:
    losses = []
    for example in some:
        hidden, found = encoder.backbone(collate([example]), stage.visibility)[0], []
        for place, label in enumerate(example.labels):
            if label != IGNORE:
                found.append(-encoder.backbone.head(hidden[place][None]).log_softmax(-1)[0, label])
        losses.append(torch.stack(found).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("name", "stage", "tokens"), [("cocoa", "bridge", 4), ("cocoa-sealed", "bridge", 4), ("coma", "compress", 1)])
def test_the_others_number_of_tokens(folder_of: Folders, name: str, stage: str, tokens: int) -> None:
    recipe = load_recipe(name).with_tokens(tokens)
    encoder, one = Encoder.load(folder_of("qwen2_5_vl"), recipe=recipe), recipe.stage(stage)
    encoder.backbone.vision_tower.requires_grad_(False)
    source = open_source("scenes", limit=9)
    make = encoder.preparer
    if name == "coma":
        some = [make.dialogue(source.dialogue(i), one, i) for i in range(4)]
    else:
        some = [make.pair(source.group(i).query, source.group(i).positives[0], one, i) for i in range(4)]
        bridges = [np.flatnonzero(e.roles == ROLE_ID["compression"]) for e in some]
        labels = [e.labels[b] != IGNORE for e, b in zip(some, bridges, strict=True)]
        assert any(label[-1] for label in labels) and not any(label[:-1].any() for label in labels), "the last says the first word"
    assert all((e.roles == ROLE_ID["compression"]).sum() == tokens for e in some)
    loss = by_hand(encoder, one, some)
    loss.backward()
    want = {n: p.grad.clone() for n, p in encoder.backbone.named_parameters() if p.grad is not None}
    encoder.backbone.zero_grad()
    result = token_step(Accelerator(cpu=True), encoder.backbone, some, one, 250)
    assert abs(result.loss - float(loss.detach())) < 1e-5
    scale = max(float(g.abs().max()) for g in want.values())
    for n, gradient in want.items():
        got = encoder.backbone.get_parameter(n).grad
        assert got is not None and float((got - gradient).abs().max()) < 1e-4 * scale, n
    rows = encoder.backbone.rows.grad
    assert rows is not None and (rows[:tokens].abs().amax(1) > 0).all(), "every token learns"
