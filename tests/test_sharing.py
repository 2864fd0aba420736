"""Questions about one picture share its rows in the language model: fewer tokens, the same vectors, and only where it is exact."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from comatch.content import as_message
from comatch.core.batch import Example, Loan
from comatch.core.packing import collate
from comatch.core.sharing import share, shareable
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipe import Visibility
from comatch.recipes import load_recipe

Folders = Callable[[str], Path]
WORDS = ["what is it?", "what is on the left of the red one, and what is on its right?", "what is it not?", "how many are there?"]


def png(number: int, side: int = 112) -> bytes:
    stream = io.BytesIO()
    PILImage.fromarray(scene(4, number).draw()).resize((side, side)).save(stream, "PNG")
    return stream.getvalue()


def questions(pictures: list[bytes]) -> list[Any]:
    return [{"image": picture, "text": words} for words in WORDS for picture in pictures]


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Valid tokens of every pass through a language model from now on, and how many were borrowed."""
    seen: list[int] = []
    real = collate

    def counting(examples: Any, *rest: Any, **named: Any) -> Any:
        batch = real(examples, *rest, **named)
        seen.append(batch.tokens)
        return batch

    monkeypatch.setattr("comatch.encoder.collate", counting)
    return seen


@pytest.mark.parametrize("recipe", ["coma", "matching-last"])
def test_the_same_vectors_from_fewer_tokens(folder_of: Folders, family: str, recipe: str, tokens: list[int]) -> None:
    found = load_recipe(recipe)
    encoder = Encoder.load(folder_of(family), recipe=found.with_tokens(4) if found.tokens else found)
    pictures = [png(0), png(1, 140), png(2)]
    items = [*questions(pictures), pictures[0], "a text", {"images": pictures[:2], "text": "which is larger?"}]
    items += [{"images": pictures[:2], "text": "and which is smaller?"}, {"images": [pictures[0], pictures[2]], "text": "which is larger?"}]
    together = encoder.encode(items)
    shared = sum(tokens)
    tokens.clear()
    apart = np.concatenate([encoder.encode([item]) for item in items])
    assert shared < 0.7 * sum(tokens)
    np.testing.assert_allclose(together, apart, atol=3e-6)
    assert np.abs(apart[0] - apart[3]).max() > 1e-4 and np.abs(apart[0] - apart[1]).max() > 1e-4


@pytest.fixture(scope="module")
def encoder(folder_of: Folders) -> Encoder:
    return Encoder.load(folder_of("qwen2_5_vl"), recipe=load_recipe("coma").with_tokens(4))


def prepared(encoder: Encoder, items: list[Any]) -> list[Example]:
    encoder.preparer.named = True
    return [encoder.preparer.item(as_message(item), encoder.stage) for item in items]


def test_segments_and_the_dense_mask_agree_on_loans(folder_of: Folders, encoder: Encoder) -> None:
    examples = prepared(encoder, [*questions([png(0)]), png(1), *questions([png(2)])])
    left, loans = share(examples, encoder.backbone.image_id)
    assert len(loans) == 6 and {loan.lender for loan in loans} == {0, 5}
    batch = collate(left, loans=loans)
    with torch.no_grad():
        fast = encoder.backbone(batch, encoder.stage.visibility)
        encoder.backbone.dense_mask = True
        slow = encoder.backbone(batch, encoder.stage.visibility)
        blind = encoder.backbone(replace(batch, loans=()), encoder.stage.visibility)
        encoder.backbone.dense_mask = False
    valid = batch.example >= 0
    assert float((fast - slow)[valid].abs().max()) < 1e-5
    assert float((blind - slow)[batch.example == 1].abs().max()) > 1e-2, "without the loan the borrower knows nothing of the picture"
    assert torch.allclose(blind[batch.example == 0], slow[batch.example == 0], atol=1e-5), "the lender needs nobody"


def test_what_is_lent(encoder: Encoder) -> None:
    asked = [{"image": png(0), "text": words} for words in (WORDS[0], WORDS[2])]
    one, same, other, unnamed = prepared(encoder, [*asked, png(1), png(0)])
    image = encoder.backbone.image_id
    pads = int((one.ids == image).sum())
    left, loans = share([one, same, other], image)
    assert loans == (Loan(1, 0, len(one) - len(left[0]) + loans[0].length),) and loans[0].length > pads
    assert len(left[1]) == len(same) - loans[0].length and not left[1].grids and left[0] is one and left[2] is other
    assert list(same.ids[: loans[0].length]) == list(one.ids[: loans[0].length])
    assert share([one, other, same], image)[1] == (), "neighbours only"
    assert share([one, replace(unnamed, pictures=(b"",))], image)[1] == (), "a picture without a name is not known to be equal"
    assert share([one, one], image)[1][0].length == int(np.argmax(one.roles != 0)), "never the compression tokens"


@pytest.mark.parametrize(
    ("table", "pooling", "right"),
    [
        (("c.", "cc"), "mean_compression", True),
        (("c.", "ff"), "last_compression", True),
        (("f.", "ff"), "mean_compression", False),
        (("cc", "cc"), "mean_compression", False),
        (("c.", "cc"), "mean", False),
    ],
)
def test_only_where_the_beginning_does_not_depend_on_the_end(table: tuple[str, ...], pooling: str, right: bool) -> None:
    assert shareable(Visibility(("context", "compression"), table), pooling) is right
