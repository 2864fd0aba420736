"""YAML as people mean it: plain data only, and the line of every key.

Values follow the core schema of YAML 1.2. PyYAML alone reads `5e-5` as text, `010` as eight, `1:30` as
ninety, `no` as false, and lets the second of two equal keys win. Tags (and so code), anchors and aliases are
refused: a config is data, written out.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from comatch.errors import ConfigError

Key = tuple[str | int, ...]
"""A place in nested data: ("stages", "match", "steps"), ("adapter", "targets", 0)."""


class _Loader(yaml.SafeLoader):
    """Reads values by the patterns below only."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would read as something other than text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern in (
    ("null", r"~|null|Null|NULL|"),
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?(0|[1-9][0-9]*)"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
    ),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def parse(text: str, source: str) -> tuple[Any, dict[Key, int]]:
    """The data in `text`, and the line of every key; `source` names it in errors. Raises ConfigError."""
    lines: dict[Key, int] = {}
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, yaml.TagToken | yaml.AnchorToken | yaml.AliasToken):
                kind = type(token).__name__.removesuffix("Token").lower()
                where = f"{source}:{token.start_mark.line + 1}"
                raise ConfigError(f"{where}: a YAML {kind} is refused; write the plain value out")
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _note_lines(node, (), lines, source)
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line} is not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error


def dump(value: Any, *, one_line: bool = False) -> str:
    """Plain data as text that `parse` reads back to an equal value."""
    width = float("inf") if one_line else 110
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width, default_flow_style=one_line
    )
    return str(text).removesuffix("...\n")


def _note_lines(node: yaml.Node, path: Key, lines: dict[Key, int], source: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _note_lines(child, (*path, index), lines, source)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        where = f"{source}:{key.start_mark.line + 1}"
        if key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{where}: key {key.value!r} is not text; put it in quotes")
        here = (*path, str(key.value))
        if here in lines:
            name = ".".join(map(str, here))
            raise ConfigError(f"{where}: key {name!r} stands twice, first in line {lines[here]}; keep one")
        lines[here] = key.start_mark.line + 1
        _note_lines(value, here, lines, source)
