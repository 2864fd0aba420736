"""A study: its file read whole, its runs done once, its figures those of plain loops, and one run the same as by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import run
from scipy import stats

from comatch.config import load_config
from comatch.encoder import Encoder
from comatch.errors import ConfigError, StudyError
from comatch.evaluation.compare import holm
from comatch.evaluation.tasks import evaluate, scene_tasks
from comatch.studies.figures import arms as arms_figure
from comatch.studies.plan import Study, read_study
from comatch.studies.report import _shown, curves, draw, gap_table, markdown
from comatch.studies.runner import missing, one_run_command, results, run_study, taken
from comatch.studies.summary import MEAN, Mean, gaps, means, values
from comatch.training.loop import train

RUN = """
name: tiny
model: untrained-nano
recipe: coma
tokens: 2
device: cpu
precision: fp32
adapter: {kind: full}
save_every: null
data: {source: scenes}
stages:
  compress: {steps: 2, batch: 4, log_every: 1, data: {dialogue: caption}}
  match: {steps: 2, batch: 4, log_every: 1}
"""
STUDY = """
name: small
question: Does it run?
base: run.yaml
seeds: 2
baseline: matching
arms:
  matching: {recipe: matching, stages.compress: null}
  coma: {}
measure: {n: 6, candidates: 12, tokens: 4, carried: 3, answers: 18}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "run.yaml").write_text(RUN)
    (folder / "study.yaml").write_text(STUDY)
    return folder


@pytest.fixture(scope="module")
def done(files: Path) -> dict[str, Any]:
    """A whole study by the command line, four runs in processes of their own, two at a time."""
    told = run("ablate", files / "study.yaml", "--out", files / "out", "--jobs", "2", "--keep", "--json")
    assert told.code == 0, told.err
    found: dict[str, Any] = json.loads(told.out)
    return found


def read(files: Path, *overrides: str, text: str = STUDY) -> Study:
    path = files / "other.yaml"
    path.write_text(text)
    return read_study(path, files / "plan", overrides)


# --- the file


def test_arms_times_grid_times_seeds(files: Path) -> None:
    study = read(files, "grid={tokens: [1, 4], stages.match.batch: [4, 8]}")
    names = [arm.name for arm in study.arms]
    assert len(names) == 8 and names[0] == "matching, tokens=1, match.batch=4" and names[-1] == "coma, tokens=4, match.batch=8"
    assert [(arm.recipe.tokens, arm.config.stages["match"].batch) for arm in study.arms[:4]] == [(1, 4), (1, 8), (4, 4), (4, 8)]
    assert [list(arm.config.stages) for arm in study.arms[::4]] == [["match"], ["compress", "match"]]
    assert len(study.runs) == 16 and [seed for _, seed in study.runs] == [0] * 8 + [1] * 8, "a part of it compares all arms"


def test_null_takes_away_a_stage_and_the_data_of_all_stages(files: Path) -> None:
    own = "recipe: matching, stages.compress: null, stages.match.data: {source: scenes, subset: questions}"
    text = STUDY.replace("recipe: matching, stages.compress: null", f"{own}, data: null")
    arm = read(files, "settings={data.limit: 50}", text=text).arms[0]
    assert list(arm.config.stages) == ["match"] and (data := arm.config.stages["match"].data) and data.subset == "questions"
    with pytest.raises(ConfigError, match="every stage has its own"):
        read(files, "settings={data.limit: 50}", text=text.replace(", data: null", ""))


