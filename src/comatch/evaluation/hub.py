"""MMEB from the Hugging Face hub: fetched or found in its cache, at one revision, or a message that says which command fetches it."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from comatch.errors import EvaluationError
from comatch.evaluation.specs import Spec

IMAGES: Final = "TIGER-Lab/MMEB-eval"
FRAMES: Final = "TIGER-Lab/MMEB-V2"


@dataclass(frozen=True)
class Fetched:
    """Where data lies. roots: folders to look in; repos: the folder of each hub id; commit: of the first, "" for a person's own folder."""

    roots: tuple[Path, ...]
    repos: dict[str, Path] = field(default_factory=dict)
    commit: str = ""


def fetch(wanted: Iterable[Spec], revision: str | None, work: Path) -> Fetched:
    """The hub's files of some datasets. revision: a commit, branch or tag of MMEB-eval; what was fetched is named by its commit.

    work: frames of videos, published as .tar.gz, are unpacked to .tar there, once. Raises EvaluationError where the hub does not answer.
    """
    specs = list(wanted)
    roots, repos = list[Path](), dict[str, Path]()
    if any(not spec.repo for spec in specs):
        roots.append(_snapshot(IMAGES, revision, ("*/*.parquet", "images.zip")))
    for repo in dict.fromkeys(spec.repo for spec in specs if spec.repo):
        repos[repo] = _snapshot(repo, None, ("*.parquet", "*.json", "*.jsonl"))
    kinds = sorted({spec.frames.partition("/")[0] for spec in specs if spec.frames})
    if kinds:
        packed = _snapshot(FRAMES, None, tuple(f"video-tasks/frames/{kind}.tar.gz*" for kind in kinds)) / "video-tasks" / "frames"
        for kind in kinds:
            inflate(sorted(packed.glob(f"{kind}.tar.gz*")), work / "frames" / f"{kind}.tar")
        roots.append(work)
    return Fetched(tuple(roots), repos, roots[0].name if roots and roots[0] != work else "")


def inflate(parts: Sequence[Path], target: Path) -> None:
    """Unpack the parts of a .gz file, in order, into one file; what is there already stays. Raises EvaluationError for damaged ones."""
    if target.is_file():
        return
    if not parts:
        raise EvaluationError(f"the hub has no frames for {target.name}; unpack them by hand and pass the folder with --data")
    target.parent.mkdir(parents=True, exist_ok=True)
    whole, aside = target.with_name(f".{target.name}.gz"), target.with_name(f".{target.name}")
    try:
        with whole.open("wb") as joined:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, joined)
        with gzip.open(whole) as packed, aside.open("wb") as plain:
            shutil.copyfileobj(packed, plain)
        aside.replace(target)
    except (OSError, EOFError) as error:
        raise EvaluationError(f"{parts[0]} does not unpack ({error}); remove it from the cache and fetch it again") from error
    finally:
        whole.unlink(missing_ok=True)
        aside.unlink(missing_ok=True)


def _snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    no_connection: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, by the hub's release
    at = f" --revision {revision}" if revision else ""
    command = f"hf download {repo} --repo-type dataset{at} --local-dir MMEB"
    try:
        return Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, no_connection) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        raise EvaluationError(
            f"{repo} could not be fetched ({why}), and the cache {constants.HF_HUB_CACHE} lacks files of it. "
            f"Where there is a network: {command}; then evaluate with --data MMEB"
        ) from error
