"""Show all runs below a folder in the browser of this machine, while they go on: no account, no network.

python recipes/dashboard.py runs=outputs
"""

from __future__ import annotations

from _main import CONFIGS, exit_with, settings, store  # isort: skip
import contextlib
import logging
import signal
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import MISSING

from llamita.report import board

LOOK_SECONDS = 10.0
"""How often new run directories are looked for."""


@dataclass(kw_only=True)
class Dashboard:
    """Everything that this recipe can be told."""

    runs: Path = MISSING
    """The folder in and below which the run directories are."""
    port: int | None = None
    """Unset: the first free one from 7860 on."""
    open: bool = False
    """Also open the page in a browser."""
    every_seconds: float = 2.0
    """How often new rows are looked for."""
    out: Path | None = None
    """Where the copy of the metrics lies while the dashboard runs, on a local disk; unset: a temporary folder."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"port must be in 1..65535, got {self.port}")
        if not 0.1 <= self.every_seconds <= 3600:
            raise ValueError(f"every_seconds must be in 0.1..3600, got {self.every_seconds}")


store("dashboard_schema", Dashboard)


def run(config: Dashboard, stop: threading.Event | None = None) -> None:
    """Copy the metrics, serve the page, and follow the runs until SIGINT, SIGTERM or ``stop``."""
    if not config.runs.is_dir():
        raise ValueError(f"runs={config.runs} is not a directory")
    if config.out is not None and config.out.is_dir() and any(config.out.iterdir()):
        raise ValueError(f"out={config.out} is not empty; the copy needs a folder of its own")
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with (
        tempfile.TemporaryDirectory(prefix="llamita-dashboard-", dir=config.out) as folder,
        _stopped(stop or threading.Event()) as stopped,
    ):
        trackio = board.Trackio(Path(folder))
        shown = board.Board(config.runs, trackio)
        count, rows = shown.look_for_runs(), shown.advance()
        url = trackio.serve(config.port)
        print(f"{count} runs below {config.runs}, {rows:,} rows: {url}  (Ctrl-C ends)", flush=True)
        if config.open:
            webbrowser.open(url)
        looked = time.monotonic()
        while not stopped.wait(config.every_seconds):
            if time.monotonic() - looked > LOOK_SECONDS:
                looked = time.monotonic()
                shown.look_for_runs()
            shown.advance()
        trackio.close()


@contextlib.contextmanager
def _stopped(stop: threading.Event) -> Iterator[threading.Event]:
    """Set ``stop`` on SIGINT and SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main() -> None:
    """Compose the settings from the command line, and serve."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = settings(compose("dashboard", overrides=sys.argv[1:]), Dashboard)
    run(config)


if __name__ == "__main__":
    exit_with(main)
