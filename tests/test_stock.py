"""What we rely on in transformers, tokenizers and PEFT, so that an upgrade that changes it fails here and by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForImageTextToText, AutoTokenizer, Qwen2Tokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch.backbones import adapters, attention
from comatch.backbones.base import Backbone
from comatch.backbones.nano import SPECIAL
from comatch.encoder import Encoder
from comatch.errors import ModelError
from comatch.recipes import load_recipe

Folders = Callable[[str], Path]
COMA = load_recipe("coma").with_tokens(4)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
GRIDS = torch.tensor([(1, 4, 6), (1, 18, 10), (1, 16, 16), (1, 4, 6), (1, 2, 2)])
Call = dict[str, Any]


@pytest.fixture
def stock(folder_of: Folders, family: str) -> Any:
    model = AutoModelForImageTextToText.from_pretrained(folder_of(family), attn_implementation="sdpa").eval()
    for name, parameter in model.model.visual.named_parameters():
        if "qkv.weight" in name:
            # Fresh weights attend evenly to all, and then a leak between pictures hardly shows.
            parameter.data *= 20
    return model


def recorder(name: str, real: Callable[..., Any]) -> list[Call]:
    """Register `real` under a name of its own, and list what it is called with."""
    calls: list[Call] = []

    def watched(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        calls.append({"attention_mask": attention_mask, "length": query.shape[2], **kwargs})
        return real(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, watched)
    return calls


def speak(model: Any, name: str, **extra: Any) -> torch.Tensor:
    """Hidden states of two rows of five tokens under an attention of that name."""
    model.model.language_model.config._attn_implementation = name
    states = model.model.language_model.embed_tokens(torch.arange(10).view(2, 5))
    positions = torch.arange(5).expand(3, 2, 5)
    with torch.no_grad():
        out = model.model.language_model(inputs_embeds=states, position_ids=positions, use_cache=False, **extra)
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


def look(model: Any, name: str, pixels: torch.Tensor) -> torch.Tensor:
    """Picture features under a vision attention of that name; Qwen2.5's nano shape gets windows in its outer layers."""
    model.model.visual.config._attn_implementation = name
    if hasattr(model.model.visual, "fullatt_block_indexes"):
        model.model.visual.fullatt_block_indexes = [1]
    with torch.no_grad():
        out = model.model.visual(pixels, grid_thw=GRIDS)
    return torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or ())])


def pixels_of(model: Any) -> torch.Tensor:
    side = model.config.vision_config.patch_size
    return torch.randn(int(GRIDS.prod(1).sum()), 3 * 2 * side * side, generator=torch.Generator().manual_seed(0))


def test_a_name_without_a_mask_gets_none_and_every_keyword(stock: Any) -> None:
    calls = recorder("test_bare", sdpa_attention_forward)
    ours = torch.ones(1)
    bare = speak(stock, "test_bare", visibility_mask=ours)
    assert len(calls) == stock.config.text_config.num_hidden_layers
    for call in calls:
        assert call["attention_mask"] is None and call["visibility_mask"] is ours
        assert call["scaling"] == pytest.approx(8**-0.5) and call["dropout"] == 0
    # Not for want of masks: the same call under a name that has one is given it.
    AttentionMaskInterface.register("test_with_mask", sdpa_mask)
    calls = recorder("test_with_mask", sdpa_attention_forward)
    padded = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    speak(stock, "test_with_mask", attention_mask=padded)
    assert all(call["attention_mask"] is not None for call in calls) and calls
    calls = recorder("test_bare", sdpa_attention_forward)
    speak(stock, "test_bare", attention_mask=padded)
    assert all(call["attention_mask"] is None for call in calls) and calls
    torch.testing.assert_close(bare, speak(stock, "sdpa"), atol=1e-5, rtol=1e-5)


