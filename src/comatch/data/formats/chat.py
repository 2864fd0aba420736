"""Chat rows with `<image>` in their texts: ms-swift's groups and dialogues, LLaVA's and ShareGPT's dialogues.

    ms-swift   {"messages": [{"role": "user", "content": "<image>what?"}], "images": ["q.png"],
                "positive_messages": [[{"role": "user", "content": "a cat"}]], "positive_images": [[]],
                "negative_messages": [[...], ...], "negative_images": [[...], ...]}
               or the older {"query": "<image>", "response": "a cat", "rejected_response": ["a dog"], "images": ["q.png"]}
    llava      {"image": "q.png", "conversations": [{"from": "human", "value": "<image>\\nwhat?"}, {"from": "gpt", "value": "a cat"}]}

Every `<image>` stands for one picture, in order; other counts and `<video>` are faults of the row. In dialogues the pictures
are the context and the marks leave the questions. Source: specs/conventions.md 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Final

from comatch.content import Message, as_message
from comatch.data.columns import checked_turns, empty, spoken
from comatch.data.placeholders import IMAGE
from comatch.data.record import Options, Pair, Record, Rows, Turns, told
from comatch.data.scene_truth import Dice
from comatch.data.tables import Table, open_table
from comatch.data.text_tables import Row
from comatch.errors import ContentError, DataError


def _open_swift(options: Options) -> tuple[Rows, Options]:
    table = _opened(options, ("messages", "query"))
    if "label" in table.filled:
        raise DataError(
            f"{table.path} has a column 'label': pairs with labels are for other losses. Keep the pairs that match, and leave it out"
        )
    return table, options


def _open_llava(options: Options) -> tuple[Rows, Options]:
    return _opened(options, ("conversations", "messages")), options


def _opened(options: Options, one_of: tuple[str, ...]) -> Table:
    table = open_table(options.path, allow_cut=options.allow_cut)
    if not set(one_of) & set(table.columns):
        raise DataError(f"{table.path} has no column {' or '.join(one_of)}; its columns are {', '.join(table.columns)}")
    return table


def _dialogue(row: Row, options: Options, dice: Dice) -> tuple[Message, Turns]:
    pairs = spoken(row.get("conversations") or row.get("messages"))
    if answers := IMAGE.count([answer for _, answer in pairs]):
        raise ContentError(f"{answers} times {IMAGE.mark} in an answer; pictures stand in questions")
    pictures = _pictures(row)
    IMAGE.parts([question for question, _ in pairs], pictures)  # refuses other counts
    if not pictures:
        raise ContentError("a dialogue without a picture; there is no context to compress")
    context = as_message([{"image": picture} for picture in pictures], root=options.root)
    turns = checked_turns([(question.replace(IMAGE.mark, ""), answer) for question, answer in pairs])
    return context, told(turns, options, dice)


def _pictures(row: Row) -> list[Any]:
    """What `image` or `images` holds, as a list."""
    cells = [row[name] for name in ("image", "images") if not empty(row.get(name))]
    if len(cells) > 1:
        raise ContentError("both image and images are set; one must hold all pictures")
    cell = cells[0] if cells else []
    return cell if isinstance(cell, list) else [cell]


def _group(row: Row, options: Options, dice: Dice) -> Pair:
    if empty(row.get("positive_messages")):
        return _older_group(row, options.root)
    query = _said(row.get("messages"), _pictures(row), options.root)
    if any(turn["role"] == "assistant" for turn in row["messages"]):
        raise ContentError("messages has an assistant turn beside positive_messages; the anchor is system and user turns alone")
    negatives = [] if empty(row.get("rejected_messages")) else _sides(row, "rejected", options.root)
    return query, _sides(row, "positive", options.root), [*_sides(row, "negative", options.root), *negatives]


def _sides(row: Row, name: str, root: Path) -> list[Message]:
    """One item for each list of messages, with the list of pictures at the same place."""
    sides, pictures = row.get(f"{name}_messages") or [], row.get(f"{name}_images") or []
    if not isinstance(sides, list) or not isinstance(pictures, list):
        raise ContentError(f"{name}_messages and {name}_images must be lists, one entry for each item")
    if pictures and len(pictures) != len(sides):
        raise ContentError(f"{len(sides)} {name}_messages, but {len(pictures)} {name}_images; one list of pictures for each")
    return [_said(turns, pictures[i] or [] if pictures else [], root) for i, turns in enumerate(sides)]


def _said(turns: Any, pictures: Any, root: Path) -> Message:
    """All that is said in a list of turns as one item, a system turn first."""
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns):
        raise ContentError("messages must be a list of {role: ..., content: ...}")
    if not isinstance(pictures, list):
        raise ContentError(f"images must be a list, not {type(pictures).__name__}")
    return as_message(list(chain.from_iterable(IMAGE.parts([turn["content"] for turn in turns], pictures))), root=root)


def _older_group(row: Row, root: Path) -> Pair:
    """query, response and rejected_response, or the same as user and assistant turns; they share the pictures in this order."""
    if not empty(row.get("query")):
        asks, answers = row["query"], row.get("response")
    else:
        ((asks, answers),) = _one(spoken(row.get("messages")))
    if empty(answers):
        raise ContentError("there are neither positive_messages nor a response; a pair needs a positive")
    rejected = row.get("rejected_response") or []
    sides: Sequence[Any] = [asks, answers, *(rejected if isinstance(rejected, list) else [rejected])]
    query, positive, *negatives = (as_message(parts, root=root) for parts in IMAGE.parts(sides, _pictures(row)))
    return query, [positive], negatives


def _one(turns: Turns) -> Turns:
    if len(turns) != 1:
        raise ContentError(f"{len(turns)} questions with answers, and no positive_messages; a pair has one of each")
    return turns


MS_SWIFT: Final = Record(_open_swift, _dialogue, _group)
LLAVA: Final = Record(_open_llava, _dialogue)
