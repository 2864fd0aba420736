"""A batch is a pure function of its step: for any workers, ranks and restarts, without equal positives, with every fault counted."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from comatch.config import RunConfig
from comatch.content import Dialogue, Group, Message, as_message
from comatch.core.batch import Example
from comatch.core.packing import Size
from comatch.data.mixture import Ingredient, Mixture, key
from comatch.errors import ContentError, DataError
from comatch.recipes import load_recipe
from comatch.training import loop
from comatch.training.loader import Quarantine, Sample, StageData, batches

COMPRESS, MATCH = load_recipe("coma").stages


class Pairs:
    """Rows whose positive is `answer(row)`. Rows of `unreadable` cannot be read at all; `reads` counts what was read."""

    endless = False

    def __init__(
        self, n: int, answer: Callable[[int], str] = str, unreadable: Callable[[int], bool] = lambda i: False, negatives: int = 0
    ) -> None:
        self.n, self.answer, self.unreadable, self.negatives, self.reads = n, answer, unreadable, negatives, 0

    def __len__(self) -> int:
        return self.n

    def group(self, row: int, epoch: int) -> Group:
        self.reads += 1
        if self.unreadable(row):
            raise ContentError("unreadable")
        right = [as_message(f"{self.answer(row)}{form}") for form in ("", " again")]
        return Group(as_message(f"query {row}"), tuple(right), tuple(as_message(f"wrong {row} {i}") for i in range(self.negatives)))

    def dialogue(self, row: int, epoch: int) -> Dialogue:
        if self.unreadable(row):
            raise ContentError("unreadable")
        return Dialogue(as_message(f"context {row}"), (("q", f"epoch {epoch}"),))


class Stub:
    """In the place of a Preparer: an example is the key of its item, and the process it was made in. Texts with `damaged` fail."""

    def __init__(self, damaged: Callable[[str], bool] = lambda text: False, cut: Callable[[str], int] = lambda text: 0) -> None:
        self.damaged, self.cut = damaged, cut

    def item(self, message: Message, stage: Any) -> Example:
        if self.damaged(message.text):
            raise ContentError("damaged")
        ids = np.asarray([key(message)])
        return Example(ids, ids, ids, np.full((3, 1), os.getpid()), cut=self.cut(message.text))

    def dialogue(self, dialogue: Dialogue, stage: Any, seed: int = 0) -> Example:
        return self.item(as_message([*dialogue.context.parts, dialogue.turns[0][1]]), stage)


def mixture(*sources: Any, unit: int = 1, positives: int = 1, negatives: int = 0) -> Mixture:
    names = "abc"[: len(sources)]
    return Mixture(tuple(Ingredient(n, s, Fraction(1)) for n, s in zip(names, sources, strict=True)), unit, positives, negatives)


def stage(mixed: Mixture, preparer: Any = None, *, stage: Any = MATCH, seed: int = 0, batch: int = 16, **rank: int) -> StageData:
    return StageData(mixed, preparer or Stub(), stage, seed=seed, batch=batch, **rank)


def faulty(**changes: Any) -> StageData:
    """Two sources with everything that can be wrong: unreadable rows, damaged pictures, positives that repeat."""
    a = Pairs(60, answer=lambda i: f"class {i % 25}", unreadable=lambda i: i % 9 == 0, negatives=3)
    b = Pairs(31, answer=lambda i: f"class {i % 20}", negatives=1)
    mixed = mixture(a, b, positives=2, negatives=2)
    return stage(mixed, Stub(damaged=lambda text: text in ("query 7", "query 14", "wrong 3 1")), **changes)


def told(samples: list[Sample]) -> list[Any]:
    """All of the samples but the process they were made in."""
    return [(replace(s, examples=()), [e.ids.tolist() for e in s.examples]) for s in samples]


# --- the same for any workers, starts and ranks


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_same_batches_for_any_workers_and_any_start() -> None:
    data = faulty()
    straight = [told(data[step]) for step in range(9)]
    assert straight == [told(faulty()[step]) for step in range(9)] and straight != [told(faulty(seed=1)[step]) for step in range(9)]
    assert len({str(batch) for batch in straight}) == 9
    for workers in (0, 1, 2, 4):
        for first in (0, 5):
            got = list(batches(data, first, 9, workers))
            assert [told(samples) for samples in got] == straight[first:]
            made_in = {int(e.positions[0, 0]) for samples in got for s in samples for e in s.examples}
            assert len(made_in) == min(workers, 9 - first) or (workers == 0 and made_in == {os.getpid()})
            assert (os.getpid() in made_in) == (workers == 0), "worker processes did the work"


@pytest.mark.parametrize("kind", [COMPRESS, MATCH])
def test_ranks_together_are_one(kind: Any) -> None:
    whole = [told(faulty(stage=kind)[step]) for step in range(5)]
    assert any(sample.bad for step in range(5) for sample in faulty(stage=kind)[step])
    for ranks in (2, 4, 8):
        parts = [faulty(stage=kind, rank=rank, ranks=ranks) for rank in range(ranks)]
        for step in range(5):
            got = [told(part[step]) for part in parts]
            assert [len(one) for one in got] == [16 // ranks] * ranks
            assert [got[i % ranks][i // ranks] for i in range(16)] == whole[step]


def test_loading_leaves_the_random_state_alone() -> None:
    """A run that loads once and one that loads again after a kill must draw the same dropout."""
    for workers in (0, 2):
        before = torch.get_rng_state()
        list(batches(faulty(), 0, 2, workers))
        assert torch.equal(torch.get_rng_state(), before)
    list(DataLoader([1, 2]))
    assert not torch.equal(torch.get_rng_state(), before), "a loader without a generator of its own does not"


# --- rows


def test_every_row_once_in_an_epoch() -> None:
    data = stage(mixture(Pairs(48), Pairs(48, answer="b{}".format)))
    for epoch in (0, 1):
        seen = Counter((s.source, s.row) for step in range(6 * epoch, 6 * epoch + 6) for s in data[step])
        assert set(seen) == {(name, row) for name in "ab" for row in range(48)} and set(seen.values()) == {1}
    orders = [[s.row for step in range(6 * e, 6 * e + 6) for s in data[step] if s.source == "a"] for e in (0, 1)]
    assert orders[0] != orders[1]
    single = stage(mixture(Pairs(64), unit=0))
    rows = [s.row for step in range(4) for s in single[step]]
    assert sorted(rows) == list(range(64)), "rows of different content are never replaced"
    assert not any(s.replaced or s.duplicate or s.bad for step in range(4) for s in single[step])


def test_bad_rows_are_replaced_counted_and_bounded() -> None:
    for kind, bad in ((COMPRESS, {"unreadable"}), (MATCH, {"unreadable", "damaged"})):
        source = Pairs(90, unreadable=lambda i: i % 10 == 0)
        damaged = Stub(damaged=lambda text: text in {f"query {i}" for i in range(3, 90, 10)})
        data = stage(mixture(source, unit=0), damaged, stage=kind, batch=15)
        samples = [s for step in range(6) for s in data[step]]
        assert len(samples) == 90 and all(s.row % 10 and (kind is COMPRESS or s.row % 10 != 3) for s in samples)
        assert {reason for s in samples for reason in s.bad} == bad
        assert sum(s.bad[0] == "unreadable" for s in samples if s.bad) == 9, "each bad row was met once in the epoch, in its own place"
        account = Quarantine(0.5, 90)
        for sample in samples:
            account.add(sample)
        assert account.count == sum(account.reasons.values()) == sum(len(s.bad) for s in samples) == account.counts["a"]["bad"]
        assert account.total("samples") == 90
        strict = Quarantine(0.001, 90)
        many = [replace(s, bad=("worse",)) for s in samples]
        for sample in many[:10]:
            strict.add(sample)
        with pytest.raises(DataError, match=r"11 bad rows in 11 samples, allowed are 10 \(data.max_bad=0.001\): 11 x worse"):
            strict.add(many[10])
        with pytest.raises(DataError, match="source 'a' and its 19 reserves are all bad"):
            stage(mixture(Pairs(90, unreadable=lambda i: True)), stage=kind)[0]
    with pytest.raises(DataError, match="all bad: \\['damaged'"):
        stage(mixture(Pairs(90)), Stub(damaged=lambda text: True))[0]


# --- positives and negatives


def test_no_positive_stands_twice_in_a_batch() -> None:
    source = Pairs(100, answer=lambda i: f"class {i % 30}")
    data = stage(mixture(source, source))
    replaced = 0
    for step in range(12):
        samples = data[step]
        answers = [s.keys[1] for s in samples]
        assert len(set(answers)) == 16 and not any(s.duplicate for s in samples)
        replaced += sum(s.replaced for s in samples)
        planned = [key(as_message(f"class {next(data.mixture.rows(*place, 0))[0] % 30}")) for place in data.mixture.places(step, 16)]
        assert len(set(planned)) < 16, "without replacing, some would"
    assert replaced > 12


def test_positives_that_cannot_be_told_apart_stay_and_are_counted() -> None:
    source = Pairs(1000, answer=lambda i: "yes" if i % 2 else "no")
    data = stage(mixture(source, unit=0), batch=64)
    samples = data[0]
    assert [s.duplicate for s in samples].count(False) == 2 and not any(s.replaced for s in samples[3:])
    assert len({s.keys[1] for s in samples}) == 2
    assert [s.row for s in samples if s.duplicate] == [row for s, (row, _) in zip(samples, planned(data, 64), strict=True) if s.duplicate]
    assert source.reads <= 64 * 2, "the search is bounded by the batch"


def planned(data: StageData, batch: int) -> list[tuple[int, int]]:
    return [next(data.mixture.rows(*place, 0)) for place in data.mixture.places(0, batch)]


def test_a_replacement_for_a_damaged_row_is_no_duplicate_either() -> None:
    source = Pairs(200, answer=lambda i: f"class {i % 40}")
    damaged = Stub(damaged=lambda text: text.startswith("query") and int(text.split()[1]) % 3 == 0)
    replacements = 0
    for step in range(20):
        samples = stage(mixture(source, unit=0), damaged)[step]
        times = Counter(s.keys[1] for s in samples)
        # Two replacements of one batch may meet, because they may stand on two ranks; the loss masks these.
        assert all(s.bad or times[s.keys[1]] == 1 for s in samples)
        replacements += sum(bool(s.bad) for s in samples)
    assert replacements > 60


def test_as_many_positives_and_negatives_as_asked_for() -> None:
    source = Pairs(32, negatives=5)
    for positives, negatives in ((1, 0), (1, 3), (2, 5), (4, 7)):
        data = stage(mixture(source, unit=0, positives=positives, negatives=negatives))
        for s in data[0]:
            assert s.positives == min(positives, 2) and len(s.examples) == 1 + s.positives + min(negatives, 5)
            assert s.missing == max(0, negatives - 5) and s.keys == tuple(int(e.ids[0]) for e in s.examples)
            wrong = {key(as_message(f"wrong {s.row} {i}")) for i in range(5)}
            assert s.keys[0] == key(as_message(f"query {s.row}")) and wrong.issuperset(s.keys[1 + s.positives :])
            assert wrong.isdisjoint(s.keys[: 1 + s.positives])
    data = stage(mixture(source, unit=0, negatives=2))
    drawn = [{s.row: s.keys[2:] for step in range(2 * e, 2 * e + 2) for s in data[step]} for e in range(16)]
    for row in range(32):
        assert len({frozenset(d[row]) for d in drawn}) > 1, "others in other epochs"
    assert len({k for d in drawn for k in d[0]}) == 5, "and in time all of them"


def test_a_prompt_goes_before_the_query_alone() -> None:
    source: Any = Pairs(16)
    sample = stage(Mixture((Ingredient("a", source, prompt="Find it."),)))[0][0]
    assert sample.keys == (key(as_message(f"Find it.\nquery {sample.row}")), key(as_message(str(sample.row))))


# --- the account


def test_the_account_tells_everything_for_each_source() -> None:
    account, expected = Quarantine(1.0, 91), Counter[str]()
    data = faulty()
    for step in range(6):
        for s in data[step]:
            account.add(s)
            expected.update({f"{s.source} samples": 1, f"{s.source} bad": len(s.bad), f"{s.source} replaced": s.replaced})
            expected.update({f"{s.source} kept": s.duplicate, f"{s.source} missing": s.missing})
    for source in "ab":
        for name in ("samples", "bad", "replaced", "kept", "missing"):
            assert account.counts[source][name] == expected[f"{source} {name}"]
    assert expected["a samples"] == expected["b samples"] == 48
    assert expected["a bad"] and expected["b bad"] and expected["a replaced"] and expected["b missing"] == 48 and not expected["a missing"]
    row = account.metrics()
    assert row["bad_rows"] == account.count and row["sources"]["b"]["missing"] == row["negatives_missing"] == 48
    ranks = [Quarantine(1.0, 91) for _ in range(4)]
    for rank, part in enumerate(ranks):
        for step in range(6):
            for s in faulty(rank=rank, ranks=4)[step]:
                part.add(s)
    assert Quarantine.merged(ranks) == account and ranks[0] != account
    with pytest.raises(DataError, match="allowed are 10"):
        Quarantine.merged([Quarantine(0.0, 91, Counter({"x": 6})), Quarantine(0.0, 91, Counter({"x": 6}))])


def test_text_that_was_cut_is_counted_and_told_once() -> None:
    data = stage(mixture(Pairs(32), unit=0), Stub(cut=lambda text: 7 if text.startswith("query 1") else 0))
    account = Quarantine(0.1, 32)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for step in range(2):
            for sample in data[step]:
                account.add(sample)
    assert len(heard) == 1 and "7 text tokens were cut" in str(heard[0].message)
    assert account.metrics()["cut_examples"] == 11 and account.counts["a"]["samples"] == 32


# --- a whole run


def test_a_run_on_a_mixture(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    rows = [{"q": f"query {i}", "p": [f"class {i % 7}"], "n": [f"wrong {i}"] * (i % 2)} for i in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"query.text": "q", "positive.text": "p", "negative.text": "n"}
    table = {"source": "table", "path": str(tmp_path / "pairs.jsonl"), "columns": columns, "prompt": "Find it."}
    data = {"mixture": {"pairs": table, "scenes": {"limit": 8}}, "negatives": 1, "compose": "blocks", "block": 4}
    values: dict[str, Any] = {
        "name": "mixed", "model": str(folder_of("qwen2_5_vl")), "recipe": "coma", "tokens": 4, "precision": "fp32", "device": "cpu",
        "output": str(tmp_path / "run"), "stages": {"match": {"epochs": 2.0, "batch": 8, "log_every": 1, "data": data}},
    }  # fmt: skip
    out = loop.train(RunConfig.model_validate(values), quiet=True)
    metrics = loop.read_metrics(out / "metrics.jsonl")
    assert len(metrics) == 8, "2 epochs of 32 rows in batches of 8"
    last = metrics[-1]["sources"]
    assert (last["pairs"]["samples"], last["scenes"]["samples"]) == (48, 16)
    assert last["pairs"]["replaced"] and 0 < last["pairs"]["missing"] < 48 and last["scenes"]["missing"] == 0, "scenes make theirs"
    assert metrics[-1]["negatives_missing"] == last["pairs"]["missing"] and metrics[0]["sources"] != last
    stages = {"compress": {"steps": 1, "batch": 1, "data": {**table, "prompt": ""}}}
    with pytest.raises(DataError, match=r"stages.compress: .*for a dialogue, columns must name"):
        loop.train(RunConfig.model_validate({**values, "output": str(tmp_path / "no"), "stages": stages}), quiet=True)
    assert not (tmp_path / "no").exists()


# --- dealt out by what it costs


class Sized(Stub):
    """A Stub that knows sizes: a text costs its length, and some cannot be told before they are prepared."""

    renderer: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.renderer = self

    def size(self, row: Any) -> Size:
        return Size(len(row.text) ** 2)

    def item(self, message: Message, stage: Any) -> Any:
        if message.text == "query 5":
            raise ContentError("damaged")
        return Weighed(message.text, super().item(message, stage))

    def dialogue(self, dialogue: Dialogue, stage: Any, seed: int = 0) -> Any:
        return self.item(dialogue.context, stage)


class Weighed(Example):
    """An example that remembers its text."""

    def __init__(self, text: str, example: Example) -> None:
        super().__init__(example.ids, example.roles, example.labels, example.positions)
        object.__setattr__(self, "text", text)


class Uneven(Pairs):
    """Rows of very different lengths."""

    def group(self, row: int, epoch: int) -> Group:
        return Group(as_message(f"query {row}"), (as_message(f"{row} " + "long " * (row * row % 61)),), ())

    def dialogue(self, row: int, epoch: int) -> Dialogue:
        return Dialogue(self.group(row, epoch).positives[0], (("q", "a"),))


@pytest.mark.parametrize("kind", [COMPRESS, MATCH], ids=["compress", "match"])
def test_ranks_get_equally_much_work_and_together_the_same(kind: Any) -> None:
    def work(ranks: int, cost: Any) -> tuple[list[list[Any]], float]:
        parts = [stage(mixture(Uneven(300)), Sized(), stage=kind, batch=64, rank=r, ranks=ranks, cost=cost)[1] for r in range(ranks)]
        costs = [sum(len(e.text) ** 2 for s in part for e in s.examples) for part in parts]
        return [told(part) for part in parts], max(costs) * ranks / sum(costs)

    whole, _ = work(1, lambda size: float(size.tokens))
    for ranks in (2, 8):
        dealt, even = work(ranks, lambda size: float(size.tokens))
        turns, uneven = work(ranks, None)
        assert [len(part) for part in dealt] == [64 // ranks] * ranks
        assert sorted(map(str, chain(*dealt))) == sorted(map(str, chain(*turns))) == sorted(map(str, whole[0]))
        assert even < 1.01 < 1.05 < uneven, "by turns some rank has much more"
