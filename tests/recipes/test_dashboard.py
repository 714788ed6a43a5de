"""The dashboard shows what the runs wrote, follows them, and listens to nobody but this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import REPOSITORY
from llamita import runs
from llamita.metrics import read_metrics
from llamita.report import board
from llamita.runs import RunConfig


class Memory:
    """A store that keeps rows by project and run."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.configs: dict[tuple[str, str], dict[str, Any]] = {}
        self.removed = 0

    def add(self, project: str, run: str, run_id: str, rows: list[dict[str, Any]], config: dict[str, Any]) -> None:
        self.rows.setdefault((project, run), []).extend(rows)
        self.configs[project, run] = config

    def remove(self, project: str, run: str, run_id: str) -> None:
        self.rows.pop((project, run), None)
        self.removed += 1


def log_steps(path: Path, steps: range, *, done: bool = False) -> None:
    with runs.start(path, "x", {"optim": {"learning_rate": 0.1}}, RunConfig()) as run:
        for step in steps:
            run.log({"train/loss": 1.0 / step}, step=step)
        if done:
            run.finish([])


def steps(memory: Memory, *key: str) -> list[int]:
    return [row["step"] for row in memory.rows[key]]  # type: ignore[index]


def test_a_pipeline_is_a_project_and_its_stages_are_its_runs(tmp_path: Path) -> None:
    for name in ("demo/teacher", "demo/student", "alone", "llama3.2/deep/er", "registry-x/a", "my_system/b"):
        log_steps(tmp_path / "outputs" / name, range(1, 2))
    log_steps(tmp_path / "outputs" / "demo" / "teacher" / "inside", range(1, 2))
    log_steps(tmp_path / "outputs" / "demo" / "teacher" / "workers" / "00003-of-00016", range(1, 2))
    (tmp_path / "outputs" / ".cache").mkdir()
    log_steps(tmp_path / "outputs" / ".cache" / "hidden", range(1, 2))
    found = board.find(tmp_path / "outputs")
    assert {path.name: project for path, (project, _) in found.items()} == {
        "teacher": "demo",
        "student": "demo",
        "00003-of-00016": "demo-teacher-workers",
        "alone": "outputs",
        "er": "llama3-2-deep",
        "a": "registry-x-runs",
        "b": "my_system-runs",
    }
    assert list(board.find(tmp_path / "outputs" / "alone").values()) == [("outputs", "alone")]


def test_new_rows_are_copied_once_and_a_restart_takes_back_what_it_repeats(tmp_path: Path) -> None:
    memory = Memory()
    log_steps(tmp_path / "p" / "run", range(1, 6))
    shown = board.Board(tmp_path, memory)
    shown.look_for_runs()
    assert shown.advance() == 5
    assert shown.advance() == 0
    with runs.start(tmp_path / "p" / "run", "x", {"optim": {"learning_rate": 0.1}}, RunConfig()) as run:
        run.log({"train/loss": 10.0}, step=4)
        shown.advance()
        assert steps(memory, "p", "run") == [1, 2, 3, 4]
        assert memory.configs["p", "run"]["state"] == "going on"
        run.log({"train/loss": 11.0}, step=5)
        with (tmp_path / "p" / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "rest')
        assert shown.advance() == 1
    rows = memory.rows["p", "run"]
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        (row["step"], row["train/loss"]) for row in read_metrics(tmp_path / "p" / "run")
    ]
    shown.advance()
    assert memory.configs["p", "run"]["state"] == "not finished"
    log_steps(tmp_path / "p" / "run", range(6, 8), done=True)
    shown.advance()
    assert memory.configs["p", "run"]["state"] == "done"
    assert steps(memory, "p", "run") == [1, 2, 3, 4, 5, 6, 7]


