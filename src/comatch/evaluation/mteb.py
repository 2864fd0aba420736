"""Our encoders as models of mteb (version 2), and our tasks as its retrieval tasks (specs/mmeb.md section 7).

    import mteb
    from comatch.evaluation.mteb import MtebEncoder, mteb_task
    results = mteb.evaluate(MtebEncoder(encoder), [mteb_task(task) for task in tasks], cache=None)

The same tasks give the same numbers here and by `comatch.evaluation.tasks.evaluate`: items travel whole in a column of their own, and
ties are misses. Any other mteb model runs them too, on the columns "text" and "image". mteb's own tasks, such as Flickr30k and COCO, run as
they are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from comatch.content import Image, Mark, Message, Text, Video
from comatch.encoder import Encoder
from comatch.errors import EvaluationError, MissingExtra
from comatch.evaluation.archives import LIMITS
from comatch.evaluation.metrics import TIE
from comatch.evaluation.tasks import Task
from comatch.pictures import Pixels, opened
from comatch.released.sentence import SentenceEncoder

try:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import OutputDType, PromptType
except ImportError as missing:
    raise MissingExtra("mteb", "eval") from missing

MAIN = "hit_rate_at_1"
_SCORES = {"hit@1": MAIN, "ndcg@5": "ndcg_at_5"}
_CHUNK = 256


class MtebEncoder(AbsEncoder):  # type: ignore[misc]  # mteb is an extra and has no types for us
    """An encoder behind mteb's protocol. A task's instruction stands in the model's place for it, else before the text of a query.

    name: "organisation/model" in results; their revision is the encoder's fingerprint, so that a changed model never meets its old scores.
    """

    def __init__(self, encoder: Encoder | SentenceEncoder, name: str = "") -> None:
        self.model = encoder
        self.mteb_model_meta = _meta(encoder, name)

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Vectors float32 [n, dim] of a loader's items, in its order. Raises what the encoder raises for an item."""
        told = "" if prompt_type is PromptType.document else _instruction(task_metadata.prompt)
        apart = isinstance(self.model, SentenceEncoder) or self.model.recipe.prompt.takes_instruction
        parts, waiting = list[np.ndarray](), list[Message]()
        for batch in inputs:
            waiting += _messages(batch, told, apart)
            if len(waiting) >= _CHUNK:
                parts.append(self.model.encode(waiting))
                waiting = []
        if waiting:
            parts.append(self.model.encode(waiting))
        return np.concatenate(parts)


def load_mteb(name: str, revision: str | None = None, *, device: str | None = None, **_: Any) -> MtebEncoder:
    """A saved model or hub id as mteb's loaders call it."""
    return MtebEncoder(Encoder.load(name, revision=revision, device=device), name)


def mteb_task(task: Task, *, revision: str = "local", reference: str | None = None) -> Any:
    """A task as mteb's retrieval task: each query ranks its own candidates, by `hit_rate_at_1` or what else the task counts.

    revision: of the data. Raises EvaluationError for items of several pictures, which mteb's columns cannot hold.
    """
    query, document = (_category(side, task.name) for side in (task.queries, task.pool))
    metadata = TaskMetadata(
        name=task.name,
        description=f"{task.meta} in the form of MMEB: the right one among the candidates listed for each query",
        reference=reference,
        dataset={"path": f"comatch/{task.name}", "revision": revision},
        type="Any2AnyRetrieval",
        category=f"{query}2{document}",
        modalities=sorted({{"i": "image", "t": "text"}[letter] for letter in query + document}),
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=_SCORES[task.metric],
        bibtex_citation="",
    )
    # A class of its own, because mteb empties an instance after its turn.
    return type(f"Ranking_{task.name}", (_Ranking,), {"metadata": metadata, "task": task})()


class _Ranking(AbsTaskRetrieval):  # type: ignore[misc]
    """Queries, their listed candidates and the right ones of a Task, in mteb's words. Ids of candidates are their places in its pool."""

    task: Task

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Lay the task out in mteb's tables."""
        task, everything = self.task, range(len(self.task.pool))
        listed = None
        if any(places != everything for places in task.candidates):
            listed = {f"q{i}": [f"d{j}" for j in dict.fromkeys(places)] for i, places in enumerate(task.candidates)}
        grades = task.relevance or [[1.0] * len(places) for places in task.gold]
        right = {
            f"q{i}": {f"d{j}": round(grade) for j, grade in zip(places, grades[i], strict=True)} for i, places in enumerate(task.gold)
        }
        queries, corpus = _table(task.queries, "q", task.name), _table(task.pool, "d", task.name)
        self.dataset = {"default": {"test": {"queries": queries, "corpus": corpus, "relevant_docs": right, "top_ranked": listed}}}
        self.data_loaded = True

    def task_specific_scores(
        self, scores: Any, qrels: Mapping[str, Mapping[str, int]], results: Mapping[str, Mapping[str, float]], **_: Any
    ) -> dict[str, float]:
        """The main score once more, strictly: a right answer beats every other one by more than `TIE` (mteb breaks ties by chance)."""
        hits = []
        for query, gold in qrels.items():
            found = results.get(query, {})
            rivals = [score for document, score in found.items() if document not in gold]
            best = max((score for document, score in found.items() if document in gold), default=-np.inf)
            hits.append(best - max(rivals, default=-np.inf) > TIE)
        return {MAIN: round(float(np.mean(hits)), 5)}


