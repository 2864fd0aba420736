"""Through mteb our encoders give the numbers that they give here, on our tasks and on mteb's own."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import run
from fixtures.mmeb import write_v1
from PIL import Image as PILImage

from comatch.content import Image, Mark, Message, Text, Video
from comatch.data.scenes import scene
from comatch.encoder import Encoder
from comatch.errors import EvaluationError, ModelError
from comatch.evaluation.metrics import Score
from comatch.evaluation.mmeb import mmeb_tasks
from comatch.evaluation.protocols import protocol_of
from comatch.evaluation.tasks import Task, evaluate, scene_tasks
from comatch.recipes import load_recipe

mteb = pytest.importorskip("mteb")

from datasets import Dataset, Features, Value  # noqa: E402
from datasets import Image as ImageFeature  # noqa: E402
from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from mteb.tasks.retrieval.eng import Flickr30kI2TRetrieval, Flickr30kT2IRetrieval, MSCOCOI2TRetrieval, MSCOCOT2IRetrieval  # noqa: E402

from comatch.evaluation.mteb import MtebEncoder, load_mteb, mteb_task  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # mteb and datasets warn of what they drop


def scores(encoder: Any, tasks: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """What mteb makes of tasks, by name."""
    model = MtebEncoder(encoder, "comatch/test") if hasattr(encoder, "fingerprint") else encoder
    found = mteb.evaluate(model, tasks, cache=None, co2_tracker=False, show_progress_bar=False)
    return {result.task_name: result.scores["test"][0] for result in found.task_results}


def in_mtebs_words(score: Score) -> dict[str, float]:
    """The numbers that both define alike, rounded as mteb does."""
    told = {"main_score": score.hit, "hit_rate_at_1": score.hit, **{f"recall_at_{k}": score.recall[k] for k in (5, 10)}}
    return {name: round(value, 5) for name, value in told.items()}


# --- our tasks


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return scene_tasks(10, 30)


def test_the_same_numbers_through_mteb_the_library_and_the_command_line(encoder: Encoder, model: Path, tasks: list[Task]) -> None:
    library = {score.name: score for score in evaluate(encoder, tasks)}
    found = scores(encoder, [mteb_task(task) for task in tasks])
    assert found.keys() == library.keys() and len(found) == 8
    for name, score in library.items():
        assert score.ties == 0
        assert in_mtebs_words(score) == {key: found[name][key] for key in in_mtebs_words(score)}, name
    assert len({score.hit for score in library.values()}) > 2, "the numbers say something"
    told = json.loads(run("evaluate", model, "--n", 10, "--candidates", 30, "--json").out)["tasks"]
    assert {one["name"]: round(one["hit"], 5) for one in told} == {name: one["main_score"] for name, one in found.items()}


def test_nano_gets_the_same_numbers_on_mmeb_everywhere(tmp_path: Path) -> None:
    """The shipped model on the whole fixture: library, command line and mteb."""
    data = write_v1(tmp_path / "mmeb")
    saved = Encoder.load("comatch-nano", recipe=load_recipe("coma").with_tokens(4)).save(tmp_path / "nano")
    nano, tasks = protocol_of("comatch").ready(Encoder.load(saved)), mmeb_tasks(data)
    library = {score.name: score for score in evaluate(nano, tasks)}
    assert len(library) == 36 and len({score.hit for score in library.values()}) > 3, "the numbers say something"
    found = scores(nano, [mteb_task(task) for task in tasks])
    for name, score in library.items():
        assert in_mtebs_words(score) == {key: found[name][key] for key in in_mtebs_words(score)}, name
    ran = run("evaluate", saved, "--suite", "mmeb-v1", "--data", data, "--out", tmp_path / "out", "--json")
    told = {one["name"]: round(one["hit"], 5) for one in json.loads(ran.out)["tasks"]}
    assert told == {name: one["main_score"] for name, one in found.items()}


def png(mode: str, colour: Any) -> bytes:
    file = io.BytesIO()
    picture = PILImage.new(mode, (61, 40), colour)
    picture.paste(0, (3, 4, 30, 20))
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def awkward(tmp_path: Path) -> Task:
    """MMEB's shapes: texts that begin and end with line breaks, marks, pictures alone and with texts, of all modes and sources."""
    path = tmp_path / "with space.png"
    path.write_bytes(png("P", 7))
    pictures = [Image(path), Image(png("RGBA", (9, 200, 40, 90))), Image(png("L", 30)), Image(scene(0, 1).draw())]
    queries = [
        Message((pictures[0], Text("\nWhat is left of it?\n"))),
        Message((Text("Retrieve it. \n\n"),)),
        Message((Mark(), Text("\nFind the \"news\": ünï <|image_pad|>\n"))),
        Message((Text("first "), pictures[1], Text(" then\n"))),
    ]  # fmt: skip
    pool = [*(Message((p,)) for p in pictures), Message((pictures[2], Text("\nthe same with a caption"))), Message((Text("  words "),))]
    return Task("MMEB-Awkward", "retrieval", queries, pool, [range(6), [4, 2, 1], [0, 5, 5], [3, 1, 0]], [[0], [2], [5], [1]])


