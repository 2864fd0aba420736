"""Several vectors an item: nested groups of the compression tokens, compared by MaxSim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from comatch.content import as_message
from comatch.core.batch import ROLE_ID
from comatch.core.packing import collate
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ContentError, RecipeError
from comatch.recipes import load_recipe

K = 4
COMA = load_recipe("coma").with_tokens(K)
ITEMS = ["a red circle", {"text": "what is this?", "image": scene(0, 1).draw()}, "two blue stars", scene(0, 2).draw()]


@pytest.fixture
def encoder(folder_of: Callable[[str], Path]) -> Encoder:
    return Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def states(encoder: Encoder) -> np.ndarray:
    """States of the compression tokens of each item: [items, K, dim]."""
    found = []
    for item in ITEMS:
        batch = collate([encoder.preparer.item(as_message(item), encoder.stage)])
        with torch.no_grad():
            hidden = encoder.backbone(batch, encoder.stage.visibility)
        found.append(hidden[batch.roles == ROLE_ID["compression"]].numpy())
    return np.stack(found)


def test_vectors_are_means_of_groups_of_tokens(encoder: Encoder) -> None:
    tokens = states(encoder)
    assert np.array_equal(encoder.encode(ITEMS), encoder.encode(ITEMS, vectors=1))
    for count in (1, 2, K):
        found = encoder.encode(ITEMS, vectors=count)
        want = unit(tokens.reshape(len(ITEMS), count, K // count, -1).mean(2))
        assert found.shape == ((len(ITEMS), encoder.dim) if count == 1 else (len(ITEMS), count, encoder.dim))
        np.testing.assert_allclose(found.reshape(want.shape), want, atol=5e-6)
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-2, "equal vectors of an item would show nothing"
    cut = encoder.encode(ITEMS, vectors=2, dim=8)
    np.testing.assert_allclose(cut, unit(encoder.encode(ITEMS, vectors=2)[..., :8]), atol=1e-6)
    streamed = [part.vectors for part in encoder.stream([(str(i), item) for i, item in enumerate(ITEMS)], vectors=2, chunk=3)]
    np.testing.assert_allclose(np.concatenate(streamed), encoder.encode(ITEMS, vectors=2), atol=2e-6)


def test_similarity_of_several_vectors_is_maxsim(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    found = encoder.encode(ITEMS, vectors=K)
    want = [[np.mean([max(float(x @ y) for y in b) for x in a]) for b in found] for a in found]
    np.testing.assert_allclose(encoder.similarity(found, found), want, atol=1e-6)
    monkeypatch.setattr("comatch.encoder.CELLS", 1)
    np.testing.assert_allclose(encoder.similarity(found, found), want, atol=1e-6)
    assert encoder.similarity(found[:0], found).shape == (0, len(ITEMS))
    single = encoder.encode(ITEMS)
    assert np.array_equal(encoder.similarity(single[:1], single), single[:1] @ single.T)
    assert np.abs(encoder.similarity(single, single) - np.array(want)).max() > 1e-3


def test_what_does_not_fit_is_refused(encoder: Encoder) -> None:
    with pytest.raises(RecipeError, match=r"4 compression tokens do not make 3 vectors of equally many; allowed: \[1, 2, 4\]"):
        encoder.encode(ITEMS, vectors=3)
    with pytest.raises(ContentError, match="do not compare"):
        encoder.similarity(encoder.encode(ITEMS), encoder.encode(ITEMS, vectors=2))
    with pytest.raises(ContentError, match="do not compare"):
        encoder.similarity(encoder.encode(ITEMS), encoder.encode(ITEMS, dim=8))
    last = Encoder(encoder.backbone, load_recipe("matching-last"))
    with pytest.raises(RecipeError, match="2 vectors an item need the pooling 'mean_compression', this stage has 'last'"):
        last.encode(ITEMS, vectors=2)
