"""Run stages as processes of this machine: as many at a time as asked, each with its log and its progress bar."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llamita import faults, locks, runs, storage
from llamita.progress import progress_bars

POLL_SECONDS = 0.2
ASK_AGAIN_SECONDS = 10.0
ORPHAN_SECONDS = 60.0
"""How long to wait for a stage that outlived the launcher that was killed, until it has saved."""
RECIPES = Path(__file__).parent


@dataclass(kw_only=True)
class LocalConfig:
    """How many stages this machine runs at a time."""

    parallel: int = 1
    """Independent stages that run side by side."""
    threads: int = 0
    """Threads of one process; 0 shares the processors of the machine among the processes that run."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a count below its least."""
        if self.parallel < 1:
            raise ValueError(f"local.parallel must be at least 1, got {self.parallel}")
        if self.threads < 0:
            raise ValueError(f"local.threads must be at least 0, got {self.threads}")


@dataclass(frozen=True)
class Job:
    """One stage as a process to start."""

    name: str
    recipe: str
    arguments: list[str]
    """Overrides, ``out`` included."""
    out: Path
    after: list[str]
    processes: int
    done: bool
    spares_others: bool = False
    """Whether the stages beside it go on when it fails: a point of a sweep."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    progress: Path
    codes: Path
    """Where each rank leaves its exit code: a launcher of several turns every failure into 1."""
    started: float

    def stop(self) -> None:
        """Ask the stage to save and end: its launcher would only pass a signal on and then kill."""
        if self.job.processes > 1:
            (self.job.out / "control").mkdir(parents=True, exist_ok=True)
            (self.job.out / "control" / "stop").touch()
        else:
            self.process.terminate()

    def code(self) -> int | None:
        """The stage's exit code, once it has ended."""
        code = self.process.poll()
        if code in (None, 0) or self.job.processes == 1:
            return code
        told = {int(file.read_text() or 1) for file in self.codes.glob("rank-*")}
        return next((wanted for wanted in (runs.EXIT_USER, runs.EXIT_REQUEUE) if wanted in told), code)


def run_jobs(jobs: list[Job], logs: Path, config: LocalConfig, finished: Callable[[str], None]) -> None:
    """Run every job that is not done after those it waits for; call ``finished(name)`` for each that ends well.

    Raises:
        Stopped: a stage saved its state and wants to be started again, or this launcher was told to stop.
        ValueError: a stage ended with the code of a user's error.
        Crashed: a stage crashed.
    """
    logs.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    waiting = [job for job in jobs if not job.done]
    done = {job.name for job in jobs if job.done}
    for name in sorted(done):
        print(f"  {name:<20} finished earlier", flush=True)
    running: list[_Running] = []
    failed: list[tuple[Job, int]] = []
    with _Screen() as screen, _noting_signals() as asked:
        while waiting or running:
            if asked.is_set():
                _stop(running, screen)
                raise runs.Stopped("stopped, everything is saved: run the same command again to go on")
            for job in list(waiting):
                if time.monotonic() - begun < ORPHAN_SECONDS and _has_owner(job.out):
                    continue
                if len(running) < config.parallel and set(job.after) <= done:
                    waiting.remove(job)
                    together = min(config.parallel, len(running) + 1 + sum(set(j.after) <= done for j in waiting))
                    running.append(_start(job, logs, config, together))
            time.sleep(POLL_SECONDS)
            for item in list(running):
                screen.show(item)
                if (code := item.code()) is not None:
                    running.remove(item)
                    screen.close(item, code)
                    if code == runs.EXIT_DONE:
                        done.add(item.job.name)
                        finished(item.job.name)
                    elif item.job.spares_others and code != runs.EXIT_REQUEUE:
                        failed.append((item.job, code))
                        waiting = _without_children(waiting, item.job.name)
                    else:
                        _stop(running, screen)
                        _fail(item.job, code, logs)
    if failed:
        _fail(*failed[0], logs)


def _without_children(jobs: list[Job], failed: str) -> list[Job]:
    """The jobs, which are in order, that do not wait for a failed one, nor for one that does."""
    lost = {failed}
    for job in jobs:
        if lost & set(job.after):
            lost.add(job.name)
    return [job for job in jobs if job.name not in lost]


def _has_owner(out: Path) -> bool:
    try:
        locks.Lock(out).dead_owner()
    except ValueError:
        return True
    return False


