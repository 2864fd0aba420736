"""Parsing of what people pass in: a str is text, pictures are typed, paths of data stay below their root."""

from __future__ import annotations

import base64
import copy
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PIL

from comatch.content import Image, Message, Text, Video, as_message, as_messages
from comatch.errors import ContentError, ImageError
from comatch.pictures import ImageLimits

_seen: list[str] = []
_watching = False


def _watch(event: str, args: tuple[object, ...]) -> None:
    if _watching and event.split(".")[0] in ("open", "socket", "urllib", "os", "subprocess"):
        _seen.append(f"{event} {args[:1]}")


sys.addaudithook(_watch)  # sees every opened file and every socket, in C code too


@contextmanager
def watched() -> Iterator[list[str]]:
    global _watching
    _seen.clear()
    _watching = True
    try:
        yield _seen
    finally:
        _watching = False


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    PIL.new("RGB", (4, 3), "red").save(path)
    return path


def kinds(message: Message) -> list[str]:
    return [type(part).__name__ for part in message.parts]


# Row 9: a text that is a path or an address


def test_a_str_is_text_and_touches_neither_files_nor_network(picture: Path) -> None:
    url = "http://127.0.0.1:9/x.png"
    texts = [str(picture), url, "file:///etc/passwd", "data:image/png;base64,AAAA", "//host/x.png", "x.png"]
    as_message("the codecs of text are modules, which are files")
    with watched() as seen:
        messages = as_messages(texts)
        as_messages([{"text": text} for text in texts] + [[text, text] for text in texts])
        as_messages([{"role": "user", "content": text} for text in texts])
        for message in messages:
            hash(message)
    assert seen == []
    assert messages == [Message((Text(text),)) for text in texts]
    with watched() as seen:  # the guard is not blind
        as_message(picture).images[0].load()
    assert any("red.png" in event for event in seen)


def test_parsing_opens_no_picture_file() -> None:
    with watched() as seen:
        message = as_message({"text": "a", "image": "no/such/file.png"})
    assert seen == []
    with pytest.raises(ImageError, match=r"'no/such/file\.png' cannot be read: No such file"):
        _ = message.images[0].size


@pytest.mark.parametrize(
    "address",
    [
        "http://a/x.png", "https://a/x.png", "HTTPS://a/x.png", " https://a/x.png", "ftp://a/x.png", "s3://a/x.png",
        "gs://a/x", "//host/x.png", "\\\\host\\x.png", "http:\\\\host", "file:///etc/passwd", "file:x.png",
        "FILE:/x.png", "zip://x.png::http://a/b.zip",
    ],
)  # fmt: skip
def test_addresses_in_a_pictures_place_are_refused(address: str) -> None:
    for item in (
        {"image": address},
        {"images": [address]},
        {"video": [address]},
        {"image": {"bytes": None, "path": address}},
        [{"type": "image_url", "image_url": {"url": address}}],
        {"role": "user", "content": [{"type": "image_url", "image_url": address}]},
    ):
        with watched() as seen, pytest.raises(ImageError, match="is an address, and nothing is fetched"):
            as_message(item)
        assert seen == []


# Every form of input


def test_every_form_of_a_picture_gives_the_same_pixels(picture: Path) -> None:
    data = picture.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    array = np.zeros((3, 4, 3), np.uint8)
    array[:, :, 0] = 255
    forms = [
        picture, data, bytearray(data), PIL.open(picture), array,
        {"image": picture}, {"image": str(picture)}, {"image": data}, {"image": uri}, {"image": array},
        {"images": [picture]}, {"image": {"bytes": data, "path": "http://ignored/x"}},
        {"image": {"bytes": None, "path": str(picture)}}, {"type": "image", "image": PIL.open(picture)},
        {"type": "image_url", "image_url": {"url": uri}}, {"type": "image_url", "image_url": str(picture)},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(picture)}}]},
        Image(picture),
    ]  # fmt: skip
    for form in forms:
        (part,) = as_message(form).parts
        assert isinstance(part, Image) and part.size == (4, 3)
        loaded = part.load()
        assert loaded.mode == "RGB" and loaded.tobytes() == array.tobytes(), form


def test_order_of_keys_and_parts_is_kept(picture: Path) -> None:
    assert kinds(as_message({"text": "a", "image": picture})) == ["Text", "Image"]
    assert kinds(as_message({"image": picture, "text": "a"})) == ["Image", "Text"]
    row = {"video": [picture, picture], "text": "a", "images": [picture, picture], "image": picture}
    assert kinds(as_message(row)) == ["Video", "Text", "Image", "Image", "Image"]
    mixed = as_message(["a", picture, {"text": "b", "image": picture}, Text("c"), as_message("d")])
    assert kinds(mixed) == ["Text", "Image", "Text", "Image", "Text", "Text"]
    assert mixed.text == "a\nb\nc\nd" and len(mixed.images) == 2
    assert as_message(("a", picture)) == as_message(["a", picture]) != as_message([picture, "a"])


