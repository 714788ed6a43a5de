"""A stage's directory: one owner, its settings, its seeds, its log and metrics, how it stops, and how it is finished.

A run directory holds ``config.yaml`` (resolved settings), ``run.json`` (its identity, kept over restarts),
``metrics.jsonl`` (append-only, the source of truth for every dashboard), ``logs/`` and, last of all, ``DONE.json``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import random
import re
import secrets
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llamita import directories, faults, locks, redaction, sinks, stops, storage
from llamita.metrics import mend_metrics

log = logging.getLogger(__name__)
T = TypeVar("T")

EXIT_DONE = 0
EXIT_CRASH = 1
EXIT_USER = 64
"""The user's or the data's error: never requeue."""
EXIT_NODE = 70
"""A bad node: requeue elsewhere."""
EXIT_REQUEUE = 75
"""Everything is saved and the run wants to go on."""

COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""Rank 0 alone hashes models and publishes; the others wait for it."""
WAIT_SECONDS = 0.2
"""Between two looks at a directory that another process owns."""
LEAVE_SECONDS = 30.0
"""How long a later rank waits at its end for rank 0 to leave first."""


class Stopped(Exception):  # noqa: N818  (not an error)
    """The run was asked to stop, has saved its state, and wants to be started again (exit code 75)."""


class Crashed(RuntimeError):  # noqa: N818
    """A process that this one started crashed, and its own words are in the message."""


class BadNode(RuntimeError):  # noqa: N818
    """A node failed the checks before the start (exit code 70): start again, without it where it is known."""

    def __init__(self, message: str, *, here: bool) -> None:
        super().__init__(message)
        self.here = here
        """Whether it is this process's node."""


MAY_CHANGE = ("wandb", "project", "tensorboard", "hang_seconds", "min_allreduce_gb_per_s")
"""Settings of ``run`` that a restart may change: all but the seed."""


class WandbMode(StrEnum):
    """Where the metrics go besides ``metrics.jsonl``."""

    off = "off"
    auto = "auto"
    """Online where a key is found, else files for ``wandb sync``."""
    offline = "offline"


@dataclass(kw_only=True)
class RunConfig:
    """What every recipe can be told about its run."""

    seed: int = 0
    wandb: WandbMode = WandbMode.off
    project: str = "llamita"
    """The wandb project."""
    hang_seconds: float = 1800.0
    """A process that trains or captures and makes no progress for so long ends itself with its stacks; 0: never."""
    tensorboard: bool = False
    """Event files in the run directory's ``tensorboard/`` too; needs the extra ``watch``."""
    min_allreduce_gb_per_s: float | None = None
    """The least bus bandwidth of an all-reduce, in 10^9 bytes per second, with which processes that train or capture
    start; unset: it is not measured."""

    def __post_init__(self) -> None:
        if self.tensorboard:
            sinks.check_tensorboard()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"run.seed must be in 0..{2**32 - 1}, got {self.seed}")
        if not 0 <= self.hang_seconds < math.inf:
            raise ValueError(f"run.hang_seconds must be >= 0 and finite, got {self.hang_seconds}")
        if self.min_allreduce_gb_per_s is not None and not 0 < self.min_allreduce_gb_per_s < math.inf:
            raise ValueError(
                f"run.min_allreduce_gb_per_s must be > 0 and finite, or unset, got {self.min_allreduce_gb_per_s}"
            )


def names(mapping: Mapping[str, str]) -> list[str]:
    """Names, by the setting they stand in, that would not be safe as part of a path, a job or a metric."""
    return [
        f"{setting}: a name has 1 to 64 letters, digits, '.', '_' or '-', got {name!r}"
        for setting, name in mapping.items()
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name in (".", "..")
    ]


def read_done(path: Path) -> dict[str, Any]:
    """What ``DONE.json`` says; ``ValueError`` when it is not one that a run wrote."""
    done = storage.read_mapping(path / "DONE.json")
    if not isinstance(done.get("files"), dict):
        raise ValueError(f"{path / 'DONE.json'} lists no files: no run wrote it")
    return done


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def is_main_process() -> bool:
    """Whether this process is rank 0 of the launch, before any process group exists."""
    return faults.rank() == 0


