"""Signals that ask a run to end: it finishes its step, saves, and exits with a code that says it can go on."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType, TracebackType

import torch
from accelerate import Accelerator

from comatch.devices import moved

PREEMPTED, INTERRUPTED = 75, 130


class Signals:
    """Takes SIGTERM and SIGUSR1 (a scheduler wants the machine) and Ctrl-C while the block runs.

    A second Ctrl-C ends the block at once by KeyboardInterrupt. Outside of the main thread no signal can be taken, and none is.
    """

    def __init__(self) -> None:
        self.code = 0
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self, accelerator: Accelerator) -> int:
        """The exit code that any process was asked for, 0 for none. Every process must call this, and all get the same."""
        if accelerator.num_processes == 1:
            return self.code
        asked = accelerator.gather(moved(torch.tensor([self.code]), accelerator.device))
        return int(asked.max())

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # workers of the loader inherit this; the process that they work for ends them
        if number == signal.SIGINT and self.code == INTERRUPTED:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.code = max(self.code, INTERRUPTED if number == signal.SIGINT else PREEMPTED)
        again = "; press Ctrl-C again to exit now" if number == signal.SIGINT else ""
        with suppress(OSError):  # nobody may be reading; print would not be safe inside a handler
            os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint after this step{again}\n".encode())
