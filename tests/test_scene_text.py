"""What is said of scenes: captions tell the whole truth, and every answer is the only true one."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise

import pytest

from comatch.data import scene_text as text
from comatch.data.scene_truth import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES, Thing
from comatch.data.scenes import Scene, scene, vocabulary
from comatch.errors import DataError

SCENES = [scene(7, index) for index in range(400)]
CORNERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
PLURALS = {"crosses": "cross"} | {f"{shape}s": shape for shape in SHAPES}


def named(phrase: str, things: tuple[Thing, ...]) -> list[Thing]:
    """The objects that a phrase such as "the small red star" or "an object at the top left" fits."""
    noun, _, place = phrase.partition(" at the ")
    found = [thing for thing in things if place in ("", thing.place)]
    for word in noun.split():
        if word not in ("a", "an", "the", "object", "objects"):
            word = PLURALS.get(word, word)
            assert word in SHAPES + COLOURS + SIZES, phrase
            found = [thing for thing in found if word in (thing.shape, thing.colour, thing.size)]
    return found


def stands(side: str, one: Thing, other: Thing) -> bool:
    """Whether one stands on that side of the other, by columns (left, right) or rows (above, below)."""
    (x, y), (other_x, other_y) = CORNERS[one.place], CORNERS[other.place]
    return {"left of": x < other_x, "right of": x > other_x, "above": y < other_y, "below": y > other_y}[side]


def neighbour(side: str, of: Thing, things: tuple[Thing, ...]) -> str:
    shift_x, shift_y = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[side]
    x, y = CORNERS[of.place]
    for thing in things:
        if CORNERS[thing.place] == (x + shift_x, y + shift_y):
            return short(thing)
    return "nothing"


def short(thing: Thing) -> str:
    return f"{'an' if thing.colour == 'orange' else 'a'} {thing.colour} {thing.shape}"


def true_answer(question: str, scene: Scene) -> str:
    """The answer by the words of the question and the truth alone; fails where it is not the only one."""
    things = scene.things

    def only(phrase: str) -> Thing:
        (thing,) = named(phrase, things)
        return thing

    def yes(fact: bool) -> str:
        return "yes" if fact else "no"

    letters = [thing.letter for thing in things if thing.letter]
    sides = "(left of|right of|above|below)"
    rules: dict[str, Callable[..., str]] = {
        r"what (?:colour )?is the background\?": lambda: scene.background,
        r"what colour is (the .+)\?": lambda name: only(name).colour,
        r"what shape is at the (.+)\?": lambda place: only(f"object at the {place}").shape,
        r"what shape is (the .+)\?": lambda name: only(name).shape,
        r"what size is (the .+)\?": lambda name: only(name).size,
        r"where is (the .+)\?": lambda name: only(name).place,
        rf"what is directly {sides} (the .+)\?": lambda side, name: neighbour(side, only(name), things),
        rf"is (the .+) {sides} (the .+)\?": lambda a, side, b: yes(stands(side, only(a), only(b))),
        r"how many letters are there\?": lambda: str(len(letters)),
        r"how many (.+) are there\?": lambda noun: str(len(named(noun, things))),
        r"is there a letter (.)\?": lambda letter: yes(letter in letters),
        r"is there (an? .+)\?": lambda noun: yes(bool(named(noun, things))),
        r"which letter does (the .+) have\?": lambda name: only(name).letter,
        r"what has letter (.)\?": lambda x: " and ".join(
            short(thing) for thing in things if thing.letter == x
        ),
    }
    for pattern, rule in rules.items():
        if match := re.fullmatch(pattern, question):
            return rule(*match.groups())
    raise AssertionError(f"unknown question: {question}")


def told(caption: str) -> tuple[str, frozenset[tuple[str, ...]]]:
    """The background and the objects that a caption of either kind speaks of, read back by patterns."""
    thing = rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: with letter (.))?"
    place = rf"at the ({'|'.join(PLACES)})"
    first = [(w, s, c, z, x) for z, c, s, x, w in re.findall(f"{thing} {place}", caption)]
    second = [(w, s, c, z, x) for w, z, c, s, x in re.findall(f"{place} {thing}", caption)]
    (background,) = re.findall(rf"an? ({'|'.join(BACKGROUNDS)}) background", caption)
    return background, frozenset(first if len(first) == len(re.findall(place, caption)) else second)


def test_captions_tell_the_whole_truth_and_nothing_else() -> None:
    orders = set()
    for seed, s in enumerate(SCENES):
        truth = (s.background, frozenset(map(tuple, s.things)))
        assert told(s.dense_caption()) == truth
        assert told(s.caption(seed)) == truth
        assert f"with {len(s.things)} objects" in s.dense_caption()
        request, answer = s.describe(seed)
        assert request in text.DESCRIBE and answer == s.dense_caption()
        orders.add(tuple(re.findall("|".join(PLACES), s.caption(seed))))
    assert len(orders) > 30
    assert len({SCENES[0].caption(seed) for seed in range(40)}) > 8


def test_every_answer_is_the_only_true_one() -> None:
    asked = Counter[str]()
    for seed, s in enumerate(SCENES):
        turns = s.dialogue(seed, 3 + seed % 7)
        assert len(turns) == 3 + seed % 7 == len({question for question, _, _ in turns})
        for question, answer, kind in turns:
            assert true_answer(question, s) == answer, (s.key, question)
            asked[kind] += 1
    assert set(asked) == set(text.KINDS) and min(asked.values()) > 80
    for wrong in (0, 10):
        with pytest.raises(DataError, match=f"{wrong} turns.*1 to 9"):
            SCENES[0].dialogue(0, wrong)


def test_the_checker_can_fail() -> None:
    wrong = 0
    for s, other in pairwise(SCENES):
        question, answer, _ = s.question(0)
        try:
            wrong += true_answer(question, other) != answer
        except ValueError:  # the question's object is not in the other scene
            wrong += 1
    assert wrong > 0.5 * len(SCENES)


def test_answers_are_not_guessable() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    wordings: dict[str, Counter[str]] = defaultdict(Counter)
    for seed in range(1500):
        for question, answer, kind in scene(11, seed).dialogue(seed, 5):
            answers[kind][answer] += 1
            if answer in ("yes", "no"):
                wordings[re.sub("|".join(SHAPES + COLOURS + SIZES), "_", question.rsplit(" ", 1)[0])][
                    answer
                ] += 1
                wordings[kind][answer] += 1
    for wording, counts in wordings.items():
        if counts.total() > 150:
            assert 0.4 < counts["yes"] / counts.total() < 0.6, (wording, counts)
    assert {"exists", "relation", "text"} <= set(wordings)
    most = {
        "colour": 0.2,
        "shape": 0.2,
        "place": 0.35,
        "background": 0.35,
        "size": 0.6,
        "count": 0.5,
        "text": 0.3,
    }
    for kind, share in most.items():
        assert answers[kind].most_common(1)[0][1] < share * answers[kind].total(), (kind, answers[kind])


def test_vocabulary_is_exactly_what_appears() -> None:
    seen = set[str]()
    for seed in range(2500):
        s = scene(5, seed)
        turns = [part for turn in s.dialogue(seed, 6) for part in turn[:2]]
        labels = [*s.classes().values(), *(phrase for phrase, _ in s.regions())]
        for said in (s.dense_caption(), s.caption(seed), *s.describe(seed), *turns, *labels):
            seen.update(re.findall(r"\w+|[^\w ]", said))
    assert seen == set(vocabulary()) | set(text.PUNCTUATION)
    assert vocabulary() == sorted(set(vocabulary())) and len(vocabulary()) < 150
