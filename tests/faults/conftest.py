"""What the fault tests share: fast starts, a small corpus, the undisturbed runs, and the report they write."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "processes"))

import starts
from cases import Case

import invented


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[starts.Zygote]:
    """Forks starts of recipes."""
    with starts.Zygote(tmp_path_factory.mktemp("starts")) as process:
        yield process


@pytest.fixture(scope="session")
def data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some hundred rows of 64 tokens."""
    return invented.packed(recipe("prepare"), tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def small_data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So few rows that two epochs are short."""
    return invented.packed(recipe("prepare"), tmp_path_factory.mktemp("few"), documents=60)


@pytest.fixture(scope="session")
def whole(zygote: starts.Zygote, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """The undisturbed run of so many steps on so many ranks, made once."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def of(steps: int = 12, ranks: int = 1, **changes: Any) -> Case:
        key = json.dumps([steps, ranks, changes])
        if key not in made:
            made[key] = Case(zygote, folder / f"run-{len(made)}", data, steps, changes)
            made[key].ends(*[0] * ranks, ranks=ranks)
        return made[key]

    return of


@pytest.fixture
def case(zygote: starts.Zygote, data: Path, tmp_path: Path) -> Callable[..., Case]:
    """A run that faults are to happen to."""

    def of(steps: int = 12, **changes: Any) -> Case:
        return Case(zygote, tmp_path / "run", data, steps, changes)

    return of


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Tells the report what became of a fault; a test that fails before it does so is told as failed."""
    number = re.match(r"test_(f\d\d)_", request.node.name)
    assert number, "a test of a fault is named after it"
    row: dict[str, Any] = {"id": number[1].upper(), "test": request.node.nodeid, "ok": False, "what": "failed"}

    def tell(what: str, *, steps_lost: int = 0, checkpoints_lost: int = 0, samples_wrong: int = 0) -> None:
        numbers = {"steps_lost": steps_lost, "checkpoints_lost": checkpoints_lost, "samples_wrong": samples_wrong}
        row.update(numbers, what=what, ok=True)

    yield tell
    if file := os.environ.get("FAULT_REPORT"):
        with open(file, "a", encoding="utf-8") as report:
            report.write(json.dumps(row) + "\n")