def test_our_text_attention_sees_the_mask_that_we_pass(stock: Any) -> None:
    causal = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    mine = speak(stock, attention.TEXT, visibility_mask=causal)
    torch.testing.assert_close(mine, speak(stock, "sdpa"), atol=1e-5, rtol=1e-5)
    full = speak(stock, attention.TEXT, visibility_mask=torch.ones_like(causal))
    assert (mine - full).abs().max() > 1e-3, "the mask decides"


def test_a_flash_name_gets_all_segments_in_one_call_per_layer(stock: Any) -> None:
    depth = len(stock.model.visual.blocks)
    pixels = pixels_of(stock)
    plain = recorder("test_plain", sdpa_attention_forward)
    expected = look(stock, "test_plain", pixels)
    assert len(plain) > depth * len(GRIDS) if stock.config.model_type == "qwen2_5_vl" else len(plain) == depth * len(GRIDS)
    grouped = recorder("test_flash_name", attention.vision)
    found = look(stock, "test_flash_name", pixels)
    assert len(grouped) == depth
    for call in grouped:
        bounds = call["cu_seq_lens_q"]
        assert call["length"] == len(pixels) == int(bounds[-1]) and bounds[0] == 0 and call["attention_mask"] is None
    lengths = [call["length"] for call in plain]
    assert lengths == [n for call in grouped for n in call["cu_seq_lens_q"].diff().tolist()], "the same segments in the same order"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_our_vision_attention_is_stock_sdpa(stock: Any) -> None:
    pixels = pixels_of(stock)
    expected = look(stock, "sdpa", pixels)
    torch.testing.assert_close(look(stock, attention.VISION, pixels), expected, atol=1e-5, rtol=1e-5)

    def one_segment(*args: Any, cu_seq_lens_q: torch.Tensor, **kwargs: Any) -> Any:
        return attention.vision(*args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)

    AttentionInterface.register("test_flash_leaking", one_segment)
    assert (look(stock, "test_flash_leaking", pixels) - expected).abs().max() > 1e-3, "pictures that see each other differ"


