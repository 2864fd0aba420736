"""What a training method is, as frozen data that checks itself.

A stage names its roles in sequence order, who may look at whom, what is trained and how vectors are pooled. That is all that
separates the published methods (design.md section 3). A table that does not fit its roles, or a bottleneck that leaks, is refused
when the object is made, before any weight is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from comatch.corruption import NESTED as NESTED
from comatch.corruption import ROLES as ROLES
from comatch.corruption import Corruption as Corruption
from comatch.corruption import check_choice, check_corruptions, check_nested
from comatch.errors import RecipeError

LETTERS = {".": "never", "c": "causal: key position <= query position", "f": "full"}
POOLINGS = ("mean_compression", "last_compression", "mean", "last")
OBJECTIVES = ("next_token", "contrastive", "masked_token", "masked_patch", "distillation", "orthogonality")
SUPERVISE = ("answers", "dialogue")
LAYOUTS = ("raw", "chat")
MASK_TOKEN = "<|mask|>"


_LATER = ("shift", "decoder_layers", "patch_target", "kl_temperature", "nested")


@dataclass(frozen=True)
class Visibility:
    """Who may attend to whom: one row of letters per role, one letter per role looked at.

    `table[i][j]` says how role i (the query) sees role j (the key): `.` never, `c` causal, `f` full.
    Roles stand in sequence order, so `c` on a later role means never.
    """

    roles: tuple[str, ...]
    table: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_roles(self.roles)
        n = len(self.roles)
        if len(self.table) != n or any(len(row) != n for row in self.table):
            raise RecipeError(f"visibility {list(self.table)} does not fit {n} roles {list(self.roles)}: give {n} rows of {n} letters")
        bad = sorted({letter for row in self.table for letter in row} - set(LETTERS))
        if bad:
            raise RecipeError(f"visibility {list(self.table)} has unknown letters {bad}; allowed: {LETTERS}")
        blind = [role for i, role in enumerate(self.roles) if self.table[i][i] == "."]
        if blind:
            raise RecipeError(f"visibility {list(self.table)}: {blind} cannot see itself; put 'c' or 'f' on the diagonal")

    def letter(self, query: str, key: str) -> str:
        """The letter for one pair of roles."""
        return self.table[self.roles.index(query)][self.roles.index(key)]

    def sees(self, query: str, key: str) -> bool:
        """Whether any token of role `query` looks at any token of role `key` in one layer."""
        i, j = self.roles.index(query), self.roles.index(key)
        return self.table[i][j] == "f" or (self.table[i][j] == "c" and j <= i)

    def reaches(self, query: str, key: str, avoiding: str | None = None) -> bool:
        """Whether `key` can influence `query` through any number of layers, not passing through `avoiding`."""
        seen, stack = {query}, [query]
        while stack:
            role = stack.pop()
            for other in self.roles:
                if other != avoiding and other not in seen and self.sees(role, other):
                    seen.add(other)
                    stack.append(other)
        return key in seen


@dataclass(frozen=True)
class Bottleneck:
    """A promise: `reader`, and any dialogue or target there is, learns of `hidden` only by way of `through`."""

    reader: str = "dialogue"
    through: str = "compression"
    hidden: str = "context"


@dataclass(frozen=True)
class Prompt:
    """The fixed text around an item; here, and nowhere else, a special token's name is the token.

    before, after   what opens and closes a row; `{instruction}` in `before` is the item's own instruction, or `instruction`
    picture         a picture: `<|image_pad|>` stands for its visual tokens
    join            put before a text that follows another part, unless the text begins with white space
    stop            ends an instruction of the item's own that ends without punctuation
    grid            visual tokens are numbered by their place in the picture; False: on by one, like text
    """

    before: str = ""
    after: str = ""
    picture: str = "<|vision_start|><|image_pad|><|vision_end|>"
    join: str = "\n"
    instruction: str = ""
    stop: str = ""
    grid: bool = True

    def __post_init__(self) -> None:
        if self.picture.count("<|image_pad|>") != 1:
            raise RecipeError(f"prompt: picture is {self.picture!r}; it needs '<|image_pad|>' once")
        if bool(self.instruction) != self.takes_instruction:
            raise RecipeError(
                f"prompt: before is {self.before!r} and instruction is {self.instruction!r}; "
                "give both '{instruction}' and its default, or neither"
            )

    @property
    def takes_instruction(self) -> bool:
        """Whether an item's instruction has a place."""
        return "{instruction}" in self.before