def test_settings_go_into_the_recipe_too(files: Path) -> None:
    text = STUDY.replace("coma: {}", "coma: {}\n  all: {recipe.stages.compress.supervise: dialogue, recipe.instruction: find it}")
    plain, changed = (next(arm for arm in read(files, text=text).arms if arm.name == name).recipe for name in ("coma", "all"))
    assert (plain.stage("compress").supervise, plain.instruction) == ("answers", "")
    assert (changed.stage("compress").supervise, changed.instruction) == ("dialogue", "find it")
    assert changed.stage("compress").visibility == plain.stage("compress").visibility and changed.tokens == plain.tokens == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("seeds=0", "seeds is 0"),
        ("nonsense=1", "unknown key 'nonsense'"),
        ("measure.answer=1", "did you mean 'answers'"),
        ("arms.coma={stages.compres.steps: 3}", "arm 'coma': .*no stage 'compres'; did you mean 'compress'"),
        ("arms.coma={stages.match.stepz: 3}", "arm 'coma': .*unknown key 'stages.match.stepz'"),
        ("arms.coma={recipe.stages.compress.supervize: dialogue}", "arm 'coma': .*supervize"),
        ("arms.coma={recipe.stages.compres.supervise: dialogue}", "name one of the stages \\['compress', 'match'\\]"),
        ("arms.coma={recipe.stages.compress.visibility: [c.., cc., ccc]}", "the bottleneck leaks"),
        ("arms.coma={name.x: 1}", "which has no parts to set"),
        ("baseline=nobody", "the arms are \\['matching', 'coma'\\]"),
        ("grid={tokens: []}", "have no values"),
        ("arms.coma={tokens: 3}", None),
        ("base=nowhere.yaml", "does not exist"),
        ("grid={stages.compress.batch: [4, 8]}", "\\['stages.compress'\\] stand in arm 'matching' and in the grid"),
        ("measure={suite: emoji, data: x.parquet, answers: 5}", "answers is 5, which has no effect on emoji"),
        ("measure={suite: emoji}", "needs data"),
        ("measure={n: 9, candidates: 3}", "at least n, 9"),
    ],
)
def test_a_faulty_file_is_refused_before_anything_runs(files: Path, change: str, told: str | None) -> None:
    if told is None:
        with pytest.raises(ConfigError, match="stand in arm 'coma' and in the grid"):
            read(files, change, "grid={tokens: [1, 4]}")
        return
    with pytest.raises(ConfigError, match=told):
        read(files, change)


def test_names_that_would_share_a_folder_are_refused(files: Path) -> None:
    with pytest.raises(ConfigError, match="would share a folder"):
        read(files, text=STUDY.replace("coma: {}", "a/b: {}\n  a+b: {tokens: 4}"))


# --- the runs


def test_every_run_is_there_with_what_was_asked_for(done: dict[str, Any], files: Path) -> None:
    assert {(r["arm"], r["seed"]) for r in done["runs"]} == {(arm, seed) for arm in ("matching", "coma") for seed in (0, 1)}
    assert done == json.loads((files / "out" / "results.json").read_text())
    coma = next(r for r in done["runs"] if r["arm"] == "coma")
    assert list(coma["stages"]) == ["compress", "match"] and coma["stages"]["match"]["items"] == 8
    assert coma["stages"]["compress"]["tflop"] > 0
    assert set(coma["redundancy"]) == {"compress", "match"} and set(coma["carried"]) == {"compress"}
    assert coma["carried"]["compress"]["nats"] == pytest.approx(coma["carried"]["compress"]["other"] - coma["carried"]["compress"]["own"])
    assert list(coma["answers"]) == ["compress", "match"] and {"all", "colour", "all, looking"} < set(coma["answers"]["match"])
    matching = next(r for r in done["runs"] if r["arm"] == "matching")
    assert matching["answers"] == {}
    assert matching["carried"] == {} and list(matching["stages"]) == ["match"]


def test_one_run_is_what_train_and_evaluate_give(done: dict[str, Any], files: Path, tmp_path: Path) -> None:
    config = load_config(files / "run.yaml", ["seed=1", f"output={tmp_path / 'run'}"])
    scores = evaluate(Encoder.load(train(config, quiet=True)), scene_tasks(6, 12))
    told = next(r for r in done["runs"] if (r["arm"], r["seed"]) == ("coma", 1))
    assert {s.name: (s.hit, s.mrr) for s in scores} == {name: (s["hit"], s["mrr"]) for name, s in told["scores"].items()}
    other = next(r for r in done["runs"] if (r["arm"], r["seed"]) == ("coma", 0))
    assert told["stages"]["match"]["loss"] != other["stages"]["match"]["loss"], "seeds differ"