def check_done(path: Path) -> dict[str, Any]:
    """The ``DONE.json`` of a finished directory.

    Raises:
        ValueError: there is none, or a file it lists is missing or has another size.
    """
    marker = path / "DONE.json"
    if not marker.is_file():
        raise ValueError(f"{path} is not a finished directory: it has no DONE.json")
    done = read_done(path)
    for name, entry in done["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["bytes"]:
            raise ValueError(f"{file} has {size} bytes, {marker} says {entry['bytes']}: the directory was changed")
    return done


class Run:
    """A stage at work in its directory. Make it with :func:`start`."""

    def __init__(self, path: Path, recipe: str, settings: Mapping[str, Any], config: RunConfig) -> None:
        self.path = path
        self.recipe = recipe
        self.settings = dict(settings)
        self.config = config
        self.stop = stops.StopSignal(path)
        self.watchdog = faults.Watchdog(path, config.hang_seconds)
        self.identity: dict[str, Any] = {}
        self.done = False
        """Whether the directory already holds the finished result of these very settings."""
        self._lock = locks.Lock(path)
        self._metrics = path / "metrics.jsonl"
        self._sinks = sinks.Sinks({})

    def log(self, metrics: Mapping[str, float | int | str], *, step: int = 0) -> None:
        """Append one line of metrics; on rank 0 only.

        Raises:
            RuntimeError: the directory is not this run's any more.
        """
        if not is_main_process():
            return
        self._lock.check()
        row = {"step": step, "time": time.time(), "restart": self.identity["restarts"], **metrics}
        line = json.dumps(row) + "\n"
        try:
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._metrics)) from error
        self._sinks.write(metrics, step=step, at=row["time"])

    def until_stopped(self, items: Iterable[T]) -> Iterator[T]:
        """Give the items; for stages that are short enough to be done again.

        Raises:
            Stopped: the run was asked to stop.
        """
        for item in items:
            if self.stop.is_set():
                raise Stopped(f"stopped in {self.path}: run the same command again, which begins this stage anew")
            yield item

    def finish(
        self,
        files: Collection[str],
        *,
        parents: Mapping[str, str] | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Publish: sync ``files`` (names below the run directory) and write ``DONE.json`` last.

        ``parents`` maps names of directories that this stage read to their content hashes.
        """
        if not is_main_process():
            return
        self._lock.check()
        for name in files:
            storage.fsync(self.path / name)
        if self._metrics.is_file():
            storage.fsync(self._metrics)
        storage.fsync(self.path)
        done = {
            "recipe": self.recipe,
            "settings": self.settings,
            "parents": dict(parents or {}),
            "summary": dict(summary or {}),
            "files": storage.sha256_of_files(self.path, sorted(files)),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        faults.crash_point("before_done")
        self._lock.check()  # again: hashing takes minutes, and one that was suspended in it is not the owner any more
        storage.write_json(self.path / "DONE.json", done)
        faults.crash_point("after_done")

    def _open_sinks(self) -> None:
        if not is_main_process():
            return
        wanted: dict[str, sinks.Sink] = {}
        if self.config.wandb is not WandbMode.off:
            wanted["wandb"] = sinks.Wandb(
                self.path,
                project=self.config.project,
                run_id=self.identity["id"],
                settings={"recipe": self.recipe, **self.settings},
                offline=self.config.wandb is WandbMode.offline,
            )
        if self.config.tensorboard:
            wanted["tensorboard"] = sinks.TensorBoard(self.path / sinks.TENSORBOARD)
        self._sinks = sinks.Sinks(wanted)


@contextmanager
def start(
    path: Path, recipe: str, settings: Mapping[str, Any], config: RunConfig, *, may_change: Collection[str] = ()
) -> Iterator[Run]:
    """Own ``path`` for the time of one stage; on leaving, give it up.

    The yielded run has ``done=True`` when the directory already holds the finished result of the same settings: the
    recipe returns at once. An unfinished directory of the same settings is gone on with. ``may_change`` names dotted
    settings that may differ on a restart.

    Raises:
        ValueError: another live run owns the directory, or it holds the work of other settings.
    """
    run = Run(path, recipe, storage.plain(settings), config)
    main = is_main_process()
    lock = run._lock
    if wrong := names({"the last part of out": path.absolute().name, "run.project": config.project}):
        raise ValueError("\n".join(wrong))
    directories.refuse_foreign(path)
    if main:
        path.mkdir(parents=True, exist_ok=True)
        storage.fsync(path.parent)
        lock.acquire()
    fresh = not (path / "config.yaml").is_file()
    try:
        directories.check_settings(path, recipe, run.settings, may_change=_changeable(may_change))
        run.done = (path / "DONE.json").is_file()
        if run.done:
            check_done(path)
            log.info("%s is finished already", path)
            yield run
            return
        _prepare_directory(run, main)
        handler = _log_to_file(path)
        run.stop.install()
        seed_everything(config.seed)
        run._open_sinks()
        try:
            yield run
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, Stopped):
                # The screen may show the message only.
                print(redaction.redacted(traceback.format_exc()), file=handler.stream)
                faults.record(path, error)
            raise
        finally:
            run._sinks.close()  # before a signal could end this process again
            run.stop.restore()
            logging.getLogger().removeHandler(handler)
            handler.close()
    except (ValueError, OSError):
        if main and fresh:
            directories.forget(path)
        raise
    finally:
        lock.release()
        if main and path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        if not main:
            _wait_for_main_process(path)


@contextmanager
def start_when_free(
    path: Path, recipe: str, settings: Mapping[str, Any], config: RunConfig, *, may_change: Collection[str] = ()
) -> Iterator[Run]:
    """As :func:`start`, for a directory that several processes share in turns: waits while another one owns it.

    For as long as that lives: one that finishes what they share may take hours for it.

    Raises:
        Stopped: the run was asked to stop while it waited.
    """
    stop = stops.StopSignal(path)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                run = stack.enter_context(start(path, recipe, settings, config, may_change=may_change))
                break
            except locks.Owned as error:
                if stop.is_set():
                    raise Stopped(f"stopped while {path} had another owner; start it again to go on") from error
                time.sleep(WAIT_SECONDS)
        yield run


def _wait_for_main_process(path: Path) -> None:
    """Leave after rank 0: torchrun ends the others as soon as one process has failed, or asked for another start."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while (path / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def check_out(path: Path, recipe: str, settings: Mapping[str, Any], *, may_change: Collection[str] = ()) -> None:
    """Raise the ``ValueError`` that :func:`start` would raise for this directory; nothing is changed."""
    directories.refuse_foreign(path)
    directories.check_settings(path, recipe, storage.plain(settings), may_change=_changeable(may_change))
    locks.Lock(path).dead_owner()


def _changeable(settings: Collection[str]) -> set[str]:
    """What may differ on a restart of any recipe, and the settings of this one."""
    return {"out", *(f"run.{name}" for name in MAY_CHANGE), *settings}


def _prepare_directory(run: Run, main: bool) -> None:
    identity = run.path / "run.json"
    if not main:
        run.identity = {"restarts": 0}
        return
    if identity.is_file():
        run.identity = storage.read_json(identity)
        run.identity["restarts"] += 1
    else:
        run.identity = {"id": secrets.token_hex(6), "restarts": 0, "created": time.time()}
    for half_written in run.path.glob(".*.tmp"):
        half_written.unlink(missing_ok=True)
    # First of all: a directory without it is not known as a run's.
    text = yaml.safe_dump({"recipe": run.recipe, "settings": run.settings}, sort_keys=False)
    storage.write_atomically(run.path / "config.yaml", text)
    storage.write_json(identity, run.identity)
    run.stop.forget_earlier()
    faults.forget(run.path)
    mend_metrics(run.path / "metrics.jsonl")


def _log_to_file(path: Path) -> logging.FileHandler:
    file = faults.log_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)  # a later rank may be here before rank 0
    handler = logging.FileHandler(file)
    form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(redaction.Formatter(form))
    logging.getLogger().addHandler(handler)
    return handler
