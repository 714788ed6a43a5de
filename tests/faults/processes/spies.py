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


SPIES: dict[str, Callable[[Any], None]] = {
    "record_rows": record_rows,
    "signals_at": signals_at,
    "slow_at": slow_at,
    "touch_at": touch_at,
    "refuse_at": refuse_at,
    "largest_file": largest_file,
    "collective_timeout": collective_timeout,
    "leave_seconds": leave_seconds,
    "clock": clock,
    "host": host,
}
