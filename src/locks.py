"""One process at a time owns a directory, on one machine, on many, and in containers."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30.0
POLL_SECONDS = 1.0
STALE_SECONDS = 300.0
"""A lock of another host that was not touched for this long is taken over."""


class Owned(ValueError):  # noqa: N818
    """Another live process owns the directory; whoever shares it with others may wait."""


class Lock:
    """One process at a time owns a run directory.

    The lock file names host, process and Slurm job. A lock whose process is dead on this host, that belongs to an
    earlier start of this same Slurm job, or that was not touched for ``STALE_SECONDS`` is taken over.
    """

    def __init__(self, path: Path) -> None:
        self._file = path / ".lock"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._text = ""
        self._lost = False

    def acquire(self) -> None:
        """Own the directory.

        Raises:
            Owned: another live run owns it.
        """
        self._text = json.dumps(self._mine())
        for _ in range(3):
            try:
                create(self._file, self._text)
            except FileExistsError:
                try:
                    owner = self.dead_owner()
                except Owned:
                    if not self._is_of_a_silent_job():
                        raise
                else:
                    if owner is not None:
                        self._take_over(owner)
                continue
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
            return
        raise Owned(f"out={self._file.parent} is being taken by another run; choose another out")

    def _is_of_a_silent_job(self) -> bool:
        """Whether another Slurm job that owns the directory leaves it, or gives no sign of life for long enough.

        Its processes cannot be seen from another node. One that was killed leaves its lock, and the job that is
        submitted in its place starts within seconds: refused as a user's error, it would take all jobs that wait for
        it along.
        """
        mine, owner = self._mine(), _owner_in(self._file)
        if mine["job"] is None or owner.get("job") in (None, mine["job"]) or _same_host(owner, mine):
            return False
        log.warning("%s has the lock of job %s; waiting for a sign of life", self._file.parent, owner["job"])
        try:
            last = self._file.stat().st_mtime
            while time.time() - last <= STALE_SECONDS:
                time.sleep(POLL_SECONDS)
                if self._file.stat().st_mtime != last:
                    return False
        except FileNotFoundError:
            pass
        return True

    def _take_over(self, owner: Mapping[str, Any]) -> None:
        """Remove a dead owner's lock. Of several that try, one wins the rename; a lock made meanwhile is put back."""
        grave = self._file.with_name(f".lock-{secrets.token_hex(4)}")
        try:
            self._file.rename(grave)
        except FileNotFoundError:
            return
        if _owner_in(grave) != owner:
            with contextlib.suppress(FileExistsError):
                os.link(grave, self._file)
        else:
            log.warning("taking over %s from a run that ended without a word: %s", self._file.parent, owner)
        grave.unlink()

    @staticmethod
    def _mine() -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "processes": _process_space(),
            "pid": os.getpid(),
            "started": _process_start(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "start": os.environ.get("SLURM_RESTART_COUNT", "0"),
        }

    def dead_owner(self) -> dict[str, Any] | None:
        """Who left the lock and is gone; ``None`` where there is no lock.

        Raises:
            Owned: the owner is alive.
        """
        mine = self._mine()
        try:
            owner, age = _owner_in(self._file), time.time() - self._file.stat().st_mtime
        except FileNotFoundError:
            return None
        same_host = _same_host(owner, mine)
        dead = same_host and _process_start(owner["pid"]) != owner.get("started")
        # Not this start of it: a job that was started once on each of its nodes would own the directory many times.
        earlier = mine["job"] is not None and owner.get("job") == mine["job"] and owner.get("start") != mine["start"]
        # Silence proves nothing of a process that can be seen to live on this host.
        silent = age > STALE_SECONDS and not (same_host and owner.get("started") is not None)
        if dead or (earlier and not same_host) or silent:
            return owner
        raise Owned(
            f"out={self._file.parent} is owned by another run: process {owner.get('pid')} on {owner.get('host')}; "
            "wait for it, stop it, or choose another out"
        )

    def _beat(self) -> None:
        gone = False
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                owned = self._file.read_text() == self._text
                if owned:
                    os.utime(self._file)
            except FileNotFoundError:
                owned, gone = not gone, True  # once: somebody looks whether its owner lives, and puts it back
            except OSError:
                continue  # a network file system that is away for a moment
            else:
                gone = False
            if not owned:
                self._lost = True
                return

    def check(self) -> None:
        """Raise ``RuntimeError`` when another run took the directory, as it may from one that was suspended."""
        if self._lost:
            raise RuntimeError(
                f"{self._file.parent} does not belong to this run any more: its lock was taken over or removed"
            )

    def release(self) -> None:
        """Give the directory up."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            with contextlib.suppress(FileNotFoundError):
                if self._file.read_text() == self._text:
                    self._file.unlink()


def create(path: Path, text: str) -> None:
    """Make a file that must not be there yet, with its text at once: nobody sees an empty one, not after a crash.

    Raises:
        FileExistsError: it is there.
    """
    whole = path.with_name(f".{path.name.lstrip('.')}-{secrets.token_hex(4)}.tmp")
    try:
        with whole.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(whole, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            _create_in_place(path, text)
    finally:
        whole.unlink(missing_ok=True)


def _create_in_place(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise


def _owner_in(file: Path) -> dict[str, Any]:
    """Who a lock names; nobody where its writer died in the middle of it."""
    try:
        owner: dict[str, Any] = json.loads(file.read_text())
    except ValueError:  # no text, or no JSON: a power cut leaves anything
        return {}
    return owner if isinstance(owner, dict) else {}


def _same_host(owner: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether an owner's process can be seen from here if it lives.

    Containers of one machine, or of two that have the same name, do not see each other's processes.
    """
    return all(owner.get(key) == mine[key] for key in ("host", "processes"))


def _process_space() -> str | None:
    """Which processes this one can see: those of the same boot and process namespace (``None`` without /proc)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _process_start(pid: int) -> str | None:
    """When a process of this host started, in clock ticks since boot; ``None`` if there is none (or no /proc)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