def test_items_arrive_whole(encoder: Encoder, awkward: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[Message]()
    plain = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, items: (seen.extend(items), plain(self, items))[1])
    found = scores(encoder, [mteb_task(awkward)])["MMEB-Awkward"]
    monkeypatch.undo()
    sent = [*awkward.queries, *awkward.pool]
    assert [[type(p) for p in m.parts] for m in seen] == [[type(p) for p in m.parts] for m in sent]
    np.testing.assert_array_equal(encoder.encode(seen), encoder.encode(sent))
    (score,) = evaluate(encoder, [awkward])
    assert found["main_score"] == round(score.hit, 5)


def test_an_instruction_arrives_with_its_item(awkward: Task) -> None:
    table = mteb_task(replace(awkward, queries=[replace(query, instruction="Find\nit") for query in awkward.queries]))
    table.load_data()
    told = table.dataset["default"]["test"]["queries"]["message"]
    assert {json.loads(row)["instruction"] for row in told} == {"Find\nit"}


def test_several_pictures_are_refused(awkward: Task) -> None:
    two = Message((Image(png("L", 1)), Image(png("L", 2))))
    video = Message((Video((Image(png("L", 1)),)),))
    for message in (two, video):
        with pytest.raises(EvaluationError, match="MMEB-Awkward has items of several pictures"):
            mteb_task(replace(awkward, pool=[message, *awkward.pool[1:]]))


class Fixed:
    """An encoder that gives every item the same row, whatever it is."""

    fingerprint, dim = "0" * 32, 4

    def __init__(self, encoder: Encoder, row: Sequence[float]) -> None:
        self.backbone, self.preparer, self.recipe, self.row = encoder.backbone, encoder.preparer, encoder.recipe, row

    def encode(self, items: Sequence[Any]) -> np.ndarray:
        return np.tile(np.asarray(self.row, np.float32), (len(items), 1))


