"""What a person sees of a run, and what stays of it: a live bar, and one JSON line per report."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from comatch.training.step import StepResult


class Reporter:
    """Shows a stage's progress and appends its metrics; only the first process does either.

    On a terminal a bar with loss, items/s, tokens/s and time left; elsewhere a line every few seconds on stderr.
    """

    def __init__(self, path: Path, stage: str, steps: int, accelerator: Accelerator, *, quiet: bool, every: int) -> None:
        self.path, self.stage, self.steps, self.accelerator, self.every = path, stage, steps, accelerator, every
        self.active = accelerator.is_main_process
        self.quiet = quiet or not self.active
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=self.quiet or not self.console.is_terminal,
        )
        self.file: IO[str] | None = None
        self.spent = self.loss = self.accuracy = 0.0
        self.items = self.tokens = self.count = 0
        self.began = self.told_at = time.perf_counter()

    def __enter__(self) -> Reporter:
        if self.active:
            self.file = open(self.path, "a", encoding="utf-8")
        self.bar.start()
        self.task = self.bar.add_task(self.stage, total=self.steps, told="")
        return self

    def step(self, step: int, result: StepResult, norm: float, rate: float, bad: int, seconds: float) -> None:
        """Count one optimiser step; every few of them, write their mean loss."""
        ranks = self.accelerator.num_processes
        self.spent += seconds
        self.loss += result.loss
        self.accuracy += result.accuracy
        self.items += result.examples * ranks
        self.tokens += result.tokens * ranks
        self.count += 1
        if (step + 1) % self.every and step + 1 < self.steps:
            self.bar.advance(self.task)
            return
        now = time.perf_counter()
        wall = now - self.began
        row = {
            "stage": self.stage,
            "step": step + 1,
            "loss": self.loss / self.count,
            "accuracy": self.accuracy / self.count,
            "gradient_norm": norm,
            "lr": rate,
            "items_per_second": self.items / wall,
            "tokens_per_second": self.tokens / wall,
            "data_wait": max(0.0, 1 - self.spent / wall),
            "bad_rows": bad,
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        self._tell(step + 1, row)
        self.spent = self.loss = self.accuracy = 0.0
        self.items = self.tokens = self.count = 0
        self.began = now

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        if self.file:
            self.file.close()

    def _tell(self, step: int, row: dict[str, Any]) -> None:
        told = f"loss {row['loss']:.3f}  {row['items_per_second']:.0f} items/s  {row['tokens_per_second']:.0f} tokens/s"
        self.bar.update(self.task, completed=step, told=told)
        self.accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=step)
        if self.file:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        last = step == self.steps
        if not self.quiet and not self.console.is_terminal and (last or time.perf_counter() - self.told_at > 5):
            self.told_at = time.perf_counter()
            self.console.print(f"{self.stage} {step}/{self.steps}  {told}", highlight=False, soft_wrap=True)
