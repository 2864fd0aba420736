"""Wrong answers to look at: what was asked, what the model took, what would have been right, as pictures where there are any."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, Literal

from comatch.content import Image, Message, Video
from comatch.drawing.page import Picture
from comatch.errors import ContentError
from comatch.evaluation.records import Prediction, TaskResult
from comatch.evaluation.tasks import Task

Show = Callable[[str, Literal["query", "candidate"], str], Message]
"""(task, side, key) to the item: `key` is a `Prediction.query`, or its `chosen` or `gold`."""

_SIDE = 176
_BUDGET = 3_000_000


def showing(task_of: Callable[[str], Task]) -> Show:
    """The items of tasks by their names; `task_of` reads a task when its first item is asked for.

    A key that the task lacks is a ContentError, which the page tells in the item's place.
    """

    @cache
    def items(task: str) -> dict[tuple[str, str], Message]:
        read = task_of(task)
        known: dict[tuple[str, str], Message] = {}
        for side, messages, names in (("query", read.queries, read.ids), ("candidate", read.pool, read.names)):
            for name, message in zip(names or map(str, range(len(messages))), messages, strict=True):
                known.setdefault((side, name), message)
        return known

    def show(task: str, side: Literal["query", "candidate"], key: str) -> Message:
        if (side, key) not in items(task):
            raise ContentError(f"{task} has no {side} of this name")
        return items(task)[side, key]

    return show


def mistakes(tasks: Sequence[TaskResult], show: Show | None, most: int = 2) -> tuple[list[dict[str, Any]], int]:
    """Rows for a page's table: up to `most` wrong answers of each task, the surest ones first; and how many more there would be.

    The surest are those whose wrong answer won by the largest margin. Without `show` items stand as their keys.
    A page stays small: when pictures have used up 3 MB, what is left is only counted.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    used = left = 0
    for place, task, prediction in _picked(tasks, most):
        if used > _BUDGET:
            left += 1
            continue
        row = _row(task, prediction, show)
        used += sum(len(cell.uri) for cell in row.values() if isinstance(cell, Picture))
        rows.append((place, row))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])], left


def _picked(tasks: Sequence[TaskResult], most: int) -> Iterator[tuple[int, TaskResult, Prediction]]:
    """The surest mistake of each task, then the second of each, and so on, so that a full page still shows every task."""
    wrong = [sorted((p for p in task.predictions if not p.correct), key=_surest_first) for task in tasks]
    for rank in range(most):
        for place, (task, found) in enumerate(zip(tasks, wrong, strict=True)):
            if rank < len(found):
                yield place, task, found[rank]


def _surest_first(prediction: Prediction) -> tuple[bool, float]:
    return prediction.rank == 0, prediction.margin


def _row(task: TaskResult, prediction: Prediction, show: Show | None) -> dict[str, Any]:
    margin = "broken vector" if prediction.rank == 0 else "tie" if prediction.tie else f"{prediction.margin:+.3f}"
    return {
        "task": task.name,
        "query": _cell(task.name, "query", prediction.query, show),
        "chosen": _cell(task.name, "candidate", prediction.chosen, show),
        "right": _cell(task.name, "candidate", prediction.gold, show),
        "margin": margin,
        "rank": f"{prediction.rank or '–'} of {prediction.candidates}",
    }


def _cell(task: str, side: Literal["query", "candidate"], key: str, show: Show | None) -> Picture | str:
    if show is None:
        return _short(key)
    try:
        message = show(task, side, key)
        pictures = [*message.images, *(frame for part in message.parts if isinstance(part, Video) for frame in part.frames)]
        words = _short(message.text)
        if not pictures:
            return words
        more = f" (the first of {len(pictures)} pictures)" if len(pictures) > 1 else ""
        return Picture(_thumbnail(pictures[0]), alt=words or _short(key) or side, caption=words + more)
    except ContentError as error:
        return f"{_short(key)} (cannot be shown: {error})"


def _thumbnail(image: Image) -> str:
    """A small JPEG as a `data:` URI."""
    picture = image.load(at_least=(_SIDE, _SIDE))
    picture.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _short(text: str) -> str:
    return textwrap.shorten(text, 180, placeholder=" …") or text[:180]
