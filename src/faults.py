"""Faults have names: the first error in one file, out of memory with a setting to change, hung processes that end.

And the points at which a test may let a process die.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from llamita import locks, redaction

FILE = "ERROR.json"
EXIT_HUNG = 1
"""A crash: the job may be started again while it makes progress."""
GRACE_SECONDS = 5.0
"""How long a process that hangs waits for others that hang to say how far they came."""
LAST_RESORT_SECONDS = 60.0
"""After the watchdog's own time: one that needs no interpreter, for a process that hangs inside a library."""

_PHASE = "phase: "
_HUNG = "hung-"
_NO_MEMORY = re.compile(r"DefaultCPUAllocator: can't allocate memory|not enough memory|CUDA out of memory|OutOfMemory")
_PEER = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|NCCL|Timed out waiting|remote process (exited|has terminated)"
    r"|DistBackendError|ProcessGroup|connectFullMesh",
    re.IGNORECASE,
)


def rank() -> int:
    """This process's number in its launch."""
    return int(os.environ.get("RANK", "0"))


def log_file(folder: Path) -> Path:
    """The log of this process in a run directory."""
    return folder / "logs" / f"rank-{rank():05d}.log"


@contextmanager
def phase(name: str, *, memory: str) -> Iterator[None]:
    """What a run does; ``memory`` names the settings that lower what it needs.

    Raises:
        ValueError: there was not enough memory; with the phase and the settings.
    """
    try:
        yield
    except Exception as error:
        if phase_of(error) is None:
            error.add_note(_PHASE + name)
        if not is_out_of_memory(error):
            raise
        told = ValueError(
            f"out of memory in {name} on rank {rank()} of {socket.gethostname()}{_held()}; to need less: {memory}. "
            "What was saved is whole: the same command with such a setting goes on where it may be changed, "
            "and says so where it may not"
        )
        told.add_note(_PHASE + name)
        raise told from error


def phase_of(error: BaseException) -> str | None:
    """The innermost phase that an error came in."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_PHASE)]
    return notes[0].removeprefix(_PHASE) if notes else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(f"{type(error).__name__}: {error}"))


def _held() -> str:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    # Not of the current device: what only moves tensors to its device, as pruning does, never sets that.
    held, device = max((torch.cuda.max_memory_reserved(index), -index) for index in range(torch.cuda.device_count()))
    total = torch.cuda.get_device_properties(-device).total_memory
    return f", where this process held {held / 2**30:.1f} of {total / 2**30:.1f} GiB"


def launch_id() -> str:
    """The same for all processes of one launch, and another one for the next."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run if run != "none" else f"{socket.gethostname()}:{os.getppid()}"


def record(folder: Path, error: BaseException, *, stack: str | None = None) -> None:
    """Leave in ``ERROR.json`` what ended this process, unless another process of this launch has failed before it."""
    message = redaction.redacted(str(error))
    entry: dict[str, Any] = {
        "rank": rank(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "launch": launch_id(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "phase": phase_of(error),
        "type": type(error).__name__,
        "message": message,
        "traceback": redaction.redacted(stack or "".join(traceback.format_exception(error))).splitlines()[-60:],
    }
    if _PEER.search(f"{type(error).__name__}: {message}"):
        entry["hint"] = (
            "another process of the run was gone: of one that was killed (by the kernel for memory, say) nothing else "
            "can be told here; look for the rank whose log ends without an error"
        )
    with contextlib.suppress(OSError):  # the disk may be what failed
        locks.create(folder / FILE, json.dumps(entry, indent=2) + "\n")


def first(folder: Path) -> str | None:
    """The first error of the last start in a line, where it left one: a launcher of many processes tells its own."""
    try:
        told = json.loads((folder / FILE).read_text(encoding="utf-8"))
        phase = f" in {told['phase']}" if told["phase"] else ""
        return f"rank {told['rank']} on {told['host']}{phase}: {told['type']}: {told['message']}"
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(folder: Path) -> None:
    """Remove what an earlier launch left in ``ERROR.json``; what a faster process of this one wrote stays."""
    for hung in (folder / "control").glob(f"{_HUNG}*"):
        hung.unlink(missing_ok=True)
    file = folder / FILE
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError:
        told = None
    if not isinstance(told, dict) or told.get("launch") != launch_id():
        file.unlink(missing_ok=True)


class Watchdog:
    """Ends this process when :meth:`beat` was not called for ``seconds``, after writing down what every thread does.

    A run of many processes otherwise waits for its one hung process until somebody looks. A thread watches; should
    the process hang where no Python runs, a timer of the interpreter ends it ``LAST_RESORT_SECONDS`` later.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        """Nothing is watched before :meth:`__enter__`; never when ``seconds`` is 0."""
        self.folder = folder
        self.seconds = seconds
        self._last = time.monotonic()
        self._beats = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        self._log: Any = None

    def __enter__(self) -> Self:
        if self.seconds and self._thread is None:
            log_file(self.folder).parent.mkdir(parents=True, exist_ok=True)
            self._log = log_file(self.folder).open("a")
            self._done.clear()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()
            self._log.close()

    def beat(self) -> None:
        """Say that the run goes on."""
        self._beats += 1
        self._last = time.monotonic()
        if self._thread is not None:
            faulthandler.dump_traceback_later(self.seconds + LAST_RESORT_SECONDS, exit=True, file=self._log)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            if (silent := time.monotonic() - self._last) > self.seconds:
                self._end(silent)

    def _end(self, silent: float) -> None:
        text = f"rank {rank()} made no progress for {silent:.0f} s; run.hang_seconds={self.seconds:g} ends it"
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
        for file in (self._log, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                print(f"{text}; what each thread did:", file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
        if self._is_furthest_behind():
            record(self.folder, TimeoutError(text), stack=stack)
        os._exit(EXIT_HUNG)

    def _is_furthest_behind(self) -> bool:
        """Whether, of all processes that hang now, this one has come least far: the others wait for it."""
        folder = self.folder / "control"
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
            (folder / f"{_HUNG}{rank()}").write_text(str(self._beats))
        time.sleep(GRACE_SECONDS)
        others: list[tuple[int, int]] = []
        for file in folder.glob(f"{_HUNG}*"):
            with contextlib.suppress(OSError, ValueError):
                others.append((int(file.read_text()), int(file.name.removeprefix(_HUNG))))
        return min(others, default=(0, rank()))[1] == rank()


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
    "after_removal": "a greedy pass has decided which layer leaves next, and its losses are saved; there are no scores",
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
    occurrence, _, dying = rest.partition(":")
    if name != target or (dying and int(dying) != rank()):
        return
    _crash_counts[name] = _crash_counts.get(name, 0) + 1
    if _crash_counts[name] == int(occurrence or 1):
        os.kill(os.getpid(), signal.SIGKILL)


_crash_counts: dict[str, int] = {}
