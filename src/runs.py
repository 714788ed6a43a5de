"""A stage's directory: one owner, its settings, its seeds, its log and metrics, how it stops, and how it is finished.

A run directory holds ``config.yaml`` (resolved settings), ``run.json`` (its identity, kept over restarts),
``metrics.jsonl`` (append-only, the source of truth for every dashboard), ``logs/`` and, last of all, ``DONE.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import random
import re
import secrets
import signal
import time
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llamita import directories, faults, locks, sinks, stops
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


def plain(value: Any) -> Any:
    """Settings as mappings, lists and scalars: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def names(mapping: Mapping[str, str]) -> list[str]:
    """Names, by the setting they stand in, that would not be safe as part of a path, a job or a metric."""
    return [
        f"{setting}: a name has 1 to 64 letters, digits, '.', '_' or '-', got {name!r}"
        for setting, name in mapping.items()
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name in (".", "..")
    ]


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(root: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each named file below ``root``; reads several files at a time."""
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: sha256(root / name), names)
        return {
            name: {"bytes": (root / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }


def fsync(path: Path) -> None:
    """Force a file or a directory entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` so that a reader, or a crash at any moment, sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        crash_point("mid_write")
        temporary.replace(path)
    except OSError as error:  # of a full disk, which names no file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Atomically write ``value`` as indented JSON."""
    write_atomically(path, json.dumps(plain(value), indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; ``ValueError`` names the file when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; ``ValueError`` names the file when it is damaged or holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(value).__name__}")
    return value


def read_done(path: Path) -> dict[str, Any]:
    """What ``DONE.json`` says; ``ValueError`` when it is not one that a run wrote."""
    done = read_mapping(path / "DONE.json")
    if not isinstance(done.get("files"), dict):
        raise ValueError(f"{path / 'DONE.json'} lists no files: no run wrote it")
    return done


CRASH_POINTS = {
    "mid_write": "a small file is whole and synced under a temporary name, not yet under its own",
    "before_tmp": "a folder is to be published: nothing is there",
    "mid_checkpoint": "a rank has written weights, and no moments",
    "after_shards": "every file of a folder is written; they are not synced, and there is no manifest",
    "before_manifest": "the files are synced; there is no manifest",
    "before_rename": "everything is synced under a temporary name",
    "mid_rename": "some of the files of a model or of data have their names, others do not",
    "after_rename": "the folder has its name",
    "before_pointer": "a checkpoint is published; LATEST names the one before",
    "during_purge": "a superseded checkpoint lost its name and is not deleted yet",
    "before_done": "a result is published; there is no DONE.json",
    "after_done": "DONE.json is there; what is to be tidied up is not",
    "after_model_shard": "one file of a model is written",
    "after_shard": "one file of packed data is written",
    "mid_shard": "the entries of a cache's shard are written; its index is not",
    "after_scores": "the scores of a model are saved; nothing is cut",
    "after_choice": "the candidates of a search are chosen; none is measured",
    "after_candidate": "one candidate of a search is measured",
    "after_counts": "the tokens of a corpus are counted; no vocabulary is chosen",
}
"""Where a fault-injection test may let a process die, and what is on disk there."""


def crash_point(name: str) -> None:
    """Die here, as if the power had gone, when ``LLAMITA_CRASH_AT=name[:occurrence[:rank]]`` says so.

    Fault-injection tests set it; nothing else does.

    Raises:
        ValueError: it names a point that there is not.
    """
    wanted = os.environ.get("LLAMITA_CRASH_AT")
    if wanted is None:
        return
    target, _, rest = wanted.partition(":")
    if target not in CRASH_POINTS:
        raise ValueError(f"LLAMITA_CRASH_AT must name one of {', '.join(CRASH_POINTS)}, got {target!r}")
    occurrence, _, rank = rest.partition(":")
    if name != target or (rank and int(rank) != faults.rank()):
        return
    _crash_counts[name] = _crash_counts.get(name, 0) + 1
    if _crash_counts[name] == int(occurrence or 1):
        os.kill(os.getpid(), signal.SIGKILL)


_crash_counts: dict[str, int] = {}


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
            fsync(self.path / name)
        if self._metrics.is_file():
            fsync(self._metrics)
        fsync(self.path)
        done = {
            "recipe": self.recipe,
            "settings": self.settings,
            "parents": dict(parents or {}),
            "summary": dict(summary or {}),
            "files": sha256_of_files(self.path, sorted(files)),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        crash_point("before_done")
        write_json(self.path / "DONE.json", done)
        crash_point("after_done")

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
    run = Run(path, recipe, plain(settings), config)
    main = is_main_process()
    lock = run._lock
    if wrong := names({"the last part of out": path.absolute().name, "run.project": config.project}):
        raise ValueError("\n".join(wrong))
    directories.refuse_foreign(path)
    if main:
        path.mkdir(parents=True, exist_ok=True)
        fsync(path.parent)
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
                traceback.print_exc(file=handler.stream)  # the screen may show the message only
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
    path: Path,
    recipe: str,
    settings: Mapping[str, Any],
    config: RunConfig,
    *,
    may_change: Collection[str] = (),
    seconds: float,
) -> Iterator[Run]:
    """As :func:`start`, for a directory that several processes share in turns: waits while another one owns it."""
    deadline = time.monotonic() + seconds
    with contextlib.ExitStack() as stack:
        while True:
            try:
                run = stack.enter_context(start(path, recipe, settings, config, may_change=may_change))
                break
            except locks.Owned as error:
                if seconds == 0:
                    raise
                if time.monotonic() > deadline:
                    raise TimeoutError(f"waited {seconds:.0f} s in vain: {error}") from error
                time.sleep(0.2)
        yield run


def _wait_for_main_process(path: Path) -> None:
    """Leave after rank 0: torchrun ends the others as soon as one process has failed, or asked for another start."""
    deadline = time.monotonic() + LEAVE_SECONDS
    while (path / ".lock").exists() and time.monotonic() < deadline:
        time.sleep(0.1)


def check_out(path: Path, recipe: str, settings: Mapping[str, Any], *, may_change: Collection[str] = ()) -> None:
    """Raise the ``ValueError`` that :func:`start` would raise for this directory; nothing is changed."""
    directories.refuse_foreign(path)
    directories.check_settings(path, recipe, plain(settings), may_change=_changeable(may_change))
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
        run.identity = read_json(identity)
        run.identity["restarts"] += 1
    else:
        run.identity = {"id": secrets.token_hex(6), "restarts": 0, "created": time.time()}
    for half_written in run.path.glob(".*.tmp"):
        half_written.unlink(missing_ok=True)
    # First of all: a directory without it is not known as a run's.
    text = yaml.safe_dump({"recipe": run.recipe, "settings": run.settings}, sort_keys=False)
    write_atomically(run.path / "config.yaml", text)
    write_json(identity, run.identity)
    run.stop.forget_earlier()
    faults.forget(run.path)
    mend_metrics(run.path / "metrics.jsonl")


def _log_to_file(path: Path) -> logging.FileHandler:
    file = faults.log_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)  # a later rank may be here before rank 0
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    return handler
