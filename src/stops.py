"""How a run is asked to stop: by a signal, or by a file in its directory."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any


class StopSignal:
    """Remembers that the run was asked to stop: by a signal, or by a file in the run directory.

    The file is ``control/stop``, written by hand, or ``control/stop-<job>-<restart>``, written by the batch script of
    that start of that Slurm job: one that was meant for an earlier start does not stop a later one.

    Handlers only set a flag. Who owns the loop combines the flag over ranks at a step boundary, so that all ranks
    save the same step.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self, path: Path) -> None:
        job, start = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
        self._control = path / "control"
        self._files = [self._control / "stop"] + ([self._control / f"stop-{job}-{start}"] if job else [])
        self._flag = threading.Event()
        self._previous: dict[int, Any] = {}

    def forget_earlier(self) -> None:
        """Remove what stopped an earlier start; what was meant for this one, or for another job here, stays."""
        job = os.environ.get("SLURM_JOB_ID")
        stale = set(self._control.glob(f"stop-{job}-*" if job else "stop-*")) - set(self._files)
        if int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")) == 1:  # the others of an array may not have seen it
            stale.add(self._control / "stop")
        for file in stale:
            file.unlink(missing_ok=True)

    def install(self) -> None:
        """Handle the stop signals; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
            # A forked worker that only noted SIGTERM would outlive its pool's terminate(), which then waits for ever.
            os.register_at_fork(after_in_child=self.restore)

    def restore(self) -> None:
        """Give the signals back to who had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._flag.is_set():
            raise KeyboardInterrupt  # a second Ctrl-C does not wait for the step
        self._flag.set()

    def is_set(self) -> bool:
        """Whether a stop was asked for on this rank."""
        return self._flag.is_set() or any(file.exists() for file in self._files)
