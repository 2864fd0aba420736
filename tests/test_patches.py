"""Masked patches: the loss in plain loops, a decoder that begins as the middle layer, and nothing of it left after its stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from forked import Make, assert_equal_runs, make, stop_after
from safetensors.torch import load_file

from comatch.backbones import adapters
from comatch.backbones.decoder import PatchDecoder, decoder_size
from comatch.core.batch import Batch, Example
from comatch.core.packing import collate
from comatch.data.mixture import Ingredient
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import Stopped
from comatch.objectives.patches import masked_patch
from comatch.recipe import Visibility
from comatch.recipes import load_recipe
from comatch.training import loop
from comatch.training.beside import Beside
from comatch.training.step import token_step

__all__ = ["make"]

MOCA = load_recipe("moca")
DENOISE = MOCA.stage("denoise")
Folders = Callable[[str], Path]


def examples(encoder: Encoder, n: int = 4) -> list[Example]:
    source = Ingredient("scenes", open_source("scenes"))
    return [encoder.preparer.pair(*source.pair(i, 0), DENOISE, seed=i) for i in range(n)]


def decoder_of(encoder: Encoder, layers: int) -> PatchDecoder:
    torch.manual_seed(3)
    decoder = PatchDecoder.of(encoder.backbone, layers)
    torch.nn.init.normal_(decoder.out.weight, std=0.1)
    return decoder


@pytest.mark.parametrize("normalised", [False, True])
def test_loss_in_plain_loops(normalised: bool) -> None:
    torch.manual_seed(0)
    predicted, pixels = torch.randn(5, 4 * 6), 3 + 2 * torch.randn(20, 6)
    owner = torch.tensor([0, 0, 2, 0, 2])
    got = masked_patch(predicted, pixels, owner, 4, normalised)
    for i in range(4):
        errors = []
        for token in range(5):
            for patch in range(4):
                values = pixels[4 * token + patch]
                if normalised:
                    values = (values - values.mean()) / (values.var(unbiased=False) + 1e-6).sqrt()
                for value in range(6):
                    errors += [(predicted[token, 6 * patch + value] - values[value]) ** 2] * int(owner[token] == i)
        torch.testing.assert_close(got[i], torch.stack(errors).mean() if errors else torch.tensor(0.0))
    assert got[1] == got[3] == 0 and (masked_patch(predicted, pixels, owner, 4, not normalised) != got).any()


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_decoder_begins_as_the_middle_layer(folder_of: Folders, family: str, layers: int) -> None:
    encoder = Encoder.load(folder_of(family), recipe=MOCA)
    backbone, decoder = encoder.backbone, decoder_of(encoder, layers)
    middle = backbone.text.layers[1]
    assert len(backbone.text.layers) == 3 and len(decoder.layers) == layers
    for layer in decoder.layers:
        for name, value in middle.named_parameters():
            assert torch.equal(value.float(), layer.get_parameter(name)) and layer.get_parameter(name) is not value
    assert decoder_size(backbone, layers) == sum(p.numel() for p in decoder.parameters())
    adapters.attach(backbone, "lora", r=2, alpha=4, dropout=0.0, targets=("q_proj",), train_vision=False)
    assert decoder_size(backbone, layers) == sum(p.numel() for p in decoder.parameters())
    batch = collate(examples(encoder))
    hidden = backbone(batch, DENOISE.visibility).detach()
    seen = hidden
    for _ in range(layers):  # by the stock layer itself, one example at a time, full attention and no mask
        parts = torch.zeros_like(seen)
        for i in range(batch.size):
            at = batch.example[0] == i
            one = seen[:, at]
            rotary = backbone.text.rotary_emb(one, batch.positions[:, :, at])
            visible = backbone.visible(collate([examples(encoder)[i]], multiple=1), DENOISE.visibility)
            parts[:, at] = middle(one, attention_mask=None, position_embeddings=rotary, use_cache=False, **visible)
        seen = parts
    want = decoder.out(seen[0, batch.target_places])
    torch.testing.assert_close(decoder(hidden, batch, DENOISE.visibility, backbone), want, atol=2e-5, rtol=1e-4)
    assert len(want) == len(batch.target_places) > 4


def loss_by_hand(encoder: Encoder, decoder: PatchDecoder, some: list[Example]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Both losses and the gradients of their weighted sum, every example by itself."""
    words, pixels = [], []
    backbone = encoder.backbone
    for example in some:
        batch: Batch = collate([example])
        hidden = backbone(batch, DENOISE.visibility)
        rows = [j for j, label in enumerate(batch.labels[0].tolist()) if label >= 0]
        if rows:
            logits = backbone.head(hidden[0, rows]).log_softmax(-1)
            words.append(-torch.stack([logits[n, batch.labels[0, j]] for n, j in enumerate(rows)]).mean())
        if len(example.targets):
            side = encoder.backbone.processor.patch_size
            colours = torch.from_numpy(example.targets).view(-1, 3, side * side).float() / 255
            colours = (colours - backbone.mean.view(3, 1)) / backbone.std.view(3, 1)
            guess = decoder(hidden, batch, DENOISE.visibility, backbone)
            pixels.append((guess.reshape(colours.shape) - colours).square().mean())
    a, b = torch.stack(words).mean(), torch.stack(pixels).mean()
    (a + 0.5 * b).backward()
    found = {name: p.grad.clone() for module in (backbone, decoder) for name, p in module.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    decoder.zero_grad()
    return float(a.detach()), float(b.detach()), found


@pytest.mark.parametrize("budget", [1, 90, 100_000])
def test_step_equals_plain_loops_under_any_budget(folder_of: Folders, budget: int) -> None:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=MOCA)
    encoder.backbone.vision_tower.requires_grad_(False)
    decoder = decoder_of(encoder, 1)
    some = examples(encoder, 5)
    # One row is a picture without a word, one is words alone: each counts for one objective only.
    bare = encoder.preparer.finish(encoder.preparer.renderer.item(open_source("scenes").group(9).query, DENOISE))
    some += [replace(some[0], patches=(), grids=(), **text_only(some[0], encoder)), encoder.preparer._corrupted(bare, DENOISE, 0)]
    assert some[-1].untouched == 1 and some[-1].supervised == 0 and not len(some[-2].targets)
    words, pixels, want = loss_by_hand(encoder, decoder, some)
    result = token_step(Accelerator(cpu=True), encoder.backbone, some, DENOISE, budget, beside=Beside(decoder=decoder))
    assert abs(result.parts["masked_token"] - words) < 1e-5 and abs(result.parts["masked_patch"] - pixels) < 1e-5
    assert abs(result.loss - (words + 0.5 * pixels)) < 1e-5
    got = {name: p.grad for module in (encoder.backbone, decoder) for name, p in module.named_parameters() if p.grad is not None}
    assert {"out.weight", "rows"} <= got.keys() and any(name.startswith("layers.0.") for name in got)
    scale = max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        assert float((got[name] - gradient).abs().max()) < 1e-4 * scale, name