def test_a_copy_in_any_pieces_is_what_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that come out of order between restarts too: a later start that logs step 0 last."""
    monkeypatch.setattr(board, "BATCH_ROWS", 3)
    log_steps(tmp_path / "written", range(1, 2))
    (tmp_path / "copied" / "run").mkdir(parents=True)
    for name in ("config.yaml", "run.json"):
        (tmp_path / "copied" / "run" / name).write_bytes((tmp_path / "written" / name).read_bytes())
    logged = [(0, s) for s in range(1, 9)] + [(1, s) for s in (5, 6, 7)] + [(2, s) for s in (7, 8, 9, 3)]
    lines = [json.dumps({"step": s, "time": 0.0, "restart": r, "x": 100 * r + s}) + "\n" for r, s in logged]
    memory = Memory()
    shown = board.Board(tmp_path / "copied", memory)
    shown.look_for_runs()
    for line in lines:
        with (tmp_path / "copied" / "run" / "metrics.jsonl").open("a") as file:
            file.write(line[:7])
            file.flush()
            shown.advance()
            file.write(line[7:])
        shown.advance()
        expected = [row["x"] for row in read_metrics(tmp_path / "copied" / "run")]
        assert [row["x"] for row in memory.rows["copied", "run"]] == expected


def test_a_damaged_run_is_told_of_once_and_hides_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("damaged", "whole"):
        log_steps(tmp_path / name, range(1, 4))
    with (tmp_path / "damaged" / "metrics.jsonl").open("a") as file:
        file.write('{"step": "four", "restart": 0}\n')
    memory = Memory()
    shown = board.Board(tmp_path, memory)
    shown.look_for_runs()
    shown.advance()
    shown.advance()
    assert steps(memory, tmp_path.name, "whole") == [1, 2, 3]
    assert caplog.text.count("is not a row of metrics") == 1


def test_a_directory_that_was_made_anew_is_copied_anew(tmp_path: Path) -> None:
    memory = Memory()
    log_steps(tmp_path / "run", range(1, 4))
    shown = board.Board(tmp_path, memory)
    shown.look_for_runs()
    shown.advance()
    shutil.rmtree(tmp_path / "run")
    log_steps(tmp_path / "run", range(11, 19))
    shown.advance()
    assert steps(memory, tmp_path.name, "run") == list(range(11, 19))


def test_a_metric_becomes_a_curve_with_its_second_value_and_none_is_lost() -> None:
    """Whatever was logged more than once is copied whole and in order; the rest is told as single values."""
    rows: list[dict[str, Any]] = [{"step": 0, "time": 1.0, "restart": 0, "cost": 3.0, "val": 9.0, "word": "x"}]
    rows += [{"step": step, "time": 2.0, "restart": 0, "loss": 1.0 / step} for step in (1, 2)]
    rows += [{"step": 2, "time": 3.0, "restart": 0, "val": 8.0}, {"step": 3, "time": 4.0, "restart": 1, "loss": 0.5}]
    rows += [{"step": 3, "time": 5.0, "restart": 1, "final": 7.0}]
    curves = board.Curves()
    copied = [part for row in rows for part in curves.split(row)]
    for name in ("loss", "val"):
        assert [(r["step"], r["time"], r[name]) for r in copied if name in r] == [
            (r["step"], r["time"], r[name]) for r in rows if name in r
        ]
    assert [r["run/restarts"] for r in copied if "run/restarts" in r] == [r["restart"] for r in rows]
    assert not {"cost", "word", "final"} & {name for r in copied for name in r}
    assert curves.single == {"cost": 3.0, "word": "x", "final": 7.0}


LISTENED_TO = """
import runpy, sys
told = open(sys.argv[1], "a", buffering=1)
def listen(event, arguments):
    match event:
        case "socket.connect" | "socket.bind" | "socket.sendto":
            told.write(f"{event} {arguments[1]!r}\\n")
        case "socket.getaddrinfo" | "socket.gethostbyname" | "subprocess.Popen" | "os.posix_spawn":
            told.write(f"{event} {arguments[0]!r}\\n")