def test_what_is_there_is_not_run_again(done: dict[str, Any], files: Path) -> None:
    study, told = read_study(files / "study.yaml", files / "out"), list[Any]()
    again = run_study(study, ["false"], files / "out", tell=told.append)
    assert again["runs"] == done["runs"] and told == []


def test_only_what_is_missing_is_run(done: dict[str, Any], files: Path, tmp_path: Path) -> None:
    """A study that lost a run, and one whose run ended before its result was collected."""
    study = read_study(files / "study.yaml", tmp_path)
    kept = [r for r in done["runs"] if (r["arm"], r["seed"]) != ("coma", 1)]
    (tmp_path / "results.json").write_text(json.dumps({**done, "runs": kept}))
    assert [(arm.name, seed) for arm, seed in missing(study, results(study, tmp_path))] == [("coma", 1)]
    lost = next(r for r in done["runs"] if (r["arm"], r["seed"]) == ("coma", 1))
    (tmp_path / "runs" / "coma-1").mkdir(parents=True)
    (tmp_path / "runs" / "coma-1" / "result.json").write_text(json.dumps(lost))
    found = run_study(study, ["false"], tmp_path, tell=lambda told: None)
    assert found["runs"] == [*kept, lost] and not (tmp_path / "runs" / "coma-1").exists()


def test_runs_of_equal_settings_are_taken_from_another_study(done: dict[str, Any], files: Path, tmp_path: Path) -> None:
    """The same arm under another name, and with it one that differs, another seed, and other measures."""
    other = files / "out" / "results.json"
    study = read(files, "arms={again: {}, longer: {stages.match.steps: 3}}", "baseline=null", "seeds=3")
    found = results(study, tmp_path)
    same = [{**run, "arm": "again"} for run in done["runs"] if run["arm"] == "coma"]
    assert sorted(taken(study, found, other), key=lambda run: run["seed"]) == sorted(same, key=lambda run: run["seed"])
    told = list[Any]()
    with pytest.raises(StudyError, match="4 of 6 runs failed"):
        run_study(study, ["false"], tmp_path, take=[other], tell=told.append)
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 2, "and they are written"
    assert taken(study, {**found, "runs": same}, other) == [], "none twice"
    narrow = read(files, "measure.n=7")
    assert taken(narrow, results(narrow, tmp_path / "new"), other) == []
    (tmp_path / "odd.json").write_text("[]")
    for odd in (tmp_path / "odd.json", tmp_path / "none.json"):
        with pytest.raises(StudyError, match="give one that comatch ablate wrote"):
            taken(study, found, odd)


def test_a_run_that_fails_is_told_and_the_others_are_done(done: dict[str, Any], files: Path, tmp_path: Path) -> None:
    study, told = read_study(files / "study.yaml", tmp_path), list[Any]()
    ready = tmp_path / "runs" / "coma-0"
    ready.mkdir(parents=True)
    (ready / "result.json").write_text(json.dumps(done["runs"][0] | {"arm": "coma", "seed": 0}))
    with pytest.raises(StudyError, match="3 of 4 runs failed: matching, seed 0"):
        run_study(study, ["sh", "-c", "echo it broke; exit 7"], tmp_path, tell=told.append)
    reasons = [one for one in told if isinstance(one, str)]
    assert len(reasons) == 3 and all("code 7: it broke" in one for one in reasons)
    assert [r["arm"] for r in json.loads((tmp_path / "results.json").read_text())["runs"]] == ["coma"]


