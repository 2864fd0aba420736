"""docs/data.md holds: its files are written, and its YAML reads them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from reader_files import packed, shape
from table_files import png

from comatch import plain_yaml
from comatch.config import DataConfig
from comatch.content import Dialogue, Group
from comatch.data.sources import SOURCES, open_source

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = {title: text for title, text in re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE) if title in SOURCES}
FILE = re.compile(r"^`([^`\n]+)`\n```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def written(folder: Path, text: str) -> None:
    for name, kind, content in FILE.findall(text):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "members":
            members = [line.split(maxsplit=1) for line in content.splitlines()]
            packed(path, [(name, said[0].encode() if said else png(int(name[3]))) for name, *said in members])
        else:
            path.write_text(content, encoding="utf-8")
    for place in ("", "assets", "MMEB-train/images"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            (folder / place / f"{i}.png").write_bytes(png(40 * i))


def units(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> list[Group | Dialogue]:
    written(folder, text)
    monkeypatch.chdir(folder)
    found: list[Group | Dialogue] = []
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        config = DataConfig.model_validate(plain_yaml.parse(block, "docs/data.md")[0]["data"])
        options = config.model_dump(include={"path", "split", "columns", "subset", "root", "corpus"})
        source = open_source(config.source, **options)
        pairs = SOURCES[config.source].group and not any(role.startswith("dialogue") for role in config.columns or ())
        found.append(source.group(0) if pairs else source.dialogue(0))
    return found


def test_every_format_has_its_section() -> None:
    assert set(SECTIONS) == set(SOURCES) - {"scenes", "emoji"}
    assert all(f"`{name}`" in PAGE for name in SOURCES)


@pytest.mark.parametrize("name", SECTIONS)
def test_the_examples_are_read_by_their_yaml(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = units(tmp_path, SECTIONS[name], monkeypatch)
    assert len(found) == (2 if name == "table" else 1)
    for unit in found:
        messages = [unit.context] if isinstance(unit, Dialogue) else [unit.query, *unit.positives, *unit.negatives]
        assert any(message.images for message in messages) and all(map(shape, messages))
        assert isinstance(unit, Dialogue) or name == "webdataset" or unit.negatives, "hard negatives reach the group"
