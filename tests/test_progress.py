"""What a person sees of a loop, at a terminal and in a log, and that nothing of it can end the work."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from llamita import progress
from llamita.progress import Progress, TrainingProgress

FACTS = {"loss": "2.3412", "held out loss": "2.4011", "lr": "3.00e-03", "memory": "1.24 GiB", "checkpoint": "2"}


class Terminal(io.StringIO):
    """Standard error as a terminal; broken, it cannot be written to, as when its window was closed."""

    broken = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.broken:
            raise OSError(5, "Input/output error")
        return super().write(text)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """To be put in the place of standard error by the test: between set-up and test pytest puts its own there."""
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "LLAMITA_PROGRESS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    # datasets puts a copy in the place of os.environ behind a map over several processes; rich keeps the old one.
    monkeypatch.setattr(Console, "_environ", os.environ)
    return Terminal()


def last_picture(terminal: Terminal) -> list[str]:
    """The lines of the panel that stays on the screen."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    return plain[plain.rindex("╭") :].splitlines()


def train(stderr: io.StringIO) -> None:
    with contextlib.redirect_stderr(stderr), TrainingProgress("student", 6, completed=1) as shown:
        for step in (2, 3, 4):
            shown.update(step, "loss 2.3")
            if step % 2 == 0:
                shown.tell({**FACTS, "step of the facts": str(step)})


def test_a_terminal_shows_one_panel_with_every_fact(terminal: Terminal, capsys: pytest.CaptureFixture[str]) -> None:
    train(terminal)
    picture = last_picture(terminal)
    assert picture[0].startswith("╭─ student ")
    assert re.search(r"━.* step 4 of 6, 0 s gone, 0 s left │$", picture[1])
    names, values = ([cell.strip() for cell in re.split(r" {2,}", line.strip("│ "))] for line in picture[2:4])
    assert dict(zip(names, values, strict=True)) == {**FACTS, "step of the facts": "4"}
    assert picture[4].startswith("╰")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("columns", [80, 60, 40])
def test_a_narrow_terminal_shows_the_facts_below_each_other_and_cuts_none(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    train(terminal)
    picture = last_picture(terminal)
    assert {len(line) for line in picture} == {columns}
    for text in [*FACTS, *FACTS.values(), "step of the facts"]:
        assert any(text in line for line in picture), text


def test_a_log_has_one_plain_line_for_each_time_that_the_run_logs(capsys: pytest.CaptureFixture[str]) -> None:
    train(io.StringIO())
    text = capsys.readouterr().out
    told = "  ".join(f"{name} {value}" for name, value in FACTS.items())
    assert text.splitlines() == [
        f"student: step {step}/6  {told}  step of the facts {step}  0 s left" for step in (2, 4)
    ]
    assert "\x1b" not in text


def test_only_the_first_rank_says_anything(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    train(terminal)
    train(io.StringIO())
    assert terminal.getvalue() == capsys.readouterr().out == ""


def test_under_a_launcher_the_lines_go_to_the_log_and_the_state_to_its_file(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMITA_PROGRESS", str(tmp_path / "state"))
    train(terminal)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert json.loads((tmp_path / "state").read_text())["completed"] == 4
    assert terminal.getvalue() == ""


def test_time_left_is_what_remains_at_the_pace_of_this_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    shown = TrainingProgress("student", 100, completed=40)
    assert shown.seconds_left is None
    shown.update(50)
    monkeypatch.setattr(time, "monotonic", lambda: now + 20)
    assert shown.seconds_left == pytest.approx(20 / 10 * 50)
    assert [progress.duration(s) for s in (100, 600, 9000)] == ["100 s", "10 min", "2.5 h"]


@pytest.mark.parametrize("kind", [Progress, TrainingProgress])
def test_a_terminal_that_went_away_ends_no_work(kind: type[Progress], terminal: Terminal) -> None:
    done = []
    with contextlib.redirect_stderr(terminal), kind("student", 4) as shown:
        terminal.broken = True
        for step in range(1, 5):
            shown.update(step)
            if isinstance(shown, TrainingProgress):
                shown.tell(FACTS)
            done.append(step)
    assert done == [1, 2, 3, 4]
    assert terminal.getvalue(), "it was there at first"


@pytest.mark.parametrize("kind", [Progress, TrainingProgress])
def test_a_log_or_state_that_cannot_be_written_ends_no_work(
    kind: type[Progress], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = Terminal()
    broken.broken = True
    for state in (None, tmp_path / "missing" / "state"):
        if state:
            monkeypatch.setenv("LLAMITA_PROGRESS", str(state))
        with contextlib.redirect_stdout(broken), contextlib.redirect_stderr(io.StringIO()), kind("s", 2) as shown:
            shown._said -= 60
            shown.update(1)
            if isinstance(shown, TrainingProgress):
                shown.tell(FACTS)
