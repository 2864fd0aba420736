"""Rows that nobody reads are left out of the last layers, and what is read stays the same, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comatch.backbones import adapters
from comatch.backbones.base import Backbone
from comatch.backbones.compiled import compiled_layers
from comatch.backbones.memory import recompute
from comatch.backbones.stills import still
from comatch.content import Dialogue, as_message
from comatch.core.batch import ROLE_ID, Batch
from comatch.core.packing import collate
from comatch.core.pooling import pool, pooled
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.recipe import Stage
from comatch.recipes import load_recipe

COMA = load_recipe("coma").with_tokens(4)
COMPRESS, MATCH = COMA.stages


def made(folder: Path, stage: Stage) -> tuple[Backbone, Batch, np.ndarray]:
    """A float64 backbone with a fresh LoRA that is not zero, a packed batch, and the places that the stage reads."""
    encoder = Encoder.load(folder, recipe=COMA, dtype=torch.float64)
    backbone = encoder.backbone
    adapters.attach(backbone, "lora", r=2, alpha=4, dropout=0.0, targets=("q_proj", "o_proj", "down_proj"), train_vision=False)
    torch.manual_seed(1)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name or name == "rows")
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    backbone.double()
    scenes = [scene(6, i) for i in range(3)]
    if stage is COMPRESS:
        talks = [Dialogue(as_message(s.draw()), ((s.caption(0), "yes"), ("and?", s.caption(1)))) for s in scenes]
        batch = collate([encoder.preparer.dialogue(talk, stage) for talk in talks])
        return backbone, batch, (batch.labels >= 0).numpy()
    batch = collate([encoder.preparer.item(as_message({"image": s.draw(), "text": s.caption(0)}), stage) for s in scenes])
    read = pooled(batch.roles, stage.pooling)
    assert read is not None
    return backbone, batch, read


def result(
    backbone: Backbone, batch: Batch, stage: Stage, read: np.ndarray, leave_out: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The states that are read, and the gradients of a loss of them."""
    hidden = backbone(batch, stage.visibility, read=read if leave_out else None)
    states = hidden[read]
    (states * torch.linspace(-1, 1, states.numel(), dtype=states.dtype).view_as(states)).sum().backward()
    grads = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    return states.detach(), grads


def rows_computed(backbone: Backbone, run: Callable[[], Any]) -> list[tuple[int, int]]:
    """For each layer the rows that its output projection and its MLP compute in a run."""
    counts: list[list[int]] = [[0, 0] for _ in backbone.text.layers]
    hooks = []
    for count, layer in zip(counts, backbone.text.layers, strict=True):
        for i, module in enumerate((layer.self_attn.o_proj, layer.mlp.down_proj)):
            inner = getattr(module, "base_layer", module)

            def note(_: Any, args: Any, count: list[int] = count, i: int = i) -> None:
                count[i] += args[0].shape[:-1].numel()

            hooks.append(inner.register_forward_pre_hook(note))
    run()
    for hook in hooks:
        hook.remove()
    return [(a, b) for a, b in counts]


