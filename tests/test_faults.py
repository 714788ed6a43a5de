"""What ended a run is told once, with its phase and with what to change; a process that hangs ends itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamita import faults, runs


def test_the_first_failure_of_a_launch_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    faults.record(tmp_path, ValueError("the cause"))
    monkeypatch.setenv("RANK", "0")
    faults.record(tmp_path, RuntimeError("Connection closed by peer"))
    told = json.loads((tmp_path / "ERROR.json").read_text())
    assert (told["rank"], told["type"], told["message"]) == (3, "ValueError", "the cause")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ERROR.json"]


def test_a_failure_of_a_peer_says_where_to_look(tmp_path: Path) -> None:
    faults.record(tmp_path, RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]"))
    assert "another process of the run was gone" in json.loads((tmp_path / "ERROR.json").read_text())["hint"]


def test_what_an_earlier_launch_left_is_forgotten_and_what_this_one_left_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    faults.record(tmp_path, ValueError("old"))
    faults.forget(tmp_path)
    assert (tmp_path / "ERROR.json").is_file()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    faults.forget(tmp_path)
    assert not (tmp_path / "ERROR.json").exists()
    (tmp_path / "ERROR.json").write_text("no json")
    faults.forget(tmp_path)
    assert not (tmp_path / "ERROR.json").exists()


def test_no_key_gets_into_the_file(tmp_path: Path) -> None:
    faults.record(tmp_path, ValueError("cannot log in with hf_" + "a" * 30))
    assert "hf_aaa" not in (tmp_path / "ERROR.json").read_text()


def test_a_run_that_crashes_leaves_its_error_and_the_next_start_removes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with (
        pytest.raises(RuntimeError),
        runs.start(out, "distill", {}, runs.RunConfig()),
        faults.phase("step 7", memory="nothing"),
    ):
        raise RuntimeError("broken")
    told = json.loads((out / "ERROR.json").read_text())
    assert (told["phase"], told["message"]) == ("step 7", "broken")
    assert any("in test_a_run_that_crashes" in line for line in told["traceback"])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "next")
    with pytest.raises(runs.Stopped), runs.start(out, "distill", {}, runs.RunConfig()):
        raise runs.Stopped("asked to")
    assert not (out / "ERROR.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_memory_that_ran_out_names_the_phase_and_a_setting(error: Exception) -> None:
    with (
        pytest.raises(ValueError, match=r"out of memory in the outer on rank 0 .*: a smaller x") as told,
        faults.phase("the outer", memory="a smaller x"),
    ):
        raise error
    assert faults.phase_of(told.value) == "the outer"


def test_memory_is_that_of_the_device_where_the_process_holds_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never sets a current device, as in pruning, works on another than the first."""
    sizes = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: sizes if index == 2 else None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index=0: [0, 0, 70 * 2**30][index])
    with (
        pytest.raises(ValueError, match=r"where this process held 70\.0 of 80\.0 GiB; to need less: fewer rows"),
        faults.phase("a pass", memory="fewer rows"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_a_processor_really_lacks_is_known_for_what_it_is() -> None:
    with pytest.raises(ValueError, match="out of memory in a big tensor"), faults.phase("a big tensor", memory="less"):
        torch.empty(2**60, dtype=torch.uint8)


def test_a_launcher_can_tell_the_first_error_in_a_line(tmp_path: Path) -> None:
    assert faults.first(tmp_path) is None
    error = RuntimeError("broken")
    error.add_note("phase: step 3")
    faults.record(tmp_path, error)
    assert str(faults.first(tmp_path)).startswith("rank 0 on ")
    assert str(faults.first(tmp_path)).endswith("in step 3: RuntimeError: broken")
    (tmp_path / "ERROR.json").write_text("[]")
    assert faults.first(tmp_path) is None


def test_the_innermost_phase_is_told() -> None:
    with (
        pytest.raises(ValueError, match="out of memory in the inner") as told,
        faults.phase("the outer", memory="x"),
        faults.phase("the inner", memory="y"),
    ):
        raise MemoryError
    assert faults.phase_of(told.value) == "the inner"


def watched(folder: Path, hang: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """A process that says it goes on for a while and then does ``hang``."""
    program = f"""
import re, sys, time
from pathlib import Path
from llamita import faults
faults.LAST_RESORT_SECONDS, faults.GRACE_SECONDS = 3, 0.5
with faults.Watchdog(Path({str(folder)!r}), 1.0) as dog:
    for _ in range(8):
        time.sleep(0.25)
        dog.beat()
    print("hangs", flush=True)
    {hang}
"""
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    return done, time.monotonic() - begun


def test_a_process_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    done, seconds = watched(tmp_path, "time.sleep(1000)", RANK="1")
    assert done.returncode == faults.EXIT_HUNG
    assert done.stdout == "hangs\n", "it was ended while it went on"
    assert seconds < 30
    said = (tmp_path / "logs/rank-00001.log").read_text()
    assert "rank 1 made no progress for 1 s; run.hang_seconds=1 ends it" in said
    assert 'File "<string>", line 11 in <module>' in said
    told = json.loads((tmp_path / "ERROR.json").read_text())
    assert (told["rank"], told["type"]) == (1, "TimeoutError")


def test_a_process_that_hangs_where_no_python_runs_ends_too(tmp_path: Path) -> None:
    done, seconds = watched(tmp_path, 're.match("(a+)+$", "a" * 60 + "b")')
    assert done.returncode == 1
    assert seconds < 30
    assert "Timeout" in (tmp_path / "logs/rank-00000.log").read_text()


def test_a_run_that_ends_in_time_is_left_alone(tmp_path: Path) -> None:
    with faults.Watchdog(tmp_path, 0.3):
        pass
    time.sleep(0.6)
    with faults.Watchdog(tmp_path, 0) as never:
        never.beat()
        time.sleep(0.1)
    assert not (tmp_path / "ERROR.json").exists()


def test_a_time_that_is_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"run.hang_seconds must be >= 0 and finite, got -1"):
        runs.RunConfig(hang_seconds=-1)
