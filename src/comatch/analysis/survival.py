"""What survives the squeeze: questions answered from the compression tokens alone, kind by kind (specs/coma.md 2.5 and 10).

Beside these answers stand the two that tell what they are worth. Above: the same model may look at the context as well. Below: it is given
the compression tokens of another item, so that whatever is still right was guessed from the question; and the best single guess, the
commonest answer of the kind.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from comatch.analysis.answers import accuracy, answer, looking
from comatch.analysis.masks import dialogue_stage
from comatch.content import Image, Message
from comatch.data.scene_text import ATTRIBUTES, KINDS
from comatch.data.scene_truth import Dice
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import ContentError, RecipeError
from comatch.recipe import Recipe, Stage


@dataclass(frozen=True)
class Question:
    """A question with one true answer. kinds: the rows of the table in which it counts, its kind first: ("colour", "small object")."""

    context: Message
    question: str
    answer: str
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Kept:
    """Shares of right answers to the n questions of one kind.

    kept        from the item's compression tokens alone
    looking     from these and the context: the ceiling
    another     from the compression tokens of another item: what the question alone gives away
    commonest   by always saying the commonest answer of the question's first kind
    """

    n: int
    kept: float
    looking: float
    another: float
    commonest: float


@dataclass(frozen=True)
class Survival:
    """What of the items can still be told from their compression tokens.

    stage: the stage whose layout was used. tokens: K. trained_looking: whether the dialogue could look at the context in training; where it
    could not (the paper's CoMa), `looking` is what the model makes of a sight it was never trained to use beside the tokens, and may even
    be below `kept`. by_kind: one row per kind and one for "all". said, said_looking, said_another: the answers, in the order of
    `questions`, for paired tests.
    """

    recipe: str
    stage: str
    tokens: int
    trained_looking: bool
    by_kind: dict[str, Kept]
    questions: tuple[Question, ...] = field(repr=False, compare=False)
    said: tuple[str, ...] = field(repr=False)
    said_looking: tuple[str, ...] = field(repr=False)
    said_another: tuple[str, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON: everything but the questions and answers themselves."""
        plain = {name: getattr(self, name) for name in ("recipe", "stage", "tokens", "trained_looking")}
        return plain | {"by_kind": {kind: asdict(row) for kind, row in self.by_kind.items()}}


def survival(
    encoder: Encoder,
    questions: Sequence[Question],
    *,
    stage: Stage | None = None,
    seed: int = 0,
    longest: int = 16,
    batch_tokens: int = 8192,
) -> Survival:
    """Ask every question three times, and count exact answers: tokens alone, tokens and context, another item's tokens.

    The dialogue's view of the context is taken away or given whatever the stage's table says, so that recipes without a bottleneck are
    measured as those with one, and a matched model as one that was only compressed. stage: of the recipe where not given, the one with
    the dialogue. seed: which other item stands in. longest: tokens of an answer. batch_tokens: in one pass. Weights stay as they are.
    Raises RecipeError where no stage was trained to answer after compression tokens, ContentError for a context that cannot be read and
    where all questions are about one context, so that there is no other.
    """
    stage = stage or _speaking(encoder.recipe)
    blind, open_ = looking(stage, at_context=False), looking(stage, at_context=True)
    others = _others([question.context for question in questions], seed)
    own = [(question.context, question.question) for question in questions]
    swapped = [(other, question.question) for other, question in zip(others, questions, strict=True)]
    # In one call, because every context is in both and is then read once.
    told = answer(encoder, own + swapped, blind, longest=longest, batch_tokens=batch_tokens)
    said, said_another = told[: len(own)], told[len(own) :]
    said_looking = answer(encoder, own, open_, longest=longest, batch_tokens=batch_tokens)
    truth, kinds = [question.answer for question in questions], [question.kinds for question in questions]
    kept, seen, guessed = (accuracy(words, truth, kinds) for words in (said, said_looking, said_another))
    common = _commonest(truth, kinds)
    rows = ["all", *dict.fromkeys(names[0] for names in kinds), *sorted({name for names in kinds for name in names[1:]})]
    return Survival(
        recipe=encoder.recipe.name,
        stage=stage.name,
        tokens=encoder.recipe.tokens,
        trained_looking=stage.visibility.sees("dialogue", "context"),
        by_kind={kind: Kept(kept[kind][1], kept[kind][0], seen[kind][0], guessed[kind][0], common[kind]) for kind in dict.fromkeys(rows)},
        questions=tuple(questions),
        said=tuple(said),
        said_looking=tuple(said_looking),
        said_another=tuple(said_another),
    )


def scene_questions(n: int, *, seed: int = 0, split: str = "test") -> list[Question]:
    """At least `n` questions on drawn scenes of a split, at least two of them: one of each of the nine kinds on every scene.

    A question of a kind that is about one object counts as one about a small or a large object, too.
    """
    found = []
    for i in range(max(2, -(-n // len(KINDS)))):
        one = scene(seed, i, split)
        picture = Message((Image(one.draw()),))
        for kind in KINDS:
            thing = Dice("survival", seed, i, kind).pick(one.things) if kind in ATTRIBUTES else None
            question, true = one.ask(kind, seed, thing)
            # That a small object is small says nothing about how well small ones are seen.
            apart = (f"{thing.size} object",) if thing and kind != "size" else ()
            found.append(Question(picture, question, true, (kind, *apart)))
    return found


def _speaking(recipe: Recipe) -> Stage:
    stage = dialogue_stage(recipe)
    if stage is None:
        raise RecipeError(
            f"recipe {recipe.name!r} has no stage with the roles context, compression and dialogue, so it never learned to answer from its "
            "compression tokens; train one that does, such as coma, or read its vectors by probes (comatch inspect MODEL --probes)"
        )
    return stage


def _others(contexts: Sequence[Message], seed: int) -> list[Message]:
    """For each context another one, the same for all questions about it."""
    distinct = list(dict.fromkeys(contexts))
    if len(distinct) < 2:
        raise ContentError(f"questions about {len(distinct)} contexts; tokens of another item stand in for each, so ask about at least 2")
    round_ = Dice("another", seed).shuffled(distinct)
    following = dict(zip(round_, [*round_[1:], round_[0]], strict=True))
    return [following[context] for context in contexts]


def _commonest(truth: Sequence[str], kinds: Sequence[Sequence[str]]) -> dict[str, float]:
    """The best that one answer to all questions of a first kind can do, within each row of the table."""
    answers: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for true, names in zip(truth, kinds, strict=True):
        for name in ("all", *names):
            answers[name][names[0]][true] += 1
    rows = {name: list(by_first.values()) for name, by_first in answers.items()}
    return {name: sum(max(row.values()) for row in parts) / sum(row.total() for row in parts) for name, parts in rows.items()}
