"""Released checkpoints, made tiny in their own layouts, give the vectors of stock transformers fed with the released prompt."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_run import run
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from comatch import released
from comatch.backbones.registry import lacking
from comatch.content import Image, Message, Text
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ContentError, ModelError, RecipeError
from comatch.evaluation.protocols import PROTOCOLS
from comatch.evaluation.tasks import evaluate, scene_tasks
from comatch.recipe import Prompt, Recipe
from comatch.released.records import RELEASES

Folders = Callable[[str], Path]
PIXELS, SQUARE = (56 * 56, 112 * 112), 112  # what keeps a tiny model quick; a test of its own pins the published numbers
K = 4
TRIPLE, BARE = "<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"
CTOKENS = "".join(f"<|ctoken_pad_{i}|>" for i in range(K))
CHAT = "<|im_start|>system\n{i}<|im_end|>\n<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant\n"
DEFAULT = "Represent the user's input."


@dataclass(frozen=True)
class Layout:
    """What the released code of a kind does, told apart from our records. line: what it numbers its visual tokens like."""

    family: str
    marker: str
    frame: str = "{x}"
    bidirectional: bool = False
    line: bool = False
    pool: str = "last"
    newline: str = "\n"


LAYOUTS = {
    "coma": Layout("qwen2_5_vl", TRIPLE, "{x}" + CTOKENS, pool="mean of K"),
    "cocoa": Layout("qwen2_5_vl", BARE, "{x}<|im_end|>", bidirectional=True, line=True),
    "moca": Layout("qwen2_5_vl", TRIPLE, bidirectional=True, pool="mean"),
    "vlm2vec-v1": Layout("qwen2_vl", BARE, line=True),
    "vlm2vec-v2": Layout("qwen2_vl", BARE, line=True),
    "qwen3-vl-embedding": Layout("qwen3_vl", TRIPLE, CHAT, newline=""),
}
PICTURE = PILImage.fromarray(scene(0, 3).draw()).resize((150, 90))
TEXT = "what is left of the red circle?"


@dataclass
class Made:
    """A checkpoint on disk and the live stock model that was saved there."""

    folder: Path
    model: Any
    tokenizer: Any
    processor: Any


def old_names(folder: Path) -> None:
    """Name an adapter's weights as PEFT did before transformers 4.52, when the published ones were saved."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    old = {k.replace("model.language_model.", "model.").replace("base_model.model.model.visual.", "base_model.model.visual."): v
           for k, v in tensors.items()}  # fmt: skip
    assert old.keys() != tensors.keys()
    save_file(old, path, metadata={"format": "pt"})


def adapter_of(model: Any, folder: Path, base: Path, **settings: Any) -> Any:
    """A trained LoRA adapter around a stock model, saved as the reference code saves it, pickled leftovers included."""
    config = LoraConfig(r=4, lora_alpha=16, init_lora_weights="gaussian", base_model_name_or_path=str(base), **settings)
    torch.manual_seed(1)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"a pickle that nobody opens")
    old_names(folder)
    return adapted.eval()


def with_compression(made: Made) -> None:
    made.tokenizer.add_tokens([f"<|ctoken_pad_{i}|>" for i in range(K)], special_tokens=True)
    table = made.model.get_input_embeddings().weight
    table.data[len(made.tokenizer) - K : len(made.tokenizer)] = torch.randn(K, table.shape[1], generator=torch.Generator().manual_seed(2))


