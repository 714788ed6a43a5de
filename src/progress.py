"""How far a loop is, for a person at a terminal, for a log, and for a launcher that watches several stages."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from llamita import runs

T = TypeVar("T")


class Progress:
    """How far a loop is: a live bar on a terminal, one plain line every few seconds elsewhere; rank 0 only.

    Under a launcher that watches several stages, ``LLAMITA_PROGRESS`` names a file that always holds the latest state.
    """

    def __init__(self, name: str, total: int, *, completed: int = 0, every_seconds: float = 15.0) -> None:
        self.name, self.total = name, total
        self._completed, self._first = completed, completed
        self._every, self._started, self._said = every_seconds, time.monotonic(), time.monotonic()
        self._file = os.environ.get("LLAMITA_PROGRESS")
        self._bar: Any = None
        if runs.is_main_process() and self._file is None and sys.stderr.isatty():
            self._bar = progress_bars()
            self._task = self._bar.add_task(name, total=total, completed=completed, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif runs.is_main_process() and self._completed > self._first:
            self._say("")

    def update(self, completed: int, note: str = "") -> None:
        """Say that ``completed`` of the total are done."""
        self._completed = completed
        if not runs.is_main_process():
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, note=note)
        elif time.monotonic() - self._said >= (0.5 if self._file else self._every):
            self._say(note)

    def count(self, items: Iterable[T], *, note: str = "") -> Iterator[T]:
        """The items; each is done when the next one is asked for."""
        for number, item in enumerate(items, self._completed + 1):
            yield item
            self.update(number, note)

    def _say(self, note: str) -> None:
        self._said = time.monotonic()
        if self._file:
            state = {"name": self.name, "completed": self._completed, "total": self.total, "note": note}
            temporary = Path(f"{self._file}.tmp")
            temporary.write_text(json.dumps(state))
            temporary.replace(self._file)
            return
        elapsed = self._said - self._started
        rate = (self._completed - self._first) / max(elapsed, 1e-9)
        left = f"{(self.total - self._completed) / rate:.0f} s left" if rate > 0 else ""
        print(f"{self.name}: {self._completed}/{self.total}  {note}  {elapsed:.0f} s gone, {left}", flush=True)


def progress_bars() -> Any:
    """Rich's bars with the columns that every recipe shows; a task has a ``note``."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )
