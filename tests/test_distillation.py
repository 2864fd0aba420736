"""Distillation: the loss in plain loops, a teacher that is the plain model without compression tokens, and a student that alone learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from comatch.backbones import adapters
from comatch.content import Dialogue, as_message
from comatch.core.batch import IGNORE, ROLE_ID
from comatch.core.packing import collate
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ConfigError
from comatch.objectives.distillation import distillation
from comatch.objectives.tokens import next_token
from comatch.recipe import Stage, Visibility
from comatch.recipes import load_recipe
from comatch.training.beside import Beside
from comatch.training.step import token_step
from comatch.training.teacher import Teacher

K = 4
KL = load_recipe("coma-kl").with_tokens(K)
COMPRESS = KL.stage("compress")
PLAIN = Stage("plain", Visibility(("context", "dialogue"), ("c.", "cc")), {"next_token": 1.0})
Folders = Callable[[str], Path]


def dialogues(n: int = 4) -> list[Dialogue]:
    worlds = [scene(1, i) for i in range(n)]
    return [Dialogue(as_message(s.draw()), tuple((q, a) for q, a, _ in s.dialogue(i, 1 + i % 3))) for i, s in enumerate(worlds)]


def adapted(encoder: Encoder, kind: str) -> Encoder:
    adapters.attach(encoder.backbone, kind, r=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj"), train_vision=False)
    generator = torch.Generator().manual_seed(1)
    for name, p in encoder.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2, generator=generator)
    return encoder


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_in_plain_loops(temperature: float) -> None:
    torch.manual_seed(0)
    hidden, taught = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    labels = torch.tensor([[-100, 3, -100, 1, 2, -100], [0, -100, 4, -100, -100, -100]])
    example = torch.tensor([[0, 0, 0, 1, 1, -1], [3, 3, 3, 3, -1, -1]])
    weights = torch.randn(2, 5, 8)
    heads = (lambda x: x @ weights[0].T), (lambda x: x @ weights[1].T)
    for chunk in (128, 1024):
        losses, counts = distillation(hidden, taught, labels, example, 4, heads, temperature, chunk)
        for i in range(4):
            found = []
            for r in range(2):
                for c in range(6):
                    if example[r, c] == i and labels[r, c] >= 0:
                        p = (heads[1](taught[r, c]) / temperature).softmax(-1)
                        q = (heads[0](hidden[r, c]) / temperature).softmax(-1)
                        found.append(temperature**2 * sum(p[w] * (p[w].log() - q[w].log()) for w in range(5)))
            torch.testing.assert_close(losses[i], torch.stack(found).mean() if found else torch.tensor(0.0))
        right = sum(int(heads[0](hidden[r, c]).argmax() == labels[r, c]) for r in range(2) for c in range(6) if labels[r, c] >= 0)
        assert counts.tolist() == [right, 5]
    same, _ = distillation(hidden, hidden, labels, example, 4, (heads[0], heads[0]), temperature)
    assert same.abs().max() < 1e-6 < losses[[0, 1, 3]].min()


def test_chunks_change_nothing_and_only_the_student_has_a_gradient() -> None:
    torch.manual_seed(0)
    labels, example = torch.randint(0, 5, (1, 300)), torch.arange(300).remainder(3)[None].sort().values
    weight = torch.randn(5, 8)
    heads = (lambda x: x @ weight.T), (lambda x: x @ weight.T)
    found = []
    for chunk in (128, 4096):
        hidden, taught = (torch.randn(1, 300, 8, generator=torch.Generator().manual_seed(s)).requires_grad_(True) for s in (1, 2))
        losses, _ = distillation(hidden, taught, labels, example, 3, heads, 1.5, chunk)
        losses.sum().backward()
        assert taught.grad is None and hidden.grad is not None and hidden.grad.abs().max() > 0
        found.append((losses.detach(), hidden.grad))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_teacher_is_the_plain_model_on_a_row_without_compression_tokens(folder_of: Folders, family: str, kind: str) -> None:
    encoder = Encoder.load(folder_of(family), recipe=KL)
    backbone = encoder.backbone
    batch = collate([encoder.preparer.dialogue(d, COMPRESS) for d in dialogues()])
    simple = collate([encoder.preparer.dialogue(d, PLAIN) for d in dialogues()])
    assert batch.ids.shape[1] > simple.ids.shape[1] or batch.tokens == simple.tokens + 4 * K
    with torch.no_grad():
        wanted = backbone(simple, PLAIN.visibility)[simple.labels != IGNORE]
    teacher = Teacher.of(backbone, kind == "full")
    if kind == "full":
        for parameter in backbone.text.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    else:
        adapted(encoder, kind)
    opened = {name: p.requires_grad for name, p in backbone.named_parameters()}
    taught = teacher(batch, None)
    at = batch.labels != IGNORE
    assert torch.equal(batch.labels[at], simple.labels[simple.labels != IGNORE]), "teacher and student are aligned on the same tokens"
    torch.testing.assert_close(taught[at], wanted, atol=2e-5, rtol=1e-4)
    assert opened == {name: p.requires_grad for name, p in backbone.named_parameters()}
    assert (teacher.backbone is backbone) == (kind != "full") and not taught.requires_grad
    with torch.no_grad():
        student = backbone(batch, COMPRESS.visibility)
    assert (student - taught)[at].abs().max() > 1e-3
    backbone.rows.data += 1.0
    torch.testing.assert_close(teacher(batch, None)[at], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("objectives", [{"distillation": 1.0}, {"distillation": 0.7, "next_token": 0.3}])
def test_step_equals_the_two_losses_by_hand(folder_of: Folders, kind: str, objectives: dict[str, float]) -> None:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=KL)
    backbone, stage = encoder.backbone, replace(COMPRESS, objectives=objectives, kl_temperature=2.0)
    teacher = Teacher.of(backbone, kind == "full")
    if kind == "full":
        backbone.vision_tower.requires_grad_(False)
    else:
        adapted(encoder, kind)
    some = [encoder.preparer.dialogue(d, stage) for d in dialogues()]
    total, parts = torch.zeros(()), {"distillation": 0.0, "next_token": 0.0}
    for example in some:
        batch = collate([example])
        taught, hidden = teacher(batch, None), backbone(batch, stage.visibility)
        rows = batch.labels, batch.example, 1
        kl, _ = distillation(hidden, taught, *rows, (backbone.head, teacher.backbone.head), 2.0)
        ce, _ = next_token(hidden, *rows, backbone.head)
        for name, loss in (("distillation", kl), ("next_token", ce)):
            parts[name] += float(loss.detach()) / 4
            total = total + objectives.get(name, 0.0) * loss[0] / 4
    total.backward()
    want = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
    backbone.zero_grad()
    for budget in (60, 100_000):
        result = token_step(Accelerator(cpu=True), backbone, some, stage, budget, beside=Beside(teacher=teacher))
        assert abs(result.loss - float(total.detach())) < 1e-5
        assert all(abs(parts[name] - value) < 1e-5 for name, value in result.parts.items()) and result.parts.keys() == objectives.keys()
        got = {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}
        backbone.zero_grad()
        scale = max(float(g.abs().max()) for g in want.values())
        assert got.keys() == want.keys() and scale > 0
        assert max(float((got[name] - want[name]).abs().max()) for name in want) < 1e-4 * scale
    if kind == "full":
        assert all(p.grad is None and not p.requires_grad for p in teacher.backbone.parameters())
    with pytest.raises(ConfigError, match="Beside"):
        token_step(Accelerator(cpu=True), backbone, some, stage, 1000)


def test_the_teacher_sees_the_picture_and_the_student_only_compression_tokens(folder_of: Folders) -> None:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=KL)
    turns = dialogues()[0].turns
    batches = [collate([encoder.preparer.dialogue(Dialogue(as_message(scene(5, i).draw()), turns), COMPRESS)]) for i in (0, 1)]
    teacher, at = Teacher.of(encoder.backbone, False), batches[0].labels != IGNORE
    one, other = (teacher(batch, None)[at] for batch in batches)
    assert (one - other).abs().max() > 1e-4
    dialogue = batches[0].roles == ROLE_ID["dialogue"]
    inner: list[torch.Tensor] = []
    with torch.no_grad():
        handle = encoder.backbone.text.layers[0].register_forward_hook(lambda _, args, out: inner.append(out))
        for batch in batches:
            encoder.backbone(batch, COMPRESS.visibility)
        handle.remove()
    torch.testing.assert_close(inner[0][dialogue], inner[1][dialogue])  # in one layer no picture reaches the student's dialogue