@pytest.mark.parametrize("stage", [COMPRESS, MATCH], ids=lambda stage: stage.name)
def test_what_is_read_is_the_same_forward_and_backward(folder_of: Callable[[str], Path], family: str, stage: Stage) -> None:
    backbone, batch, read = made(folder_of(family), stage)
    (whole, grads), (less, fewer) = (result(backbone, batch, stage, read, leave_out) for leave_out in (False, True))
    torch.testing.assert_close(less, whole, rtol=1e-9, atol=1e-9)
    assert grads.keys() == fewer.keys() and len(grads) > 10
    for name, gradient in grads.items():
        torch.testing.assert_close(fewer[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
    assert max(float(g.abs().max()) for g in grads.values()) > 1e-3
    with torch.no_grad():
        other = backbone(batch, stage.visibility, read=read), backbone(batch, stage.visibility)
    assert not torch.allclose(other[0][~read], other[1][~read]), "elsewhere nothing was computed to the end"


def test_only_what_is_needed_is_computed(folder_of: Callable[[str], Path]) -> None:
    """The dialogue looks at compression tokens and these at the context: the last layer does the supervised, the one before no context."""
    backbone, batch, read = made(folder_of("qwen2_5_vl"), COMPRESS)
    everything, context = batch.ids.numel(), int((batch.roles == ROLE_ID["context"]).sum())
    supervised, wanted = int(read.sum()), int((batch.example >= 0).sum()) - context
    assert 0 < supervised < wanted < everything
    with torch.no_grad():
        assert rows_computed(backbone, lambda: backbone(batch, COMPRESS.visibility)) == [(everything, everything)] * 3
        counts = rows_computed(backbone, lambda: backbone(batch, COMPRESS.visibility, read=read))
    assert counts == [(everything, everything), (wanted, wanted), (supervised, supervised)]
    backbone, batch, read = made(folder_of("qwen2_5_vl"), MATCH)
    with torch.no_grad():
        counts = rows_computed(backbone, lambda: backbone(batch, MATCH.visibility, read=read))
    assert counts == [(batch.ids.numel(),) * 2] * 2 + [(12, 12)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.text.layers.modules()), "nothing stays behind"


def test_a_recomputed_or_compiled_layer_is_left_alone(folder_of: Callable[[str], Path]) -> None:
    backbone, batch, read = made(folder_of("qwen2_5_vl"), COMPRESS)
    whole, grads = result(backbone, batch, COMPRESS, read, leave_out=True)
    backbone.train()
    recompute(backbone, 3)
    again, other = result(backbone, batch, COMPRESS, read, leave_out=True)
    torch.testing.assert_close(again, whole, rtol=1e-9, atol=1e-9)
    assert all(torch.allclose(other[name], gradient, rtol=1e-9, atol=1e-9) for name, gradient in grads.items())
    recompute(backbone, 0)
    with compiled_layers(backbone, backend="eager"), torch.no_grad():
        hidden = backbone(batch, COMPRESS.visibility, read=read)
    torch.testing.assert_close(hidden[read], whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ["mean_compression", "last_compression"])
def test_a_pooling_reads_what_it_says(how: str) -> None:
    roles = torch.tensor([[ROLE_ID["context"]] * 3 + [ROLE_ID["compression"]] * 2 + [-1]])
    example, hidden = torch.tensor([[0, 0, 0, 0, 0, -1]]), torch.randn(1, 6, 4)
    read = pooled(roles, how)
    assert read is not None and int(read.sum()) == 2
    spoiled = hidden.masked_fill(torch.from_numpy(~read).unsqueeze(-1), torch.nan)
    assert torch.equal(pool(spoiled, roles, example, 1, how), pool(hidden, roles, example, 1, how))
    assert pooled(roles, "mean") is None and pooled(roles, "last") is None and pooled(roles, None) is None


# --- two equal frames


@pytest.mark.parametrize("low", [torch.float64, torch.bfloat16])
def test_one_frame_with_both_halves_of_the_kernel_is_two_frames(folder_of: Callable[[str], Path], family: str, low: torch.dtype) -> None:
    projection = Encoder.load(folder_of(family), recipe=COMA, dtype=low).backbone.vision_tower.patch_embed.proj
    side = projection.kernel_size[-1]
    frame = torch.randn(7, 3, 1, side, side).to(low).requires_grad_()
    found = []
    for block in (nullcontext(), still(projection)):
        with block:
            out = projection(frame.expand(-1, -1, 2, -1, -1))
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
        found.append([out.detach(), frame.grad, *(p.grad for p in projection.parameters())])
        frame.grad = None
        projection.zero_grad()
    near = {"rtol": 1e-9, "atol": 1e-9} if low is torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    for one, both in zip(found[1], found[0], strict=True):
        assert one.shape == both.shape and one.dtype == both.dtype
        torch.testing.assert_close(one, both, **near)
    assert not projection._forward_hooks and found[0][0].abs().max() > 0.1
