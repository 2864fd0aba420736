"""Every published string of MMEB reaches the model byte for byte, from both layouts, and each protocol really acts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from fixtures.mmeb import QUERIES, write_v1, write_v2
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from comatch.backbones.base import Backbone
from comatch.content import Image, Mark, Message, Text, as_message
from comatch.core.batch import BARE_IMAGE
from comatch.data.formats.mmeb_train import _parts
from comatch.encoder import Encoder
from comatch.errors import EvaluationError
from comatch.evaluation.mmeb import mmeb_tasks
from comatch.evaluation.protocols import PROTOCOLS, Item, protocol_of
from comatch.evaluation.specs import specs
from comatch.recipe import Prompt, Recipe
from comatch.recipes import load_recipe
from comatch.released.records import RELEASES

# specs/mmeb.md 1.3, T for the picture and B for the row's own text: query, target.
QA = "T\nRepresent the given image with the following question: B\n"
CROP = "T\nRepresent the given cropped image of the object"
SHOWN = "T\nRepresent the given image.\n"
STRINGS = {
    "ImageNet-1K": ("T\nRepresent the given image for classification\n", "B"),
    "N24News": ("T\nRepresent the given news image with the following caption for domain classification: Anthony Pidgeon\n", "Travel"),
    "HatefulMemes": (
        "T\nRepresent the given image for binary classification to determine whether it constitutes hateful speech or not\n", "Yes",
    ),
    "VOC2007": ("T\nIdentify the object shown in the image\n", "B"),
    "SUN397": ("T\nIdentify the scene shown in the image\n", "firing range indoor"),
    "Place365": ("T\nIdentify the scene shown in the image\n", "berth"),
    "ImageNet-A": ("T\nRepresent the given image for classification\n", "B"),
    "ImageNet-R": ("T\nRepresent the given image for classification\n", "bell_pepper"),
    "ObjectNet": ("T\nIdentify the object shown in the image\n", "B"),
    "Country211": ("T\nIdentify the country depicted in the image\n", "Fiji"),
    **dict.fromkeys(("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W", "ScienceQA", "VizWiz", "TextVQA"), (QA, "B")),
    "GQA": ("T\nRepresent the given image with the following question: What is this bird called?\n", "This is a parrot."),
    "VisDial": (
        "Represent the given dialogue about an image, which is used for image retrieval: B\n\n", "T\nRepresent the given image\n",
    ),
    "CIRR": (
        "T\nGiven an image, find a similar everyday image with the described changes: Show three bottles of soft drink.\n", SHOWN,
    ),
    "VisualNews_t2i": ("Retrieve an image of this news caption. B\n", SHOWN),
    "VisualNews_i2t": ("T\nFind a caption for the news in the given photo.\n", "B"),
    "MSCOCO_t2i": ("Find me an everyday image that matches the given caption: B\n", SHOWN),
    "MSCOCO_i2t": ("T\nFind an image caption describing the given everyday image.\n", "B"),
    "NIGHTS": ("T\nFind a day-to-day image that looks similar to the provided image.\n", SHOWN),
    "WebQA": (
        "Find a Wikipedia image that answers this question: B\n",
        "T\nRepresent the given Wikipedia image with related text information: B\n",
    ),
    "FashionIQ": (
        "T\nFind an image to match the fashion image and style note: Is shiny and silver with shorter sleeves and fit and flare.\n", SHOWN,
    ),
    "Wiki-SS-NQ": (
        "Find the document image that can answer the given query: who needs to know about the jet stream\n",
        "T\nRepresent the given image\n",
    ),
    "OVEN": (
        "T\nRetrieve a Wikipedia image-description pair that provides evidence for the question of this image: B\n",
        "T\nRepresent the given Wikipedia image with related text information: B\n",
    ),
    "EDIS": (
        "Find a news image that matches the provided caption: B\n", "T\nRepresent the given image with related text information: B\n",
    ),
    "MSCOCO": ('T\nCrop the image to to isolate the object labeled as "dog"\n', CROP),
    "RefCOCO": ('T\nSelect the portion of the image that follows the language expressions. "B"\n', CROP),
    "RefCOCO-Matching": (
        'T\nSelect the portion of the image that follows the language expressions: "bowl behind the others can only see part"\n',
        'T\nSelect the portion of the image that follows the language expressions: "Dish in top right corner"\n',
    ),
    "Visual7W-Pointing": ('T\nSelect the portion of the image that answers the question "B"\n', CROP),
}  # fmt: skip
V2 = {
    "K700": ("V Recognize the category of the video content.", "B"),
    "SmthSmthV2": ("V What actions or object interactions are being performed by the person in the video?", "B"),
    "HMDB51": ("V What actions or objects interactions are the person in the video doing?", "B"),
    "UCF101": ("V What activities or sports are being performed by the person in the video?", "B"),
    "Breakfast": ("V Recognize the breakfast type that the person is cooking in the video. ", "B"),
    "DiDeMo": ("Find a video that includes the following described scenes: B", "V Understand the content of the provided video."),
    "MSR-VTT": ("Find a video that contains the following visual content: B", "V Understand the content of the provided video."),
    "MSVD": ("Find the video snippet that corresponds to the given summary: B", "V Understand the content of the provided video."),
    "VATEX": ("Select a video that fits the description provided: B", "V Understand the content of the provided video."),
    "YouCook2": (
        "Find a video that demonstrates the following action while making a recipe: B", "V Understand the content of the provided video.",
    ),
    "QVHighlight": (
        "V Find the clip that corresponds to the described scene in the given video: B", "V Understand the content of the provided video.",
    ),
    "MomentSeeker": ("Find the clip that corresponds to the given text: B", "V Understand the content of the provided video clip."),
    "ViDoRe_docvqa": (
        "Find a document image that matches the given query: B", "T Understand the content of the provided document image.",
    ),
}  # fmt: skip
ASKED = (
    "V Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question:  "
)
OPTIONS = {
    "Video-MME": (r"Which sign\?\nA\. (\w+)\nB\. \w+\nC\. \w+\nD\. \w+", "{}"),
    "NExTQA": (r"which sign\nOptions:\n\(A\) (\w+)\n\(B\) \w+\n\(C\) \w+\n\(D\) \w+\n\(E\) none of them", "{}"),
    "MVBench": (r"Which sign\?\nOptions:\n\(A\) (\w+)\n\(B\) \w+\n\(C\) \w+\n\(D\) \w+", "(A) {}"),
    "EgoSchema": (r"Which sign\?A\. (\w+) B\. \w+ C\. \w+ D\. \w+", "{}"),
    "ActivityNetQA": (r"is it a sign\? \(A\) (yes); \(B\) no\.", "{}"),
}
BARE = Prompt(picture="<|image_pad|>", grid=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mmeb")
    write_v1(root / "whole")
    write_v1(root / "split", "split")
    return write_v2(root / "v2")


@pytest.fixture(scope="module")
def plain(folder_of: Callable[[str], Path]) -> Encoder:
    return Encoder.load(folder_of("qwen2_5_vl"), recipe=load_recipe("coma").with_tokens(2))


def rendered(encoder: Encoder, message: Message) -> str:
    """What the model reads, its visual tokens as one each and without compression tokens."""
    row = encoder.preparer.renderer.item(message, encoder.stage)
    ids = [encoder.backbone.image_id if id == BARE_IMAGE else id for id in row.ids[: len(row.ids) - encoder.recipe.tokens]]
    text = encoder.backbone.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", text)


def with_prompt(encoder: Encoder, prompt: Prompt, recipe: Recipe | None = None) -> Encoder:
    return Encoder(encoder.backbone, replace(recipe or encoder.recipe, prompt=prompt), encoder.images)


def matches(template: str, text: str, picture: str) -> bool:
    """Whether a text is the template with something for B and these markers for T and V."""
    parts = {"T": re.escape(picture), "V": f"(?:{re.escape(picture)})+", "B": "[^\0]+?"}
    return re.fullmatch("".join(parts.get(piece) or re.escape(piece) for piece in re.split(r"(\b[TVB]\b)", template)), text) is not None


@pytest.mark.parametrize("layout", ["whole", "split"])
@pytest.mark.parametrize(("protocol", "prompt"), [("comatch", Prompt()), ("moca", Prompt()), ("coma", Prompt()), ("vlm2vec-v1", BARE)])
def test_every_golden_string_is_rendered(tree: Path, plain: Encoder, layout: str, protocol: str, prompt: Prompt) -> None:
    encoder = with_prompt(plain, prompt)
    picture = prompt.picture
    assert set(STRINGS) == set(specs("mmeb-v1"))
    for task in mmeb_tasks(tree.parent / layout, "mmeb-v1", protocol):
        query, target = STRINGS[task.name]
        if protocol == "vlm2vec-v1" and task.name in ("WebQA", "EDIS"):  # the marker stays although there is no picture
            query = f"T\n{query}"
        assert matches(query, rendered(encoder, task.queries[0]), picture), task.name
        assert matches(target, rendered(encoder, task.pool[task.gold[0][0]]), picture), task.name
        assert not matches(target.replace("e", "é", 1) + "?", rendered(encoder, task.pool[0]), picture)


def test_every_golden_string_of_videos_and_documents_is_rendered(tree: Path, plain: Encoder) -> None:
    encoder, picture = with_prompt(plain, Prompt()), Prompt().picture
    tasks = {task.name: task for task in mmeb_tasks(tree, "mmeb-v2", names=[n for n, s in specs("mmeb-v2").items() if s.repo])}
    for name, (query, target) in V2.items():
        task = tasks[name]
        assert matches(query, rendered(encoder, task.queries[0]), picture), name
        assert matches(target, rendered(encoder, task.pool[task.gold[0][0]]), picture), name
    for name, (question, candidate) in OPTIONS.items():
        task = tasks[name]
        text = rendered(encoder, task.queries[0]).replace(picture, "").lstrip()
        found = re.fullmatch(re.escape(ASKED.removeprefix("V ")) + question, text)
        assert found, (name, text)
        assert rendered(encoder, task.pool[task.gold[0][0]]) == candidate.format(found[1]), name
    seeker = [rendered(encoder, query) for query in tasks["MomentSeeker"].queries]
    assert matches("T Select the video clip that aligns with the given text and image: B", seeker[1], picture)
    assert matches("V Find the clip that corresponds to the given sentence and video segment: B", seeker[2], picture)


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_both_layouts_give_equal_prompts(tree: Path, protocol: str) -> None:
    for whole, split in zip(*(mmeb_tasks(tree.parent / layout, "mmeb-v1", protocol) for layout in ("whole", "split")), strict=True):
        assert list(map(told, whole.queries)) == list(map(told, split.queries)), whole.name
        assert list(map(told, whole.pool)) == list(map(told, split.pool)), whole.name
        assert [list(some) for some in whole.candidates] == [list(some) for some in split.candidates]
        assert len(set(map(told, whole.queries))) == len(whole.queries) == QUERIES


def told(message: Message) -> tuple[object, ...]:
    """A message with its pictures by file name, as the two layouts lie in two folders."""
    return message.instruction, *(part.source.name if isinstance(part, Image) else part for part in message.parts)  # type: ignore[union-attr]


def test_a_chat_protocol_takes_the_instruction_apart(tree: Path, plain: Encoder) -> None:
    protocol = protocol_of("qwen3-vl-embedding")
    assert protocol.prompt is not None
    encoder = with_prompt(plain, protocol.prompt)
    tasks = {task.name: task for task in mmeb_tasks(tree.parent / "whole", "mmeb-v1", protocol)}
    row = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    picture = Prompt().picture
    for name, side, instruction, body in (
        ("GQA", "queries", "Represent the given image with the following question:", f"{picture}What is this bird called?"),
        ("GQA", "pool", "Represent the user's input.", "This is a parrot."),
        ("ImageNet-1K", "queries", "Represent the given image for classification.", picture),  # a full stop where there is none
        ("CIRR", "pool", "Represent the user's input.", picture),
        ("RefCOCO-Matching", "pool", "Represent the user's input.", f'{picture}"Dish in top right corner"'),
        ("Wiki-SS-NQ", "queries", "Find the document image that can answer the given query:", "who needs to know about the jet stream"),
    ):
        assert rendered(encoder, getattr(tasks[name], side)[0]) == row.format(instruction, body)


def test_protocols_are_those_of_the_released_models() -> None:
    assert set(PROTOCOLS) == {"comatch", *RELEASES}
    for name, release in RELEASES.items():
        protocol = protocol_of(name)
        assert (protocol.pixels, protocol.square) == (release.pixels, release.square)
        assert protocol.apart == release.template
        assert release.template or protocol.prompt == release.recipe.prompt
        assert protocol.pooling == (release.recipe.encoding.pooling,) if release.recipe.encoding else False


def test_an_unknown_protocol_names_those_there_are() -> None:
    with pytest.raises(EvaluationError, match=r"no protocol 'vlm2vec'; allowed: comatch, vlm2vec-v1, vlm2vec-v2, moca, coma, cocoa, qwen3"):
        protocol_of("vlm2vec")


def test_a_protocol_bounds_pictures_and_checks_the_pooling(plain: Encoder) -> None:
    mean = Recipe("mean", (replace(load_recipe("matching-last").stages[0], pooling="mean"),))
    models = {
        "coma": plain, "comatch": plain,
        "moca": Encoder(plain.backbone, mean), **dict.fromkeys(("vlm2vec-v1", "vlm2vec-v2", "cocoa"), last(plain)),
    }  # fmt: skip
    sizes = ((28, 28), (2000, 1000), (1, 500))  # width, height
    pixels = {"comatch": (plain.images.min_pixels, plain.images.max_pixels), "vlm2vec-v2": (3136, 1003520)}
    pixels |= dict.fromkeys(("moca", "coma"), (200704, 802816))
    squares = {"vlm2vec-v1": 1344, "cocoa": 672}
    for name, model in models.items():
        ready = protocol_of(name).ready(model)
        for width, height in sizes:
            grid = ready.images.grid(width, height)
            if name in squares:
                assert grid == (1, squares[name] // 14, squares[name] // 14)
                continue
            thin = (56, 56) if name in ("vlm2vec-v2", "coma") else (max(width, 28), max(height, 28))
            shape = (height, width) if min(width, height) >= 28 else thin[::-1]
            tall, wide = smart_resize(*shape, 28, *pixels[name])
            assert grid == (1, tall // 14, wide // 14), name
        assert ready.fingerprint != model.fingerprint
    with pytest.raises(EvaluationError, match="protocol moca pools by mean, this model by mean_compression"):
        protocol_of("moca").ready(plain)


def last(encoder: Encoder) -> Encoder:
    return Encoder(encoder.backbone, load_recipe("matching-last"))


def test_a_bare_marker_is_the_image_token_as_the_stock_model_embeds_it(folder_of: Callable[[str], Path]) -> None:
    recipe = replace(load_recipe("matching-last"), prompt=BARE)
    encoder = Encoder(Backbone.load(folder_of("qwen2_vl"), recipe), recipe)
    message = protocol_of("vlm2vec-v2").message(Item("<|image_1|>\nFind a Wikipedia image that answers this question: why?\n"))
    assert isinstance(message.parts[0], Mark)
    ids = [encoder.backbone.image_id if id == BARE_IMAGE else id for id in encoder.preparer.renderer.item(message, encoder.stage).ids]
    stock = AutoModelForImageTextToText.from_pretrained(folder_of("qwen2_vl")).model
    with torch.no_grad():
        hidden = stock(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    wanted = torch.nn.functional.normalize(hidden, dim=0).numpy()
    np.testing.assert_allclose(encoder.encode([message])[0], wanted, atol=1e-5)
    removed = protocol_of("moca").message(Item("<|image_1|>\nFind a Wikipedia image that answers this question: why?\n"))
    assert removed.parts == (Text("Find a Wikipedia image that answers this question: why?\n"),)
    assert np.abs(encoder.encode([removed])[0] - wanted).max() > 1e-3


def odd_texts() -> Iterator[tuple[str, Item, tuple[object, ...]]]:
    image = Image(np.zeros((28, 28, 3), np.uint8))
    yield "comatch", Item("", target=True), (Text("NULL"),)
    yield "qwen3-vl-embedding", Item("  ", body="  ", target=True), (Text("NULL"),)
    yield "vlm2vec-v2", Item("<|image_1|>\nAsk: a \nb\n", (image,)), (image, Text("\nAsk: a\nb\n"))
    yield "vlm2vec-v1", Item("<|image_1|>\nAsk: a \nb\n", (image,)), (image, Text("\nAsk: a \nb\n"))
    yield "vlm2vec-v2", Item("Ask: a \nb\n"), (Text("Ask: a \nb\n"),)
    yield "comatch", Item("no marker", (image,)), (image, Text("no marker"))
    yield "comatch", Item("spell <|image_pad|> out", ()), (Text("spell <|image_pad|> out"),)


@pytest.mark.parametrize(("protocol", "item", "parts"), list(odd_texts()))
def test_odd_texts(protocol: str, item: Item, parts: tuple[object, ...]) -> None:
    assert protocol_of(protocol).message(item).parts == parts


def test_a_chat_protocol_refuses_an_unknown_instruction() -> None:
    item = specs("mmeb-v1")["GQA"].item("<|image_1|>\nTell me: what is this?\n")
    with pytest.raises(EvaluationError, match="begins with another instruction"):
        protocol_of("qwen3-vl-embedding").message(item)
    assert protocol_of("comatch").message(item).text == "Tell me: what is this?\n"


def test_what_is_trained_is_what_is_evaluated(tree: Path) -> None:
    """The reader of MMEB-train makes the same messages of the same strings."""
    root = tree.parent / "whole"
    for task in mmeb_tasks(root, names=["GQA", "WebQA", "CIRR", "VisDial"]):
        (file,) = (root / "MMEB-eval" / task.name).iterdir()
        for row, query in zip(pq.read_table(file).to_pylist(), task.queries, strict=True):
            cells = {"text": row["qry_text"]} | ({"image": row["qry_img_path"]} if row["qry_img_path"] else {})
            assert as_message(_parts(cells), root=root / "images") == query