def _category(messages: Sequence[Message], task: str) -> str:
    """What a side of a task holds, as mteb writes it: "i", "t" or "it"."""
    if any(len(message.images) > 1 or any(isinstance(part, Video) for part in message.parts) for message in messages):
        raise EvaluationError(f"task {task} has items of several pictures, which mteb's columns cannot hold; use comatch evaluate")
    return ("i" if any(message.images for message in messages) else "") + ("t" if any(message.text for message in messages) else "")


def _table(messages: Sequence[Message], prefix: str, task: str) -> Dataset:
    """One row a message: id, what other models read (text, image), and the whole of it (message)."""
    columns: dict[str, list[Any]] = {
        "id": [f"{prefix}{i}" for i in range(len(messages))],
        "message": [_written(message) for message in messages],
    }
    types = {"id": Value("string"), "message": Value("string")}
    kinds = _category(messages, task)
    if "t" in kinds:
        columns["text"], types["text"] = [message.text for message in messages], Value("string")
    if "i" in kinds:
        columns["image"], types["image"] = [_file(message) for message in messages], ImageFeature()
    return Dataset.from_dict(columns, Features(types))


def _written(message: Message) -> str:
    parts = [["mark"] if isinstance(part, Mark) else ["text", part.text] if isinstance(part, Text) else ["image"] for part in message.parts]
    return json.dumps({"parts": parts, "instruction": message.instruction})


def _read(written: str, picture: Any) -> Message:
    told = json.loads(written)
    kinds: dict[str, Callable[..., Text | Image]] = {"mark": Mark, "text": Text, "image": partial(Image, picture, LIMITS)}
    return Message(tuple(kinds[kind](*value) for kind, *value in told["parts"]), told["instruction"])


def _file(message: Message) -> dict[str, Any] | None:
    """The picture of a message as `datasets` keeps one; its file as it is, so that nothing is coded anew."""
    if not message.images:
        return None
    image = message.images[0]
    if isinstance(image.source, Path):
        return {"path": str(image.source), "bytes": None}
    if isinstance(image.source, Pixels):
        file = io.BytesIO()
        image.load().save(file, "PNG")
        return {"path": None, "bytes": file.getvalue()}
    with opened(image.source, image.limits) as stream:
        return {"path": None, "bytes": stream.read()}


def _messages(batch: Mapping[str, Sequence[Any]], told: str, apart: bool) -> list[Message]:
    """The items of one of mteb's batches."""
    pictures = batch.get("image") or [None] * len(next(iter(batch.values())))
    if "message" in batch:
        return [_read(written, picture) for written, picture in zip(batch["message"], pictures, strict=True)]
    messages = []
    for text, picture in zip(batch.get("text") or [""] * len(pictures), pictures, strict=True):
        words = text if apart else " ".join(filter(None, (told, text)))
        shown = () if picture is None else (Image(picture, LIMITS),)
        messages.append(Message((*shown, Text(words)), told if apart else ""))
    return messages


def _instruction(prompt: str | Mapping[str, str] | None) -> str:
    """What a task tells a model to do with its queries."""
    return (prompt.get("query", "") if isinstance(prompt, Mapping) else prompt) or ""


def _meta(encoder: Encoder | SentenceEncoder, name: str) -> Any:
    module, source, window = (
        (encoder.backbone, encoder.backbone.source, float(encoder.preparer.renderer.window))
        if isinstance(encoder, Encoder)
        else (encoder.model, str(encoder.folder), None)
    )
    name = name or "/".join(("comatch", *source.split("/")[-1:]))
    weights: list[torch.Tensor] = list(module.parameters())
    size = sum(tensor.numel() * tensor.element_size() for tensor in weights)
    return ModelMeta(
        loader=partial(load_mteb, name),
        name=name if name.count("/") == 1 else "comatch/" + Path(name).name,
        revision=encoder.fingerprint,
        release_date=None,
        languages=None,
        n_parameters=sum(tensor.numel() for tensor in weights),
        memory_usage_mb=round(size / 2**20),
        max_tokens=window,
        embed_dim=encoder.dim,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers", "safetensors"],
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        training_datasets=None,
        modalities=["image", "text"],
        output_dtypes=OutputDType(str(weights[0].dtype).removeprefix("torch.")),
    )
