"""A dry run tells the truth about a run of any size, with no weights, no network and no data."""

from __future__ import annotations

import re
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as PILImage

from comatch import cli
from comatch.backbones import adapters
from comatch.config import RunConfig, load_config
from comatch.core.batch import ROLE_ID
from comatch.core.flops import Shape, Trains, work_of
from comatch.data.scenes import scene
from comatch.errors import ConfigError, DataError, ModelError
from comatch.recipes import load_recipe
from comatch.training import loop
from comatch.training.dry import describe, weightless
from comatch.training.loader import StageData
from comatch.training.plan import plan

RUNS = sorted((Path(__file__).resolve().parent.parent / "runs").glob("*.yaml"))
LARGE = {path.stem: path for path in RUNS if path.stem in ("coma-3b", "coma-7b")}
Folders = Callable[[str], Path]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a dry run asked the network for {args}")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)


def tiny(folder: Path, **changes: Any) -> RunConfig:
    stage = {"steps": 4, "batch": 2, "tokens_per_pass": 300}
    values = {"name": "tiny", "model": str(folder), "recipe": "coma", "tokens": 4, "stages": {"compress": stage, "match": stage}}
    return RunConfig.model_validate(values | changes)


def counted(text: str) -> dict[str, int]:
    return {kind.strip(): int(n.replace(",", "")) for kind, n in re.findall(r"^  ([\w ]{18}) *([\d,]+)(?: =.*)?$", text, re.MULTILINE)}