@pytest.fixture
def make(folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Made]:
    """Write a tiny checkpoint of a kind, and let the kind's record have pictures that suit it."""

    def build(kind: str, adapter: bool | None = None) -> Made:
        release, base = RELEASES[kind], folder_of(LAYOUTS[kind].family)
        smaller = replace(release, pixels=release.pixels and PIXELS, square=release.square and SQUARE)
        monkeypatch.setitem(RELEASES, kind, smaller)
        folder = tmp_path / kind
        made = Made(folder, *(AutoModelForImageTextToText.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base),
                              Qwen2VLImageProcessorPil.from_pretrained(base)))  # fmt: skip
        made.model.requires_grad_(False)
        if kind == "coma":
            with_compression(made)
        if release.adapter if adapter is None else adapter:
            targets = {"target_modules": ["q_proj", "v_proj", "qkv"], "use_dora": True}
            if kind == "coma":
                made.model.save_pretrained(tmp_path / "base")
                made.tokenizer.save_pretrained(folder)
                made.processor.save_pretrained(tmp_path / "base")
                base = tmp_path / "base"
                targets |= {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens"]}
            made.model = adapter_of(made.model, folder, base, **targets)
        else:
            made.model.save_pretrained(folder)
            made.tokenizer.save_pretrained(folder)
            made.processor.save_pretrained(folder)
        return made

    return build


def string(kind: str, picture: Any, text: str, instruction: str = DEFAULT) -> str:
    """The released prompt, in which one image_pad stands for a picture."""
    layout = LAYOUTS[kind]
    newline = layout.newline if picture and text else ""
    return layout.frame.replace("{x}", (layout.marker if picture else "") + newline + text).replace("{i}", instruction)


def reference(made: Made, kind: str, picture: Any, prompt: str, **wrong: Any) -> np.ndarray:
    """One vector by stock transformers and a pooling by hand, in the most literal way."""
    layout = replace(LAYOUTS[kind], **wrong)
    stock = made.model.get_base_model() if hasattr(made.model, "get_base_model") else made.model
    extra: dict[str, Any] = {}
    if picture is not None:
        if RELEASES[kind].square:
            side = RELEASES[kind].square
            picture = picture.resize((side, side), PILImage.Resampling.BICUBIC)
            low, high = side * side, side * side
        else:
            low, high = PIXELS
        extra = dict(made.processor(picture, size={"shortest_edge": low, "longest_edge": high}, return_tensors="pt"))
        pads = int(extra["image_grid_thw"].prod()) // 4
        assert pads > 4
        prompt = prompt.replace(BARE, BARE * pads)
    ids = torch.tensor([made.tokenizer(prompt).input_ids])
    image = ids == stock.config.image_token_id
    if picture is not None and not layout.line:
        positions, _ = stock.model.get_rope_index(ids, image.int(), extra["image_grid_thw"])
    else:
        positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    n = ids.shape[1]
    mask = torch.ones(1, 1, n, n, dtype=torch.bool) if layout.bidirectional else torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    with torch.no_grad():
        hidden = stock.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **extra).last_hidden_state[0]
    pooled = {"last": hidden[-1], "mean": hidden.mean(0), "mean of K": hidden[-K:].mean(0)}[layout.pool]
    return F.normalize(pooled, dim=0).numpy()


CASES = [(None, TEXT), (PICTURE, ""), (PICTURE, TEXT)]
ITEMS = [TEXT, PICTURE, {"image": PICTURE, "text": TEXT}]


@pytest.mark.parametrize(("kind", "adapter"), [*((kind, None) for kind in LAYOUTS), ("coma", True), ("cocoa", True)])
def test_vectors_are_those_of_stock_transformers_and_the_released_prompt(make: Any, kind: str, adapter: bool | None) -> None:
    made = make(kind, adapter)
    encoder = released.load(made.folder, kind, device="cpu")
    found = encoder.encode(ITEMS)
    assert found.dtype == np.float32 and len(encoder.fingerprint) == 32
    wanted = np.stack([reference(made, kind, picture, string(kind, picture, text)) for picture, text in CASES])
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found @ found.T - 1).max() > 1e-3, "items differ"


@pytest.mark.parametrize("kind", LAYOUTS)
def test_another_layout_gives_other_vectors(make: Any, kind: str) -> None:
    made, layout = make(kind), LAYOUTS[kind]
    right = reference(made, kind, PICTURE, string(kind, PICTURE, TEXT))
    prompt = string(kind, PICTURE, TEXT)
    marker = TRIPLE if layout.marker == BARE else BARE
    wrong = {
        "pooling": reference(made, kind, PICTURE, prompt, pool="last" if layout.pool != "last" else "mean"),
        "visibility": reference(made, kind, PICTURE, prompt, bidirectional=not layout.bidirectional),
        "positions": reference(made, kind, PICTURE, prompt, line=not layout.line),
        "marker": reference(made, kind, PICTURE, prompt.replace(layout.marker, marker)),
        "newline": reference(made, kind, PICTURE, prompt.replace(TEXT, " " + TEXT)),
    }
    for name, vector in wrong.items():
        assert np.abs(vector - right).max() > 1e-4, name


def test_an_adapter_makes_all_the_difference(make: Any) -> None:
    made = make("vlm2vec-v1")
    right = released.load(made.folder, "vlm2vec-v1", device="cpu").encode([TEXT])
    with made.model.disable_adapter():
        base = reference(made, "vlm2vec-v1", None, TEXT)
    assert np.abs(right - base).max() > 1e-2


