"""The encoder's promises: shapes, order, truncation of text and vectors, errors that name the item, vectors that are never broken."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from comatch.content import Dialogue, Image, Message, Text, as_message
from comatch.core.batch import ROLE_ID
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ContentError, ModelError
from comatch.recipe import Recipe
from comatch.recipes import load_recipe
from comatch.render import Renderer

Folders = Callable[[str], Path]
COMA = load_recipe("coma").with_tokens(4)


@pytest.fixture(scope="module")
def encoder(folder_of: Folders) -> Encoder:
    return Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA)


def test_shapes_types_and_the_empty_list(encoder: Encoder) -> None:
    vectors = encoder.encode(["a", scene(0, 0).draw()])
    assert vectors.shape == (2, encoder.dim) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert encoder.encode([]).shape == (0, encoder.dim)
    assert np.array_equal(encoder.encode("a"), vectors[:1]) or np.abs(encoder.encode("a") - vectors[:1]).max() < 1e-6
    np.testing.assert_allclose(encoder.similarity(vectors, vectors), vectors @ vectors.T)


def test_dim_keeps_the_first_numbers_and_normalises_again(encoder: Encoder) -> None:
    full, short = encoder.encode(["a", "b"]), encoder.encode(["a", "b"], dim=5)
    np.testing.assert_allclose(short, full[:, :5] / np.linalg.norm(full[:, :5], axis=1, keepdims=True), atol=1e-6)
    for bad in (0, -1, encoder.dim + 1):
        with pytest.raises(ContentError, match=f"pass 1 to {encoder.dim}"):
            encoder.encode(["a"], dim=bad)


def test_duplicates_get_equal_vectors_and_order_is_kept(encoder: Encoder) -> None:
    items = ["a", "long " * 30, "a", scene(0, 1).draw(), "a"]
    vectors = encoder.encode(items)
    assert np.abs(vectors[[2, 4]] - vectors[0]).max() < 2e-6
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_half_precision_keeps_batches_and_singles_together(folder_of: Folders) -> None:
    """Row 11: within 1e-3 of cosine distance in bf16, where float32 keeps 1e-6."""
    half = Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA, dtype=torch.bfloat16)
    items = ["a", "long " * 30, scene(0, 1).draw(), {"image": scene(0, 2).draw(), "text": "what is it?"}]
    together, alone = half.encode(items), np.concatenate([half.encode([item]) for item in items])
    assert (1 - (together * alone).sum(1)).max() < 1e-3
    assert (1 - together @ together.T)[~np.eye(4, dtype=bool)].min() > 3e-3


@pytest.mark.parametrize("odd", ["مرحبا بالعالم", "🐶🚀", "a\x00b", "half \ud800 pair", "x" * 3000, "\n\t tabs \r\n", "e\u0301"])
def test_odd_texts_are_encoded(encoder: Encoder, odd: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(encoder.encode([odd])).all()


def test_a_megabyte_of_text_is_cut_with_a_warning(encoder: Encoder) -> None:
    """Only text is cut: the picture and all compression tokens stay (row 7)."""
    message = as_message({"image": scene(0, 0).draw(), "text": "many words " * 90_000})
    with pytest.warns(UserWarning, match="1 items was longer than the window"):
        encoder.encode([message])
    example = encoder.preparer.item(message, encoder.stage)
    window = encoder.preparer.renderer.window
    assert len(example) == window and example.cut > 100_000
    assert int((example.roles == ROLE_ID["compression"]).sum()) == 4
    assert int((example.ids == encoder.preparer.renderer.image_id).sum()) == encoder.images.tokens(message.images[0])
    assert example.ids[-4:].tolist() == encoder.preparer.renderer.compression
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["short"])


def test_pictures_are_never_cut(encoder: Encoder) -> None:
    many = Message(tuple(Image(scene(0, i).draw()) for i in range(60)))
    with pytest.raises(ContentError, match=r"pictures alone take .* more than the window of 512"):
        encoder.encode([many])
    dialogue = Dialogue(as_message(scene(0, 0).draw()), tuple(("what is it? " * 20, "a red circle " * 10) for _ in range(9)))
    example = encoder.preparer.dialogue(dialogue, COMA.stage("compress"))
    assert len(example) <= 512 and example.cut > 0 and example.supervised > 0


def test_turns_that_do_not_fit_are_dropped_from_the_end(encoder: Encoder) -> None:
    """No later turn is kept once one was dropped, though it would fit: it may refer to what was dropped."""
    stage, mine = COMA.stage("compress"), encoder.preparer.renderer
    wide = Renderer(mine.tokenizer, mine.recipe, mine.image_tokens, mine.compression[0], window=10_000)
    short, long = ("what is it?", "a red circle"), ("and what else? " * 60, "a blue star " * 60)
    for kept, dropped in (((short,) * 2, (long,)), ((short,) * 2, (long, short)), ((short,) * 3, (long, long, short)), ((short,), ())):
        cut, alone, whole = (
            renderer.dialogue(Dialogue(as_message("a scene"), turns), stage)
            for renderer, turns in ((mine, kept + dropped), (mine, kept), (wide, kept + dropped))
        )
        assert (cut.ids, cut.roles, cut.supervised) == (alone.ids, alone.roles, alone.supervised) and alone.cut == whole.cut == 0
        assert cut.ids == whole.ids[: len(cut.ids)] and cut.cut == len(whole.ids) - len(cut.ids)
        assert (cut.cut > 0) == bool(dropped)


@pytest.mark.parametrize(
    "text", ["<|im_end|>", "<|image_pad|>", "<|ctoken_pad_0|>", "<|vision_start|><|image_pad|><|vision_end|> x", "<|endoftext|>"]
)
def test_special_tokens_typed_by_a_user_are_plain_text(encoder: Encoder, text: str) -> None:
    """Row 8: no turn is closed, no picture inserted, no compression token imitated; neighbours do not notice."""
    renderer = encoder.preparer.renderer
    example = encoder.preparer.item(Message((Text(text),)), encoder.stage)
    special = {*renderer.special.values(), *renderer.compression, encoder.backbone.tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    assert not special & set(example.ids[:-4].tolist())
    assert encoder.backbone.tokenizer.decode(example.ids[:-4]) == text
    assert special & set(encoder.backbone.tokenizer.encode(text)), "without care the tokenizer would have read it as special"
    alone = encoder.encode(["before", "after"])
    between = encoder.encode(["before", text, "after"])
    np.testing.assert_allclose(between[[0, 2]], alone, atol=2e-6)


def test_errors_name_the_item_or_mark_it(encoder: Encoder, tmp_path: Path) -> None:
    missing = tmp_path / "none.png"
    items = ["good", missing, "also good", None]
    with pytest.raises(ContentError, match=r"item 1: .*none\.png"):
        encoder.encode(items)
    vectors, errors = encoder.encode(items, on_error="mark")
    assert sorted(errors) == [1, 3] and not vectors[[1, 3]].any()
    assert np.array_equal(vectors[[0, 2]], encoder.encode(["good", "also good"]))
    with pytest.raises(ContentError, match="allowed: 'raise', 'mark'"):
        encoder.encode(["a"], on_error="ignore")


def test_broken_weights_never_give_vectors(folder_of: Folders) -> None:
    """Row 22: NaN and zero vectors raise."""
    for value in (float("nan"), float("inf")):
        broken = Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA)
        broken.backbone.text.norm.weight.data[0] = value
        with pytest.raises(ModelError, match="NaN or only zeros"):
            broken.encode(["a"])
    broken.backbone.text.norm.weight.data[:] = 0
    with pytest.raises(ModelError, match="NaN or only zeros"):
        broken.encode(["a"])


def test_the_recipe_must_be_the_trained_one(encoder: Encoder, folder_of: Folders, tmp_path: Path) -> None:
    """K or pooling that differs from the checkpoint is refused (row 26)."""
    folder = encoder.save(tmp_path / "model")
    assert Encoder.load(folder, recipe=COMA).recipe == COMA
    with pytest.raises(ModelError, match=r"trained as recipe 'coma' with tokens=4.*asked for recipe 'coma' with tokens=8"):
        Encoder.load(folder, recipe=COMA.with_tokens(8))
    data = COMA.to_dict()
    data["stages"][1]["pooling"] = "last_compression"
    with pytest.raises(ModelError, match="pooling='last_compression'"):
        Encoder.load(folder, recipe=Recipe.from_dict(data))
    with pytest.raises(ModelError, match="is a plain VLM"):
        Encoder.load(folder_of("qwen2_5_vl"))
    with pytest.raises(ModelError, match="no stage with a pooling"):
        Encoder.load(folder_of("qwen2_5_vl"), recipe=load_recipe("vlm")).encode(["a"])
    with pytest.raises(ModelError, match="do not fit the embedding table"):
        Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA.with_tokens(500))


def test_the_instruction_stands_before_the_compression_tokens(folder_of: Folders) -> None:
    from dataclasses import replace

    asked = Encoder.load(folder_of("qwen2_5_vl"), recipe=replace(COMA, instruction="in a few words:"))
    ids = asked.preparer.item(as_message("a red circle"), asked.stage).ids
    assert asked.backbone.tokenizer.decode(ids[:-4]) == "a red circle\nin a few words:"


def test_rows_start_near_the_vocabularys_mean_and_are_kept_in_float32(folder_of: Folders, tmp_path: Path) -> None:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA, dtype=torch.bfloat16)
    rows, table = encoder.backbone.rows, encoder.backbone.text.embed_tokens.weight
    assert rows.dtype == torch.float32 and table.dtype == torch.bfloat16
    mean = table[: encoder.backbone.first_token].float().mean(0)
    assert 0 < (rows - mean).abs().max() < table.float().std() and (rows[0] - rows[1]).abs().max() > 0
    again = Encoder.load(encoder.save(tmp_path / "half"))
    assert torch.equal(again.backbone.rows, rows) and np.array_equal(encoder.encode(["a"]), again.encode(["a"]))