def damaged(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], str]) -> tuple[Path, str]:
    """A copy of a model whose weights file was changed; also the name of the tensor concerned."""
    copy = Path(shutil.copytree(folder, target))
    weights = load_file(copy / "model.safetensors")
    name = change(weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    return copy, name


def remove(weights: dict[str, torch.Tensor]) -> str:
    name = next(n for n in sorted(weights) if n.endswith("layers.1.mlp.up_proj.weight"))
    del weights[name]
    return "layers.1.mlp.up_proj.weight"


def add(weights: dict[str, torch.Tensor]) -> str:
    name = next(n for n in sorted(weights) if n.endswith("layers.1.mlp.up_proj.weight"))
    weights[name.replace("up_proj", "side_proj")] = weights[name].clone()
    return "layers.1.mlp.side_proj.weight"


def reshape(weights: dict[str, torch.Tensor]) -> str:
    name = next(n for n in sorted(weights) if n.endswith("layers.1.mlp.up_proj.weight"))
    weights[name] = weights[name][:-1].clone()
    return "layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(("change", "kind"), [(remove, "missing_keys"), (add, "unexpected_keys"), (reshape, "mismatched_keys")])
def test_every_wrong_weight_is_reported(folder_of: Folders, family: str, tmp_path: Path, change: Any, kind: str) -> None:
    folder, name = damaged(folder_of(family), tmp_path / "model", change)
    with pytest.raises(ModelError, match=rf"(?s){kind}: 1, .*{name}"):
        Backbone.load(folder)


def test_a_sound_folder_reports_nothing(folder_of: Folders, family: str) -> None:
    """The keys that `check_loaded` reads are there, so that an empty report is not a renamed one."""
    _, info = AutoModelForImageTextToText.from_pretrained(folder_of(family), output_loading_info=True)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert not any(info.values()), info


@pytest.fixture(params=["ours", "qwen"])
def tokenizer(request: pytest.FixtureRequest, folder_of: Folders) -> Any:
    """The nano tokenizer, and the same vocabulary in the class that Qwen's own models load."""
    folder = folder_of("qwen2_5_vl")
    if request.param == "ours":
        return AutoTokenizer.from_pretrained(folder)
    core = json.loads((folder / "tokenizer.json").read_text())["model"]
    made = Qwen2Tokenizer(vocab=core["vocab"], merges=[tuple(pair) for pair in core["merges"]])
    made.add_tokens(list(SPECIAL), special_tokens=True)
    return made


def test_special_tokens_can_be_split(tokenizer: Any) -> None:
    tokenizer.add_tokens(["<|ctoken_pad_0|>"], special_tokens=True)
    for name in (*SPECIAL, "<|ctoken_pad_0|>"):
        special = tokenizer.convert_tokens_to_ids(name)
        text = f"a red {name} circle"
        split = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert special not in split and not set(split) & set(tokenizer.all_special_ids)
        assert tokenizer.decode(split) == text, "it is spelled out, not dropped"
        assert special in tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(name, add_special_tokens=False) == [special]
        # The flag of one call leaves nothing behind.
        assert special in tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def test_saving_keeps_the_ids_of_compression_tokens(tokenizer: Any, tmp_path: Path) -> None:
    names = [COMA.token_name.format(i) for i in range(12)]
    tokenizer.add_tokens(names, special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    assert ids == list(range(ids[0], ids[0] + 12)) and ids[-1] == len(tokenizer) - 1
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.convert_tokens_to_ids(names) == ids and len(again) == len(tokenizer)
    assert again.encode("a" + "".join(names), add_special_tokens=False)[-12:] == ids


def test_a_saved_encoder_has_its_tokens_in_any_stock_loader(folder_of: Folders, family: str, tmp_path: Path) -> None:
    encoder = Encoder.load(folder_of(family), recipe=COMA)
    first, rows = encoder.backbone.first_token, encoder.backbone.rows.detach().clone()
    folder = encoder.save(tmp_path / "model")
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids([COMA.token_name.format(i) for i in range(4)])
    assert ids == list(range(first, first + 4))
    table = AutoModelForImageTextToText.from_pretrained(folder).model.language_model.embed_tokens.weight
    assert torch.equal(table[ids], rows)


def test_the_image_limits_survive_saving(tmp_path: Path) -> None:
    processor = Qwen2VLImageProcessorPil()
    processor.size = {"shortest_edge": 784, "longest_edge": 78400}
    processor.save_pretrained(tmp_path)
    size = Qwen2VLImageProcessorPil.from_pretrained(tmp_path).size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 78400)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_fresh_adapter_is_the_identity_and_merging_keeps_outputs(folder_of: Folders, family: str, kind: str) -> None:
    backbone = Backbone.load(folder_of(family), COMA).eval()
    plain = speak(backbone.stock, "sdpa")
    adapters.attach(backbone, kind, r=4, alpha=8, dropout=0.1, targets=TARGETS, train_vision=False)
    backbone.eval()
    named = dict(backbone.named_parameters())
    ups, downs = ([p for n, p in named.items() if f"lora_{letter}" in n] for letter in "BA")
    assert len(ups) == len(downs) == 4 * backbone.stock.config.text_config.num_hidden_layers
    assert all((p == 0).all() for p in ups), "B = 0"
    assert all((p != 0).any() for p in downs)
    torch.testing.assert_close(speak(backbone.stock, "sdpa"), plain, atol=1e-6 if kind == "dora" else 0, rtol=0)
    for p in ups:
        torch.nn.init.normal_(p, std=0.1)
    adapted = speak(backbone.stock, "sdpa")
    assert (adapted - plain).abs().max() > 1e-2
    adapters.merge(backbone)
    assert not any("lora" in name for name, _ in backbone.named_parameters())
    torch.testing.assert_close(speak(backbone.stock, "sdpa"), adapted, atol=1e-5, rtol=1e-5)
