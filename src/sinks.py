"""Where metrics go besides ``metrics.jsonl``: dashboards, which may fail in every way without training noticing.

Each sink has a bounded queue and a thread of its own. A row that finds the queue full is left out of that sink; a sink
that raises is left alone from there on; one that hangs is waited for a bounded time at the end, and then left.
"""

from __future__ import annotations

import contextlib
import fnmatch
import importlib.util
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from llamita import redaction

log = logging.getLogger(__name__)

QUEUE_ROWS = 4096
"""Rows that may wait for a sink; a row of a training step has about 2 kB."""
CLOSE_SECONDS = 10.0
"""How long the end of a run waits for all sinks together; torchrun kills 30 s after a signal."""
TENSORBOARD = "tensorboard"
"""The folder of the event files in a run directory."""

SENT_SETTINGS = (
    "recipe",
    "steps",
    "run.seed",
    "global_batch_rows",
    "micro_batch_rows",
    "sequence_length",
    "overlong",
    "epochs",
    "precision",
    "attention",
    "activation_checkpointing",
    "compile",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "validation_every",
    "validation_rows",
    "peak_tflops",
    "samples_per_token",
    "optim.*",
    "loss.divergence",
    "loss.temperature",
    "loss.jsd_beta",
    "loss.skew",
    "loss.*_weight",
    "loss.hidden.weight",
    "student.init",
    "student.shape.*",
    "student.lora.rank",
    "student.lora.alpha",
    "student.lora.dropout",
    "student.lora.embeddings",
    "lora.rank",
    "lora.alpha",
    "lora.dropout",
    "lora.embeddings",
    "teachers.*.weight*",
    "deepspeed.stage",
    "target.num_*",
    "target.*_size",
    "target.head_dim",
    "target.tie_word_embeddings",
    "target.output_rows",
    "target.rope",
    "scores.mlp",
    "scores.attention",
    "scores.hidden",
    "scores.layers",
)
"""Patterns of the settings that may leave the machine; whatever is not listed stays, and so does every path."""


def sent(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may leave the machine, by dotted name: listed ones that are numbers, truths or plain words."""
    return {name: value for name, value in redaction.flat(settings) if _is_sent(name) and _is_plain(value)}


def _is_sent(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in SENT_SETTINGS)


def _is_plain(value: Any) -> bool:
    """Whether a value says nothing about places or people: a number, or one word such as an enumeration has."""
    if isinstance(value, str):
        return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,31}", value) is not None
    return isinstance(value, bool | int | float)


@dataclass(frozen=True)
class Row:
    """One line of metrics, with when it was written, in seconds since 1970."""

    step: int
    time: float
    metrics: Mapping[str, float | int | str]


class Sink(Protocol):
    """Takes rows in the order in which they were written; every method may raise, hang or be slow."""

    def open(self) -> None:
        """Begin; called in the sink's own thread."""
        ...

    def write(self, row: Row) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...

    def abandon(self) -> None:
        """End at once whatever it has started outside this process; called when it failed or did not end in time."""
        ...


class Feed:
    """One sink with its queue and its thread; nothing here blocks or raises, but :meth:`close`, which waits."""

    def __init__(self, name: str, sink: Sink, *, rows: int = QUEUE_ROWS) -> None:
        self.name = name
        self._sink = sink
        self._queue: queue.Queue[Row | None] = queue.Queue(maxsize=rows)
        self._ending = threading.Event()
        self._failed = threading.Event()
        self._missed = 0
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        """Hand a row over, or leave it out where the sink is too far behind."""
        if self._failed.is_set():
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._missed += 1
            if self._missed == 1:
                log.warning("%s does not keep up and misses rows; metrics.jsonl has everything", self.name)

    def ask_to_end(self) -> None:
        """Let the thread end after what it has been given."""
        self._ending.set()
        with contextlib.suppress(queue.Full):  # then it is awake, and sees the flag after its last row
            self._queue.put_nowait(None)

    def close(self, deadline: float) -> None:
        """Wait until ``deadline`` (of ``time.monotonic``) for the sink to end, and leave it alone after that."""
        self.ask_to_end()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._failed.set()
            log.warning("%s did not end in time and is left alone; metrics.jsonl has everything", self.name)
            with contextlib.suppress(Exception):
                self._sink.abandon()

    def _work(self) -> None:
        try:
            self._sink.open()
            while (row := self._next()) is not None:
                self._sink.write(row)
            self._sink.close()
        # Also what is no Exception, such as SystemExit of a library: it ends this thread and nothing else.
        except BaseException as error:
            if not self._failed.is_set():
                self._failed.set()
                what = f"{type(error).__name__}: {error}".rstrip(": ")
                log.warning("%s failed and is left alone; metrics.jsonl has everything: %s", self.name, what)
                with contextlib.suppress(BaseException):
                    self._sink.abandon()

    def _next(self) -> Row | None:
        """The next row; ``None`` once the end was asked for and nothing waits."""
        while not self._failed.is_set() and not (self._ending.is_set() and self._queue.empty()):
            with contextlib.suppress(queue.Empty):
                if (row := self._queue.get(timeout=1.0)) is not None:
                    return row
        return None


class Sinks:
    """All sinks of one run; empty where it has none."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._feeds = [Feed(name, sink) for name, sink in sinks.items()]

    def write(self, metrics: Mapping[str, float | int | str], *, step: int, at: float) -> None:
        """Hand a row to every sink; returns at once and never raises."""
        if self._feeds:
            row = Row(step, at, dict(metrics))
            for feed in self._feeds:
                feed.put(row)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """End all sinks; waits so long for all of them together."""
        deadline = time.monotonic() + seconds
        for feed in self._feeds:
            feed.ask_to_end()
        for feed in self._feeds:
            feed.close(deadline)
        self._feeds = []


class TensorBoard:
    """Event files in a run directory; each start writes its own, and takes back the steps that it repeats.

    The folder is a local or a shared one: the files are only appended to.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def open(self) -> None:
        """Import what is needed; the file begins with the first row."""
        import tensorboard.summary.writer.event_file_writer  # noqa: F401

    def write(self, row: Row) -> None:
        """Add the numbers of a row as one event."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        if self._writer is None:
            self._begin(row)
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in row.metrics.items()
            if isinstance(value, int | float)
        ]
        if values:
            summary = summary_pb2.Summary(value=values)
            self._writer.add_event(event_pb2.Event(wall_time=row.time, step=row.step, summary=summary))

    def _begin(self, row: Row) -> None:
        """Begin a file; what earlier starts wrote of this step and later ones is forgotten, as in metrics.jsonl."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        again = any(self._folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(self._folder), flush_secs=10)
        if again:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(wall_time=row.time, step=row.step, session_log=start))

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer is not None:
            self._writer.close()

    def abandon(self) -> None:
        """Nothing runs outside this process."""


