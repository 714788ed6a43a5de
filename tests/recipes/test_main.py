"""How every recipe begins and ends, whatever it does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

NAMES = ["prepare", "prune", "distill", "evaluate", "report", "pipeline"]
CANARY = "hf_" + "Zq9" * 11


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

    module = recipe("report")
    with pytest.raises(ValueError, match=r"run\.project looks like a Hugging Face token") as refused:
        module.settings(OmegaConf.create({"out": "x", "run": {"project": CANARY}}), module.Report)
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
    assert capfd.readouterr().err == "error: out must be given: out=…\n"
