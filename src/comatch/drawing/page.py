"""A report as one HTML file that holds everything itself: no script, no request, pictures inside, and safe whatever the texts say.

Every text is escaped, and the content security policy admits inline pictures and this page's own style (by
its hash), nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from comatch.errors import ContentError

_PICTURE = re.compile(r"data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}")
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?( to [+-]?\d+(\.\d+)?)?( %)?")
_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --soft: #5c5c63; --line: #d8d8de; --paper: #ffffff; --head: #f4f4f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #a5a5b0; --line: #3b3b43; --paper: #17171b; --head: #222228 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line) }
p { margin: .6rem 0; max-width: 46rem }
nav ol { margin: 0; padding-left: 1.3rem }
a { color: inherit }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
td:not(.number) { min-width: 7rem }
th { background: var(--head); font-weight: 600 }
.number { text-align: right; white-space: nowrap }
figure { margin: 1.2rem 0 }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px; padding: .5rem;
  border: 1px solid var(--line) }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; max-width: 46rem }
td:not(.number):has(img) { min-width: 12rem }
td img { padding: .15rem; border-radius: 4px; margin-bottom: .3rem }
td small { display: block; max-width: 16rem; font-size: .85rem; line-height: 1.4 }
@media (max-width: 40rem) { figure img { min-width: 36rem } }
@media print { body { max-width: none } figure, tr { break-inside: avoid } }
"""


@dataclass(frozen=True)
class Picture:
    """uri: a `data:` URI of a PNG, JPEG or WebP, as `figures.data_uri` makes. alt: what it shows, for those who cannot see it."""

    uri: str
    alt: str
    caption: str = ""

    def __post_init__(self) -> None:
        if not _PICTURE.fullmatch(self.uri):
            raise ContentError(
                f"a picture on a page must be a data: URI of a PNG, JPEG or WebP, got {self.uri[:40]!r}; make one with figures.data_uri"
            )
        if not self.alt.strip():
            raise ContentError("a picture on a page needs an alt text that says what it shows")


@dataclass(frozen=True)
class Section:
    """A heading, paragraphs (separated by blank lines), one table and pictures, in this order.

    table: rows as mappings of column to value (a Picture is shown); columns are the keys in order of first
    appearance, and a missing cell shows a dash.
    """

    title: str
    text: str = ""
    table: Sequence[Mapping[str, Any]] = ()
    pictures: Sequence[Picture] = ()


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write the page to `path` (UTF-8) and return it; folders above it are made, a file in its place is replaced."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(_page(title, sections), encoding="utf-8", newline="\n")
    return file


def _page(title: str, sections: Sequence[Section]) -> str:
    style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
    links = "".join(f'<li><a href="#s{i}">{escape(section.title)}</a></li>' for i, section in enumerate(sections))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
            f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(sections) > 1 else "",
            *(_section(i, section) for i, section in enumerate(sections)),
            "</body>\n</html>\n",
        ]
    )


def _section(number: int, section: Section) -> str:
    paragraphs = [p for p in re.split(r"\n\s*\n", section.text.strip()) if p]
    return "\n".join(
        [
            f'<section id="s{number}">\n<h2>{escape(section.title)}</h2>',
            *(f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs),
            _table(section.table) if section.table else "",
            *(_figure(picture) for picture in section.pictures),
            "</section>",
        ]
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numeric = {c for c in columns if all(_is_number(row.get(c)) for row in rows)}
    kind = {c: ' class="number"' if c in numeric else "" for c in columns}
    head = "".join(f'<th scope="col"{kind[c]}>{escape(str(c))}</th>' for c in columns)
    body = ["<tr>" + "".join(f"<td{kind[c]}>{_cell(row.get(c))}</td>" for c in columns) + "</tr>" for row in rows]
    # Focusable, so that a wide table can be scrolled from the keyboard.
    return (
        f'<div class="wide" tabindex="0"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n' + "\n".join(body) + "\n</tbody></table></div>"
    )


def _figure(picture: Picture) -> str:
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    image = f'<img src="{picture.uri}" alt="{escape(picture.alt)}">'
    return f'<figure><div class="wide" tabindex="0">{image}</div>{caption}</figure>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | None) or (isinstance(value, str) and _NUMBER.fullmatch(value) is not None)


def _cell(value: Any) -> str:
    if isinstance(value, Picture):
        return f'<img src="{value.uri}" alt="{escape(value.alt)}">' + (f"<small>{escape(value.caption)}</small>" if value.caption else "")
    return escape(cell_text(value))


def cell_text(value: Any) -> str:
    """A value of a table as text: numbers to three digits, a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1000 else f"{value:.3g}"
    return str(value)