@dataclass(frozen=True)
class Stage:
    """One training run described as data.

    `objectives` maps an objective's name to its weight. `supervise` chooses the dialogue tokens that carry loss: "answers" (the paper)
    or "dialogue" (every token after the compression tokens, the released code). `layout` "raw" puts the context before any
    turn (specs/coma.md 1.2), "chat" inside the first user turn, as a stock chat template does.

    `shift` of masked_token: a hidden token is predicted from the state before it (1) or from its own (0). `decoder_layers`: between the
    states and the pixels of masked_patch. `patch_target`: pixels as the processor normalises them, or "normalised" in each patch once
    more. `kl_temperature`: of distillation, for teacher and student. `nested`: how many of the first compression tokens a row with labels
    keeps, drawn for each: all ("none"), "any" number, or one of 1, 2, 4, ... and all ("doubling"); items to match keep all.
    """

    name: str
    visibility: Visibility
    objectives: Mapping[str, float]
    pooling: str | None = None
    supervise: str = "answers"
    layout: str = "raw"
    bottleneck: Bottleneck | None = None
    corruptions: tuple[Corruption, ...] = ()
    shift: int = 1
    decoder_layers: int = 1
    patch_target: str = "raw"
    kl_temperature: float = 1.0
    nested: str = "none"

    def __post_init__(self) -> None:
        roles = self.visibility.roles
        check_choice(f"stage {self.name!r}: supervise", self.supervise, SUPERVISE)
        check_choice(f"stage {self.name!r}: layout", self.layout, LAYOUTS)
        if not self.objectives:
            raise RecipeError(f"stage {self.name!r} trains nothing; name at least one objective of {list(OBJECTIVES)}")
        for name, weight in self.objectives.items():
            check_choice(f"stage {self.name!r}: objective", name, OBJECTIVES)
            if not weight > 0:
                raise RecipeError(f"stage {self.name!r}: weight of {name} is {weight}; it must be above 0")
        self._check_pooling(roles)
        for name in ("next_token", "distillation"):
            if name in self.objectives:
                self._check_dialogue(name, roles)
        check_corruptions(self)
        check_nested(self)
        if self.bottleneck is not None:
            self._check_bottleneck(self.bottleneck)

    @property
    def speaks(self) -> bool:
        """Whether it predicts tokens, and so runs the language model's head."""
        return bool(self.objectives.keys() & {"next_token", "masked_token", "distillation"})

    @property
    def tells(self) -> str | None:
        """What its rows with labels are made of: "dialogue", "pair" (the text of a positive stands in the row), or None without such."""
        if self.objectives.keys() & {"next_token", "distillation"}:
            return "dialogue"
        return "pair" if self.objectives.keys() & {"masked_token", "masked_patch"} else None

    def _check_pooling(self, roles: tuple[str, ...]) -> None:
        if self.pooling is None:
            if "contrastive" in self.objectives:
                raise RecipeError(f"stage {self.name!r} is contrastive and needs a pooling, one of {list(POOLINGS)}")
            return
        check_choice(f"stage {self.name!r}: pooling", self.pooling, POOLINGS)
        if self.pooling.endswith("compression") and "compression" not in roles:
            raise RecipeError(f"stage {self.name!r}: pooling {self.pooling!r} needs the role 'compression', roles are {list(roles)}")

    def _check_dialogue(self, name: str, roles: tuple[str, ...]) -> None:
        if "dialogue" not in roles:
            raise RecipeError(f"stage {self.name!r}: {name} needs the role 'dialogue', roles are {list(roles)}")
        peeking = [r for r in roles if self.visibility.letter(r, "dialogue") == "f" and self.visibility.reaches("dialogue", r)]
        if peeking:
            raise RecipeError(
                f"stage {self.name!r}: {name} would see its own answer, because {peeking} sees 'dialogue' in full; use 'c' or '.'"
            )

    def _check_bottleneck(self, b: Bottleneck) -> None:
        missing = [role for role in (b.reader, b.through, b.hidden) if role not in self.visibility.roles]
        if missing:
            raise RecipeError(f"stage {self.name!r}: bottleneck names {missing}, roles are {list(self.visibility.roles)}")
        table = list(self.visibility.table)
        for reader in [role for role in self.visibility.roles if role in (b.reader, "dialogue", "target")]:
            if self.visibility.reaches(reader, b.hidden, avoiding=b.through):
                leak = f"{reader!r} reaches {b.hidden!r} without {b.through!r}"
                raise RecipeError(f"stage {self.name!r}: the bottleneck leaks: {leak} in {table}")
            if not self.visibility.reaches(reader, b.hidden):
                told = f"{b.through!r} does not carry {b.hidden!r} to {reader!r} in {table}"
                raise RecipeError(f"stage {self.name!r}: {told}; nothing could be learned")


