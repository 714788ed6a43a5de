"""How far a loop is, for a person at a terminal, for a log, and for a launcher that watches several stages.

Nothing here raises into the work that it tells of: a terminal that went away, or a full disk, ends the telling only.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
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
        self._screen: Any = None
        self._main = runs.is_main_process()

    def __enter__(self) -> Self:
        with contextlib.suppress(Exception):
            if self._main and self._file is None and sys.stderr.isatty():
                self._open()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            if self._screen is not None:
                self._screen.stop()
            elif self._main and self._completed > self._first:
                self._end()

    def update(self, completed: int, note: str = "") -> None:
        """Say that ``completed`` of the total are done."""
        self._completed = completed
        if not self._main:
            return
        with contextlib.suppress(Exception):
            if self._screen is not None:
                self._show(note)
            elif time.monotonic() - self._said >= (0.5 if self._file else self._every):
                self._say(note)

    def count(self, items: Iterable[T], *, note: str = "") -> Iterator[T]:
        """The items; each is done when the next one is asked for."""
        for number, item in enumerate(items, self._completed + 1):
            yield item
            self.update(number, note)

    @property
    def seconds_left(self) -> float | None:
        """By the mean of what was done since the start; ``None`` before anything was."""
        done = self._completed - self._first
        return (self.total - self._completed) * (time.monotonic() - self._started) / done if done > 0 else None

    def _open(self) -> None:
        bars = progress_bars()
        self._task = bars.add_task(self.name, total=self.total, completed=self._completed, note="")
        bars.start()
        self._screen = bars

    def _show(self, note: str) -> None:
        self._screen.update(self._task, completed=self._completed, note=note)

    def _end(self) -> None:
        self._say("")

    def _say(self, note: str) -> None:
        self._said = time.monotonic()
        if self._file:
            state = {"name": self.name, "completed": self._completed, "total": self.total, "note": note}
            temporary = Path(f"{self._file}.tmp")
            temporary.write_text(json.dumps(state))
            temporary.replace(self._file)
            return
        self._print(note, self._said - self._started)

    def _print(self, note: str, elapsed: float) -> None:
        left = "" if self.seconds_left is None else f"{self.seconds_left:.0f} s left"
        print(f"{self.name}: {self._completed}/{self.total}  {note}  {elapsed:.0f} s gone, {left}", flush=True)


class TrainingProgress(Progress):
    """How far a training run is: a live panel on a terminal; elsewhere one plain line for each time that it logs.

    What it tells beside step and time left are facts by name, in their order.
    """

    def __init__(self, name: str, total: int, *, completed: int = 0) -> None:
        super().__init__(name, total, completed=completed)
        self._facts: dict[str, str] = {}

    def tell(self, facts: Mapping[str, str]) -> None:
        """Show the facts of the last step, or write the one line of it."""
        with contextlib.suppress(Exception):
            self._facts = dict(facts)
            if self._main and self._screen is None:
                print(self._line(), flush=True)

    def _line(self) -> str:
        told = [f"{name} {value}" for name, value in self._facts.items()]
        left = self.seconds_left
        told += [] if left is None else [f"{duration(left)} left"]
        return f"{self.name}: step {self._completed}/{self.total}  {'  '.join(told)}".rstrip()

    def _open(self) -> None:
        from rich.console import Console
        from rich.live import Live

        screen = Live(get_renderable=self._panel, console=Console(stderr=True), refresh_per_second=4)
        screen.start()
        self._screen = screen

    def _show(self, note: str) -> None:
        """The screen asks for the panel itself, four times a second: its clock goes on in a long step too."""

    def _end(self) -> None:
        if self._file:
            self._say("")

    def _print(self, note: str, elapsed: float) -> None:
        """Lines come with the facts."""

    def _panel(self) -> Any:
        from rich.columns import Columns
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        left = self.seconds_left
        bar = Table.grid(padding=(0, 2), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(justify="right", no_wrap=True)
        told = f"step {self._completed:,} of {self.total:,}, {duration(time.monotonic() - self._started)} gone"
        told += "" if left is None else f", {duration(left)} left"
        bar.add_row(ProgressBar(total=self.total, completed=self._completed), Text(told))
        cells = (Text(f"{name}\n", "dim").append(value, "not dim bold") for name, value in self._facts.items())
        facts = Columns(cells, padding=(0, 3))  # as many side by side as the terminal is wide
        return Panel(Group(bar, facts) if self._facts else bar, title=Text(self.name), title_align="left")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


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
