"""Lists of texts that were written into one cell, as Python or JSON, read without running anything."""

from __future__ import annotations

import ast
import json
import re

from comatch.errors import ContentError

_LARGEST = 1_000_000
_ENTRY = re.compile(r"""\s*(None|'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")\s*(,|\Z)""", re.DOTALL)


def texts_of(cell: str) -> list[str]:
    """The entries of a flat list of texts, such as "['a', None]"; None counts as "".

    Only lists of text literals are understood, so there is nothing to nest and nothing to evaluate. Raises ContentError.
    """
    if len(cell) > _LARGEST:
        raise ContentError(f"a list of {len(cell):,} characters in one cell, allowed are {_LARGEST:,}")
    body = cell.strip()
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = _python(body[1:-1])
    if not isinstance(found, list) or not all(isinstance(entry, str | None) for entry in found):
        raise ContentError(f"{cell[:80]!r} is no list of texts, such as ['a', 'b']")
    return [entry or "" for entry in found]


def _python(body: str) -> list[str | None] | None:
    """The literals between commas; None where there is anything else."""
    found: list[str | None] = []
    at = 0
    body = body.rstrip()
    while at < len(body):
        entry = _ENTRY.match(body, at)
        if entry is None:
            return None
        try:
            found.append(ast.literal_eval(entry[1]))
        except (ValueError, SyntaxError):  # an escape that names no character
            return None
        at = entry.end()
    return found