def test_chat_turns_are_joined(picture: Path) -> None:
    parts = [{"type": "text", "text": "what?"}, {"type": "image", "image": picture}]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}]
    assert as_message(chat) == Message((Text("be brief"), Text("what?"), Image(picture)))
    assert as_message(chat[1]) == as_message([chat[1]]) == as_message(parts)
    assert kinds(as_message({"type": "video", "video": [picture]})) == ["Video"]


def test_messages_can_be_compared_copied_and_hashed(picture: Path) -> None:
    items = ["a", picture, PIL.open(picture), {"video": [picture], "text": "x"}]
    messages = as_messages(items)
    assert copy.deepcopy(messages) == messages == as_messages(messages)
    assert len({*messages, *as_messages(items)}) == len(items)
    assert "\\x" not in repr(messages) and len(repr(messages)) < 600


# Row 7: texts


@pytest.mark.parametrize(
    "nothing",
    [None, float("nan"), np.float64("nan"), "", "   ", "\n\t\u2003", "\0", [], (), {}, [""], {"text": ""},
     {"text": None}, {"text": float("nan"), "image": None}, {"images": []}, {"role": "user", "content": ""},
     {"role": "user", "content": None}, {"role": "user"}, [{"role": "user", "content": []}], {"video": []},
     {"type": "text"}, {"type": "text", "text": None}, {"type": "image", "image": None},
     {"type": "image_url", "image_url": {}}, {"image": {"bytes": None, "path": None}}, {"image": ""}, [None]],
)  # fmt: skip
def test_nothing_is_refused_with_its_position(nothing: object) -> None:
    with pytest.raises(ContentError, match=r"^item 2: ") as caught:
        as_messages(["a", "b", nothing])
    assert caught.value.position == 2


def test_blank_text_beside_a_picture_is_dropped(picture: Path) -> None:
    alone = as_message(picture)
    nan = float("nan")
    for item in ({"text": "", "image": picture}, [" ", picture, "\0"], {"text": nan, "image": picture}):
        assert as_message(item) == alone
    assert Message((Text("\n"), Image(picture))) == alone


def test_text_is_kept_except_nul_and_lone_surrogates() -> None:
    kept = ["שלום  عالم", "👩‍👩‍👧", "  a b\n", "<|im_end|><image>", "\ufeffx", "e\u0301", "\U0010ffff"]
    kept.append("x" * 1_000_000)
    assert [as_message(text).text for text in kept] == kept
    assert as_message("a\0b").text == "ab"
    assert as_message("a\ud800b").text == "a\ufffdb" and as_message("\udfff\udfff").text == "\ufffd\ufffd"
    assert as_message("\ud83d\ude00").text == "😀"  # two halves of one character are joined
    assert as_message(np.str_("a")).text == "a" and type(as_message(np.str_("a")).text) is str
    as_message("a\ud800b").text.encode()


# Refusals say what is allowed


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"txt": "a"}, r"unknown key 'txt'; allowed: text, image, images, video"),
        ({"text": "a", 3: "b"}, r"unknown key 3"),
        ({"text": 3}, r"text must be a str, not int"),
        ({"text": b"a"}, r"text must be a str, not bytes"),
        (7, r"int cannot be embedded; allowed: str, pathlib\.Path, bytes"),
        (1.5, r"1\.5 cannot be embedded"),
        ([["a"]], r"lists do not nest"),
        ({"images": "x.png"}, r'"images" must be a list of pictures, not str'),
        ({"video": "x.mp4"}, r'"video" must be a list'),
        ({"video": [b"x"] * 1001}, r"a video of 1,001 frames, allowed are 1,000"),
        ({"image": 3}, r"int is no picture; allowed: pathlib\.Path, bytes, PIL image"),
        ({"image": {"bytes": "/etc/passwd"}}, r"str is no picture"),
        ({"image": {"url": "x"}}, r"unknown key 'url'; allowed: bytes, path"),
        ({"image": "data:image/png,abc"}, r"data URI must look like"),
        ({"image": "data:image/png;base64,@@@"}, r"data URI has damaged base64"),
        ({"image": "data:image/png;base64,"}, r"data URI is empty"),
        ({"type": "audio", "audio": "x"}, r"part type 'audio' is unknown; allowed: text, image, image_url"),
        ({"type": "text", "text": "a", "image": "b"}, r"unknown key 'image'; allowed: type, text"),
        ({"type": ["text"], "text": "a"}, r"part type \['text'\] is unknown"),
        ({"type": "image_url", "image_url": {"url": "x", "size": 1}}, r"unknown key 'size'; allowed: url"),
        ({"role": "assistant", "content": "a"}, r"an assistant turn cannot be embedded"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], r"an assistant turn"),
        ({"role": "tool", "content": "a"}, r"role 'tool' is unknown; allowed: system, user"),
        ({"role": "system", "content": "a"}, r"without a user turn"),
        ({"role": "user", "content": "a", "name": "b"}, r"unknown key 'name'; allowed: role, content"),
        ({"role": "user", "content": {"text": "a"}}, r"content of a turn must be a text or a list"),
        (["a", {"role": "user", "content": "a"}], r"a chat turn cannot stand among parts"),
        ({"role": "user", "content": [{"role": "user", "content": []}]}, r"a chat turn cannot stand among"),
        (np.zeros((2, 2)), r"array of float64 with shape \[2, 2\] is not a picture"),
        (np.zeros((2, 2, 2), np.uint8), r"shape \[2, 2, 2\] is not a picture; allowed: uint8 with shape"),
        (np.zeros((1, 2, 2, 3), np.uint8), r"shape \[1, 2, 2, 3\] is not a picture"),
        (np.zeros((0, 2, 3), np.uint8), r"is 2 x 0 pixels"),
    ],
)
def test_refusals_name_the_value_and_what_is_allowed(item: object, message: str) -> None:
    with pytest.raises(ContentError, match=message):
        as_message(item)


