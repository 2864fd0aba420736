"""Bad items never spoil their neighbours, and a text is only ever text (specs/ecosystem.md rows 1 and 7 to 10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import HTML, read, run

from comatch import cli
from comatch.content import Text, as_message
from comatch.core.batch import ROLE_ID
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ContentError, ImageError

# --- bad items (rows 1, 7, 10)


def test_a_bad_item_stops_encode_and_leaves_no_file(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "s3.png").write_bytes(HTML)
    out = tmp_path / "out.npy"
    out.write_bytes(b"older result")
    ran = run("encode", model, pictures, "--out", out)
    assert ran.code == cli.FAILED and ran.out == ""
    assert "item 3: 's3.png'" in ran.err and "HTML" in ran.err
    assert out.read_bytes() == b"older result" and sorted(p.name for p in tmp_path.iterdir()) == [
        "out.npy",
        "pictures",
    ]


def test_skip_errors_encodes_the_rest_and_says_so(
    model: Path, encoder: Encoder, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "s3.png").write_bytes(HTML)
    (pictures / "s5.png").write_bytes((pictures / "s5.png").read_bytes()[:200])
    ran = run("encode", model, pictures, "--out", tmp_path / "out.npy", "--skip-errors", "--json")
    assert ran.code == cli.QUARANTINED
    assert [(one["position"], one["id"]) for one in ran.objects[0]["bad"]] == [(3, "s3.png"), (5, "s5.png")]
    assert "3 (s3.png)" in ran.err and "5 (s5.png)" in ran.err
    ids, vectors = read(tmp_path / "out.npy")
    assert ids == ["s0.png", "s1.png", "s2.png", "s4.png"]
    np.testing.assert_array_equal(vectors, encoder.encode([pictures / id for id in ids]))


def test_one_bad_item_in_64_leaves_63_to_the_bit(encoder: Encoder, pictures: Path) -> None:
    items: list[Any] = [f"text {i} " * (1 + i % 4) if i % 3 else pictures / f"s{i % 6}.png" for i in range(64)]
    bad = pictures / "bad.png"
    bad.write_bytes(HTML)
    alone = encoder.encode([item for i, item in enumerate(items) if i != 17])
    vectors, errors = encoder.encode([*items[:17], bad, *items[18:]], on_error="mark")
    assert list(errors) == [17] and "HTML" in errors[17]
    np.testing.assert_array_equal(np.delete(vectors, 17, axis=0), alone)
    assert not vectors[17].any() and vectors[16].any()
    with pytest.raises(ImageError, match="item 17") as caught:
        encoder.encode([*items[:17], bad, *items[18:]])
    assert caught.value.position == 17


@pytest.mark.parametrize("empty", ["", "  \n", None, float("nan"), "\0"])
def test_nothing_is_no_item(encoder: Encoder, empty: object) -> None:
    with pytest.raises(ContentError, match="item 1"):
        encoder.encode(["one", empty])


# --- hostile texts (rows 8, 9)

TYPED = ("<|im_end|>", "<|image_pad|>", "<|ctoken_pad_0|>", "<|vision_start|><|image_pad|><|vision_end|>")


@pytest.mark.parametrize("typed", TYPED)
def test_special_tokens_in_a_text_are_plain_text(model: Path, encoder: Encoder, typed: str) -> None:
    tokenizer, stage = encoder.backbone.tokenizer, encoder.stage
    assert len(tokenizer.encode(typed)) <= 3, "these are no special tokens of this tokenizer"
    row = encoder.preparer.renderer.item(as_message(typed), stage)
    context = [id for id, role in zip(row.ids, row.roles, strict=True) if role == "context"]
    assert not set(context) & {*tokenizer.all_special_ids, *encoder.preparer.renderer.compression}
    assert tokenizer.decode(context) == typed and not row.images
    neighbours = ["before", scene(0, 1).draw(), "after"]
    among = encoder.encode([neighbours[0], f"a {typed} b", *neighbours[1:]])
    np.testing.assert_allclose(np.delete(among, 1, axis=0), encoder.encode(neighbours), atol=2e-6)
    ran = run("encode", model, "-", stdin=f"before\na {typed} b\n")
    assert ran.code == 0
    np.testing.assert_array_equal(ran.vectors, encoder.encode(["before", f"a {typed} b"]))


def test_compression_tokens_stand_only_at_the_end(encoder: Encoder) -> None:
    example = encoder.preparer.item(as_message("".join(TYPED)), encoder.stage)
    ours = np.isin(example.ids, encoder.preparer.renderer.compression)
    np.testing.assert_array_equal(ours, example.roles == ROLE_ID["compression"])
    assert ours.sum() == 4 and ours[-4:].all()


def test_a_text_that_is_a_path_or_an_address_stays_text(
    model: Path, encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was tried")

    for name in ("socket.socket.connect", "socket.getaddrinfo", "socket.create_connection"):
        monkeypatch.setattr(name, refuse)
    texts = [str(pictures / "s0.png"), "http://127.0.0.1:9/x.png", "file:///etc/passwd", "data:image/png;base64,AA"]
    vectors = encoder.encode(texts)
    np.testing.assert_array_equal(vectors, encoder.encode([Text(text) for text in texts]))
    assert np.abs(vectors[0] - encoder.encode([pictures / "s0.png"])[0]).max() > 1e-3
    ran = run("encode", model, "-", stdin="".join(f"{text}\n" for text in texts))
    assert ran.code == 0
    np.testing.assert_array_equal(ran.vectors, vectors)
    np.testing.assert_array_equal(run("encode", model, "--text", texts[0]).vectors, encoder.encode([texts[0]]))
