"""The page holds everything itself, asks nobody for anything, and no text in it can become markup."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from comatch.drawing.page import Picture, Section, write_page
from comatch.errors import ContentError

EVIL = "<script>alert('x')</script> \"><img src=http://evil.example/x onerror=alert(1)> & </style> ü 日本"


class Reader(HTMLParser):
    """Collects tags with their attributes, and the text between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags must close in order"

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self.open[-1], data))


def png() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(stream, "png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def read(path: Path) -> tuple[str, Reader]:
    html = path.read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return html, reader


def page(tmp_path: Path) -> Path:
    sections = [
        Section(EVIL, EVIL + "\n\nsecond", [{EVIL: EVIL, "score": 0.25}, {"score": None, "more": True}], [Picture(png(), EVIL, EVIL)]),
        Section("plain", pictures=[Picture(png(), "a red box")]),
    ]
    return write_page(tmp_path / "deep" / "page.html", EVIL, sections)


def test_every_text_is_escaped_and_whole(tmp_path: Path) -> None:
    html, reader = read(page(tmp_path))
    assert "<script" not in html and "onerror=alert(1)>" not in html
    known = "html head meta title style body h1 nav ol li a section h2 p div table thead tr th tbody td figure img figcaption"
    assert " ".join(dict.fromkeys(tag for tag, _ in reader.tags)) == known
    for tag in ("title", "h1", "a", "h2", "p", "th", "td", "figcaption"):
        assert EVIL in ["".join(text for _, text in group) for group in [[(t, x)] for t, x in reader.text if t == tag]], tag
    images = [attrs for tag, attrs in reader.tags if tag == "img"]
    assert [attrs["alt"] for attrs in images] == [EVIL, "a red box"]
    assert all(set(attrs) == {"src", "alt"} for attrs in images)


def test_the_page_asks_nobody(tmp_path: Path) -> None:
    html, reader = read(page(tmp_path))
    addresses = [value for _, attrs in reader.tags for name, value in attrs.items() if name in ("src", "href", "action", "data", "srcset")]
    assert addresses and all(value and value.startswith(("data:image/png;base64,", "#s")) for value in addresses)
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    policy = next(attrs["content"] for tag, attrs in reader.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not any("style" in attrs for _, attrs in reader.tags), "inline styles would be refused by the policy"
    assert next(i for i, (_, attrs) in enumerate(reader.tags) if "http-equiv" in attrs) < [tag for tag, _ in reader.tags].index("style")
    assert not re.search(r"https?://", html.replace("http://evil.example", ""))


def test_tables_show_numbers_and_gaps(tmp_path: Path) -> None:
    rows = [{"model": "a", "hit": 0.51234, "n": 10, "tiny": 1.5e-7}, {"model": "b", "hit": None, "ok": True, "nan": float("nan")}]
    _, reader = read(write_page(tmp_path / "x.html", "t", [Section("s", table=rows)]))
    assert [text for tag, text in reader.text if tag == "th"] == ["model", "hit", "n", "tiny", "ok", "nan"]
    cells = [text for tag, text in reader.text if tag == "td"]
    assert cells == [*("a", "0.512", "10", "1.5e-07", "–", "–"), *("b", "–", "–", "–", "yes", "nan")]
    kinds = [attrs.get("class") for tag, attrs in reader.tags if tag == "th"]
    assert kinds[:3] == [None, "number", "number"]


def test_a_cell_may_be_a_picture(tmp_path: Path) -> None:
    rows = [{"query": Picture(png(), EVIL, EVIL), "margin": "-0.25", "span": "1.5 to 2"}, {"query": "word", "margin": "tie", "span": "3 %"}]
    html, reader = read(write_page(tmp_path / "x.html", "t", [Section("s", table=rows)]))
    assert [attrs["alt"] for tag, attrs in reader.tags if tag == "img"] == [EVIL] and ("small", EVIL) in reader.text
    assert "<script" not in html and "figure" not in [tag for tag, _ in reader.tags]
    assert [attrs.get("class") for tag, attrs in reader.tags if tag == "th"] == [None, None, "number"], "a word among numbers makes a text"


def test_the_page_is_little_more_than_its_pictures(tmp_path: Path) -> None:
    small = write_page(tmp_path / "a.html", "t", [Section("s")]).stat().st_size
    large = write_page(tmp_path / "b.html", "t", [Section("s", pictures=[Picture(png(), "red")] * 9)]).stat().st_size
    assert small < 4000 and large - small < 9 * (len(png()) + 120)


def test_a_page_is_replaced_and_the_same_every_time(tmp_path: Path) -> None:
    first = page(tmp_path).read_bytes()
    write_page(tmp_path / "deep" / "page.html", "other", [])
    assert page(tmp_path).read_bytes() == first


@pytest.mark.parametrize(
    "uri",
    [
        "http://x.example/y.png",
        "//x.example/y.png",
        "y.png",
        "data:text/html;base64,AAAA",
        "data:image/svg+xml;base64,AAAA",
        'data:image/png;base64,AA" onload="x',
        "data:image/png;base64,AAAA\n",
    ],
)
def test_a_picture_must_be_inside(uri: str) -> None:
    with pytest.raises(ContentError, match="data: URI"):
        Picture(uri, "alt")


def test_a_picture_needs_an_alt_text() -> None:
    with pytest.raises(ContentError, match="alt text"):
        Picture(png(), " ")