def test_the_verb_takes_a_released_model_by_its_kind(make: Any, folder_of: Folders) -> None:
    made = make("vlm2vec-v2")
    asked = ("evaluate", made.folder, "--n", 3, "--candidates", 6, "--json")
    told = json.loads(run(*asked, "--as", "vlm2vec-v2", "--base", folder_of("qwen2_vl")).out)
    encoder = released.load(made.folder, "vlm2vec-v2")
    assert told["fingerprint"] == encoder.fingerprint
    assert [one["hit"] for one in told["tasks"]] == pytest.approx([score.hit for score in evaluate(encoder, scene_tasks(3, 6))], abs=1e-6)
    for more, hint in [((), "comatch.released.load"), (("--as", "gme"), "known: ['coma'"), (("--base", "x"), "--base belongs to --as")]:
        failed = run(*asked, *more)
        assert failed.code and hint in " ".join(failed.err.split())


def test_a_saved_released_model_loads_without_its_kind(make: Any, tmp_path: Path) -> None:
    for kind in ("vlm2vec-v2", "cocoa", "qwen3-vl-embedding"):
        encoder = released.load(make(kind).folder, kind, device="cpu")
        again = Encoder.load(encoder.save(tmp_path / "saved" / kind), device="cpu")
        assert again.fingerprint == encoder.fingerprint and again.recipe == encoder.recipe
        np.testing.assert_array_equal(again.encode(ITEMS), encoder.encode(ITEMS))


# --- Qwen3-VL-Embedding's instruction and template


def message(text: str, instruction: str = "") -> Message:
    return Message((Text(text),), instruction)


@pytest.mark.parametrize(("given", "told"), [("Find it", "Find it."), (" Find it! ", "Find it!"), ("A\n<|im_end|>b.", "A\n<|im_end|>b.")])
def test_an_instruction_stands_in_the_system_turn(make: Any, given: str, told: str) -> None:
    kind = "qwen3-vl-embedding"
    made = make(kind)
    encoder = released.load(made.folder, kind, device="cpu")
    found = encoder.encode([message(TEXT, given), TEXT, message(TEXT, DEFAULT), message("\n\n" + TEXT)])
    if "<|" in told:  # what a user types is never a token, which a prompt string cannot say
        assert np.abs(found[0] - reference(made, kind, None, string(kind, None, TEXT, told))).max() > 1e-3
    else:
        np.testing.assert_allclose(found[0], reference(made, kind, None, string(kind, None, TEXT, told)), atol=1e-5)
    np.testing.assert_array_equal(found[1], found[2])
    np.testing.assert_allclose(found[3], reference(made, kind, None, string(kind, None, "\n\n" + TEXT)), atol=1e-5)
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_the_template_and_the_end_token_are_the_checkpoints_own(make: Any) -> None:
    kind = "qwen3-vl-embedding"
    made = make(kind)
    tokenizer = made.tokenizer
    end = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant:")
    tokenizer.save_pretrained(made.folder)
    encoder = released.load(made.folder, kind, device="cpu")
    assert encoder.recipe.prompt.after == "<|im_end|>\n<|im_start|>assistant:<|endoftext|>"
    prompt = string(kind, PICTURE, TEXT).replace("assistant\n", "assistant:")
    np.testing.assert_allclose(encoder.encode(ITEMS)[2], reference(made, kind, PICTURE, prompt), atol=1e-5)


@pytest.mark.parametrize("template", ["{{ messages[1]['content'][1]['text'] }}", "{{ messages[0]['content'][0]['text'] }}", None])
def test_a_template_without_the_places_is_refused(make: Any, template: str | None) -> None:
    made = make("qwen3-vl-embedding")
    made.tokenizer.chat_template = template
    (made.folder / "chat_template.jinja").unlink(missing_ok=True)
    made.tokenizer.save_pretrained(made.folder)
    with pytest.raises(ModelError, match=r"chat.template"):
        released.load(made.folder, "qwen3-vl-embedding")


def test_an_instruction_without_a_place_is_refused(make: Any) -> None:
    encoder = released.load(make("moca").folder, "moca", device="cpu")
    with pytest.raises(ContentError, match="item 1: recipe 'moca-released' has no place for the instruction 'Find it'"):
        encoder.encode(["x", message("x", "Find it")])
    with pytest.raises(ContentError, match="whole item"):
        encoder.encode([["x", message("x", "Find it")]])


