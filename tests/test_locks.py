"""One process at a time owns a directory, whatever the machine, the container or the moment."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llamita import locks, runs
from llamita.runs import RunConfig

SETTINGS = {"seed": 0}


def test_a_live_owner_keeps_its_directory_and_a_dead_one_loses_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = (
        "import sys, time; from pathlib import Path; from llamita import runs\n"
        f"with runs.start(Path({str(out)!r}), 'distill', {SETTINGS!r}, runs.RunConfig()):\n"
        "    print('mine', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "mine\n"
        with (
            pytest.raises(ValueError, match=f"owned by another run: process {owner.pid}"),
            runs.start(out, "distill", SETTINGS, RunConfig()),
        ):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    with runs.start(out, "distill", SETTINGS, RunConfig()) as run:
        assert run.identity["restarts"] == 1
    assert not (out / ".lock").exists()


def test_an_old_lock_of_another_host_is_taken_over_and_a_fresh_one_is_not(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1", "job": None}))
    with pytest.raises(ValueError, match="process 1 on elsewhere"), runs.start(tmp_path, "x", SETTINGS, RunConfig()):
        pass
    old = time.time() - locks.STALE_SECONDS - 1
    os.utime(lock, (old, old))
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_lock_whose_writer_died_in_the_middle_is_taken_over_once_it_is_old(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text('{"host": "else')
    with pytest.raises(ValueError, match="owned by another run"), runs.start(tmp_path, "x", SETTINGS, RunConfig()):
        pass
    old = time.time() - locks.STALE_SECONDS - 1
    os.utime(lock, (old, old))
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def test_a_silent_lock_of_a_process_that_lives_is_kept(tmp_path: Path) -> None:
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()):
        old = time.time() - locks.STALE_SECONDS - 1
        os.utime(tmp_path / ".lock", (old, old))
        with pytest.raises(ValueError, match=f"process {os.getpid()}"):
            locks.Lock(tmp_path).acquire()


def test_a_lock_that_another_has_taken_meanwhile_is_put_back(tmp_path: Path) -> None:
    lock = locks.Lock(tmp_path)
    (tmp_path / ".lock").write_text('{"host": "new"}')
    lock._take_over({"host": "dead"})
    assert (tmp_path / ".lock").read_text() == '{"host": "new"}'
    lock._take_over({"host": "new"})
    assert list(tmp_path.iterdir()) == []


def lock_of(tmp_path: Path, **changes: object) -> None:
    """A lock as this process would write it, but for ``changes``."""
    (tmp_path / ".lock").write_text(json.dumps(locks.Lock._mine() | changes))


def test_a_container_that_cannot_see_the_owner_does_not_take_its_directory(tmp_path: Path) -> None:
    """On one host under one name, but in another process namespace, a live owner looks dead."""
    lock_of(tmp_path, processes="another boot or namespace", pid=2**22 + 1)
    with pytest.raises(ValueError, match="owned by another run"):
        locks.Lock(tmp_path).acquire()
    lock_of(tmp_path, pid=2**22 + 1)
    locks.Lock(tmp_path).acquire()


def test_a_requeued_job_takes_its_own_lock_but_not_that_of_a_node_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock_of(tmp_path, host="the other node of this start")
    with pytest.raises(ValueError, match="owned by another run"):
        locks.Lock(tmp_path).acquire()
    lock_of(tmp_path, host="a node of the start before", start="0")
    locks.Lock(tmp_path).acquire()


def test_a_job_waits_for_a_sign_of_life_from_the_lock_of_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was killed a moment ago cannot take back the job that was submitted in its place."""
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    lock_of(tmp_path, host="another node", job="4711")
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            os.utime(tmp_path / ".lock", (time.time() + 1, time.time() + 1))

    monkeypatch.setattr(locks.time, "sleep", sleep)
    with pytest.raises(locks.Owned, match="owned by another run"):
        locks.Lock(tmp_path).acquire()
    assert len(slept) == 3
    monkeypatch.undo()
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.3)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.05)
    lock_of(tmp_path, host="another node", job="4711")
    lock = locks.Lock(tmp_path)
    lock.acquire()
    lock.release()


def test_a_run_that_lost_its_directory_writes_nothing_more_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that Slurm suspends is silent for hours, and another may go on in its place."""
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        lock_of(tmp_path, pid=1)
        assert run._lock._thread is not None
        run._lock._thread.join(60)
        with pytest.raises(RuntimeError, match="does not belong to this run any more"):
            run.log({"train/loss": 1.0}, step=1)
        with pytest.raises(RuntimeError, match="does not belong to this run any more"):
            run.finish([])
    assert not {"metrics.jsonl", "DONE.json"} & {path.name for path in tmp_path.iterdir()}
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 1, "the other's lock stays"


def test_a_lock_that_is_put_back_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.0)
    lock = locks.Lock(tmp_path)
    text = iter([FileNotFoundError(), None, FileNotFoundError(), None])

    def read(path: Path) -> str:
        if isinstance(error := next(text, None), FileNotFoundError):
            raise error
        return lock._text

    lock.acquire()
    lock._stop.set()
    assert lock._thread is not None
    lock._thread.join()
    waits = iter([False] * 5)
    monkeypatch.setattr(lock._stop, "wait", lambda _: next(waits, True))
    monkeypatch.setattr(Path, "read_text", read)
    lock._beat()
    lock.check()


def test_a_full_disk_leaves_no_lock_behind(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from llamita import locks\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"
        "try:\n    locks.Lock(Path(sys.argv[1])).acquire()\nexcept OSError as error:\n    sys.exit(error.errno)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_links_can_be_locked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(locks.os, "link", refused)
    lock = locks.Lock(tmp_path)
    lock.acquire()
    with pytest.raises(locks.Owned, match=f"process {os.getpid()}"):
        locks.Lock(tmp_path).acquire()
    lock.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\0" * 80, b"\xff\xfe", b"[1]"])
def test_whatever_a_power_cut_left_of_a_lock_is_taken_over_once_it_is_old(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(locks.Owned):
        locks.Lock(tmp_path).acquire()
    old = time.time() - locks.STALE_SECONDS - 1
    os.utime(tmp_path / ".lock", (old, old))
    lock = locks.Lock(tmp_path)
    lock.acquire()
    lock.release()