def test_hostile_depth_ends_at_once() -> None:
    deep: object = "a"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ContentError, match="lists do not nest"):
        as_message(deep)


def test_one_item_is_not_a_list_of_items(picture: Path) -> None:
    array = np.zeros((2, 2, 3), np.uint8)
    for item in ("abc", b"abc", picture, {"text": "a"}, as_message("a"), array, 3, None):
        with pytest.raises(ContentError, match="expected a list of items"):
            as_messages(item)  # type: ignore[arg-type]
    assert len(as_messages(text for text in "abc")) == 3


def test_a_large_data_uri_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "data:image/png;base64," + "A" * 4_000
    assert as_message({"image": uri}, limits=ImageLimits(max_bytes=3_000)).images  # 4 letters are 3 bytes
    monkeypatch.setattr(base64, "b64decode", lambda *a, **k: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"has 3,000 bytes, allowed are 2,999"):
        as_message({"image": uri}, limits=ImageLimits(max_bytes=2_999))


# Row 12: paths that come from data


def test_paths_from_data_stay_below_their_root(tmp_path: Path, picture: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    inside = root / "sub" / "in.png"
    inside.write_bytes(picture.read_bytes())
    (root / "link.png").symlink_to(inside)
    (root / "out.png").symlink_to(picture)
    (root / "up").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    good = ["sub/in.png", "./sub/in.png", "sub/../sub/in.png", str(inside), "link.png", "up/root/sub/in.png"]
    for name in good:
        (image,) = as_message({"image": name}, root=root).images
        assert image.size == (4, 3) and image.source == inside.resolve()
    bad = [
        "../red.png", "sub/../../red.png", str(picture), "out.png", "up/red.png", "/etc/passwd", "..", "loop",
        "file:///etc/passwd", "sub/in.png\0.txt", "\0", "nothing/../../red.png", str(root) + "2/x.png",
    ]  # fmt: skip
    for name in bad:
        for slot in (name, {"bytes": None, "path": name}):
            with pytest.raises(ImageError):
                as_message({"text": "a", "image": slot}, root=root)
    with pytest.raises(ImageError, match="lies outside of"):
        as_message(picture, root=root)  # a Path is held to the same rule
    for name in ("sub/in.png\0", "a\0b"):
        with pytest.raises(ImageError, match="NUL"):
            as_message({"image": name})
    assert as_message({"image": str(picture)}).images[0].size == (4, 3)  # no root: the caller's own path


def test_video_frames_and_nested_slots_keep_the_root(tmp_path: Path) -> None:
    for item in (
        {"video": ["../a.png"]},
        {"images": ["../a.png"]},
        [{"type": "image", "image": "../a.png"}],
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "../a.png"}}]},
    ):
        with pytest.raises(ImageError, match="lies outside of"):
            as_message(item, root=tmp_path / "root")
        assert as_message(item).parts


# Values are what they were when they were passed


def test_later_changes_by_the_caller_do_not_reach_us() -> None:
    array, image, data = np.zeros((2, 2, 3), np.uint8), PIL.new("RGB", (2, 2)), bytearray(b"abc")
    parts = [Image(array), Image(image), Image(data)]
    digests = [part.digest for part in parts]
    array[:], data[:] = 255, b"xyz"
    image.putpixel((0, 0), (9, 9, 9))
    parts[1].load().putpixel((0, 0), (7, 7, 7))
    assert [part.digest for part in parts] == digests
    assert parts[1].load().getpixel((0, 0)) == (0, 0, 0)
    assert digests[0] == digests[1] != Image(array).digest


def test_frozen_and_never_empty() -> None:
    with pytest.raises(AttributeError):
        as_message("a").parts = ()  # type: ignore[misc]
    with pytest.raises(ContentError, match="at least one frame"):
        Video(())
    with pytest.raises(ContentError, match="empty"):
        Message(())


def test_import_is_light() -> None:
    code = "import sys, comatch.content; print([m for m in ('numpy', 'PIL', 'torch') if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert time.perf_counter() - start < 5  # a torch import on two busy cores takes longer
