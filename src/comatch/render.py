"""A message and a stage become one token row with roles and supervised places.

User text is plain text: a special token typed by a user is spelled out in ordinary tokens, so it never closes a turn, inserts a
picture or imitates a compression token. Layouts: specs/coma.md 1.2 and 1.3.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from comatch.content import Dialogue, Image, Mark, Message, Text, Video
from comatch.core.batch import BARE_IMAGE
from comatch.core.nested import kept
from comatch.errors import ContentError, ModelError
from comatch.recipe import Recipe, Stage

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
_SPECIAL = re.compile(r"(<\|\w+\|>)")


@dataclass
class Row:
    """A token row under construction: ids, roles by name, which tokens are supervised, and its pictures in order."""

    ids: list[int] = field(default_factory=list)
    roles: list[str] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    cut: int = 0

    def add(self, ids: Sequence[int], role: str, supervised: bool = False) -> None:
        self.ids.extend(ids)
        self.roles.extend([role] * len(ids))
        self.supervised.extend([supervised] * len(ids))


class Renderer:
    """Turns messages and dialogues into token rows for one tokenizer and recipe.

    `image_tokens` maps a picture to its number of visual tokens (from its header). `window` is the longest row allowed; only text is cut.
    `plain` gives the tokens of a text in which nothing is special.
    """

    def __init__(self, tokenizer: Any, recipe: Recipe, image_tokens: Callable[[Image], int], first_token: int, window: int) -> None:
        self.tokenizer, self.recipe, self.window = tokenizer, recipe, window
        self.image_tokens = image_tokens
        self.plain = lru_cache(maxsize=2**16)(self._plain)
        self.compression = list(range(first_token, first_token + recipe.tokens))
        self.special_id = cache(self._special_id)
        self.special = {name: self.special_id(name) for name in SPECIAL}
        self.image_id = self.special["<|image_pad|>"]
        self.start, self.end = self.special["<|im_start|>"], self.special["<|im_end|>"]
        prompt = recipe.prompt
        self.before, self.after = _SPECIAL.split(prompt.before), self._fixed(_SPECIAL.split(prompt.after))
        left, right = prompt.picture.split("<|image_pad|>")
        self.picture = self._fixed(_SPECIAL.split(left)), self._fixed(_SPECIAL.split(right))
        self.mask = first_token + recipe.tokens
        learned = [id for id, token in tokenizer.added_tokens_decoder.items() if token.special]
        self.protected = {*self.special.values(), *tokenizer.all_special_ids, *learned, *self.compression, self.mask, BARE_IMAGE}

    def item(self, message: Message, stage: Stage, seed: int | None = None) -> Row:
        """Context and compression tokens of one item, as the recipe's prompt and the stage lay them out.

        seed: of how many compression tokens a stage with nested dropout keeps, here and below; None keeps all.
        """
        row = Row()
        *opening, lead = self._before(message.instruction)
        row.add(self._fixed(opening), "context")
        self._context(row, message, stage, reserve=len(self.after), lead=lead)
        row.add(self.after, "context")
        self._compress(row, stage, seed)
        return row

    def dialogue(self, dialogue: Dialogue, stage: Stage, seed: int | None = None) -> Row:
        """Context, compression tokens and the text to rebuild where the stage has them, and every turn in ChatML.

        Turns that do not fit the window are dropped from the end and counted in `cut`; the first turn must fit.
        """
        turns = [self._turn(i, question, answer, stage) for i, (question, answer) in enumerate(dialogue.turns)]
        if not turns:
            raise ContentError("a dialogue without turns; give at least one (question, answer) pair")
        target = self.plain(dialogue.target) if "target" in stage.visibility.roles else ()
        row = self._opening(dialogue.context, stage, len(turns[0].ids) + min(len(target), self.window // 2), seed)
        self._rebuild(row, target)
        full = False
        for turn in turns:
            # A later turn may refer to an earlier one, so none is kept once one was dropped.
            full = full or len(row.ids) + len(turn.ids) > self.window
            if full:
                row.cut += len(turn.ids)
                continue
            row.ids += turn.ids
            row.roles += turn.roles
            row.supervised += turn.supervised
        return row

    def pair(self, query: Message, answer: Message, stage: Stage, seed: int | None = None) -> Row:
        """A pair as one row: the answer's text as `target` after the query, or both one after the other where there is no such role.

        A target is text: where only the query is, the two change places. A target above half of the window is cut to that.
        Raises ContentError where both show pictures.
        """
        if "target" not in stage.visibility.roles:
            return self.item(Message((*query.parts, *answer.parts)), stage, seed)
        query, answer = (query, answer) if _is_text(answer) else (answer, query)
        if not _is_text(answer):
            raise ContentError("query and positive both show pictures, so neither can be the text that is rebuilt; leave out such rows")
        target = self.plain("\n".join(part.text for part in answer.parts if isinstance(part, Text)))
        row = self._opening(query, stage, min(len(target), self.window // 2), seed)
        self._rebuild(row, target)
        return row

    def _rebuild(self, row: Row, target: Sequence[int]) -> None:
        fits = target[: self.window // 2]
        row.add(fits, "target")
        row.cut += len(target) - len(fits)

    def _plain(self, text: str) -> tuple[int, ...]:
        """Tokens of a text in which nothing is special."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def question(self, message: Message, question: str, stage: Stage) -> Row:
        """The same row up to where the answer to a first question begins."""
        prompt = self._prompt(question, stage, first=True)
        row = self._opening(message, stage, len(prompt))
        row.add(prompt, "dialogue")
        return row

    def _opening(self, message: Message, stage: Stage, reserve: int, seed: int | None = None) -> Row:
        row = Row()
        if stage.layout == "chat":
            row.add([self.start, *self.plain("user\n")], "context")
        self._context(row, message, stage, reserve)
        self._compress(row, stage, seed)
        return row

    def _compress(self, row: Row, stage: Stage, seed: int | None) -> None:
        if "compression" in stage.visibility.roles:
            few = len(self.compression) if seed is None else kept(len(self.compression), stage.nested, seed)
            row.add(self.compression[:few], "compression")

    def _prompt(self, question: str, stage: Stage, first: bool) -> list[int]:
        """One user turn that waits for an answer; in the chat layout the first is open already."""
        head = [] if stage.layout == "chat" and first else [self.start, *self.plain("user\n")]
        return [*head, *self.plain(question), self.end, *self.plain("\n"), self.start, *self.plain("assistant\n")]

    def _turn(self, index: int, question: str, answer: str, stage: Stage) -> Row:
        everything = stage.supervise == "dialogue"
        row = Row()
        row.add(self._prompt(question, stage, first=index == 0), "dialogue", everything)
        row.add([*self.plain(answer), self.end], "dialogue", True)
        row.add(self.plain("\n"), "dialogue", everything)
        return row

    def _before(self, instruction: str) -> list[str]:
        """The prompt's opening with an item's instruction in it: texts and names of special tokens by turns, a text at both ends."""
        prompt = self.recipe.prompt
        if instruction and not prompt.takes_instruction:
            raise ContentError(f"recipe {self.recipe.name!r} has no place for the instruction {instruction[:40]!r}; say it in the text")
        told = instruction.strip()
        if told and not unicodedata.category(told[-1]).startswith("P"):
            told += prompt.stop
        return [piece.replace("{instruction}", told or prompt.instruction) for piece in self.before]

    def _fixed(self, pieces: Sequence[str]) -> list[int]:
        """Tokens of texts and names of special tokens by turns."""
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids.extend([self.special_id(piece)] if i % 2 else self.plain(piece))
        return ids

    def _context(self, row: Row, message: Message, stage: Stage, reserve: int, lead: str = "") -> None:
        """The item's parts. `lead`: the text right before them, which a text that comes first is tokenised with."""
        pieces: list[Sequence[int]] = []
        texts: list[int] = []
        join = self.recipe.prompt.join if stage.layout == "raw" else ""
        if lead and (isinstance(message.parts[0], Mark) or not isinstance(message.parts[0], Text)):
            row.add(self.plain(lead), "context")
            lead = ""
        for part in message.parts:
            if isinstance(part, Mark):
                pieces.append([*self.picture[0], BARE_IMAGE, *self.picture[1]])
            elif isinstance(part, Text):
                apart = pieces and part.text[0].isspace()
                texts.append(len(pieces))
                pieces.append(self.plain(part.text if apart else lead + part.text))
            elif isinstance(part, Image | Video):
                for image in part.frames if isinstance(part, Video) else (part,):
                    pieces.append([*self.picture[0], *[self.image_id] * self.image_tokens(image), *self.picture[1]])
                    row.images.append(image)
            lead = join
        if self.recipe.instruction:
            pieces.append(self.plain("\n" + self.recipe.instruction))
        row.cut += self._cut(pieces, texts, reserve + len(row.ids))
        for piece in pieces:
            row.add(piece, "context")

    def _cut(self, pieces: list[Sequence[int]], texts: list[int], reserve: int) -> int:
        excess = sum(map(len, pieces)) + self.recipe.tokens + reserve - self.window
        cut = 0
        for i in sorted(texts, key=lambda i: -len(pieces[i])):
            if excess <= cut:
                break
            take = min(len(pieces[i]), excess - cut)
            pieces[i] = pieces[i][: len(pieces[i]) - take]
            cut += take
        if excess > cut:
            raise ContentError(
                f"its pictures alone take {excess - cut} tokens more than the window of {self.window}; "
                "lower images.max_pixels or pass fewer pictures"
            )
        return cut

    def _special_id(self, name: str) -> int:
        ids = self.tokenizer.encode(name, add_special_tokens=False)
        if len(ids) != 1:
            raise ModelError(f"the tokenizer has no single token {name!r}; use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL tokenizer")
        return int(ids[0])


def _is_text(message: Message) -> bool:
    return all(isinstance(part, Text) for part in message.parts)