sys.addaudithook(listen)
del sys.argv[:2]
sys.path.insert(0, "recipes")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a recipe and writes down every socket, look-up and process that Python begins, in whatever library."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """The recipe as a process that shows three runs, with variables by which the library would leave the machine."""
    for name in ("demo/teacher", "demo/student"):
        log_steps(tmp_path / "outputs" / name, range(1, 6))
    log_steps(tmp_path / "outputs" / "demo" / "data", range(1, 2))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", LISTENED_TO, str(tmp_path / "heard"), "recipes/dashboard.py"]
    command += [f"runs={tmp_path / 'outputs'}", f"port={port}"]
    (tmp_path / "temporary").mkdir()
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path / "temporary"),
        "GRADIO_SERVER_NAME": "0.0.0.0",
        "GRADIO_SHARE": "true",
        "TRACKIO_SPACE_ID": "somebody/space",
        "TRACKIO_DATASET_ID": "somebody/set",
        "PYTHONPATH": str(REPOSITORY / "typings"),
    }
    process = subprocess.Popen(
        [*command, "every_seconds=0.2"], env=environment, text=True, cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert "3 runs below" in process.stdout.readline()
        yield process, tmp_path, port
    finally:
        process.kill()
        process.wait()


def ask(port: int, question: str, **arguments: Any) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/{question}",
        json.dumps(arguments).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())["data"]


def store_of(folder: Path) -> Path:
    [store] = (folder / "temporary").glob("llamita-dashboard-*/demo.db")
    return store


def test_the_page_is_served_to_this_machine_only_and_follows_the_runs_until_it_is_stopped(
    served: tuple[subprocess.Popen[str], Path, int],
) -> None:
    process, folder, port = served
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as page:
        assert b"<html" in page.read()
    assert ask(port, "get_all_projects") == ["demo"]
    listening = [line.split() for line in Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()[1:]]
    assert {f[1] for f in listening if f[3] == "0A" and f[1].endswith(f":{port:04X}")} == {f"0100007F:{port:04X}"}
    log_steps(folder / "outputs" / "demo" / "teacher", range(4, 9))

    def rows() -> list[int]:
        with contextlib.closing(sqlite3.connect(store_of(folder))) as opened:
            return [s for (s,) in opened.execute("SELECT step FROM metrics WHERE run_name = 'teacher' ORDER BY step")]

    deadline = time.monotonic() + 60
    while rows() != [1, 2, 3, 4, 5, 6, 7, 8] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert rows() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert {p.name for p in (folder / "outputs" / "demo" / "teacher").iterdir()} == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "logs",
    }
    with contextlib.closing(sqlite3.connect(store_of(folder))) as opened:
        found = opened.execute("SELECT metrics FROM metrics WHERE run_name = 'data'").fetchall()
        [[config]] = opened.execute("SELECT config FROM configs WHERE run_name = 'data'").fetchall()
    assert [json.loads(metrics) for (metrics,) in found] == [{}], "one row makes no curve"
    assert json.loads(config)["logged once/train/loss"] == 1.0
    process.terminate()
    assert process.wait(timeout=60) == 0
    heard = [line.partition(" ") for line in (folder / "heard").read_text().splitlines()]
    assert f"('127.0.0.1', {port})" in {what for event, _, what in heard if event == "socket.bind"}
    assert [(event, what) for event, _, what in heard if "'127.0.0.1'" not in what] == []
    assert not list((folder / "temporary").glob("llamita-dashboard-*"))


def test_mistakes_in_what_is_asked_for_are_told(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = recipe("dashboard")
    with pytest.raises(ValueError, match="is not a directory"):
        module.run(module.Dashboard(runs=tmp_path / "nothing"), threading.Event())
    with pytest.raises(ValueError, match=r"port must be in 1\.\.65535, got 0"):
        module.Dashboard(runs=tmp_path, port=0)
    (tmp_path / "mine").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty; the copy needs a folder of its own"):
        module.run(module.Dashboard(runs=tmp_path, out=tmp_path), threading.Event())
