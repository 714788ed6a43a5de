"""Every ending of a recipe is one of the contract's exit codes, with one message."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from llamita import runs

NAMES = ["prepare", "prune", "distill", "evaluate", "report", "pipeline"]
CANARY = "hf_" + "Zq9" * 11


@pytest.fixture
def main(recipe: Callable[[str], ModuleType]) -> ModuleType:
    recipe("pipeline")
    return sys.modules["_main"]


def code(main: ModuleType, ending: Callable[[], object]) -> int:
    with pytest.raises(SystemExit) as raised:
        main.exit_with(ending)
    assert isinstance(raised.value.code, int)
    return raised.value.code


def fail(error: BaseException) -> Callable[[], object]:
    def ending() -> object:
        raise error

    return ending


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("steps must be at least 1, got 0"), runs.EXIT_USER),
        (FileNotFoundError(errno.ENOENT, "No such file", "text"), runs.EXIT_USER),
        (runs.Stopped("saved"), runs.EXIT_REQUEUE),
        (runs.Crashed("stage a ended with code 1"), runs.EXIT_CRASH),
    ],
)
def test_an_ending_is_its_code_and_its_message(
    main: ModuleType, capsys: pytest.CaptureFixture[str], error: Exception, expected: int
) -> None:
    assert code(main, fail(error)) == expected
    said = capsys.readouterr().err
    assert str(error) in said
    assert "Traceback" not in said


def test_the_code_of_each_rank_is_left_for_the_launcher(
    main: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMITA_EXIT_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "3")
    code(main, fail(runs.Stopped("saved")))
    assert (tmp_path / "rank-3").read_text() == "75\n"
    with pytest.raises(RuntimeError):
        main.exit_with(fail(RuntimeError("a defect")))
    assert (tmp_path / "rank-3").read_text() == "1\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_what_the_system_refuses_is_the_users_to_mend(
    main: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path, number: int
) -> None:
    (tmp_path / "out").mkdir()
    main._made_by_hydra[:] = [tmp_path / "out"]
    assert code(main, fail(OSError(number, os.strerror(number), "/data/file"))) == runs.EXIT_USER
    assert f"cannot use /data/file: {os.strerror(number)}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "an empty directory that was made for nothing"


def test_a_broken_connection_is_not_the_users_error(main: ModuleType) -> None:
    with pytest.raises(OSError, match="refused"):
        main.exit_with(fail(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")))


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_out_that_cannot_be_a_directory_is_refused(
    main: ModuleType,
    recipe: Callable[[str], ModuleType],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    out: str,
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["prepare.py", f"out={tmp_path / out}", "sequence_length=64", "source.path=x"])
    assert code(main, recipe("prepare").main) == runs.EXIT_USER
    assert str(tmp_path / "file") in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def ending(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of a recipe that was called with these arguments."""
    monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        module.exit_with(module.main)
    return ended.value.code


@pytest.mark.parametrize("name", NAMES)
def test_a_key_on_the_command_line_is_refused_before_anything_is_written_or_said(
    name: str,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    code = ending(recipe(name), monkeypatch, f"run.project={CANARY}", f"out={tmp_path / 'out'}")
    printed = capfd.readouterr()
    assert code == 64
    assert "run.project looks like a Hugging Face token" in printed.err
    assert CANARY not in printed.out + printed.err
    assert not list(tmp_path.iterdir())


def test_a_key_in_an_experiments_file_is_refused_too(recipe: Callable[[str], ModuleType]) -> None:
    """The last moment before it would be written into ``config.yaml``."""
    from omegaconf import OmegaConf

    report = recipe("report")
    with pytest.raises(ValueError, match=r"run\.project looks like a Hugging Face token") as refused:
        sys.modules["_main"].settings(OmegaConf.create({"out": "x", "run": {"project": CANARY}}), report.Report)
    assert CANARY not in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_a_directory_says_that_it_must_be_given(
    name: str,
    recipe: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = ["pipeline=llama3.2_1b"] if name == "pipeline" else []
    assert ending(recipe(name), monkeypatch, *arguments) == 64
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "error: out must be given: out=…\n"), "and Hydra says nothing of its own"


def test_a_name_that_would_leave_its_folder_is_refused(recipe: Callable[[str], ModuleType]) -> None:
    from omegaconf import OmegaConf

    report = recipe("report")
    with pytest.raises(ValueError, match=r"runs: a name has 1 to 64 letters.*got '\.\./\.\.'"):
        sys.modules["_main"].settings(OmegaConf.create({"out": "x", "runs": {"../..": "y"}}), report.Report)
