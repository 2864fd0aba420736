"""Batch composition is arithmetic: exact shares, whole units, permutations without repeats, and nothing that depends on luck or history."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from comatch.config import DataConfig, RunConfig, dump, load_config
from comatch.content import Image, Message, Text, Video, as_message
from comatch.data.mixture import Ingredient, Mixture, apportioned, key, open_mixture, prompted
from comatch.data.scenes import scene
from comatch.errors import ConfigError, DataError


class Rows:
    """A source of so many rows; here only their number matters."""

    endless = False

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n


def mixed(weights: dict[str, Any], unit: int = 1, rows: int = 1000) -> Mixture:
    source: Any = Rows(rows)
    return Mixture(tuple(Ingredient(name, source, Fraction(str(weight))) for name, weight in weights.items()), unit)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- shares


def test_shares_are_exact_never_fall_and_stay_near() -> None:
    dice = random.Random(0)
    for _ in range(60):
        weights = [Fraction(dice.choice((1, 3, 0.01, dice.randint(1, 10**6)))) for _ in range(dice.randint(1, 24))]
        total, last = sum(weights), [0] * len(weights)
        for n in range(1, 150):
            parts = apportioned(weights, n)
            steps = [now - before for now, before in zip(parts, last, strict=True)]
            assert sum(parts) == n and sorted(steps) == [0] * (len(weights) - 1) + [1], "one more unit goes to exactly one source"
            last = parts
        far = 10**15 + dice.randint(0, 10**6)
        for n in (149, far):
            distance = [abs(part - n * w / total) for part, w in zip(apportioned(weights, n), weights, strict=True)]
            assert max(distance) < max(2, len(weights) / 2), "the distance from the true share does not grow"


def test_whole_rounds_are_exact() -> None:
    weights = [Fraction(w) for w in (5, 1, 3, 700, 2)]
    for rounds in (1, 2, 17, 10**12):
        assert apportioned(weights, rounds * 711) == [w * rounds for w in weights]
    drawn = Counter(random.Random(0).choices(range(5), weights=[5, 1, 3, 700, 2], k=711))
    assert [drawn[i] for i in range(5)] != [5, 1, 3, 700, 2], "which drawing by luck does not give"


@pytest.mark.parametrize("unit", [1, 8, 0])
def test_batches_take_every_position_of_a_source_once_and_in_order(unit: int) -> None:
    mixture = mixed({"a": 0.5, "b": 0.3, "c": 0.2}, unit)
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in range(50):
        assert mixture.given(step, 32) == [len(seen[i]) for i in range(3)], "what came before a step is known without walking"
        places = mixture.places(step, 32)
        assert len(places) == 32 and places == mixture.places(step, 32)
        for source, position in places:
            seen[source].append(position)
    assert all(positions == list(range(len(positions))) for positions in seen.values())
    assert [len(seen[i]) for i in range(3)] == [800, 480, 320]


def test_what_a_batch_is_made_of() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    counts = {unit: [Counter(s for s, _ in mixed(weights, unit).places(step, 32)) for step in range(40)] for unit in (1, 8, 0)}
    assert all(len(batch) == 1 for batch in counts[0]), "homogeneous: one source fills the global batch"
    assert {next(iter(batch)) for batch in counts[0]} == {0, 1, 2}
    assert all(n % 8 == 0 for batch in counts[8] for n in batch.values()) and any(len(batch) > 1 for batch in counts[8])
    assert all(abs(batch[0] - 16) <= 1 and abs(batch[1] - 9.6) <= 1.6 and abs(batch[2] - 6.4) <= 1.6 for batch in counts[1])
    assert any(n % 8 for batch in counts[1] for n in batch.values())


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_every_source_alike(ranks: int) -> None:
    mixture = mixed({"a": 0.5, "b": 0.5}, unit=1)
    places = mixture.places(3, 32)
    counts = [Counter(source for source, _ in places[rank::ranks]) for rank in range(ranks)]
    assert all(max(c[s] for c in counts) - min(c[s] for c in counts) <= 1 for s in (0, 1))
    # In the order in which units are handed out, two ranks would get one source each.
    handed = [next(s for s in (0, 1) if mixture.given(u + 1, 1)[s] > mixture.given(u, 1)[s]) for u in range(96, 128)]
    assert {tuple(sorted(set(handed[rank::2]))) for rank in range(2)} == {(0,), (1,)}


# --- rows


@pytest.mark.parametrize("n", [1, 2, 7, 256, 1000])
def test_no_row_repeats_within_an_epoch_of_its_source(n: int) -> None:
    mixture = mixed({"a": 1, "b": 1}, rows=n)
    for source, epoch in itertools.product((0, 1), (0, 1, 5)):
        first = [next(mixture.rows(source, epoch * n + place, seed=3)) for place in range(n)]
        assert sorted(first) == [(row, epoch) for row in range(n)]
    if n > 7:
        walks = ((0, 0, 3), (0, 1, 3), (1, 0, 3), (0, 0, 4))
        orders = {tuple(next(mixture.rows(s, e * n + place, seed))[0] for place in range(n)) for s, e, seed in walks}
        assert len(orders) == 4, "another order in another epoch, source and seed"


def test_reserves_of_a_batch_are_other_rows() -> None:
    mixture = mixed({"a": 1}, rows=100_000)
    walks = [[row for row, _ in mixture.rows(0, position, 0)] for position in range(100, 200)]
    assert all(len(walk) == 20 for walk in walks) and all(len({walk[r] for walk in walks}) == 100 for r in range(20))
    assert len({row for walk in walks for row in walk}) > 0.98 * 2000


def test_the_order_of_samples_is_pinned() -> None:
    """A checkpoint holds a step, nothing else of the order: other numbers here mean that old runs cannot be resumed."""
    mixture = mixed({"a": 3, "b": 1.5}, rows=100)
    assert mixture.places(2, 6) == [(0, 8), (0, 9), (0, 10), (0, 11), (1, 4), (1, 5)]
    assert [next(mixture.rows(s, p, 7)) for s, p in mixture.places(2, 6)] == [(50, 0), (68, 0), (17, 0), (96, 0), (62, 0), (77, 0)]
    assert list(mixture.rows(1, 250, 7))[:4] == [(1, 2), (63, 2), (2, 2), (35, 2)]


# --- keys and prompts


def test_equal_items_have_equal_keys_and_no_file_is_opened() -> None:
    picture = scene(0, 0).draw()
    items: list[Any] = [
        "red", "Red", Path("red"), Path("/no/such/red.png"), b"red", picture, scene(0, 1).draw(),
        {"image": picture, "text": "red"}, {"text": "red", "image": picture}, ["red", "red"], ["redred"], ["red", "re", "d"],
        Video((Image(picture),)), Video((Image(picture), Image(picture))), [Image(picture), Image(picture)],
    ]  # fmt: skip
    keys = [key(as_message(item)) for item in items]
    assert len(set(keys)) == len(keys) and all(0 <= k < 2**63 for k in keys)
    assert keys == [key(as_message(item)) for item in items]
    assert key(as_message(" red\n")) == keys[0]
    assert key(as_message("red")) == 5621240838084699112, "pinned: ranks compare keys"


def test_a_prompt_stands_before_the_text() -> None:
    picture = Image(scene(0, 0).draw())
    assert prompted(as_message("a dog"), "Find it.").parts == (Text("Find it.\na dog"),)
    assert prompted(Message((picture, Text("a"), Text("b"))), "Find it.").parts == (picture, Text("Find it.\na"), Text("b"))
    assert prompted(Message((picture,)), "Find it.").parts == (picture, Text("Find it."))


# --- from a config


def test_open_mixture(tmp_path: Path) -> None:
    columns = {"query.text": "q", "positive.text": "p"}
    paths = {n: jsonl(tmp_path / f"{n}.jsonl", [{"q": f"q{i}", "p": f"p{i}"} for i in range(n)]) for n in (40, 10)}
    # Not in the order of names: the order of keys in a file must not matter.
    sources = {"small": {"source": "table", "path": paths[10], "columns": columns, "prompt": "Find it."}}
    sources["large"] = {"source": "table", "path": paths[40], "columns": columns, "limit": 30}
    mixture = open_mixture(DataConfig.model_validate({"mixture": sources, "negatives": 2}), seed=0)
    assert [(i.name, len(i.source), i.weight) for i in mixture.ingredients] == [("large", 30, 30), ("small", 10, 10)]
    assert (len(mixture), mixture.unit, mixture.negatives) == (40, 1, 2)
    assert mixture.ingredients[1].group(0, 0).query.text == "Find it.\nq0"
    assert mixture.ingredients[0].group(0, 0).query.text == "q0"
    assert mixture.places(0, 40) == [(0, p) for p in range(30)] + [(1, p) for p in range(10)]
    turned = open_mixture(DataConfig.model_validate({"mixture": dict(reversed(sources.items())), "negatives": 2}), seed=0)
    assert [i.name for i in turned.ingredients] == ["large", "small"]
    for compose, temperature, shares in (("blocks", 2.0, (3**0.5, 1)), ("homogeneous", 1e9, (1, 1))):
        data = {"mixture": sources, "compose": compose, "temperature": temperature} | ({"block": 5} if compose == "blocks" else {})
        got = open_mixture(DataConfig.model_validate(data), seed=0)
        assert float(got.ingredients[0].weight / got.ingredients[1].weight) == pytest.approx(shares[0] / shares[1], rel=1e-8)
        assert got.unit == (5 if compose == "blocks" else 0)
    for source, weight in (("large", 1.0), ("small", 0.1)):
        sources[source]["weight"] = weight
    weighted = open_mixture(DataConfig.model_validate({"mixture": sources}), seed=0)
    assert [i.weight for i in weighted.ingredients] == [1, Fraction(1, 10)]
    alone = open_mixture(DataConfig(source="scenes", limit=7, prompt="x"), seed=0)
    assert [(i.name, i.prompt) for i in alone.ingredients] == [("scenes", "x")] and alone.unit == 0


def test_epochs_are_steps() -> None:
    mixture = mixed({"a": 1, "b": 1}, rows=50)
    assert [mixture.steps(epochs, 16) for epochs in (1, 2, 0.32, 0.16)] == [6, 12, 2, 1]
    assert mixture.steps(0.29, 29) == 1 and 0.29 * 100 < 29, "numbers are read as they are written"
    with pytest.raises(ConfigError, match="fill no batch of 16; lower batch or raise epochs"):
        mixture.steps(0.1, 16)
    with pytest.raises(ConfigError, match=r"\['scenes'\] are generated without end; give them a limit"):
        open_mixture(DataConfig(), 0).steps(1, 16)
    assert open_mixture(DataConfig(limit=160), 0).steps(1, 16) == 10


def test_compositions_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="batch=12 is not a multiple of block=8"):
        mixed({"a": 1, "b": 1}, unit=8).check(10, 12)
    with pytest.raises(ConfigError, match=r"\['b'\] would not be seen in 10 steps of 4"):
        mixed({"a": 100, "b": 1}).check(10, 4)
    mixed({"a": 100, "b": 1}).check(100, 4)
    scenes = {"a": {}, "b": {"split": "dev"}}
    with pytest.raises(ConfigError, match=r"mixture\.a is generated without end"):
        open_mixture(DataConfig.model_validate({"mixture": scenes}), 0)
    open_mixture(DataConfig.model_validate({"mixture": {name: part | {"weight": 1.0} for name, part in scenes.items()}}), 0)
    with pytest.raises(DataError, match="no source 'scene'"):
        open_mixture(DataConfig(source="scene"), 0)


RUN = """name: mix
model: comatch-nano
recipe: coma
seed: 1
{top}
stages:
  compress:
    steps: 2
    batch: 4
    {compress}
  match:
    {length}
    batch: 4
    {match}
