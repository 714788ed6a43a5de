"""Run directories as a live dashboard: metrics are copied into trackio's store, on a disk of the viewer's machine.

Nothing is written into a run directory, and nothing leaves the machine. ``metrics.jsonl`` stays the truth: the store
can be thrown away at any time.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import yaml

from llamita import locks, redaction, storage
from llamita.metrics import parse_row, superseded_from

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
DEEPEST = 5
"""Levels below the folder of runs that are looked through."""
BATCH_ROWS = 2000
SETTINGS_OF_OTHERS = ("TRACKIO_", "GRADIO_", "SPACE_", "SYSTEM", "MCP_")
"""Beginnings of environment variables by which the library would send rows away, or listen to the world."""


PLACE = ("step", "time", "restart")
"""What a row says beside metrics."""


class State(StrEnum):
    """What a run directory says of its run."""

    done = "done"
    going_on = "going on"
    unfinished = "not finished"


class Store(Protocol):
    """Where rows go."""

    def add(self, project: str, run: str, run_id: str, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """Append rows, and replace what is known of the run."""
        ...

    def remove(self, project: str, run: str, run_id: str) -> None:
        """Forget a run's rows."""
        ...


def find(folder: Path) -> dict[Path, tuple[str, str]]:
    """Run directories in and below a folder, with the names of their project and of the run.

    The project of a run is the path of the folder that holds it, so a pipeline is one and its stages are its runs.
    """
    folder = folder.resolve()
    found: dict[Path, tuple[str, str]] = {}
    for place, below, files in os.walk(folder):
        path = Path(place)
        depth = len(path.relative_to(folder).parts)
        if {"config.yaml", "run.json"} <= set(files):
            parents = path.parent.relative_to(folder).parts if depth else ()
            found[path] = (project_name(parents or ((path.parent if depth == 0 else folder).name,)), path.name)
            below[:] = [name for name in below if name == "workers"]  # what else it has inside is its own
        elif depth >= DEEPEST:
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith("."))
    return found


def project_name(parts: tuple[str, ...]) -> str:
    """A name that the store takes: it would drop other characters, and keeps some beginnings and ends for itself."""
    name = "-".join(re.sub(r"[^A-Za-z0-9_-]+", "-", part).strip("-") or "runs" for part in parts)[-80:]
    return f"{name}-runs" if re.search(r"^registry-|_[a-z_]+$", name) else name


@dataclass
class Follower:
    """Copies one run's rows into a store, those that are new since the last time, each step's metric once."""

    path: Path
    project: str
    run: str
    identity: str = ""
    _end: int = 0
    _state: State | None = None

    def __post_init__(self) -> None:
        self._earliest: dict[int, int] = {}
        self._latest: dict[int, int] = {}

    def advance(self, store: Store) -> int:
        """Copy what is new; returns the number of rows.

        Raises:
            ValueError: a line is damaged.
            OSError: the directory cannot be read.
        """
        identity, state, end = self._read_identity(), _state(self.path), _whole_lines(self.path / "metrics.jsonl")
        if end < self._end or identity != self.identity or state is not self._state:
            self._forget(store)
        first = self._superseded_from(end)
        if any(latest >= first[restart] for restart, latest in self._latest.items()):
            self._forget(store)
            first = self._superseded_from(end)
        self.identity, self._state = identity, state
        copied = 0
        config = self._describe() if end > self._end else {}
        lines = self._rows(self._end, end)
        while rows := list(itertools.islice(lines, BATCH_ROWS)):
            kept = [row for row in rows if row["step"] < first[row["restart"]]]
            for row in rows:
                step, restart = row["step"], row["restart"]
                self._earliest[restart] = min(self._earliest.get(restart, step), step)
            for row in kept:
                self._latest[row["restart"]] = max(self._latest.get(row["restart"], row["step"]), row["step"])
            store.add(self.project, self.run, self.identity, kept, config)
            copied += len(kept)
        self._end = end
        return copied

    def _forget(self, store: Store) -> None:
        if self.identity:
            store.remove(self.project, self.run, self.identity)
        self._end, self._earliest, self._latest = 0, {}, {}

    def _read_identity(self) -> str:
        """Of the directory's run; another one, where the directory was made anew."""
        identity = storage.read_mapping(self.path / "run.json").get("id")
        if not isinstance(identity, str):
            raise ValueError(f"{self.path / 'run.json'} has no id: no run wrote it")
        return identity

    def _describe(self) -> dict[str, Any]:
        saved = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        known = saved if isinstance(saved, dict) else {}
        return {"state": str(self._state), "recipe": known.get("recipe"), "directory": str(self.path)} | {
            f"settings/{name}": value for name, value in redaction.flat(known.get("settings") or {})
        }

    def _superseded_from(self, end: int) -> dict[int, float]:
        """As :func:`llamita.metrics.superseded_from`, of what was copied and what is new."""
        earliest = dict(self._earliest)
        for row in self._rows(self._end, end):
            earliest[row["restart"]] = min(earliest.get(row["restart"], row["step"]), row["step"])
        return superseded_from(earliest)

    def _rows(self, begin: int, end: int) -> Iterator[dict[str, Any]]:
        """The rows in a range of bytes that begins and ends between lines."""
        with contextlib.suppress(FileNotFoundError), (self.path / "metrics.jsonl").open("rb") as file:
            file.seek(begin)
            while file.tell() < end:
                yield parse_row(file.readline(), f"{self.path / 'metrics.jsonl'}, before byte {file.tell()},")


