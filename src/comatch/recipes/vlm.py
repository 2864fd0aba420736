"""A plain VLM: describe pictures, answer questions too, hold dialogues, then rehearse all of it. It makes the base of comatch-nano.

Dense descriptions come first, because they supervise every attribute at once; from questions alone a small model hardly learns to see.
"""

from __future__ import annotations

from dataclasses import replace

from comatch.recipe import Recipe, Stage, Visibility

_DESCRIBE = Stage(
    "describe",
    Visibility(("context", "dialogue"), ("c.", "cc")),
    {"next_token": 1.0},
    layout="chat",
)

RECIPES = (Recipe("vlm", tuple(replace(_DESCRIBE, name=name) for name in ("describe", "answer", "converse", "rehearse"))),)
