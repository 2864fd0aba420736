"""Texts, two pictures and short videos of the generated world: what is asked is true, and the bottleneck holds for all of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from comatch.analysis.masks import attending
from comatch.backbones.base import Backbone
from comatch.config import RunConfig
from comatch.content import Image, Text, Video
from comatch.core.batch import IGNORE, ROLE_ID, Batch, Example
from comatch.core.masks import dense
from comatch.core.packing import collate
from comatch.data.scene_items import ITEMS, shown
from comatch.data.scene_text import article
from comatch.data.scenes import Scene, scene
from comatch.data.sources import open_source
from comatch.encoder import Encoder
from comatch.errors import DataError
from comatch.recipes import load_recipe
from comatch.training import loop

COMA = load_recipe("coma").with_tokens(3)
COMPRESS = COMA.stage("compress")
REBUILD = load_recipe("coma-rebuild").with_tokens(3)
Folders = Callable[[str], Path]


def pixels(image: Any) -> np.ndarray:
    assert isinstance(image, Image)
    return np.asarray(image.load())


@pytest.mark.parametrize("how", ITEMS)
def test_an_item_is_of_its_row_alone(how: str) -> None:
    made = open_source("scenes", seed=4, limit=40, subset=how)
    other = open_source("scenes", seed=4, limit=40, subset=how, dialogue="description")
    seen = set()
    for i in range(40):
        row, unit, group = scene(4, i), made.dialogue(i), made.group(i)
        assert unit.context == made.dialogue(i, 1).context == other.dialogue(i).context == group.query == made.group(i, 3).query
        assert unit.turns != made.dialogue(i, 1).turns and 3 <= len(set(unit.turns)) == len(unit.turns) <= 5
        views = dict(shown(row, how).views)
        assert {view.split for view in views.values()} == {"train"} and next(iter(views.values())) == row
        (text,) = group.positives
        ((_, dense_caption),) = other.dialogue(i).turns
        for view in views.values():
            assert view.dense_caption() in dense_caption
            assert all(thing.colour in text.text and thing.place in text.text for thing in view.things)
        seen.add(unit.context)
    assert len(seen) == 40


def test_what_stands_in_an_item() -> None:
    for i in range(30):
        row = scene(4, i)
        (text,) = shown(row, "texts").message.parts
        assert isinstance(text, Text) and row.background in text.text and all(f"{t.colour} {t.shape}" in text.text for t in row.things)
        two = shown(row, "pictures")
        one, other = two.message.parts
        assert np.array_equal(pixels(one), row.draw()) and np.array_equal(pixels(other), two.views[1][1].draw())
        assert two.views[1][1].truth != row.truth
        (video,) = shown(row, "frames").message.parts
        assert isinstance(video, Video) and len(video.frames) == 4
        frames = [pixels(frame) for frame in video.frames]
        assert np.array_equal(frames[0], row.redrawn(0).draw()) and all((frames[a] != frames[a + 1]).any() for a in range(3))
        last = shown(row, "frames").views[1][1]
        assert np.array_equal(frames[3], last.redrawn(3).draw()) and last.background == row.background


def test_a_video_tells_what_came_and_what_left() -> None:
    found = {"came": 0, "left": 0, "changes at": set[int]()}
    for i in range(60):
        row = scene(9, i)
        video = shown(row, "frames")
        events, (_, last) = dict(video.events), video.views[1]
        came, left = set(last.things) - set(row.things), set(row.things) - set(last.things)
        assert len(came) + len(left) == 1, "one object comes or leaves"
        for things, question in ((came, "what comes into the video?"), (left, "what leaves the video?")):
            want = [article(f"{t.size} {t.colour} {t.shape}") for t in things] or ["nothing"]
            assert [events[question]] == want
        found["came"] += len(came)  # type: ignore[operator]
        found["left"] += len(left)  # type: ignore[operator]
        frames = [pixels(frame) for frame in video.message.parts[0].frames]  # type: ignore[union-attr]
        both = [[np.array_equal(frame, view.redrawn(k).draw()) for k, frame in enumerate(frames)] for view in (row, last)]
        change = both[0].index(False)
        assert both == [[k < change for k in range(4)], [k >= change for k in range(4)]]
        found["changes at"].add(change)  # type: ignore[union-attr]
    assert found["came"] > 10 and found["left"] > 10 and found["changes at"] == {1, 2, 3}  # type: ignore[operator]
    assert {shown(scene(9, i, split), "frames").views[0][1].split for i in range(5) for split in ("dev", "test")} == {"dev", "test"}


def told_by_hand(question: str, view: Scene) -> str | None:
    """The answer to some kinds of questions, straight from the truth."""
    if question in ("what colour is the background?", "what is the background?"):
        return view.background
    if question == "how many objects are there?":
        return str(len(view.things))
    if found := re.fullmatch(r"what shape is at the (\w+ \w+)\?", question):
        return next(t.shape for t in view.things if t.place == found[1])
    if found := re.fullmatch(r"what colour is the (\w+)\?", question):
        return next(t.colour for t in view.things if t.shape == found[1])
    return None


@pytest.mark.parametrize("how", ITEMS)
def test_answers_are_those_of_the_view_that_is_asked_of(how: str) -> None:
    source, checked, differs = open_source("scenes", seed=2, limit=200, subset=how), 0, 0
    asked = set()
    for i in range(200):
        item = shown(scene(2, i), how)
        views = dict(item.views)
        for question, answer in source.dialogue(i).turns:
            where, _, rest = question.rpartition(": ")
            asked.add(where)
            if question in dict(item.events):
                assert dict(item.events)[question] == answer
            elif (want := told_by_hand(rest, views[where])) is not None:
                assert answer == want
                checked += 1
                counted = rest == "how many objects are there?"
                differs += counted and any(told_by_hand(rest, view) != want for view in views.values())
    assert checked > 100 and asked == {where for where, _ in shown(scene(2, 0), how).views} | ({""} if how == "frames" else set())
    assert how == "texts" or differs > 3, "the views have different answers, or it would not matter which is asked of"


def test_what_is_refused_and_what_stays_as_it_was() -> None:
    with pytest.raises(DataError, match="captions, questions, dialogues, texts, pictures, frames"):
        open_source("scenes", subset="sounds")
    with pytest.raises(DataError, match="no effect on texts"):
        open_source("scenes", subset="texts", columns={"direction": "both"})
    turned = open_source("scenes", subset="frames", limit=5, columns={"direction": "text-to-image"})
    assert isinstance(turned.group(0).positives[0].parts[0], Video)
    for i in range(5):
        one = open_source("scenes", limit=5).dialogue(i)
        assert one == open_source("scenes", limit=5, subset="questions").dialogue(i) and len(one.context.images) == 1


def examples(encoder: Encoder, how: str, stage: Any = COMPRESS, n: int = 2) -> list[Example]:
    source = open_source("scenes", limit=50, subset=how)
    return [encoder.preparer.dialogue(replace(source.dialogue(i), target=source.group(i).positives[0].text), stage, i) for i in range(n)]


def context_gradient(backbone: Backbone, batch: Batch, visibility: Any, cut: bool) -> list[float]:
    """The largest gradient of each place's logits by the inputs of the context, with or without keys and values of compression tokens."""
    inputs: list[torch.Tensor] = []

    def grab(_: Any, args: Any, kwargs: Any) -> Any:
        inputs.append(kwargs["inputs_embeds"].detach().requires_grad_(True))
        return args, {**kwargs, "inputs_embeds": inputs[0]}

    at = (batch.roles == ROLE_ID["compression"])[:, None, :, None]

    def without(inner: Any) -> Any:
        def detached(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
            key, value = (torch.where(at, x.detach(), x) for x in (key, value))
            return inner(module, query, key, value, mask, **rest)

        return detached if cut else inner

    handle = backbone.text.register_forward_pre_hook(grab, with_kwargs=True)
    with attending(backbone, without):
        hidden = backbone(batch, visibility)
        handle.remove()
        found = []
        for place in (batch.labels[0] != IGNORE).nonzero().flatten().tolist():
            if int(batch.roles[0, place]) not in (ROLE_ID["dialogue"], ROLE_ID["target"]):
                continue
            (slope,) = torch.autograd.grad(backbone.head(hidden[:, place]).square().sum(), inputs[0], retain_graph=True)
            found.append(float(slope[batch.roles == ROLE_ID["context"]].abs().max()))
    return found


@pytest.mark.parametrize("how", ITEMS)
@pytest.mark.parametrize("recipe", [COMA, REBUILD], ids=lambda r: r.name)
def test_the_bottleneck_holds(folder_of: Folders, family: str, how: str, recipe: Any) -> None:
    encoder, stage = Encoder.load(folder_of(family), recipe=recipe), recipe.stage("compress")
    made = examples(encoder, how, stage)
    assert [len(e.grids) for e in made] == [{"texts": 0, "pictures": 2, "frames": 4}[how]] * 2
    batch = collate(made)
    allowed = dense(batch.roles, batch.example, stage.visibility)[0, 0]
    readers = (batch.roles[0] == ROLE_ID["dialogue"]) | (batch.roles[0] == ROLE_ID["target"])
    context = batch.roles[0] == ROLE_ID["context"]
    assert readers.any() and context.any() and not allowed[readers][:, context].any()
    one = collate(made[:1])
    free, cut = (context_gradient(encoder.backbone, one, stage.visibility, cut) for cut in (False, True))
    assert min(free) > 0 and max(cut) == 0, "the context is read, and through the compression tokens alone"
    with torch.no_grad():
        fast = encoder.backbone(batch, stage.visibility)
        encoder.backbone.dense_mask = True
        slow = encoder.backbone(batch, stage.visibility)
    torch.testing.assert_close(fast[batch.example >= 0], slow[batch.example >= 0], atol=2e-5, rtol=1e-4)


def test_packed_with_others_an_item_is_as_alone(folder_of: Folders) -> None:
    encoder = Encoder.load(folder_of("qwen2_5_vl"), recipe=COMA)
    made = [example for how in ITEMS for example in examples(encoder, how)]
    with torch.no_grad():
        together, batch = encoder.backbone(collate(made), COMPRESS.visibility), collate(made)
        for i, example in enumerate(made):
            alone = encoder.backbone(collate([example]), COMPRESS.visibility)[0, : len(example)]
            torch.testing.assert_close(together[batch.example == i], alone, atol=2e-5, rtol=1e-4)


def test_all_kinds_train_in_one_mixture(folder_of: Folders, tmp_path: Path) -> None:
    parts = {how: {"source": "scenes", "subset": how, "weight": 1} for how in ITEMS}
    stage = {"steps": 2, "batch": 8, "tokens_per_pass": 400, "optim": {"lr": 0.01}, "log_every": 1}
    stage["data"] = {"mixture": {"plain": {"source": "scenes", "weight": 1}, **parts}}
    values = {"name": "tiny", "model": str(folder_of("qwen2_5_vl")), "precision": "fp32", "device": "cpu", "tokens": 4}
    values |= {"output": str(tmp_path / "run"), "adapter": {"kind": "lora", "r": 4}}
    config = RunConfig.model_validate({**values, "recipe": "coma-rebuild", "stages": {"compress": stage, "match": stage}})
    rows = loop.read_metrics(loop.train(config, quiet=True) / "metrics.jsonl")
    assert len(rows) == 4 and all(np.isfinite(row["loss"]) and row["bad_rows"] == 0 for row in rows)
    assert all(set(row["sources"]) == {"plain", *ITEMS} for row in rows) and rows[0]["loss_masked_token"] > 0
    encoder = Encoder.load(tmp_path / "run")
    items = [shown(scene(0, 0), how).message for how in ITEMS]
    assert encoder.encode(items).shape == (3, encoder.dim)
