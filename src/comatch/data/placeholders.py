"""Placeholders of the field's formats, such as `<image>`: each gives its place to the next picture of the row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from comatch.data.columns import empty
from comatch.errors import ContentError


@dataclass(frozen=True)
class Placeholder:
    """How a format marks the place of a picture, and which marks of its family we would not understand."""

    mark: str
    family: re.Pattern[str]

    def count(self, texts: Sequence[str]) -> int:
        """How many pictures the texts have room for. Raises ContentError for what is no text, or marks something else."""
        for text in texts:
            if not isinstance(text, str):
                raise ContentError(f"found {type(text).__name__} where a text must be")
            for found in self.family.findall(text):
                if found != self.mark:
                    raise ContentError(f"placeholder {found} is unknown; allowed: {self.mark}, once for each picture")
        return sum(text.count(self.mark) for text in texts)

    def parts(self, texts: Sequence[str], pictures: Sequence[Any]) -> list[list[Any]]:
        """The parts of each text, as `as_message` takes them, with the next picture wherever the mark stands.

        Raises ContentError unless there are as many marks as pictures.
        """
        if (marks := self.count(texts)) != len(pictures):
            raise ContentError(f"{len(pictures)} pictures, but {marks} times {self.mark} in the text; one mark stands for one picture")
        if any(map(empty, pictures)):
            raise ContentError(f"of {len(pictures)} pictures one is empty; take it out with its {self.mark}")
        rest = iter(pictures)
        found: list[list[Any]] = []
        for text in texts:
            first, *others = text.split(self.mark)
            found.append([first, *(part for other in others for part in ({"image": next(rest)}, other))])
        return found


IMAGE: Final = Placeholder("<image>", re.compile(r"<(?:image|video|audio)>"))
MMEB_IMAGE: Final = Placeholder("<|image_1|>", re.compile(r"<\|(?:image|video|audio)_\d+\|>"))
