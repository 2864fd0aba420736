"""All runs of a study, one after the other or side by side, each in a process of its own; what is there is not run again."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comatch.card import write_json
from comatch.errors import StudyError
from comatch.studies.plan import Arm, Study
from comatch.studies.single import RESULT

RESULTS = "results.json"
Tell = Callable[[Mapping[str, Any] | str], None]


def results(study: Study, out: Path, take: Sequence[Path] = ()) -> dict[str, Any]:
    """What `out`/results.json holds, or the same without runs; and with them the `taken` runs of other studies' results.

    Runs of arms that the file does not name any more, and of seeds beyond its number, stay. Raises StudyError where an arm or what is
    measured is another than when the results were made.
    """
    arms = {arm.name: arm.record for arm in study.arms}
    measure = study.config.measure.model_dump(mode="json", exclude={"data"})
    head = {"name": study.config.name, "question": study.config.question, "baseline": study.config.baseline}
    path = out / RESULTS
    found: dict[str, Any] = {**head, "measure": measure, "arms": arms, "runs": []}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
    made = {run["arm"] for run in found["runs"]}
    changes = [f"measure.{line}" for line in _changes(found["measure"], measure)]
    for name in made & set(arms):
        changes += [f"arm {name!r}, {line}" for line in _changes(found["arms"][name], json.loads(json.dumps(arms[name])))]
    if changes:
        raise StudyError(
            f"{path} was made with other settings: {'; '.join(sorted(changes)[:5])}; undo that, name another folder with --out, "
            "or delete the file"
        )
    found |= {**head, "arms": {**arms, **{name: arm for name, arm in found["arms"].items() if name not in arms}}}
    for other in take:
        found["runs"] += taken(study, found, other)
    return found


def taken(study: Study, found: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """The runs that `found` lacks and another study's results in `path` have: of equal settings, recipe, data, measures and seed.

    Raises StudyError where the file is none of results.
    """
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        same = {(run["arm"], run["seed"]): run for run in other["runs"]}
        arms, measure = other["arms"], other["measure"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise StudyError(f"{path} is no study's results.json ({why}); give one that comatch ablate wrote") from error
    out = []
    for arm, seed in missing(study, found) if measure == found["measure"] else ():
        record = json.loads(json.dumps(arm.record))
        twins = (name for name, there in arms.items() if all(there[key] == record[key] for key in ("run", "recipe", "data")))
        out += [{**same[name, seed], "arm": arm.name} for name in twins if (name, seed) in same][:1]
    return out


def missing(study: Study, found: Mapping[str, Any]) -> list[tuple[Arm, int]]:
    """The runs that have no result yet, in order."""
    done = {(run["arm"], run["seed"]) for run in found["runs"]}
    return [(arm, seed) for arm, seed in study.runs if (arm.name, seed) not in done]


def run_study(
    study: Study,
    command: Sequence[str],
    out: Path,
    *,
    jobs: int = 1,
    launcher: str = "",
    keep: bool = False,
    take: Sequence[Path] = (),
    tell: Tell,
) -> dict[str, Any]:
    """Do the runs that are missing and return all results; `out`/results.json is written anew after each.

    command: what does one run, given `--only ARM --seed SEED` behind it. launcher: put before that, such as "srun --gpus=1" or "accelerate
    launch --num_processes 4 --no_python". jobs: runs at the same time, which share the cores. keep: leave the trained models in their
    folders. take: results of other studies, whose runs of equal settings are not done again. tell: is given each result, or the reason why
    there is none. Raises StudyError where runs failed, after all others are done, or where another process works in the folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        found = results(study, out, take)
        failed = []
        with ThreadPoolExecutor(jobs) as pool:
            start = [*shlex.split(launcher), *command]
            work = {pool.submit(_run, study, arm, seed, start, out, jobs): (arm, seed) for arm, seed in missing(study, found)}
            try:
                for future in as_completed(work):
                    arm, seed = work[future]
                    made = future.result()
                    if isinstance(made, str):
                        failed.append(f"{arm.name}, seed {seed}")
                        tell(made)
                        continue
                    found["runs"].append(made)
                    write_json(out / RESULTS, found, in_order=True)
                    if not keep:
                        shutil.rmtree(_folder(out, arm, seed))
                    tell(made)
            finally:
                for future in work:  # else Ctrl-C would end one run and begin the next
                    future.cancel()
        write_json(out / RESULTS, found, in_order=True)
    if failed:
        raise StudyError(f"{len(failed)} of {len(study.runs)} runs failed: {', '.join(failed[:5])}; their logs lie in {out / 'runs'}")
    return found


def _run(study: Study, arm: Arm, seed: int, command: Sequence[str], out: Path, jobs: int) -> dict[str, Any] | str:
    """One run's result, or why there is none."""
    folder = _folder(out, arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    # What an interrupted study left here is taken up only where it is of the same settings.
    settings = {"arm": arm.record, "measure": study.config.measure.model_dump(mode="json", exclude={"data"})}
    told = folder / "settings.json"
    if told.is_file() and (changes := list(_changes(json.loads(told.read_text(encoding="utf-8")), json.loads(json.dumps(settings))))):
        why = f"{folder} holds a run of other settings ({'; '.join(changes[:3])})"
        return f"{arm.name}, seed {seed}: {why}; undo that, or delete the folder"
    write_json(told, settings)
    if not (folder / RESULT).is_file():
        threads = max(1, (os.cpu_count() or 1) // jobs)
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            done = subprocess.run(
                [*command, "--only", arm.name, "--seed", str(seed)],
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if not (folder / RESULT).is_file():
            last = (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
            return f"{arm.name}, seed {seed}: ended with code {done.returncode}: {''.join(last)[:500]} ({folder / 'log.txt'})"
    made: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return made


def one_run_command(file: Path, overrides: Sequence[str], out: Path) -> list[str]:
    """What starts a single run of a study in a process of its own."""
    return [sys.executable, "-m", "comatch", "ablate", str(file), *overrides, "--out", str(out)]


def _folder(out: Path, arm: Arm, seed: int) -> Path:
    return out / "runs" / f"{arm.slug}-{seed}"


def _changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Where two nested records differ, as `name: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _changes(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield f"{name}: {str(old)[:60]} -> {str(new)[:60]}"


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    with open(out / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StudyError(f"another process works in {out}; wait for it, or name another folder with --out") from error
        yield
