"""comatch: compress, then match. Turn a vision-language model into a multimodal embedding model.

    encoder = comatch.Encoder.load("comatch-nano")
    vectors = encoder.encode(["a red circle", {"text": "what is left of it?", "image": "x.png"}])

Names are imported on first use (PEP 562), so that `import comatch` and `comatch --help` load neither torch
nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comatch.content import Dialogue as Dialogue
    from comatch.content import Group as Group
    from comatch.content import Image as Image
    from comatch.content import Message as Message
    from comatch.content import Text as Text
    from comatch.content import Video as Video
    from comatch.content import as_message as as_message
    from comatch.encoder import Encoder as Encoder
    from comatch.errors import ComatchError as ComatchError
    from comatch.errors import ConfigError as ConfigError
    from comatch.errors import ContentError as ContentError
    from comatch.errors import DataError as DataError
    from comatch.errors import EvaluationError as EvaluationError
    from comatch.errors import ImageError as ImageError
    from comatch.errors import MissingExtra as MissingExtra
    from comatch.errors import ModelError as ModelError
    from comatch.errors import RecipeError as RecipeError
    from comatch.errors import SearchError as SearchError
    from comatch.errors import Stopped as Stopped
    from comatch.errors import StudyError as StudyError
    from comatch.errors import TrainingError as TrainingError
    from comatch.recipes import load_recipe as load_recipe

__version__ = "0.1.0"

_EXPORTS = {
    "comatch.encoder": "Encoder",
    "comatch.recipes": "load_recipe",
    "comatch.content": "as_message Message Text Image Video Group Dialogue",
    "comatch.errors": "ComatchError ConfigError ContentError DataError EvaluationError ImageError"
    " MissingExtra ModelError RecipeError SearchError Stopped StudyError TrainingError",
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'comatch' has no attribute {name!r}; it offers {sorted(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