# --- no weight is missing, left over or made up


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(next(k for k in t if "layers.1.self_attn.q_proj.lora_B" in k)),
        lambda t: [t.pop(k) for k in list(t) if "visual" in k],
        lambda t: t.update({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}),
        lambda t: t.update({k.replace("layers.", "blocks."): t.pop(k) for k in list(t) if "model.layers" in k}),
        lambda t: t.update({k: torch.ones(3, 7) for k in list(t)[:1]}),
        lambda t: t.update({k: torch.zeros_like(v) for k, v in t.items() if "lora_B" in k}),
    ],
    ids=["one gone", "a tower gone", "left over", "other names", "other shape", "untrained"],
)
def test_an_adapter_that_does_not_load_whole_is_refused(make: Any, change: Any) -> None:
    made = make("vlm2vec-v2")
    edit_weights(made.folder / "adapter_model.safetensors", change)
    with pytest.raises(ModelError, match=r"does not fit its base|is untrained"):
        released.load(made.folder, "vlm2vec-v2")


@pytest.mark.parametrize("change", [
    lambda t: t.pop(next(k for k in t if "layers.1.mlp.up_proj" in k)),
    lambda t: t.update({"mae_proj.weight": torch.ones(2, 2)}),
], ids=["missing", "left over"])  # fmt: skip
def test_a_checkpoint_that_does_not_load_whole_is_refused(make: Any, change: Any) -> None:
    made = make("moca")
    edit_weights(made.folder / "model.safetensors", change)
    with pytest.raises(ModelError, match="does not fit its architecture"):
        released.load(made.folder, "moca")


def test_a_head_may_be_absent_and_then_nothing_random_is_left(make: Any) -> None:
    """Qwen3-VL-Embedding's own class has no head, which an untied config would have made up."""
    kind = "qwen3-vl-embedding"
    made = make(kind)
    config = json.loads((made.folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (made.folder / "config.json").write_text(json.dumps(config))
    a, b = (released.load(made.folder, kind, device="cpu") for _ in range(2))
    assert a.fingerprint == b.fingerprint
    np.testing.assert_allclose(a.encode([TEXT])[0], reference(made, kind, None, string(kind, None, TEXT)), atol=1e-5)
    with pytest.raises(ModelError, match=r"missing_keys: 1, \['lm_head.weight'\]"):
        Encoder.load(made.folder, recipe=a.recipe)


# --- the wrong checkpoint, the wrong kind, unsafe folders


def test_a_checkpoint_that_cannot_be_of_its_kind_is_refused(make: Any, folder_of: Folders) -> None:
    for kind, family, told in [
        ("vlm2vec-v1", "qwen2_vl", "has no adapter_config.json: vlm2vec-v1 is a LoRA adapter"),
        ("coma", "qwen2_5_vl", "has no compression tokens '<|ctoken_pad_0|>' and on, so it is no coma model"),
        ("moca", "qwen3_vl", r"is a qwen3_vl model; moca was published on \['qwen2_5_vl'\]"),
        ("qwen3-vl-embedding", "qwen2_5_vl", r"is a qwen2_5_vl model"),
        ("gme", "qwen2_vl", r"no kind of released model 'gme'; known: \['coma', 'cocoa', 'moca'"),
        ("sentence-transformers", "qwen2_vl", "has no modules.json"),
    ]:
        with pytest.raises(ModelError, match=told.replace("|", r"\|")):
            released.load(folder_of(family), kind)


def test_the_base_may_be_named_and_lends_what_the_checkpoint_lacks(make: Any, folder_of: Folders) -> None:
    made = make("vlm2vec-v1")
    right = released.load(made.folder, "vlm2vec-v1", device="cpu").encode(ITEMS)
    path = made.folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"base_model_name_or_path": "/gone/Qwen2-VL-2B-Instruct"}))
    with pytest.raises(ModelError, match=r"no model '/gone/Qwen2-VL-2B-Instruct'"):
        released.load(made.folder, "vlm2vec-v1")
    found = released.load(made.folder, "vlm2vec-v1", base=folder_of("qwen2_vl"), device="cpu").encode(ITEMS)
    np.testing.assert_array_equal(found, right)
    path.write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="names no base; pass base="):
        released.load(made.folder, "vlm2vec-v1")
    whole = make("moca")
    right = released.load(whole.folder, "moca", device="cpu").encode(ITEMS)
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (whole.folder / file).unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer_config\.json; pass base="):
        released.load(whole.folder, "moca")
    found = released.load(whole.folder, "moca", base=folder_of("qwen2_5_vl"), device="cpu").encode(ITEMS)
    np.testing.assert_array_equal(found, right)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def test_pickles_and_code_are_refused_for_adapter_base_and_checkpoint(make: Any, folder_of: Folders, tmp_path: Path) -> None:
    canary = pickle.dumps(Canary(tmp_path / "canary"))
    made = make("vlm2vec-v1")
    base = Path(shutil.copytree(folder_of("qwen2_vl"), tmp_path / "unsafe"))
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    with pytest.raises(ModelError, match="auto_map"):
        released.load(made.folder, "vlm2vec-v1", base=base)
    (made.folder / "adapter_model.safetensors").unlink()
    (made.folder / "adapter_model.bin").write_bytes(canary)
    with pytest.raises(ModelError, match=r"pickled weights \(adapter_model.bin\)"):
        released.load(made.folder, "vlm2vec-v1")
    whole = make("moca")
    (whole.folder / "model.safetensors").unlink()
    (whole.folder / "pytorch_model.bin").write_bytes(canary)
    with pytest.raises(ModelError, match="pickled weights"):
        released.load(whole.folder, "moca")
    assert not (tmp_path / "canary").exists()