"""
TWO = "{a: {split: dev}, b: {}}"


def read(path: Path, **parts: str) -> RunConfig:
    values = {"top": "", "compress": "log_every: 1", "match": "log_every: 1", "length": "steps: 2"} | parts
    (path / "run.yaml").write_text(RUN.format(**values))
    return load_config(path / "run.yaml")


def test_a_mixture_is_read_and_written(tmp_path: Path) -> None:
    config = read(tmp_path, match=f"data: {{mixture: {TWO}, compose: blocks, block: 2, negatives: 3}}", length="epochs: 0.5")
    data = config.stages["match"].data
    assert data is not None and data.mixture is not None and list(data.sources) == ["a", "b"]
    assert (data.mixture["a"].split, data.block, data.negatives, config.stages["match"].epochs) == ("dev", 2, 3, 0.5)
    (tmp_path / "again.yaml").write_text(dump(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"match": "data: {compose: blocks}"}, ["data: compose is 'blocks'", "no effect without a mixture"]),
        ({"match": "data: {temperature: 2.0}"}, ["temperature is 2.0", "no effect without a mixture"]),
        ({"match": f"data: {{mixture: {TWO}, path: x}}"}, ["path is 'x'", "no effect beside a mixture"]),
        ({"match": f"data: {{mixture: {TWO}, limit: 9}}"}, ["limit is 9", "say it for each"]),
        ({"match": "data: {mixture: {a: {}}}"}, ["mixture has 1 sources"]),
        ({"match": "data: {mixture: {a: {weight: 1.0}, b: {}}}"}, ["['b'] have no weight"]),
        ({"match": "data: {mixture: {a: {weight: 0.0}, b: {weight: 1.0}}}"}, [".mixture.a.weight is 0.0", "greater than 0"]),
        ({"match": f"data: {{mixture: {TWO}, compose: blocks}}"}, ["block is None and compose is 'blocks'"]),
        ({"match": f"data: {{mixture: {TWO}, block: 2}}"}, ["block is 2 and compose is 'free'"]),
        ({"match": "data: {mixture: {a: {wieght: 1.0}, b: {}}}"}, [":14: unknown key", "mixture.a.wieght", "did you mean 'weight'?"]),
        ({"match": "data: {mixture: {source: {splt: dev}, b: {}}}"}, ["mixture.source.splt", "did you mean 'split'?"]),
        ({"match": "data: {positives: 0}"}, ["positives is 0", "greater than or equal to 1"]),
        ({"compress": "data: {negatives: 1}"}, ["stages.compress.data.negatives has no effect", ":10:"]),
        ({"compress": "data: {mixture: {a: {prompt: x}, b: {}}}"}, ["stages.compress.data.prompt has no effect"]),
        ({"top": "data: {positives: 2}", "match": "data: {split: dev}"}, [":5: data.positives has no effect"]),
        ({"top": "data: {split: dev}", "match": "data: {}", "compress": "data: {}"}, [":5: data has no effect", "every stage has its own"]),
        ({"length": "epochs: 1.0\n    steps: 2"}, ["steps is 2 and epochs is 1.0; give one of the two"]),
        ({"length": "log_every: 2"}, ["steps is 0 and epochs is None; give one of the two"]),
        ({"length": "epochs: 0.0"}, ["epochs is 0.0", "greater than 0"]),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, parts: dict[str, str], told: list[str]) -> None:
    if parts.get("length") == "log_every: 2":
        parts = parts | {"match": "tokens_per_pass: 9"}
    with pytest.raises(ConfigError) as error:
        read(tmp_path, **parts)
    assert all(text in str(error.value) for text in told), str(error.value)


def test_settings_that_serve_one_stage_pass(tmp_path: Path) -> None:
    assert read(tmp_path, top="data: {negatives: 2, prompt: Find it.}").data.negatives == 2


def test_a_source_that_cannot_serve_the_stage_is_named_before_any_model_loads(tmp_path: Path) -> None:
    columns = {"query.text": "q", "positive.text": "p"}
    path = jsonl(tmp_path / "pairs.jsonl", [{"q": "q", "p": ""}, {"q": "q", "p": "p"}])
    mixture = open_mixture(DataConfig(source="table", path=path, columns=columns), 0)
    mixture.try_out(pairs=True)  # its first row is faulty, and that alone stops nothing
    with pytest.raises(DataError, match="for a dialogue, columns must name"):
        mixture.try_out(pairs=False)
