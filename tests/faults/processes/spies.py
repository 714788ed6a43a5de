"""What a start under test reports of itself, and the faults that it brings upon itself; no product code knows them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from typing import Any


def install(wanted: dict[str, Any]) -> None:
    """Put the named spies in place, each with its argument."""
    for name, argument in wanted.items():
        SPIES[name](argument)


def record_rows(argument: list[Any]) -> None:
    """Append to a file which rows each step of the loader really read, and from which position on."""
    from llamita.data.loader import Loader
    from llamita.data.shards import Split

    path, start = argument
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    read: list[int] = []
    words, following = Split.words, Loader.__next__

    def spied_words(self: Any, indices: Any) -> Any:
        read.extend(int(index) for index in indices)
        return words(self, indices)

    def spied_next(self: Any) -> Any:
        read.clear()
        position = self.samples_consumed + self.rank * (self.global_batch_rows // self.world_size)
        found = following(self)
        line = {"start": start, "rank": self.rank, "position": position, "rows": read}
        os.write(handle, (json.dumps(line) + "\n").encode())
        return found

    Split.words = spied_words  # type: ignore[method-assign]
    Loader.__next__ = spied_next  # type: ignore[method-assign]


def at_call(target: str, number: int, act: Callable[[], None]) -> None:
    """Do something before the ``number``-th call (from 1) of ``module:Class.method`` or ``module:function``."""
    import importlib

    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), [0]

    def spied(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            act()
        return real(*arguments, **named)

    setattr(owner, name, spied)


def signals_at(arguments: list[list[Any]]) -> None:
    """Send this process signals before calls: each ``[target, number, [signal, …]]``."""
    for target, number, signals in arguments:

        def act(signals: list[int] = signals) -> None:
            for one in signals:
                os.kill(os.getpid(), one)

        at_call(target, number, act)


def slow_at(argument: list[Any]) -> None:
    """Let a call take so many seconds more: ``[target, number, seconds]``."""
    import time

    target, number, seconds = argument
    at_call(target, number, lambda: time.sleep(seconds))


def touch_at(argument: list[Any]) -> None:
    """Make a file before a call: ``[target, number, path]``."""
    target, number, path = argument

    def act() -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))

    at_call(target, number, act)


def refuse_at(argument: list[Any]) -> None:
    """Raise an ``OSError`` of a number in place of a call: ``[target, number, errno]``."""
    target, number, code = argument

    def act() -> None:
        raise OSError(code, os.strerror(code))

    at_call(target, number, act)


def largest_file(argument: list[Any]) -> None:
    """No file may grow beyond so many bytes: the write fails, or the process dies of it with the file cut there."""
    import resource

    limit, dies = argument
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def dies_in_file(argument: list[int]) -> None:
    """Die when so many bytes of the ``number``-th safetensors file are written: ``[number, bytes]``."""
    from llamita import checkpoints

    number, size = argument
    real, calls = checkpoints.save_file, [0]

    def spied(tensors: Any, path: Any, **named: Any) -> None:
        real(tensors, path, **named)
        calls[0] += 1
        if calls[0] == number:
            os.truncate(path, size)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_file = spied


def collective_timeout(seconds: float) -> None:
    """How long a collective waits for a rank that says nothing."""
    from llamita import runs

    runs.COLLECTIVE_TIMEOUT = timedelta(seconds=seconds)


def leave_seconds(seconds: float) -> None:
    """How long a later rank waits at its end for the main one."""
    from llamita import runs

    runs.LEAVE_SECONDS = seconds


def clock(offset: float) -> None:
    """The wall clock is so many seconds wrong."""
    import time

    real = time.time
    time.time = lambda: real() + offset


def host(name: str) -> None:
    """This machine has another name."""
    import socket

    socket.gethostname = lambda: name


class Disk:
    """What a disk is sure to hold below a folder: of each file the content, and of each folder the names, when it was
    last synced."""

    def __init__(self, root: str, cuts: str) -> None:
        self.root, self.cuts = root, cuts
        self.content: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self.held: dict[int, int] = {}
        self.made: dict[str, int] = {}
        self.count = 0

    def hold(self, path: str) -> int:
        """The inode of a path; kept open, so that no other file gets its number."""
        inode = os.stat(path).st_ino
        if inode not in self.held:
            self.held[inode] = os.open(path, os.O_RDONLY)
        return inode

    def synced(self, path: str) -> None:
        """A file or a folder was forced to the disk."""
        inode = self.hold(path)
        if os.path.isdir(path):
            entries = {name: os.path.join(path, name) for name in os.listdir(path)}
            self.names[inode] = {n: (self.hold(full), os.path.isdir(full)) for n, full in entries.items()}
        else:
            with open(path, "rb") as file:
                self.content[inode] = file.read()

    def promised(self) -> int:
        """The newest step whose folder's name is sure to be on the disk."""
        root = os.path.join(self.root, "checkpoints")
        names = self.names.get(os.stat(root).st_ino, {}) if os.path.isdir(root) else {}
        return max((int(name[5:]) for name in names if name.startswith("step-")), default=0)

    def cut(self) -> None:
        """Make up the two disks that a power cut may leave now."""
        if not os.path.isdir(self.root):
            return
        self.count += 1
        for kind in ("synced", "names"):
            target = os.path.join(self.cuts, f"{self.count}-{kind}")
            os.mkdir(target)
            if kind == "synced":
                self.write_synced(os.stat(self.root).st_ino, target)
            else:
                self.write_names(self.root, target)
            self.made[os.path.basename(target)] = self.promised()
        with open(self.cuts + ".json", "w") as file:
            json.dump(self.made, file)

    def write_synced(self, inode: int, target: str) -> None:
        """Only what was synced."""
        for name, (child, is_folder) in self.names.get(inode, {}).items():
            path = os.path.join(target, name)
            if is_folder:
                os.mkdir(path)
                self.write_synced(child, path)
            else:
                with open(path, "wb") as file:
                    file.write(self.content.get(child, b""))

    def write_names(self, source: str, target: str) -> None:
        """Every name that there is; of the content what was synced, and zeros for the rest."""
        for entry in os.scandir(source):
            path = os.path.join(target, entry.name)
            if entry.is_dir():
                os.mkdir(path)
                self.write_names(entry.path, path)
            else:
                kept = self.content.get(entry.inode(), b"") if entry.inode() in self.held else b""
                size = entry.stat().st_size
                with open(path, "wb") as file:
                    file.write(kept[:size] + bytes(max(0, size - len(kept))))


def power_cuts(argument: list[str]) -> None:
    """Before each rename and after each sync below a folder, keep the disks that a power cut may leave there."""
    disk = Disk(*argument)
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def spied_fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        fsync(handle)
        if path.startswith(disk.root):
            disk.synced(path)
            disk.cut()

    def spied_rename(source: Any, target: Any, **named: Any) -> None:
        rename(source, target, **named)
        disk.cut()

    def spied_replace(source: Any, target: Any, **named: Any) -> None:
        replace(source, target, **named)
        disk.cut()

    os.fsync, os.rename, os.replace = spied_fsync, spied_rename, spied_replace


SPIES: dict[str, Callable[[Any], None]] = {
    "record_rows": record_rows,
    "signals_at": signals_at,
    "slow_at": slow_at,
    "touch_at": touch_at,
    "refuse_at": refuse_at,
    "largest_file": largest_file,
    "dies_in_file": dies_in_file,
    "collective_timeout": collective_timeout,
    "leave_seconds": leave_seconds,
    "clock": clock,
    "host": host,
    "power_cuts": power_cuts,
}
