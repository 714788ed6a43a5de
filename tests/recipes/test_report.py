"""``recipes/report.py`` from the command line to the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from llamita import runs

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def told(recipe: Callable[[str], ModuleType], *overrides: str) -> Any:
    """The settings that the command line would give."""
    module = recipe("report")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return sys.modules["_main"].settings(compose("report", overrides=list(overrides)), module.Report)


def training(path: Path, *, finish: bool) -> Path:
    """The directory of a training run of which there are metrics only."""
    with runs.start(path, "distill", {"teachers": {"t": {}}}, runs.RunConfig()) as run:
        for step in range(4):
            row = {"data/tokens": 100 * step, "val/held_out/bits_per_byte": 3.0 - step / 4, "train/ce": 5.0 - step}
            run.log(row, step=step)
        if finish:
            run.finish([])
    return path


def test_directories_are_named_without_a_plus_sign(recipe: Callable[[str], ModuleType]) -> None:
    config = told(recipe, "runs.a=x/y", "runs.b-2=z", "out=o")
    assert config.runs == {"a": Path("x/y"), "b-2": Path("z")}
    assert told(recipe, "runs={a: x/y, b-2: z}", "out=o").runs == config.runs


def test_a_mistake_is_refused_before_anything_is_written(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    with pytest.raises(HydraException, match="run_dirs"):
        told(recipe, "run_dirs.a=x", "out=o")
    with pytest.raises(ValueError, match=r"runs\.a=.*nowhere is not a directory"):
        recipe("report").run(told(recipe, f"runs.a={tmp_path / 'nowhere'}", f"out={tmp_path / 'out'}"))
    with pytest.raises(ValueError, match="runs must name"):
        recipe("report").run(told(recipe, f"out={tmp_path / 'out'}"))
    assert not (tmp_path / "out").exists()


def test_the_page_is_published_and_the_table_is_printed_again(
    recipe: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = training(tmp_path / "distilled", finish=True)
    config = told(recipe, f"runs.small={run}", f"out={tmp_path / 'out'}")
    recipe("report").run(config)
    first = capsys.readouterr().out
    assert "small" in first
    assert str(tmp_path / "out" / "report.html") in first
    done = json.loads((tmp_path / "out" / "DONE.json").read_text())
    assert {"report.html", "plots/recovery.png"} <= set(done["files"])
    written = (tmp_path / "out" / "report.html").stat().st_mtime_ns
    recipe("report").run(config)
    assert capsys.readouterr().out == first
    assert (tmp_path / "out" / "report.html").stat().st_mtime_ns == written


def test_the_report_of_a_running_run_is_drawn_again(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    run = training(tmp_path / "distilled", finish=False)
    config = told(recipe, f"runs.small={run}", f"out={tmp_path / 'out'}")
    recipe("report").run(config)
    assert "not finished" in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "DONE.json").exists()
    training(run, finish=True)
    recipe("report").run(config)
    assert "not finished" not in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "DONE.json").exists()
