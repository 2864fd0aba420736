"""Any sentence-transformers model behind our interface: its own vectors, whole weights, and none of its code."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import texts
from PIL import Image as PILImage
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from comatch import released
from comatch.backbones.nano import make_tokenizer
from comatch.content import Image, Message, Text
from comatch.data.scenes import scene
from comatch.errors import ContentError, ModelError
from comatch.evaluation.tasks import evaluate, scene_tasks

sentence_transformers = pytest.importorskip("sentence_transformers")
KIND = "sentence-transformers"
PICTURE = PILImage.fromarray(scene(0, 3).draw())
TEXT = "what is left of the red circle?"


def base(folder: Path) -> None:
    """A tiny LLaVA with random weights: a VLM whose processor needs no torchvision."""
    tokenizer = make_tokenizer(texts(), 400)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    tower = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    image = tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=image, image_seq_length=4)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", chat_template=tokenizer.chat_template,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What sentence-transformers saves of it: a transformer, last-token pooling, a dense layer."""
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    root = tmp_path_factory.mktemp("sentence")
    base(root / "base")
    modules = [Transformer(str(root / "base")), Pooling(32, "lasttoken"), Dense(32, 12)]
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", prompts={"query": "find: "})
    model.save(str(root / "model"))
    return root / "model"


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def test_vectors_are_those_of_sentence_transformers(saved: Path) -> None:
    encoder = released.load(saved, KIND, device="cpu")
    theirs = sentence_transformers.SentenceTransformer(str(saved), device="cpu")
    chat = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": TEXT}]}]
    two = [{"role": "user", "content": [*chat[0]["content"], {"type": "image", "image": PICTURE}]}]
    wanted = np.concatenate([theirs.encode([x], normalize_embeddings=True) for x in (TEXT, PICTURE, chat, two)])
    items = [TEXT, PICTURE, {"image": PICTURE, "text": TEXT}, [PICTURE, TEXT, PICTURE]]
    found = encoder.encode(items)
    assert found.dtype == np.float32 and found.shape == (4, 12) == (4, encoder.dim)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(encoder.similarity(found, found) - 1).max() > 1e-4, "items differ"
    prompted = encoder.encode([Message((Text(TEXT),), "find: "), TEXT, Message((Text(TEXT),), "find: ")])
    np.testing.assert_allclose(prompted[0], theirs.encode(TEXT, prompt_name="query", normalize_embeddings=True), atol=1e-5)
    np.testing.assert_allclose(prompted[1], found[0], atol=1e-6)
    np.testing.assert_array_equal(prompted[0], prompted[2])
    assert np.abs(prompted[0] - prompted[1]).max() > 1e-4


def test_equal_items_are_encoded_once_and_scored_like_any_encoder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = released.load(saved, KIND, device="cpu")
    given: list[Any] = []
    plain = encoder.model.encode
    monkeypatch.setattr(encoder.model, "encode", lambda inputs, **kw: (given.extend(inputs), plain(inputs, **kw))[1])
    done: list[int] = []
    vectors = encoder.encode([TEXT, "x", TEXT, Message((Image(PICTURE),)), PICTURE], progress=done.append)
    assert len(given) == 3 and sum(done) == 5
    np.testing.assert_array_equal(vectors[[0, 3]], vectors[[2, 4]])
    (score,) = evaluate(encoder, scene_tasks(3, 6)[:1])
    assert 0 <= score.hit <= 1


@pytest.mark.filterwarnings("ignore")
def test_it_runs_in_mteb_too(saved: Path) -> None:
    mteb = pytest.importorskip("mteb")
    from comatch.evaluation.mteb import MtebEncoder, mteb_task

    encoder, (task,) = released.load(saved, KIND, device="cpu"), scene_tasks(4, 8)[4:5]
    (result,) = mteb.evaluate(MtebEncoder(encoder), [mteb_task(task)], cache=None, show_progress_bar=False).task_results
    (score,) = evaluate(encoder, [task])
    assert result.scores["test"][0]["main_score"] == round(score.hit, 5)


def test_the_fingerprint_follows_weights_and_settings(saved: Path, model: Path) -> None:
    before = released.load(saved, KIND, device="cpu").fingerprint
    assert released.load(model, KIND, device="cpu").fingerprint == before
    path = model / "config_sentence_transformers.json"
    path.write_text(path.read_text().replace("find: ", "seek: "))
    settings = released.load(model, KIND, device="cpu").fingerprint
    weights = model / "2_Dense" / "model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(weights).items()}, weights)
    assert len({before, settings, released.load(model, KIND, device="cpu").fingerprint}) == 3


def test_an_item_that_the_model_does_not_take_is_a_content_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = released.load(saved, KIND, device="cpu")
    monkeypatch.setattr(encoder.model[0], "modality_config", {"text": encoder.model[0].modality_config["text"]})
    with pytest.raises(ContentError, match=r"the model takes \['text'\]"):
        encoder.encode([PICTURE])


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model.safetensors", lambda t: t.pop(next(k for k in t if "layers.1.mlp.up_proj" in k))),
        ("model.safetensors", lambda t: t.update({"stray.weight": torch.ones(2)})),
        ("model.safetensors", lambda t: t.update({next(k for k in t if "up_proj" in k): torch.ones(2, 2)})),
        ("2_Dense/model.safetensors", lambda t: t.pop(next(iter(t)))),
    ],
    ids=["missing", "left over", "other shape", "missing in a module"],
)
def test_weights_that_do_not_fit_are_refused(model: Path, file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(model / file)
    change(tensors)
    save_file(tensors, model / file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not fit its architecture|does not load in sentence-transformers"):
        released.load(model, KIND, device="cpu")


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def test_pickles_code_and_adapters_are_refused(model: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (model / "2_Dense" / "model.safetensors").rename(tmp_path / "kept")
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(ModelError, match="pickled weights"):
        released.load(model, KIND, device="cpu")
    (tmp_path / "kept").rename(model / "2_Dense" / "model.safetensors")
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).mkdir()\nclass Evil: pass\n")
    kept = (model / "modules.json").read_text()
    modules = json.loads(kept)
    modules[1]["type"] = "evil.Evil"
    (model / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="does not load in sentence-transformers"):
        released.load(model, KIND, device="cpu")
    (model / "modules.json").write_text(kept)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(ModelError, match="auto_map"):
        released.load(model, KIND, device="cpu")
    (model / "config.json").write_text(json.dumps(config))
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter; merge it"):
        released.load(model, KIND, device="cpu")
    assert not canary.exists()
