"""What a person sees of a run, and what stays of it: a live bar, and one JSON line per report."""

from __future__ import annotations

import json
import os
import resource
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from comatch.errors import TrainingError
from comatch.training.loader import Quarantine
from comatch.training.step import StepResult

_SUMS = ("loss", "accuracy", "items", "tokens", "filled", "slots", "count")


class _Stderr(Console):
    """Whoever reads our progress may go away, as in `2>&1 | head`; rich would end the process then."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Reporter:
    """Shows a stage's progress and appends its metrics; only the first process does either.

    On a terminal a bar with loss, items/s, tokens/s and time left; elsewhere a line every few seconds on stderr.
    """

    def __init__(self, path: Path, stage: str, steps: int, accelerator: Accelerator, *, quiet: bool, every: int) -> None:
        self.path, self.stage, self.steps, self.accelerator, self.every = path, stage, steps, accelerator, every
        self.active = accelerator.is_main_process
        self.quiet = quiet or not self.active
        self.console = _Stderr(stderr=True)
        self.tracked = True
        self.peak: float | None = None  # of one device, in TFLOP/s
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
        self.spent = self.loss = self.accuracy = self.flop = 0.0
        self.items = self.tokens = self.filled = self.slots = self.count = 0
        self.parts: dict[str, float] = {}
        self.began = self.told_at = time.perf_counter()

    def __enter__(self) -> Reporter:
        if self.active:
            self.file = open(self.path, "a", encoding="utf-8")
        self.bar.start()
        self.task = self.bar.add_task(self.stage, total=self.steps, told="")
        return self

    def state(self) -> dict[str, Any]:
        """What has been added up since the last line; every process must call this."""
        return {**{name: getattr(self, name) for name in (*_SUMS, "parts")}, "flops": gather_object([self.flop])}

    def restore(self, step: int, state: Mapping[str, Any]) -> None:
        """Go on after `step` steps with such sums."""
        for name in _SUMS:
            setattr(self, name, state.get(name, 0))
        self.parts = dict(state.get("parts", {}))
        flops, ranks = state.get("flops", [0.0]), self.accelerator.num_processes
        self.flop = flops[self.accelerator.process_index] if len(flops) == ranks else sum(flops) / ranks
        self.bar.update(self.task, completed=step)

    def step(self, step: int, result: StepResult, norm: float, rate: float, account: Quarantine, seconds: float, flop: float = 0.0) -> None:
        """Count one optimiser step; every few of them, write their mean loss and the account of the data of all ranks so far.

        flop: useful work of this rank (core/flops.py). In the line, items, tokens and tflop are all ranks' since the line before, fill is
        the share of this rank's places that are no padding, imbalance the work of the rank with the most over the mean.
        """
        ranks = self.accelerator.num_processes
        self.spent += seconds
        self.loss += result.loss
        self.accuracy += result.accuracy
        self.items += result.examples * ranks
        self.tokens += result.tokens * ranks
        self.filled += result.filled
        self.slots += result.slots
        self.flop += flop
        self.count += 1
        self.parts = {name: self.parts.get(name, 0.0) + part for name, part in result.parts.items()}
        if (step + 1) % self.every and step + 1 < self.steps:
            self.bar.advance(self.task)
            return
        now = time.perf_counter()
        wall = now - self.began
        accounts, flops = zip(*gather_object([(account, self.flop)]), strict=True)
        row = {
            "stage": self.stage,
            "step": step + 1,
            "loss": self.loss / self.count,
            "accuracy": self.accuracy / self.count,
            **({f"loss_{name}": part / self.count for name, part in self.parts.items()} if len(self.parts) > 1 else {}),
            "gradient_norm": norm,
            "lr": rate,
            **({} if result.temperature is None else {"temperature": result.temperature, "repeated": result.repeated}),
            "items": self.items,
            "tokens": self.tokens,
            "tflop": sum(flops) / 1e12,
            "seconds": wall,
            "items_per_second": self.items / wall,
            "tokens_per_second": self.tokens / wall,
            "fill": self.filled / max(1, self.slots),
            "tflops": self.flop / wall / 1e12,
            **({"mfu": self.flop / wall / 1e12 / self.peak} if self.peak else {}),
            **({"imbalance": max(flops) * ranks / sum(flops)} if ranks > 1 and sum(flops) else {}),
            "data_wait": max(0.0, 1 - self.spent / wall),
            **Quarantine.merged(accounts).metrics(),
            "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        self._tell(step + 1, row)
        self._write(step + 1, row)
        self.spent = self.loss = self.accuracy = self.flop = 0.0
        self.items = self.tokens = self.filled = self.slots = self.count = 0
        self.parts = {}
        self.began = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside the block is neither work nor waiting for data."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def sync(self) -> None:
        """Bring the lines so far to the disk: a checkpoint must not outlive them."""
        if self.file:
            os.fsync(self.file.fileno())

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Write what an evaluation after `step` steps gave."""
        self._write(step, {"stage": self.stage, "step": step, "evaluation": dict(scores)})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()
        if self.file:
            self.file.close()

    def _tell(self, step: int, row: dict[str, Any]) -> None:
        told = f"loss {row['loss']:.3f}  {row['items_per_second']:.0f} items/s  {row['tokens_per_second']:.0f} tokens/s"
        self.bar.update(self.task, completed=step, told=told)
        last = step == self.steps
        if not self.quiet and not self.console.is_terminal and (last or time.perf_counter() - self.told_at > 5):
            self.told_at = time.perf_counter()
            self.console.print(f"{self.stage} {step}/{self.steps}  {told}", highlight=False, soft_wrap=True)

    def _write(self, step: int, row: dict[str, Any]) -> None:
        """A line of metrics, and the same to the trackers. Raises TrainingError where the line cannot be written."""
        if self.file:
            try:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
            except OSError as error:
                raise TrainingError(f"{self.path} cannot be written: {error}; make room, then the same command goes on") from error
        if self.tracked:
            numbers = row.get("evaluation", row)
            try:
                self.accelerator.log({k: v for k, v in numbers.items() if isinstance(v, int | float)}, step=step)
            except Exception as error:  # noqa: BLE001 - a tracker is other people's code and network; no run is lost to it
                self.tracked = False
                warnings.warn(f"the tracker failed ({error!r}); training goes on without it, {self.path} has everything", stacklevel=2)
