"""A fingerprint is hashed once, and again after any change, however it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_run import run

from comatch.backbones import adapters
from comatch.core.fingerprint import Fingerprint
from comatch.encoder import Encoder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every hash over weights from now on."""
    counts: list[int] = []
    plain = hashlib.blake2b

    def counting(*args: object, **kwargs: object) -> object:
        counts.append(1)
        return plain(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr("comatch.core.fingerprint.hashlib.blake2b", counting)
    return counts


def scaled(encoder: Encoder) -> None:
    with torch.no_grad():
        encoder.backbone.text.norm.weight.mul_(2)


def swapped(encoder: Encoder) -> None:
    table = encoder.backbone.text.embed_tokens.weight
    with torch.no_grad():
        table[[5, 6]] = table[[6, 5]].clone()


def behind_its_back(encoder: Encoder) -> None:
    encoder.backbone.text.norm.weight.data[0] += 1e-6


def replaced(encoder: Encoder) -> None:
    norm = encoder.backbone.text.norm.weight
    norm.data = norm.data * 2


def halved(encoder: Encoder) -> None:
    encoder.backbone.to(torch.bfloat16)


def new_rows(encoder: Encoder) -> None:
    encoder.backbone.rows.data[0, 0] += 1


def new_adapter(encoder: Encoder) -> None:
    adapters.attach(encoder.backbone, "lora", r=2, alpha=4, dropout=0.0, targets=("q_proj",), train_vision=False)


CHANGES = (scaled, swapped, behind_its_back, replaced, halved, new_rows, new_adapter)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_change_is_hashed_anew_and_nothing_else(model: Path, hashed: list[int], change: Callable[[Encoder], None]) -> None:
    encoder = Encoder.load(model)
    before = encoder.fingerprint
    encoder.encode(["a red circle"])
    assert encoder.fingerprint == before and len(hashed) == 1
    change(encoder)
    after = encoder.fingerprint
    assert after != before and len(hashed) == 2
    assert encoder.fingerprint == after and len(hashed) == 2


def test_one_hash_in_a_command(model: Path, tmp_path: Path, hashed: list[int]) -> None:
    for args in (("encode", model, "--text", "x"), ("index", model, "-", "--out", tmp_path / "i"), ("search", tmp_path / "i", "x")):
        hashed.clear()
        assert run(*args, stdin="a red circle\n").code == 0
        assert len(hashed) == 1, args


def test_odd_shapes_and_places_in_memory_are_hashed() -> None:
    base = torch.arange(40, dtype=torch.float32)
    odd = {"scalar": torch.tensor(3.0), "empty": torch.zeros(0), "slice": base[1:6], "strided": base[::3], "bytes": torch.ones(5).byte()}
    fingerprint = Fingerprint()
    seen = {fingerprint.of(["b"], odd), fingerprint.of(["a"], odd)}
    changes = (odd["scalar"], base[3:4], base[39:], odd["bytes"][4:])
    for n, tensor in enumerate(changes):
        tensor.add_(1)
        seen.add(fingerprint.of(["a"], odd))
        assert len(seen) == 3 + n
    assert fingerprint.of(["a"], odd) == Fingerprint().of(["a"], {name: t.clone() for name, t in odd.items()})
