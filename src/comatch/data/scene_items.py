"""What a scene can be shown as besides one picture: as a text, in two pictures with another scene, or as a short video.

Each is a pure function of the scene, so that a dialogue and a pair of one row show the same. What can be asked is asked of its views, the
scenes that are to be seen in it: "in the second picture: what colour is the ring?" has the answer that the second scene has.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from comatch.content import Image, Message, Text, Video
from comatch.data.scene_text import NOTHING, article, look
from comatch.data.scene_truth import Dice
from comatch.data.scenes import Scene, scene

ITEMS: Final = ("texts", "pictures", "frames")
_FRAMES: Final = 4
Turn = tuple[str, str]


class Shown(NamedTuple):
    """An item and its truth.

    views: where a scene is to be seen in it ("" for everywhere), and the scene. events: (question, answer) about all of it. request: asks
    for a description.
    """

    message: Message
    views: tuple[tuple[str, Scene], ...]
    events: tuple[Turn, ...] = ()
    request: str = ""

    def turns(self, seed: int, n: int) -> list[Turn]:
        """`n` different questions with their answers."""
        if len(self.views) == 1:
            return [(question, answer) for question, answer, _ in self.views[0][1].dialogue(seed, n)]
        asked = [(f"{where}: {question}", answer) for where, view in self.views for question, answer, _ in view.dialogue(seed, n)]
        return Dice("asked", seed).shuffled([*asked, *self.events])[:n]

    def describe(self, seed: int) -> Turn:
        """A request to describe the item, and everything there is to say."""
        request = self.request or self.views[0][1].describe(seed)[0]
        return request, _listed([(where, view.dense_caption()) for where, view in self.views])

    def caption(self, seed: int) -> str:
        """The same facts in drawn orders and wordings."""
        return _listed([(where, view.caption(seed)) for where, view in self.views])


def shown(row: Scene, how: str | None) -> Shown:
    """A scene as one of ITEMS, or as one picture."""
    if how == "texts":
        return Shown(Message((Text(row.caption(row.noise)),)), (("", row),))
    if how == "pictures":
        other = scene(row.noise, 0, row.split)
        views = ("in the first picture", row), ("in the second picture", other)
        return Shown(Message((_image(row), _image(other))), views, request="describe both pictures.")
    return _video(row) if how == "frames" else Shown(Message((_image(row),)), (("", row),))


def _video(row: Scene) -> Shown:
    """Frames in which everything trembles, and between two of which an object comes or leaves."""
    dice = Dice("video", row.noise)
    after = row.afterwards(row.noise)
    change = 1 + dice.below(_FRAMES - 1)
    frames = [(row if k < change else after).redrawn(k) for k in range(_FRAMES)]
    came, left = (set(one.things) - set(two.things) for one, two in ((after, row), (row, after)))
    events = tuple(
        (question, ", ".join(article(look(thing)) for thing in things) or NOTHING)
        for question, things in (("what comes into the video?", came), ("what leaves the video?", left))
    )
    views = ("in the first frame", row), ("in the last frame", after)
    return Shown(Message((Video(tuple(map(_image, frames))),)), views, events, "describe the first and the last frame.")


def _image(view: Scene) -> Image:
    return Image(view.draw())


def _listed(told: list[tuple[str, str]]) -> str:
    return "; ".join(f"{where}: {what}" if where else what for where, what in told)