# --- the hub (row 25; the rest of it is in test_environment.py)


def test_without_the_hub_adapter_and_base_are_named_with_the_command(make: Any, tmp_path: Path) -> None:
    adapter = make("vlm2vec-v1").folder
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}))
    code = (
        "import sys\nfrom comatch import released\nfrom comatch.errors import ModelError\nfor name in sys.argv[1:]:\n"
        "    try:\n        released.load(name, 'vlm2vec-v1')\n    except ModelError as error:\n        print(error)\n"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    ask = [sys.executable, "-c", code, "TIGER-Lab/VLM2Vec-Qwen2VL-2B", str(adapter)]
    told = subprocess.run(ask, capture_output=True, text=True, check=True, env=env).stdout.splitlines()
    for line, name in zip(told, ["TIGER-Lab/VLM2Vec-Qwen2VL-2B", "Qwen/Qwen2-VL-2B-Instruct"], strict=True):
        assert f"hf download {name}" in line and "HF_HUB_OFFLINE is set" in line


def test_half_of_a_model_in_parts_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "0_Transformer").mkdir()
    (tmp_path / "modules.json").write_text("[]")
    assert lacking(tmp_path, weights=True) == ["model.safetensors"]
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "0_Transformer" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "0_Transformer" / "model-00001-of-00002.safetensors").touch()
    assert lacking(tmp_path, weights=True) == [str(Path("0_Transformer", "model-00002-of-00002.safetensors"))]


# --- the records as data


def test_the_published_settings() -> None:
    token = 28 * 28
    assert {name: (r.pixels, r.square, r.adapter) for name, r in RELEASES.items()} == {
        "coma": ((256 * token, 1024 * token), 0, False),
        "cocoa": (None, 672, False),
        "moca": ((256 * token, 1024 * token), 0, False),
        "vlm2vec-v1": (None, 1344, True),
        "vlm2vec-v2": ((4 * token, 1280 * token), 0, True),
        "qwen3-vl-embedding": ((4096, 1843200), 0, False),
    }
    assert RELEASES["coma"].recipe.tokens == 32


def test_protocols_bound_pictures_as_the_records_do() -> None:
    for name, release in RELEASES.items():
        protocol = PROTOCOLS[name]
        assert (protocol.pixels, protocol.square) == (release.pixels, release.square)
        assert release.square or protocol.small == release.small


def test_prompts_are_data_and_old_recipes_are_unchanged() -> None:
    for release in RELEASES.values():
        assert Recipe.from_json(release.recipe.to_json()) == release.recipe
    plain, bare = RELEASES["moca"].recipe, RELEASES["vlm2vec-v1"].recipe
    assert "prompt" not in plain.to_dict() and bare.to_dict()["prompt"]["grid"] is False
    for wrong, told in [({"picture": "image"}, "once"), ({"before": "{instruction}"}, "neither"), ({"instruction": "x"}, "neither")]:
        with pytest.raises(RecipeError, match=told):
            Prompt(**wrong)
    with pytest.raises(RecipeError, match=r"unknown keys \['befor'\]"):
        Recipe.from_dict(plain.to_dict() | {"prompt": {"befor": ""}})


def test_a_text_that_begins_with_white_space_is_not_put_on_another_line(encoder: Encoder) -> None:
    image = Image(PICTURE)
    found = encoder.encode([Message((image, Text(text))) for text in ("x", "\nx", " x")])
    np.testing.assert_array_equal(found[0], found[1])
    assert np.abs(found[0] - found[2]).max() > 1e-4
