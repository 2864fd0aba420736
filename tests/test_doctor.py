"""The doctor passes what runs, and finds what it is there to find: each fault by its own check, with the next step."""

from __future__ import annotations

import json
import math
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from cli_run import draw, run

from comatch import cli
from comatch.backbones import adapters
from comatch.config import RunConfig, load_config
from comatch.core.batch import ROLE_ID
from comatch.recipe import Stage, Visibility
from comatch.training import doctor, trial
from comatch.training.doctor import Report, examine
from comatch.training.loop import train
from comatch.training.machine import Finding, environment, launch
from comatch.training.plan import Plan, open_encoder, survey

ROOT = Path(__file__).resolve().parent.parent
Folders = Callable[[str], Path]
PER_STAGE = ["data", "attention", "memory", "first loss", "gradients", "duplicates", "speed"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the doctor asked the network for {args}")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.chdir(tmp_path)


def tiny(model: Path | str, **changes: Any) -> RunConfig:
    stage = {"steps": 5, "batch": 6, "tokens_per_pass": 1000}
    values = {"name": "tiny", "model": str(model), "recipe": "coma", "tokens": 4, "stages": {"compress": stage, "match": stage}}
    return RunConfig.model_validate(values | changes)


def of(report: Report, check: str, level: str = "") -> list[Finding]:
    return [finding for finding in report.everything if finding.check == check and finding.level in (level or finding.level)]


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


# --- runs that are sound


def test_a_shipped_run_passes_every_check(tmp_path: Path) -> None:
    told = run("doctor", ROOT / "runs" / "coma-nano.yaml", "--json")
    assert told.code == 0 and files(tmp_path) == [], "the doctor writes nothing"
    report = told.objects[0]
    assert report["sound"] and [stage["name"] for stage in report["stages"]] == ["compress", "match"]
    for stage in report["stages"]:
        assert [finding["check"] for finding in stage["findings"]] == PER_STAGE
        assert {finding["level"] for finding in stage["findings"]} == {"ok"}
        assert {finding["check"]: finding for finding in stage["findings"]}["speed"]["values"]["samples_per_second"] > 0
    assert {"versions", "processors", "disk", "device", "launch", "config"} == {finding["check"] for finding in report["findings"]}
    assert "stage compress (1 of 2)" in report["layout"] and "    d .......... ########" in report["layout"], "the masked picture"
    roles = [[span["role"] for span in row] for row in report["stages"][0]["sample"]]
    assert len(roles) == 1 and list(dict.fromkeys(roles[0])) == ["context", "compression", "dialogue"]
    assert [len(stage["sample"]) for stage in report["stages"]] == [1, 2], "a dialogue, and a query with its positive"


def test_a_machine_alone_and_a_report_for_people(folder_of: Folders, tmp_path: Path) -> None:
    alone = run("doctor")
    assert alone.code == 0 and f"torch {torch.__version__}" in alone.out and "0 errors" in alone.out
    (tmp_path / "run.yaml").write_text(json.dumps(tiny(folder_of("qwen2_5_vl")).model_dump(mode="json")))
    told = run("doctor", "run.yaml", "seed=1", "--processes", 2)
    assert told.code == 0
    for part in ("<4 compression tokens>", "<picture of ", "sample: context compression dialogue learned", "log 6 = 1.79", "2 processes"):
        assert part in told.out
    assert files(tmp_path) == [str(tmp_path / "run.yaml")]


def test_the_sample_is_what_the_model_reads(folder_of: Folders) -> None:
    config = tiny(folder_of("qwen3_vl"))
    recipe, stages = survey(config)
    stage, stage_run, mixture = stages[0]
    todo = Plan(config, recipe, open_encoder(config, recipe), [])
    example = trial.few(todo, stage, stage_run, mixture)[0][0].examples[0]
    spans, tokenizer = doctor.spans(example, todo.encoder.backbone), todo.encoder.backbone.tokenizer
    assert "".join(span.text for span in spans if span.learned) == tokenizer.decode(example.ids[1:][example.labels[:-1] >= 0])
    words = "".join(span.text for span in spans if span.role == "dialogue")
    assert words == tokenizer.decode(example.ids[example.roles == ROLE_ID["dialogue"]])
    high, wide = (16 * n for n in example.grids[0][1:])
    assert any(span.text.startswith(f"<picture of {wide} x {high} pixels") for span in spans)


@pytest.mark.parametrize(
    "adapter", [{"kind": "full"}, {"kind": "full", "train_vision": True}, {"kind": "lora", "r": 2}, {"kind": "dora", "r": 2}]
)
def test_gradients_reach_what_trains_and_nothing_else(folder_of: Folders, adapter: dict[str, Any]) -> None:
    report = examine(tiny(folder_of("qwen2_5_vl"), adapter=adapter))
    assert report.sound
    kinds = {"full": {"language model"}, "lora": {"LoRA"}, "dora": {"LoRA", "DoRA magnitudes"}}[adapter["kind"]]
    kinds |= {"compression rows"} | ({"vision tower"} if adapter.get("train_vision") else set())
    for finding in of(report, "gradients"):
        assert finding.level == "ok", finding
        assert set(finding.values["groups"]) == kinds and all(reached == n > 0 for reached, n in finding.values["groups"].values())


def test_the_first_loss_is_the_runs_own(folder_of: Folders, tmp_path: Path) -> None:
    """What the trial calls the first loss is what the run reports for its first step."""
    config = tiny(folder_of("qwen2_5_vl"), precision="fp32", output=str(tmp_path / "run"))
    found = [finding.values["loss"] for finding in of(examine(config), "first loss")]
    match = config.stages["match"].model_copy(update={"log_every": 1, "steps": 1})
    for stages, wanted in (({"match": match}, found[1]), ({"compress": match}, found[0])):
        folder = train(config.model_copy(update={"stages": stages}), overwrite=True, quiet=True)
        row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        assert row["loss"] == pytest.approx(wanted, rel=1e-4)


# --- faults


def test_weights_that_are_not_here_are_named_and_data_too() -> None:
    report = examine(load_config(ROOT / "runs" / "coma-3b.yaml"), 8)
    assert not report.sound and "data/MMEB-train" in of(report, "config", "error")[0].told
    assert "stage compress (1 of 2)" in report.layout, "what can be told is told"
    config = load_config(ROOT / "runs" / "coma-3b.yaml", ["stages.compress.data={source: scenes}", "stages.match.data={source: scenes}"])
    found = of(examine(config, 8), "first batch")
    assert [finding.level for finding in found] == ["warning"] * 2 and "hf download Qwen/Qwen2.5-VL-3B-Instruct" in found[0].step


def test_a_batch_that_does_not_divide_fails_and_names_numbers_that_do(folder_of: Folders) -> None:
    config = tiny(folder_of("qwen2_5_vl"))
    wrong = list(launch(config, 4))
    assert [finding.level for finding in wrong[:2]] == ["error"] * 2
    assert "stages.compress.batch=6 does not divide by 4 processes" in wrong[0].told and "[1, 2, 3, 6]" in wrong[0].step
    assert [finding.level for finding in launch(config, 3)] == ["ok"]
    assert run("doctor", "none.yaml").code == cli.USAGE


def test_launch_knows_gpus_and_sharding(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(folder_of("qwen2_5_vl"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "shards weights on GPUs only" in next(launch(config, 2)).told
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "sharded weights (FSDP2)" in next(launch(config, 2)).told
    assert "--num_processes 2" in next(launch(config, 1)).step
    assert [finding.level for finding in launch(config, 3)] == ["error"]
    assert next(launch(config.model_copy(update={"device": "cpu"}), 3)).level == "warning"


def test_a_place_that_cannot_be_written_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")

    def disk(folder: Path) -> Finding:
        return next(finding for finding in environment(folder) if finding.check == "disk")

    assert disk(tmp_path / "a" / "b").level == "ok"
    assert disk(tmp_path / "file" / "below").level == "error"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert disk(tmp_path).level == "warning" and "output=" in disk(tmp_path).step


def test_memory_that_is_short_gives_numbers_that_fit(folder_of: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(folder_of("qwen2_5_vl"), recipe="matching", stages={"match": {"steps": 5, "batch": 64, "tokens_per_pass": 1000}})
    recipe, [(stage, stage_run, mixture)] = survey(config)
    todo = Plan(config, recipe, open_encoder(config, recipe), [])
    samples = trial.few(todo, stage, stage_run, mixture)[0]
    doctor.open_parameters(config, todo.encoder.backbone, stage)

    def memory(mib: float, tokens: int = 1000) -> Finding:
        monkeypatch.setattr(doctor, "room", lambda config: mib * 2**20)
        return doctor.fit(todo, stage, stage_run.model_copy(update={"tokens_per_pass": tokens}), samples)

    plenty = memory(1000)
    assert plenty.level == "ok" and "needs fewer passes" in plenty.step
    assert "weights alone do not fit" in memory(0.1).step
    need = plenty.values["need"] / 2**20
    assert memory(1.2 * need).level == "ok"
    slower = memory(need)
    assert slower.level == "warning" and 0 < slower.values["recomputed"] <= 3 and "layers are recomputed" in slower.step
    for finding in (slower, plenty):
        proposed = int(finding.step.split("tokens_per_pass=")[1].split()[0])
        again = memory(finding.values["have"] / 2**20, proposed)
        assert again.level == "ok" and again.values["recomputed"] == 0, "what is proposed fits"
    large = memory(need, 8000)
    assert large.level == "error" and memory(need, int(large.step.split("tokens_per_pass=")[1].split(",")[0])).level != "error"


def test_swapped_pairs_and_a_sharp_temperature_are_seen() -> None:
    stage_run = load_config(ROOT / "runs" / "coma-nano.yaml").stages["match"]
    first = trial.Trial([4.0], [1.0], set(), set(), 64, None)
    assert trial._contrastive(first, stage_run, (4.2, 4.3)).level == "ok"
    assert "columns of query and positive" in trial._contrastive(first, stage_run, (6.0, 4.3)).step
    assert "loss.temperature (0.05)" in trial._contrastive(first, stage_run, (12.0, 14.0)).step


def test_a_model_that_does_worse_than_guessing_is_seen(folder_of: Folders, tmp_path: Path) -> None:
    """Weights that are all noise: the loss of the first batch is above log V."""
    config = tiny(folder_of("qwen2_5_vl"))
    recipe, stages = survey(config)
    stage, stage_run, mixture = stages[0]
    encoder = open_encoder(config, recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        encoder.backbone.text.embed_tokens.weight.normal_(std=3.0)
    todo = Plan(config, recipe, encoder, stages)
    findings = list(trial.try_out(todo, stage, stage_run, trial.few(todo, stage, stage_run, mixture)))
    assert findings[0].level == "warning" and findings[0].values["loss"] > 1.1 * math.log(512) and "tokenizer" in findings[0].step


def test_gradients_where_none_belong_are_an_error(folder_of: Folders) -> None:
    config = tiny(folder_of("qwen2_5_vl"), adapter={"kind": "lora", "r": 2})
    recipe, stages = survey(config)
    backbone = open_encoder(config, recipe).backbone
    doctor.open_parameters(config, backbone, stages[0][0])
    names = set(adapters.trainable(backbone))
    good = trial.Trial([], [], names, set(), 4, None)
    assert trial.gradients(config, backbone, stages[0][0], good).level == "ok"
    frozen = next(name for name, p in backbone.named_parameters() if not p.requires_grad)
    assert trial.gradients(config, backbone, stages[0][0], replace(good, strays={frozen})).level == "error"
    missed = trial.gradients(config, backbone, stages[0][0], replace(good, reached=names - {"rows"}))
    assert missed.level == "warning" and "as rows" in missed.step
    backbone.vision_tower.requires_grad_(True)
    assert "vision tower" in trial.gradients(config, backbone, stages[0][0], good).step


def pairs(folder: Path, rows: Sequence[tuple[str, str]]) -> dict[str, Any]:
    draw(folder, range(2))
    table = pa.table({"pic": [pic for pic, _ in rows], "words": [words for _, words in rows]})
    pq.write_table(table, folder / "pairs.parquet")
    columns = {"query.image": "pic", "positive.text": "words"}
    return {"source": "table", "path": str(folder / "pairs.parquet"), "columns": columns, "max_bad": 1.0}


def test_bad_rows_repeats_and_cut_texts_are_counted(folder_of: Folders, tmp_path: Path) -> None:
    def found(rows: Sequence[tuple[str, str]], check: str) -> Finding:
        stage = {"steps": 2, "batch": 4, "tokens_per_pass": 1000, "data": pairs(tmp_path / "data", rows)}
        config = tiny(folder_of("qwen2_5_vl"), recipe="matching", stages={"match": stage})
        return of(examine(config), check)[0]

    good = [(f"s{i % 2}.png", f"scene {i}") for i in range(8)]
    assert found(good, "data").level == found(good, "duplicates").level == "ok"
    (tmp_path / "data" / "bad.png").write_bytes(b"no picture")
    bad = found([("bad.png", f"row {i}") for i in range(4)] + good, "data")
    assert bad.level == "warning" and bad.values["bad"] >= 1 and "bad.png" in bad.step
    few = found([(pic, "always the same") for pic, _ in good], "duplicates")
    assert few.level == "warning" and few.values["kept"] > 0
    long = found([(pic, f"{words} " + "many words " * 400) for pic, words in good], "data")
    assert long.level == "warning" and long.values["cut"] == 8


def test_a_table_without_a_plain_form_is_said_to_be_slow(folder_of: Folders) -> None:
    config = tiny(folder_of("qwen2_5_vl"))
    recipe, stages = survey(config)
    todo = Plan(config, recipe, open_encoder(config, recipe), [])
    example = trial.few(todo, *stages[1])[0][0].examples[0]
    assert doctor.kernel(config, stages[1][0], todo.encoder.backbone, example).level == "ok"
    odd = Stage("odd", Visibility(("context", "compression"), ("cf", "cc")), {"contrastive": 1.0}, pooling="mean_compression")
    finding = doctor.kernel(config, odd, todo.encoder.backbone, example)
    assert finding.level == "warning" and "the dense mask, because" in finding.told