def test_what_an_interrupted_study_left_is_not_taken_for_another(done: dict[str, Any], files: Path, tmp_path: Path) -> None:
    one = ["seeds=1", "arms={coma: {}}", "baseline=null"]
    left, told = tmp_path / "runs" / "coma-0", list[Any]()
    with pytest.raises(StudyError):
        run_study(read(files, *one), ["false"], tmp_path, tell=told.append)
    (left / "result.json").write_text(json.dumps(next(r for r in done["runs"] if (r["arm"], r["seed"]) == ("coma", 0))))
    with pytest.raises(StudyError):
        run_study(read(files, *one, "settings={stages.match.steps: 3}"), ["false"], tmp_path, tell=told.append)
    assert "holds a run of other settings (arm.run.stages.match.steps: 2 -> 3)" in told[-1] and (left / "result.json").is_file()
    assert len(run_study(read(files, *one), ["false"], tmp_path, tell=told.append)["runs"]) == 1


def test_an_interruption_begins_nothing_more(files: Path, tmp_path: Path) -> None:
    def interrupt(_: Any) -> None:
        raise KeyboardInterrupt

    study = read_study(files / "study.yaml", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_study(study, ["sh", "-c", "sleep 0.3"], tmp_path, tell=interrupt)
    assert 1 <= len(list((tmp_path / "runs").iterdir())) <= 2 < len(study.runs)


def test_results_of_other_settings_are_not_mixed_in(done: dict[str, Any], files: Path) -> None:
    for change, told in (
        ("settings={stages.match.steps: 3}", "arm 'coma', run.stages.match.steps: 2 -> 3"),
        ("measure.n=7", "measure.n: 6 -> 7"),
        ("arms.coma={recipe.stages.compress.supervise: dialogue}", "arm 'coma', recipe"),
    ):
        with pytest.raises(StudyError, match=told):
            results(read(files, change), files / "out")
    more = results(read(files, "seeds=3", "arms.third={tokens: 1}"), files / "out")
    assert more["runs"] == done["runs"] and set(more["arms"]) == {"matching", "coma", "third"}, "more of it goes on"
    assert len(missing(read(files, "seeds=3", "arms.third={tokens: 1}"), more)) == 5


def test_a_launcher_starts_several_processes_for_one_result(files: Path, tmp_path: Path) -> None:
    changes = ["seeds=1", "arms={matching: {recipe: matching, stages.compress: null, model: comatch-nano}}"]
    ddp = Path(__file__).resolve().parents[1] / "accelerate" / "ddp.yaml"
    launcher = f"{sys.executable} -m accelerate.commands.launch --config_file {ddp} --num_processes 2 --main_process_port 0 --no_python"
    losses = []
    for out, how in ((tmp_path / "two", launcher), (tmp_path / "one", "")):
        command = one_run_command(files / "study.yaml", changes, out)
        (found,) = run_study(read(files, *changes), command, out, launcher=how, keep=True, tell=print)["runs"]
        losses.append(found["stages"]["match"]["loss"])
        manifest = json.loads((out / "runs" / "matching-0" / "run" / "manifest.json").read_text())
        assert manifest["processes"] == (2 if how else 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_studies_of_this_repository_and_of_its_page_can_be_read(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    for path in sorted((root / "runs" / "study").glob("*.yaml")):
        study = read_study(path, tmp_path)
        assert study.config.seeds >= 5 and study.config.question and study.arms
    example = (root / "docs" / "ablate.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "example.yaml").write_text(example.replace("../coma-nano.yaml", str(root / "runs" / "coma-nano.yaml")))
    assert [arm.recipe.tokens for arm in read_study(tmp_path / "example.yaml", tmp_path).arms] == [1, 8, 32] * 3


def test_two_studies_do_not_share_a_folder_at_once(files: Path, tmp_path: Path) -> None:
    study = read_study(files / "study.yaml", tmp_path)

    def second(_: Any) -> None:
        code = f"import fcntl; fcntl.lockf(open({str(tmp_path / '.lock')!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        seen.append(subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode)

    seen: list[int] = []
    with pytest.raises(StudyError):
        run_study(study, ["false"], tmp_path, tell=second)
    assert seen == [1] * 4


def test_the_command_line_refuses_and_plans(files: Path, tmp_path: Path, done: dict[str, Any]) -> None:
    told = run("ablate", files / "study.yaml", "--out", tmp_path, "--dry-run")
    assert told.code == 0 and "2 arms, 2 seeds, 4 of 4 runs to do" in told.out and "coma, seed 1" in told.out
    assert run("ablate", files / "study.yaml", "--out", tmp_path, "--only", "nobody", "--seed", "0").code == 2
    half = run("ablate", files / "study.yaml", "--out", tmp_path, "--seed", "1")
    assert half.code == 2 and "neither" in half.err
    assert run("ablate", files / "study.yaml", "nonsense=1").code == 2
    again = run("ablate", files / "study.yaml", "--out", files / "out")
    assert again.code == 0 and "| coma |" in again.out and (files / "out" / "study.md").read_text() == again.out.rstrip("\n") + "\n"


# --- what follows


def made(values: dict[str, list[float]], points: dict[str, Any] | None = None) -> dict[str, Any]:
    """Results of arms with one task and a score per seed."""
    runs = [
        {"arm": arm, "seed": seed, "scores": {"t": {"hit": hit, "chance": 0.1}}, "stages": {"match": dict.fromkeys(_COST, 1.0)}}
        for arm, hits in values.items()
        for seed, hit in enumerate(hits)
    ]
    arms = {arm: {"arm": arm.partition(",")[0], "point": {} if points is None else {"tokens": points[arm]}} for arm in values}
    measure = {"suite": "scenes", "split": "test", "n": 2, "candidates": 3}
    for one in runs:
        one["made_by"] = {"code": "c0de", "torch": "2", "machine": "m", "device": "cpu"}
    return {"name": "s", "question": "", "baseline": "a", "measure": measure, "arms": arms, "runs": runs}


_COST = ("loss", "steps", "items", "tokens", "tflop", "seconds")


def test_intervals_are_students() -> None:
    each = [0.1, 0.4, 0.35, 0.2, 0.3]
    mean = Mean.of(each)
    low, high = stats.t.interval(0.95, len(each) - 1, loc=np.mean(each), scale=stats.sem(each))
    assert (mean.value - (mean.half or 0), mean.value + (mean.half or 0)) == pytest.approx((low, high))
    assert Mean.of([0.5]).half is None


def test_the_mean_of_tasks_is_formed_in_each_seed() -> None:
    found = made({"a": [0.1, 0.5], "b": [0.3, 0.4]})
    assert ("scores", MEAN) not in means(found)["a"], "of one task it would say the same twice"
    for one, hit in zip(found["runs"], (0.9, 0.1, 0.9, 0.4), strict=True):
        one["scores"]["u"] = {"hit": hit, "chance": 0.3}
    a, b = (means(found)[arm]["scores", MEAN] for arm in ("a", "b"))
    assert (a.value, a.half) == pytest.approx((0.4, Mean.of([0.5, 0.3]).half)) and b.value == pytest.approx(0.5)
    assert gaps(found)["b"]["scores", MEAN].mean.value == pytest.approx(0.1) and "| mean of tasks |" in markdown(found)
    figure = arms_figure(*_shown(found))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["t", "u", MEAN]
    assert figure.axes[2].lines[-1].get_xdata()[0] == pytest.approx(20), "guessing likewise"


def test_gaps_are_paired_by_seed() -> None:
    """The same spread between seeds in both arms hides nothing from a paired test, and everything from an unpaired one."""
    a = [0.1, 0.5, 0.9, 0.3, 0.7]
    b = [x + d for x, d in zip(a, (0.05, 0.06, 0.04, 0.05, 0.07), strict=True)]
    found = gaps(made({"a": a, "b": b, "c": a[::-1]}))
    gap = found["b"]["scores", "t"]
    assert gap.mean.value == pytest.approx(0.054) and gap.p == pytest.approx(stats.ttest_rel(b, a).pvalue) and gap.p < 0.001
    assert stats.ttest_ind(b, a).pvalue > 0.5 and gap.sure and not found["c"]["scores", "t"].sure
    ps = [found[arm]["scores", "t"].p for arm in ("b", "c")]
    assert [found[arm]["scores", "t"].holm for arm in ("b", "c")] == holm([p for p in ps if p is not None])
    assert "a" not in found and gaps({**made({"a": a}), "baseline": None}) == {}


def test_a_baseline_stands_at_every_point_of_the_grid_or_at_one() -> None:
    hits = {"a, tokens=1": [0.1, 0.2], "a, tokens=8": [0.3, 0.4], "b, tokens=1": [0.5, 0.7], "b, tokens=8": [0.2, 0.4]}
    study = made(hits, {name: int(name[-1]) for name in hits})
    same = {arm: row["scores", "t"].mean.value for arm, row in gaps(study).items()}
    assert same == pytest.approx({"b, tokens=1": 0.45, "b, tokens=8": -0.05})
    one = {arm: row["scores", "t"].mean.value for arm, row in gaps(study, "a, tokens=8").items()}
    assert one == pytest.approx({"a, tokens=1": -0.2, "b, tokens=1": 0.25, "b, tokens=8": -0.05})


def test_gaps_use_the_seeds_that_both_have_and_equal_ones_are_no_gap() -> None:
    found = gaps(made({"a": [0.1, 0.2, 0.3], "b": [0.2, 0.3], "c": [0.1, 0.2, 0.3]}))
    b, c = found["b"]["scores", "t"], found["c"]["scores", "t"]
    assert b.mean.seeds == 2 and b.mean.value == pytest.approx(0.1) and c.p == 1 and c.mean.value == 0


def test_tables_and_figures_say_what_was_measured(done: dict[str, Any], tmp_path: Path) -> None:
    text = markdown(done)
    rows = means(done)
    hit = 100 * rows["coma"]["scores", "scenes-i2i"].value
    assert f"{hit:.1f}" in text and "Differences to matching" in text and "| coma | compress |" in text and "nats" in text
    assert [path.name for path in draw(done, tmp_path)] == ["scores.png"] and (tmp_path / "scores.png").stat().st_size > 5000
    for r in done["runs"]:
        assert all(math.isfinite(value) for _, value in values(r))
    grown = made({"m, tokens=1": [0.1, 0.2], "m, tokens=8": [0.3, 0.4]}, {"m, tokens=1": 1, "m, tokens=8": 8})
    assert {x: round(mean.value, 3) for x, mean in curves(grown)["t"]["m"].items()} == {1: 0.15, 8: 0.35}
    assert [path.name for path in draw(grown, tmp_path)] == ["scores.png", "curve.png"] and gap_table({**grown, "baseline": None}) == ""
    for one in grown["runs"]:
        one["answers"] = {"compress": {"colour": 0.1 * int(one["arm"][-1])}, "match": {"colour": 0.25}}
    survived = curves(grown, "answers")["colour"]
    assert {line: [mean.value for mean in along.values()] for line, along in survived.items()} == {
        "m, compress": pytest.approx([0.1, 0.8]),
        "m, match": [0.25, 0.25],
    }
    assert [path.name for path in draw(grown, tmp_path)] == ["scores.png", "curve.png", "answers.png"]


def test_a_page_says_which_versions_made_its_runs() -> None:
    found = made({"a": [0.1, 0.2, 0.3]})
    assert markdown(found).endswith("\n\nMade by code c0de, torch 2, m, cpu.\n")
    found["runs"][2]["made_by"] = found["runs"][2]["made_by"] | {"code": "0ld"}
    told = "Made by 2 versions: code c0de, torch 2, m, cpu (2 of the runs); code 0ld, torch 2, m, cpu (1 of the runs)."
    assert markdown(found).endswith(f"\n\n{told}\n")