def check_tensorboard() -> None:
    """Raise ``ValueError`` where TensorBoard's package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError("run.tensorboard=true needs the package tensorboard: pip install 'llamita[watch]'")


class Wandb:
    """One run of wandb over all restarts; online where a key is found and ``offline`` is not asked for."""

    def __init__(self, folder: Path, *, project: str, run_id: str, settings: Mapping[str, Any], offline: bool) -> None:
        self._folder, self._project, self._id = folder, project, run_id
        self._settings = sent(settings)
        self._offline = offline
        self._run: Any = None
        self._step = 0

    def open(self) -> None:
        """Start or go on with the run."""
        import wandb

        server = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        has_key = bool(os.environ.get("WANDB_API_KEY")) or _netrc_has(server)
        told_not_to = os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun")
        online = has_key and not told_not_to and not self._offline
        self._run = wandb.init(
            project=self._project,
            id=self._id,
            name=self._folder.name,
            dir=self._folder,
            config=self._settings,
            resume="allow" if online else None,
            mode="online" if online else "offline",
            # Neither the command line, nor the program, nor whose machine it is, leaves it.
            settings=wandb.Settings(
                silent=True,
                disable_git=True,
                disable_code=True,
                save_code=False,
                console="off",
                host="-",
                username="-",
                email="-",
                program="-",
                program_relpath="-",
                x_save_requirements=False,
                x_disable_meta=True,
                x_disable_machine_info=True,
            ),
        )

    def write(self, row: Row) -> None:
        """Add a row; wandb leaves out what is below the newest step, so such a row goes to that."""
        self._step = max(self._step, row.step)
        kept = {name: value for name, value in row.metrics.items() if _is_plain(value)}
        self._run.log(kept, step=self._step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()

    def abandon(self) -> None:
        """End wandb's own process: at the end of this one, wandb would wait for it."""
        import psutil

        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if "wandb" in child.name():
                    child.kill()
        forget = threading.Thread(target=self._forget, daemon=True)
        forget.start()
        forget.join(2.0)

    @staticmethod
    def _forget() -> None:
        """Drop wandb's own work at the end of the process, which would fail and say so at length."""
        import wandb

        with contextlib.suppress(BaseException):
            wandb.teardown()


def _netrc_has(host: str) -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