def _whole_lines(file: Path) -> int:
    """Bytes up to the end of the last line that is written whole; 0 where there is no file yet."""
    if not file.is_file():
        return 0
    with file.open("rb") as opened:
        end = opened.seek(0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - 65536)
            opened.seek(begin)
            if (found := opened.read(end - begin).rfind(b"\n")) >= 0:
                return begin + found + 1
            end = begin
    return 0


def _state(path: Path) -> State:
    if (path / "DONE.json").is_file():
        return State.done
    try:
        locks.Lock(path).dead_owner()
    except locks.Owned:
        return State.going_on
    return State.unfinished


class Board:
    """All runs below a folder, copied into a store again and again."""

    def __init__(self, folder: Path, store: Store) -> None:
        self._folder, self._store = folder, store
        self._followers: dict[Path, Follower] = {}
        self._broken: set[Path] = set()

    def look_for_runs(self) -> int:
        """Find new run directories; returns how many there are."""
        for path, (project, run) in find(self._folder).items():
            self._followers.setdefault(path, Follower(path, project, run))
        return len(self._followers)

    def advance(self) -> int:
        """Copy what every run has written since; a run that cannot be read is told of once, and looked at again."""
        copied = 0
        for path, follower in self._followers.items():
            try:
                copied += follower.advance(self._store)
                self._broken.discard(path)
            except (ValueError, OSError) as error:
                if path not in self._broken:
                    self._broken.add(path)
                    log.warning("%s is not shown as it is now: %s", path, error)
        return copied


class Curves:
    """Parts what one run logs into curves and single values.

    A page of charts shows a number that was logged once as a bar of a chart's size. So a metric waits for its second
    value, and is a fact about the run until then.
    """

    def __init__(self) -> None:
        self._curves: set[str] = set()
        self._single: dict[str, tuple[dict[str, Any], Any]] = {}

    @property
    def single(self) -> dict[str, Any]:
        """The values of metrics that have one so far."""
        return {name: value for name, (_, value) in self._single.items()}

    def split(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The row's metrics that are curves, behind the first values of those that become one with it."""
        at = {name: row[name] for name in PLACE if name in row}
        metrics = {name: value for name, value in _shown(row).items() if name in self._curves}
        begun: dict[int, dict[str, Any]] = {}
        for name, value in _shown(row).items():
            if name in self._single:
                place, first = self._single.pop(name)
                begun.setdefault(place["step"], dict(place))[name] = first
                self._curves.add(name)
                metrics[name] = value
            elif name not in self._curves:
                self._single[name] = at, value
        return [*begun.values(), {**at, **metrics}] if metrics else []


class Trackio:
    """trackio's store in a folder of this machine's disk, and its server on this machine only."""

    def __init__(self, folder: Path) -> None:
        for name in list(os.environ):
            if name.startswith(SETTINGS_OF_OTHERS):
                del os.environ[name]
        os.environ["TRACKIO_DIR"] = str(folder)
        try:
            import trackio
            from trackio.sqlite_storage import SQLiteStorage
        except ImportError as error:
            raise ValueError("the dashboard needs the package trackio: pip install 'llamita[watch]'") from error
        self._trackio, self._storage = trackio, SQLiteStorage
        self._server: Any = None
        self._curves: dict[str, Curves] = {}

    def add(self, project: str, run: str, run_id: str, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        """Append rows, and replace what is known of the run."""
        curves = self._curves.setdefault(run_id, Curves())
        split = [part for row in rows for part in curves.split(row)]
        if not split and rows:  # a run without any row would not be shown
            split = [{name: rows[-1][name] for name in PLACE if name in rows[-1]}]
        facts = config | {f"logged once/{name}": value for name, value in curves.single.items()}
        self._storage.bulk_log(
            project,
            run,
            [{name: value for name, value in row.items() if name not in PLACE} for row in split],
            steps=[row["step"] for row in split],
            timestamps=[_iso(row.get("time")) for row in split],
            config=json.loads(json.dumps(facts, default=str)),
            run_id=run_id,
        )

    def remove(self, project: str, run: str, run_id: str) -> None:
        """Forget a run's rows."""
        self._curves.pop(run_id, None)
        self._storage.delete_run(project, run, run_id=run_id)

    def serve(self, port: int | None) -> str:
        """Serve on this machine's own address; returns the page's.

        Raises:
            ValueError: the port is taken.
        """
        said = io.StringIO()  # it would print how to delete runs, which the truth would bring back
        try:
            with contextlib.redirect_stdout(said):
                self._server, url, *_ = self._trackio.show(
                    host=HOST, server_port=port, share=False, mcp_server=False, open_browser=False, block_thread=False
                )
        except OSError as error:
            raise ValueError(f"port={port} of {HOST} is taken; choose another") from error
        return str(url)

    def close(self) -> None:
        """Stop serving."""
        if self._server is not None:
            self._server.close()


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers and words of a row, with the restart that wrote it."""
    kept = {name: value for name, value in row.items() if name not in PLACE and isinstance(value, int | float | str)}
    return {**kept, "run/restarts": row["restart"]}


def _iso(seconds: Any) -> str:
    seconds = seconds if isinstance(seconds, int | float) and 0 <= seconds < 2**40 else 0
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat()
