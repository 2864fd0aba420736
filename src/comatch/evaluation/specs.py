"""How each dataset of MMEB is read, from `tasks.toml`: strings, columns, and where its files lie."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from comatch.content import Image, Video
from comatch.errors import EvaluationError
from comatch.evaluation.protocols import IMAGE, VIDEO, Item
from comatch.evaluation.suites import places


@dataclass(frozen=True)
class Spec:
    """One dataset; the fields are those that the head of `tasks.toml` explains."""

    name: str
    parser: str
    direction: str
    query: str
    target: str
    mode: str = "local"
    repo: str = ""
    config: str = ""
    part: str = "test"
    frames: str = ""
    labels: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The folder of its tables: the last part of its hub id, else its name."""
        return self.repo.rpartition("/")[2] or self.name

    def item(self, text: str, pictures: tuple[Image | Video, ...] = (), *, target: bool = False) -> Item:
        """A side whose whole published text is known."""
        instruction, body = _apart(text, self.target if target else self.query)
        return Item(text, pictures, instruction, body, target)

    def filled(self, body: str, pictures: tuple[Image | Video, ...] = (), *, target: bool = False, template: str = "") -> Item:
        """A side by the dataset's own template, or another, with the row's text in it."""
        template = template or (self.target if target else self.query)
        return Item(template.replace("{}", body), pictures, _instruction(template), body if "{}" in template else "", target)


@cache
def specs(suite: str) -> Mapping[str, Spec]:
    """Every dataset of a suite, in the order of the tables: 36 for mmeb-v1, 78 for mmeb-v2. Raises EvaluationError for another suite."""
    with (Path(__file__).parent / "tasks.toml").open("rb") as file:
        known: dict[str, dict[str, Any]] = tomllib.load(file)
    wanted = places(suite)
    if lacking := sorted(set(wanted) - set(known)):
        raise EvaluationError(f"tasks.toml says nothing of {', '.join(lacking)}; each dataset of {suite} needs its strings")
    return MappingProxyType({name: Spec(name, **known[name]) for name in wanted})


def _instruction(template: str) -> str:
    return _bare(template).partition("{}")[0].strip()


def _apart(text: str, template: str) -> tuple[str | None, str]:
    """Instruction and own text of a published text; (None, "") where it does not begin with the template's instruction."""
    if template == "{}":
        return "", text
    instruction, rest = _instruction(template), _bare(text)
    if not rest.startswith(instruction):
        return None, ""
    return instruction, rest.removeprefix(instruction).removeprefix(" ").rstrip("\n")


def _bare(text: str) -> str:
    return text.removeprefix(IMAGE).removeprefix(VIDEO).lstrip("\n ")