def text_only(example: Example, encoder: Encoder) -> dict[str, Any]:
    kept = example.ids != encoder.backbone.image_id
    cut = {name: getattr(example, name)[kept] for name in ("ids", "roles", "labels")}
    return {**cut, "positions": example.positions[:, kept], "targets": example.targets[:0], "target_places": example.target_places[:0]}


def test_hidden_pixels_are_not_in_what_the_model_sees(folder_of: Folders) -> None:
    """Two pictures that differ in hidden tokens only give the same states, and different targets."""
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=MOCA)
    zero = replace(DENOISE, corruptions=(replace(DENOISE.corruptions[0], fill="zero"),))
    one = encoder.preparer.pair(*Ingredient("s", open_source("scenes")).pair(0, 0), zero, seed=1)
    touched = replace(one, targets=255 - one.targets)
    with torch.no_grad():
        states = [encoder.backbone(collate([e]), zero.visibility) for e in (one, touched)]
    assert torch.equal(*states) and len(one.targets)


def test_gone_after_its_stage_and_resumed_to_the_bit(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> object:
        stage = {"steps": 5, "batch": 4, "tokens_per_pass": 120, "optim": {"lr": 0.01}, "log_every": 1}
        data = {"source": "scenes", "limit": 50}
        return make(tmp_path / name, recipe="cocoa", tokens=1, data=data, stages={"warmup": stage, "bridge": stage, "match": stage})

    loop.train(run("whole"), quiet=True)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Stopped):
            loop.train(run("parts"), quiet=True)  # type: ignore[arg-type]
    saved = load_file(next((tmp_path / "parts" / "checkpoints").glob("warmup-000003")) / "weights.safetensors")
    assert {"decoder.out.weight", "model.rows"} <= saved.keys() and any(name.startswith("decoder.layers.0.") for name in saved)
    loop.train(run("parts"), quiet=True)  # type: ignore[arg-type]
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    for folder in (tmp_path / "whole").glob("*/"):
        assert not any("decoder" in name for file in folder.glob("*.safetensors") for name in load_file(file))
    rows = loop.read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert all(row["loss_masked_patch"] > 0 for row in rows if row["stage"] == "warmup")
    last = Encoder.load(tmp_path / "whole")
    assert last.backbone.tokens == 1 and len(last.backbone.rows) == 2, "the mask token's row is saved with the model"


def test_visibility_of_the_decoder_is_the_stages(folder_of: Folders) -> None:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=MOCA)
    decoder = decoder_of(encoder, 1)
    batch = collate(examples(encoder))
    hidden = encoder.backbone(batch, DENOISE.visibility).detach().requires_grad_(True)
    for table, later in (("f", True), ("c", False)):
        first = int(batch.target_places[0])
        guess = decoder(hidden, batch, Visibility(("context",), (table,)), encoder.backbone)
        (slope,) = torch.autograd.grad(guess[0].sum(), hidden)
        seen = slope[0].abs().sum(-1) > 0
        own = batch.example[0] == batch.example[0, first]
        want = own if later else own & (torch.arange(len(own)) <= first)
        assert torch.equal(seen, want)