@dataclass(frozen=True)
class Recipe:
    """An ordered list of stages, plus how to encode.

    `tokens` is K, the number of compression tokens (0 where no stage has that role). `instruction` is a text put after the item and before
    the compression tokens in every stage. `prompt` is the fixed text around an item. The last stage with a pooling says how items become
    vectors.
    """

    name: str
    stages: tuple[Stage, ...]
    tokens: int = 0
    instruction: str = ""
    token_name: str = field(default="<|ctoken_pad_{}|>")
    prompt: Prompt = Prompt()

    def __post_init__(self) -> None:
        if not self.stages:
            raise RecipeError(f"recipe {self.name!r} has no stages; give at least one")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise RecipeError(f"recipe {self.name!r} has stages of the same name: {names}; names must differ")
        needs = any("compression" in stage.visibility.roles for stage in self.stages)
        if needs != (self.tokens > 0):
            raise RecipeError(
                f"recipe {self.name!r} has tokens={self.tokens} but {'a' if needs else 'no'} stage with the role "
                "'compression'; set tokens to " + ("1 or more" if needs else "0")
            )
        if self.tokens == 1 and (apart := [s.name for s in self.stages if s.nested != "none" or "orthogonality" in s.objectives]):
            raise RecipeError(f"recipe {self.name!r}: stages {apart} tell tokens apart, and tokens is 1; set it to 2 or more")

    @property
    def masks(self) -> bool:
        """Whether any stage hides text, so that there is a mask token."""
        return any(corruption.text for stage in self.stages for corruption in stage.corruptions)

    @property
    def token_names(self) -> tuple[str, ...]:
        """The tokens whose embeddings are trained rows of our own: K compression tokens, then the mask token where text is hidden."""
        return (*(self.token_name.format(i) for i in range(self.tokens)), *[MASK_TOKEN] * self.masks)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        check_choice(f"recipe {self.name!r}: stage", name, tuple(stage.name for stage in self.stages))
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def encoding(self) -> Stage | None:
        """The stage whose layout and pooling turn items into vectors: the last with a pooling; None for a plain VLM."""
        return next((stage for stage in reversed(self.stages) if stage.pooling), None)

    def with_tokens(self, tokens: int | None) -> Recipe:
        """The same recipe with another number of compression tokens."""
        return self if tokens is None else replace(self, tokens=tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON and YAML; `Recipe.from_dict` reads it back to an equal object."""
        out: dict[str, Any] = {"name": self.name, "tokens": self.tokens, "instruction": self.instruction}
        out |= {"token_name": self.token_name, "stages": []}
        if self.prompt != Prompt():  # so that what was saved before there was this choice keeps its fingerprint
            out["prompt"] = asdict(self.prompt)
        for stage in self.stages:
            row: dict[str, Any] = {name: getattr(stage, name) for name in ("name", "pooling", "supervise", "layout")}
            # What came later stands there only where it says something, so that an older recipe keeps its text and fingerprint.
            row |= {f.name: getattr(stage, f.name) for f in fields(stage) if f.name in _LATER and getattr(stage, f.name) != f.default}
            if stage.corruptions:
                row["corruptions"] = [asdict(corruption) for corruption in stage.corruptions]
            row["objectives"] = dict(stage.objectives)
            row["roles"], row["visibility"] = list(stage.visibility.roles), list(stage.visibility.table)
            row["bottleneck"] = asdict(stage.bottleneck) if stage.bottleneck else None
            out["stages"].append(row)
        return out

    def to_json(self) -> str:
        """Canonical JSON text."""
        return json.dumps(self.to_dict(), sort_keys=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what `to_dict` wrote, or what a person wrote in YAML. Raises RecipeError on unknown or missing keys."""
        _check_keys("recipe", data, {f.name for f in fields(cls)}, {"name", "stages"})
        stages = []
        for row in data["stages"]:
            allowed = {f.name for f in fields(Stage)} | {"roles"}
            _check_keys(f"stage {row.get('name')!r}", row, allowed, {"name", "roles", "visibility", "objectives"})
            values = {key: value for key, value in row.items() if key != "roles"}
            values["visibility"] = Visibility(tuple(row["roles"]), tuple(row["visibility"]))
            if row.get("bottleneck") is not None:
                _check_keys(f"stage {row['name']!r}: bottleneck", row["bottleneck"], {f.name for f in fields(Bottleneck)}, set())
                values["bottleneck"] = Bottleneck(**row["bottleneck"])
            if "corruptions" in row:
                for part in row["corruptions"]:
                    _check_keys(f"stage {row['name']!r}: corruption", part, {f.name for f in fields(Corruption)}, {"role"})
                values["corruptions"] = tuple(Corruption(**part) for part in row["corruptions"])
            stages.append(Stage(**values))
        prompt = data.get("prompt", {})
        _check_keys("prompt", prompt, {f.name for f in fields(Prompt)}, set())
        return cls(**{**data, "stages": tuple(stages), "prompt": Prompt(**prompt)})

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read `to_json` text back to an equal recipe."""
        return cls.from_dict(json.loads(text))


def check_vectors(vectors: int, pooling: str | None, tokens: int) -> None:
    """Raise RecipeError unless an item can have that many vectors: 1 always, more where they divide `tokens` compression tokens."""
    if vectors == 1:
        return
    if pooling != "mean_compression":
        raise RecipeError(f"{vectors} vectors an item need the pooling 'mean_compression', this stage has {pooling!r}; use 1")
    allowed = [n for n in range(1, tokens + 1) if tokens % n == 0]
    if vectors not in allowed:
        raise RecipeError(f"{tokens} compression tokens do not make {vectors} vectors of equally many; allowed: {allowed}")


def _check_roles(roles: tuple[str, ...]) -> None:
    unknown = [role for role in roles if role not in ROLES]
    if unknown or not roles or len(set(roles)) < len(roles):
        raise RecipeError(f"roles {list(roles)}: each must be one of {list(ROLES)}, at most once, at least one")


def _check_keys(what: str, data: Mapping[str, Any], allowed: set[str], needed: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{what} must be a mapping of names to values, got {type(data).__name__}")
    unknown, missing = sorted(set(data) - allowed), sorted(needed - set(data))
    if unknown or missing:
        raise RecipeError(f"{what}: unknown keys {unknown}, missing keys {missing}; allowed: {sorted(allowed)}")