def _start(job: Job, logs: Path, config: LocalConfig, together: int) -> _Running:
    program = [str(RECIPES / f"{job.recipe}.py"), *job.arguments]
    if job.processes > 1:
        program = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.processes}", *program]
    command = [sys.executable, *program]
    threads = config.threads or max(1, (os.cpu_count() or 1) // (together * job.processes))
    progress = logs / f".{job.name}.progress"
    progress.unlink(missing_ok=True)
    codes = logs / f".{job.name}.codes"
    shutil.rmtree(codes, ignore_errors=True)
    codes.mkdir()
    environment = {
        **os.environ,
        "LLAMITA_PROGRESS": str(progress),
        "LLAMITA_EXIT_DIR": str(codes),
        "OMP_NUM_THREADS": str(threads),
        **({} if _enough_gpus(job.processes) else {"CUDA_VISIBLE_DEVICES": ""}),
    }
    file = logs / f"{job.name}.log"
    if file.is_file():  # what an earlier start said stays
        file.replace(file.with_suffix(".earlier.log"))
    with file.open("wb") as log:
        # A session of its own: Ctrl-C reaches the stage through this launcher only, as a request to save.
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    return _Running(job, process, progress, codes, time.monotonic())


def _end_with_parent() -> None:
    """Ask Linux to end this process when its launcher is killed: nobody would collect its result."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _enough_gpus(processes: int) -> bool:
    """Whether each process can have a GPU of its own, or needs none: two cannot share one."""
    if processes == 1:
        return True
    import torch

    return torch.cuda.device_count() >= processes


def _stop(running: list[_Running], screen: _Screen) -> None:
    """Ask every stage to save and end, until it has: one that is still starting forgets what was asked before."""
    asked_at = 0.0
    while running:
        if time.monotonic() - asked_at > ASK_AGAIN_SECONDS:
            asked_at = time.monotonic()
            for item in running:
                item.stop()
        time.sleep(POLL_SECONDS)
        for item in list(running):
            screen.show(item)
            if (code := item.code()) is not None:
                running.remove(item)
                screen.close(item, code)


def _fail(job: Job, code: int, logs: Path) -> None:
    log = logs / f"{job.name}.log"
    if code == runs.EXIT_REQUEUE:
        raise runs.Stopped(f"stopped in stage {job.name}, everything is saved: run the same command again to go on")
    tail = "\n".join("    " + line for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    how = "was killed, as by a system that has no memory left" if code == -signal.SIGKILL else f"ended with code {code}"
    told = faults.first(job.out)
    message = f"stage {job.name} {how}{f'; the first error, {told}' if told else ''}; the end of {log}:\n{tail}"
    raise ValueError(message) if code == runs.EXIT_USER else runs.Crashed(message)


@contextmanager
def _noting_signals() -> Iterator[threading.Event]:
    """Set the yielded flag on SIGTERM and SIGINT; the stages themselves do not see Ctrl-C."""
    asked = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and asked.is_set():
            raise KeyboardInterrupt  # a second Ctrl-C does not wait; the stages save when their launcher is gone
        asked.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Screen:
    """A bar per running stage on a terminal; elsewhere one line every 15 seconds."""

    def __init__(self) -> None:
        self._bars: Any = progress_bars() if sys.stderr.isatty() else None
        self._tasks: dict[str, Any] = {}
        self._first: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> _Screen:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, item: _Running) -> None:
        name, now = item.job.name, time.monotonic()
        state = storage.read_json(item.progress) if item.progress.is_file() else None
        if self._bars is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, total=None, note="")
            if state:
                wanted = {key: state[key] for key in ("completed", "total", "note")}
                self._bars.update(self._tasks[name], description=f"{name}: {state['name']}", **wanted)
        if state and name not in self._first:
            self._first[name] = (now, state["completed"])
        if self._bars is None and state and now - self._said.setdefault(name, now) >= 15:
            self._said[name] = now
            began, completed = self._first[name]
            left = (state["total"] - state["completed"]) * (now - began) / max(state["completed"] - completed, 1)
            progress = f"{state['completed']}/{state['total']} {state['note']}"
            print(f"  {name:<20} {state['name']} {progress}, about {left:.0f} s left", flush=True)

    def close(self, item: _Running, code: int) -> None:
        item.progress.unlink(missing_ok=True)
        shutil.rmtree(item.codes, ignore_errors=True)
        if self._bars is not None and item.job.name in self._tasks:
            self._bars.remove_task(self._tasks.pop(item.job.name))
        how = "done" if code == runs.EXIT_DONE else f"ended with code {code}"
        line = f"  {item.job.name:<20} {how} in {time.monotonic() - item.started:.0f} s"
        if self._bars is not None:
            self._bars.console.print(line, highlight=False)
        else:
            print(line, flush=True)