def masks(text: str) -> list[list[tuple[str, list[str]]]]:
    """Per stage, the rows of the picture: a role's letter, and one string for each role looked at."""
    found = []
    for block in re.split(r"^stage ", text, flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^    ([xCdt]) ([#. ]+)$", block, re.MULTILINE)
        found.append([(mark, cells.split(" ")) for mark, cells in rows])
    return found


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_published_run(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    text = describe(config)
    stages = re.findall(r"^stage (\w+) \((\d) of (\d)\)", text, re.MULTILINE)
    assert [name for name, _, _ in stages] == [s.name for s in load_recipe(config.recipe).stages if s.name in config.stages]
    assert len(re.findall(r"^  memory +about .* weights \+ .* AdamW \+ .* activations", text, re.MULTILINE)) == len(stages)
    assert len(re.findall(r"^  work .* FLOP, .* on one H200 .*not a measurement", text, re.MULTILINE)) == len(stages)
    assert all(rows for rows in masks(text)) and len(masks(text)) == len(stages)


@pytest.mark.parametrize(
    ("name", "lora", "dora", "rows"),
    # specs/coma.md section 4: 7.4M + 0.17M and 10.1M + 0.23M; the released code trains the vocabulary on top, we the rows of K tokens
    [("coma-3b", 36 * 16 * 12800, 36 * 4608, 32 * 2048), ("coma-7b", 28 * 16 * 22528, 28 * 8192, 32 * 3584)],
)
def test_what_trains_is_what_the_paper_trains(name: str, lora: int, dora: int, rows: int) -> None:
    assert (round(lora / 1e6, 1), round(dora / 1e6, 2)) == ((7.4, 0.17) if name == "coma-3b" else (10.1, 0.23))
    text = describe(load_config(LARGE[name]))
    assert counted(text) == {"compression rows": rows, "LoRA": lora, "DoRA magnitudes": dora}
    trained, total = (int(n.replace(",", "")) for n in re.findall(r"trains ([\d,]+) of ([\d,]+)", text)[0])
    assert trained == lora + dora + rows
    assert (total - trained) // 10**7 == (375 if name == "coma-3b" else 829), "Qwen2.5-VL has 3.75 and 8.29 billion parameters"
    weights = 2 * (total - trained) + 4 * trained
    assert f"{weights / 2**30:.1f} GiB weights + {12 * trained / 2**20:.0f} MiB gradients and AdamW" in text
    plain = describe(load_config(LARGE[name], ["adapter.kind=lora"]))
    assert counted(plain) == {"compression rows": rows, "LoRA": lora}


def test_no_weights_are_made() -> None:
    # The high-water mark of memory; a 7B model in float32 would take 33 GB more.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = load_config(LARGE["coma-7b"])
    describe(config)
    backbone, notes = weightless(config)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert all(p.is_meta for p in backbone.parameters())
    assert sum(p.numel() * p.element_size() for p in backbone.parameters()) > 30e9
    assert grown < 400e6, f"memory grew by {grown / 1e6:.0f} MB"
    assert "not on this machine" in notes[0]
    loop.open_parameters(config, backbone)
    assert all(p.is_meta and p.dtype == torch.float32 for p in adapters.trainable(backbone).values())


def test_the_verb_prints_it_without_network(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = LARGE["coma-3b"]
    with pytest.raises(SystemExit) as end:
        cli.main(["train", str(path), "--dry-run"])
    assert end.value.code == 0
    assert capsys.readouterr().out == describe(load_config(path)) + "\n"
    assert not any(tmp_path.iterdir()), "a dry run writes nothing"


def test_mask_picture_shows_the_bottleneck() -> None:
    compress, match = masks(describe(load_config(LARGE["coma-3b"])))
    assert [mark for mark, _ in compress] == ["x"] * 10 + ["C"] * 10 + ["d"] * 10
    for mark, (context, compression, dialogue) in compress:
        assert ("#" in context) == (mark != "d"), "a dialogue is blind to its context"
        assert ("#" in compression) == (mark != "x")
        assert ("#" in dialogue) == (mark == "d")
    causal = ["#" * (i + 1) + "." * (9 - i) for i in range(10)]
    assert [cells[0] for mark, cells in compress if mark == "x"] == causal
    assert [cells[2] for mark, cells in compress if mark == "d"] == causal
    assert {mark for mark, _ in match} == {"x", "C"}
    released, _ = masks(describe(load_config(LARGE["coma-3b"], ["recipe=coma-released"])))
    assert all("#" in cells[0] for _, cells in released), "the released code has no bottleneck, and the picture shows it"


@pytest.mark.parametrize(("adapter", "passes"), [({"kind": "full"}, 3), ({"kind": "lora", "r": 2}, 2)])
def test_numbers_are_those_of_the_run(folder_of: Folders, adapter: dict[str, Any], passes: int) -> None:
    """Lengths are those of the examples that training prepares, and work follows from them."""
    config = tiny(folder_of("qwen2_5_vl"), adapter=adapter)
    todo = plan(config)
    text = describe(config)
    stage, _, mixture = todo.stages[0]
    data = StageData(mixture, todo.encoder.preparer, stage, seed=config.seed, batch=2)
    examples = [sample.examples[0] for step in range(4) for sample in data[step]]
    first = examples[0]
    counts = {role: int((first.roles == ROLE_ID[role]).sum()) for role in stage.visibility.roles}
    layout = " + ".join(f"{n} {role}" for role, n in counts.items())
    assert f"dialogue   {len(first)} tokens = {layout}; {first.supervised} supervised" in text
    assert f"mean       {np.mean([len(e) for e in examples]):,.0f} tokens" in text
    shape = Shape.of(todo.encoder.backbone.stock.config)
    # 8 samples are all of 4 steps of 2. Frozen matrices need no weight gradient, and the frozen tower runs forward only.
    trains = Trains(full=passes == 3, rank=adapter.get("r", 0), targets=() if passes == 3 else ("q_proj", "k_proj", "v_proj", "o_proj"))
    parts = work_of(shape, examples, stage.visibility, trains)
    work = passes * (parts.text + parts.head) + 3 * (parts.attention + parts.adapter) + parts.vision
    assert f"work       {work:.1e} FLOP" in text
    loop.open_parameters(config, todo.encoder.backbone)
    seen, trained = (sum(p.numel() for p in todo.encoder.backbone.parameters() if p.requires_grad or every) for every in (True, False))
    assert f"trains {trained:,} of {seen:,} parameters" in text


def test_both_sides_of_a_pair_are_told(folder_of: Folders) -> None:
    text = describe(tiny(folder_of("qwen3_vl"), stages={"match": {"steps": 1, "batch": 2, "tokens_per_pass": 8}}))
    query, positive = (int(n) for n in re.findall(r"^  (?:query|positive) +(\d+) tokens", text, re.MULTILINE))
    assert query != positive
    assert "tokens, above tokens_per_pass=8, gets a pass of its own" in text


def test_unknown_stage_and_recipe_are_refused() -> None:
    path = LARGE["coma-3b"]
    config = load_config(path)
    with pytest.raises(ConfigError, match=r"stages \['compres'\].*\['compress', 'match'\]"):
        describe(config.model_copy(update={"stages": {"compres": config.stages["compress"]}}))
    with pytest.raises(ConfigError, match="compress"):
        describe(load_config(path, ["recipe=matching"]))
    with pytest.raises(ModelError, match="match no layer"):
        describe(load_config(path, ["adapter.targets=[query]"]))


def test_data_at_hand_is_checked_as_the_run_would(folder_of: Folders, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    PILImage.fromarray(scene(0, 0).draw()).save(picture)
    table = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"pic": [str(picture.name)] * 3, "words": ["a red circle"] * 3}), table)
    columns = {"query.image": "pic", "positive.text": "words"}
    match = {"steps": 3, "batch": 2, "data": {"source": "table", "path": str(table), "columns": columns}}
    text = describe(tiny(folder_of("qwen2_5_vl"), stages={"match": match}))
    assert "6 samples of 3 rows of table: 2 epochs" in text and "note" not in text
    wrong = match | {"data": {"source": "table", "path": str(table), "columns": columns | {"positive.text": "wrods"}}}
    with pytest.raises(DataError, match="wrods"):
        describe(tiny(folder_of("qwen2_5_vl"), stages={"match": wrong}))
    gone = match | {"data": {"source": "table", "path": "nowhere.parquet", "columns": columns}}
    assert "note: there is no nowhere.parquet here" in describe(tiny(folder_of("qwen2_5_vl"), stages={"match": gone}))


def test_a_bad_row_and_an_old_run_are_noted(folder_of: Folders, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    PILImage.fromarray(scene(0, 0).draw()).save(tmp_path / "good.png")
    table = tmp_path / "pairs.parquet"
    pq.write_table(pa.table({"pic": ["bad.png"] + ["good.png"] * 5, "words": ["a red circle"] * 6}), table)
    data = {"source": "table", "path": str(table), "columns": {"query.image": "pic", "positive.text": "words"}}
    config = tiny(folder_of("qwen2_5_vl"), stages={"match": {"steps": 3, "batch": 2, "data": data}})
    assert "1 bad rows were replaced among the first 6" in describe(config)
    assert "holds a run already" not in describe(config)
    config.folder.mkdir(parents=True)
    (config.folder / "manifest.json").write_text("{}")
    assert "holds a run already" in describe(config)


def test_a_model_in_the_hub_cache_is_used(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("qwen3_vl")

    def cached(name: str, file: str, **_: Any) -> str | None:
        path = folder / file
        return str(path) if name == "Qwen/Qwen2.5-VL-3B-Instruct" and path.is_file() else None

    config = load_config(LARGE["coma-3b"], ["images={}"])
    assert weightless(config)[1]
    monkeypatch.setattr("comatch.training.dry.try_to_load_from_cache", cached)
    backbone, notes = weightless(config)
    assert not notes and backbone.family.model_type == "qwen3_vl" and backbone.rows.is_meta