def test_ties_are_misses_and_nan_is_an_error(encoder: Encoder, awkward: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("comatch.evaluation.mteb.Encoder", Fixed)
    assert scores(Fixed(encoder, [1, 0, 0, 0]), [mteb_task(awkward)])["MMEB-Awkward"]["main_score"] == 0
    with pytest.raises(ValueError, match="NaN"):
        scores(Fixed(encoder, [np.nan] * 4), [mteb_task(awkward)])


class Stranger(AbsEncoder):  # type: ignore[misc]
    """A model of mteb's that has never heard of us: it reads texts and pictures by mteb's columns."""

    def __init__(self, meta: Any) -> None:
        self.mteb_model_meta = meta
        self.columns = set[str]()

    def encode(self, inputs: Any, **_: Any) -> np.ndarray:
        rows = []
        for batch in inputs:
            self.columns |= set(batch)
            rows += [np.cos(np.arange(1, 9) * (1 + len(text))) for text in batch["text"]]
        return np.stack(rows)


def test_other_models_of_mteb_run_our_tasks(encoder: Encoder, awkward: Task) -> None:
    stranger = Stranger(MtebEncoder(encoder).mteb_model_meta)
    assert 0 <= scores(stranger, [mteb_task(awkward)])["MMEB-Awkward"]["main_score"] <= 1
    assert {"text", "image"} <= stranger.columns


# --- mteb's own tasks


def captions(own: type) -> Any:
    """One of mteb's caption tasks with eight scenes of ours instead of its download, two captions each."""
    to_text = own.metadata.category == "i2t"

    def load_data(self: Any, **_: Any) -> None:
        pictures = [PILImage.fromarray(scene(0, i).draw()) for i in range(8)]
        texts = [scene(0, i).caption(seed) for i in range(8) for seed in (0, 1)]
        seen = Dataset.from_dict({"id": [f"i{i}" for i in range(8)], "image": pictures, "modality": ["image"] * 8},
                                 Features(id=Value("string"), image=ImageFeature(), modality=Value("string")))  # fmt: skip
        said = Dataset.from_dict({"id": [f"t{i}" for i in range(16)], "text": texts, "modality": ["text"] * 16})
        queries, corpus = (seen, said) if to_text else (said, seen)
        pairs = [(f"i{i // 2}", f"t{i}") for i in range(16)]
        right: dict[str, dict[str, int]] = {}
        for image, text in pairs:
            query, document = (image, text) if to_text else (text, image)
            right.setdefault(query, {})[document] = 1
        self.dataset = {"default": {"test": {"queries": queries, "corpus": corpus, "relevant_docs": right, "top_ranked": None}}}
        self.data_loaded = True

    metadata = own.metadata.model_copy(update={"name": f"Local{own.__name__}"})
    return type(metadata.name, (own,), {"load_data": load_data, "metadata": metadata})()


def ndcg_at_10(similarity: np.ndarray, right: np.ndarray) -> float:
    """By the definition, row by row."""
    values = []
    for scores, gold in zip(similarity, right, strict=True):
        gains = gold[np.argsort(-scores)][:10] / np.log2(np.arange(2, 2 + min(10, len(gold))))
        values.append(gains.sum() / (1 / np.log2(np.arange(2, 2 + gold.sum()))).sum())
    return float(np.mean(values))


@pytest.mark.parametrize("own", [Flickr30kT2IRetrieval, Flickr30kI2TRetrieval, MSCOCOT2IRetrieval, MSCOCOI2TRetrieval])
def test_flickr_and_coco_run_as_mteb_defines_them(encoder: Encoder, own: Any) -> None:
    task = captions(own)
    found = scores(encoder, [task])[f"Local{own.__name__}"]
    told = own.metadata.prompt["query"]
    pictures = [scene(0, i).draw() for i in range(8)]
    texts = [scene(0, i).caption(seed) for i in range(8) for seed in (0, 1)]
    belongs = np.repeat(np.eye(8), 2, axis=1)
    if own.metadata.category == "i2t":
        queries, corpus, right = [{"image": picture, "text": told} for picture in pictures], texts, belongs
    else:
        queries, corpus, right = [f"{told} {text}" for text in texts], pictures, belongs.T
    similarity = encoder.encode(queries) @ encoder.encode(corpus).T
    assert found["main_score"] == found["ndcg_at_10"] == pytest.approx(ndcg_at_10(similarity, right), abs=2e-5)
    bare = encoder.encode(pictures if own.metadata.category == "i2t" else texts) @ encoder.encode(corpus).T
    assert np.abs(bare - similarity).max() > 1e-4, "the prompt matters"


def test_an_instruction_goes_to_its_place_where_the_model_has_one(encoder: Encoder) -> None:
    prompt = replace(encoder.recipe.prompt, before="{instruction}: ", instruction="Represent it")
    instructed = Encoder(encoder.backbone, replace(encoder.recipe, prompt=prompt), encoder.images)
    told = Flickr30kT2IRetrieval.metadata.prompt["query"]
    found = scores(instructed, [captions(Flickr30kT2IRetrieval)])["LocalFlickr30kT2IRetrieval"]
    queries = [Message((Text(scene(0, i).caption(seed)),), told) for i in range(8) for seed in (0, 1)]
    similarity = instructed.encode(queries) @ instructed.encode([scene(0, i).draw() for i in range(8)]).T
    assert found["main_score"] == pytest.approx(ndcg_at_10(similarity, np.repeat(np.eye(8), 2, axis=1).T), abs=2e-5)
    assert np.abs(instructed.encode(queries) - instructed.encode([query.text for query in queries])).max() > 1e-3


# --- what mteb is told of a model


def test_the_card_names_fingerprint_size_and_dtype(encoder: Encoder, model: Path) -> None:
    meta = MtebEncoder(encoder).mteb_model_meta
    assert (meta.revision, meta.embed_dim, meta.name.split("/")[0]) == (encoder.fingerprint, encoder.dim, "comatch")
    assert meta.n_parameters == sum(p.numel() for p in encoder.backbone.parameters())
    assert str(meta.output_dtypes.value) == "float32" and set(meta.modalities) == {"image", "text"}
    again = load_mteb(str(model), device="cpu")
    assert again.mteb_model_meta.revision == encoder.fingerprint
    with pytest.raises(ModelError):
        load_mteb("no/such-model-anywhere", "main", device="cpu")
