"""Sinks get every row in order, and whatever becomes of them, a run neither waits for them nor ends with them."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import logging
import threading
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llamita import runs, sinks
from llamita.metrics import read_metrics
from llamita.runs import RunConfig


class Recorder:
    """A sink that notes what it is given, and misbehaves where it is told to."""

    def __init__(self, **misbehaviour: Callable[[], None]) -> None:
        self.rows: list[sinks.Row] = []
        self.calls: list[str] = []
        self._misbehaviour = misbehaviour

    def _do(self, name: str) -> None:
        self.calls.append(name)
        self._misbehaviour.get(name, lambda: None)()

    def open(self) -> None:
        self._do("open")

    def write(self, row: sinks.Row) -> None:
        self._do("write")
        self.rows.append(row)

    def close(self) -> None:
        self._do("close")

    def abandon(self) -> None:
        self._do("abandon")


def fail() -> None:
    raise OSError("no network")


def leave() -> None:
    raise SystemExit(3)


def write(feed: sinks.Sinks, count: int) -> None:
    for step in range(count):
        feed.write({"train/loss": 1.0 / (step + 1)}, step=step, at=time.time())


def test_a_sink_gets_every_row_in_order_and_is_closed() -> None:
    sink = Recorder()
    feed = sinks.Sinks({"recorder": sink})
    write(feed, 100)
    feed.close()
    assert [row.step for row in sink.rows] == list(range(100))
    assert sink.calls[0] == "open"
    assert sink.calls[-1] == "close"


@pytest.mark.parametrize("place", ["open", "write", "close"])
@pytest.mark.parametrize("misbehave", [fail, leave])
def test_a_sink_that_raises_is_left_alone_with_one_warning_and_the_other_goes_on(
    place: str, misbehave: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole = Recorder(**{place: misbehave}), Recorder()
    feed = sinks.Sinks({"broken": broken, "whole": whole})
    with caplog.at_level(logging.WARNING, logger="llamita.sinks"):
        write(feed, 20)
        feed.close()
    assert [row.step for row in whole.rows] == list(range(20))
    assert len(caplog.records) == 1
    assert "broken failed and is left alone" in caplog.text
    assert broken.calls[-1] == "abandon"
    assert broken.calls.count(place) == 1


@pytest.mark.parametrize("place", ["open", "write", "close"])
def test_a_sink_that_hangs_delays_no_row_and_the_end_only_by_the_time_it_is_given(
    place: str, caplog: pytest.LogCaptureFixture
) -> None:
    never = threading.Event()
    sink = Recorder(**{place: never.wait})
    feed = sinks.Sinks({"stuck": sink})
    started = time.monotonic()
    # A sink that never takes a row, and more of them than the queue holds; one that hangs at the end took all.
    write(feed, sinks.QUEUE_ROWS if place == "close" else 2 * sinks.QUEUE_ROWS)
    assert time.monotonic() - started < 2
    started = time.monotonic()
    feed.close(seconds=0.3)
    assert time.monotonic() - started < 2
    assert "abandon" in sink.calls
    assert "stuck did not end in time" in caplog.text
    assert caplog.text.count("misses rows") == (0 if place == "close" else 1)
    never.set()


def test_hanging_sinks_share_the_time_at_the_end() -> None:
    never = threading.Event()
    feed = sinks.Sinks({str(index): Recorder(close=never.wait) for index in range(4)})
    started = time.monotonic()
    feed.close(seconds=0.5)
    assert time.monotonic() - started < 1.5
    never.set()


def test_a_slow_sink_gets_what_waits_before_it_ends() -> None:
    sink = Recorder(write=lambda: time.sleep(0.005))
    feed = sinks.Sinks({"slow": sink})
    write(feed, 50)
    feed.close()
    assert len(sink.rows) == 50


def test_the_truth_is_written_before_any_sink_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Reader(Recorder):
        def write(self, row: sinks.Row) -> None:
            seen.append(sum(1 for other in read_metrics(tmp_path) if other["step"] == row.step))

    with runs.start(tmp_path, "x", {}, RunConfig()) as run:
        run._sinks = sinks.Sinks({"reader": Reader()})
        for step in range(5):
            run.log({"train/loss": 1.0}, step=step)
    assert seen == [1] * 5


def test_only_rank_0_has_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(runs, "LEAVE_SECONDS", 0.0)
    with runs.start(tmp_path, "x", {}, RunConfig(tensorboard=True)) as run:
        run.log({"train/loss": 1.0}, step=1)
    assert not (tmp_path / sinks.TENSORBOARD).exists()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / sinks.TENSORBOARD), size_guidance={"scalars": 0})
    read.Reload()
    return [(event.step, event.value) for event in read.Scalars(tag)]


def test_tensorboard_shows_the_steps_that_a_restart_repeats_once_as_metrics_do(tmp_path: Path) -> None:
    for restart, steps in enumerate((range(1, 7), range(4, 9), range(6, 10))):
        with runs.start(tmp_path, "x", {}, RunConfig(tensorboard=True)) as run:
            for step in steps:
                run.log({"train/loss": float(100 * restart + step), "model": "a name"}, step=step)
    expected = [(row["step"], row["train/loss"]) for row in read_metrics(tmp_path)]
    assert [step for step, _ in expected] == list(range(1, 10))
    assert scalars(tmp_path, "train/loss") == expected


def test_tensorboard_that_is_not_installed_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"run\.tensorboard=true needs the package tensorboard: pip install"):
        RunConfig(tensorboard=True)
    assert not RunConfig().tensorboard


def test_what_leaves_the_machine_is_listed_and_says_nothing_of_places(tmp_path: Path) -> None:
    settings = {
        "steps": 10,
        "out": "outputs/secret",
        "data": {"path": "/data/patients", "split": "train"},
        "student": {"path": "/models/unreleased", "init": "checkpoint", "shape": {"hidden_size": 64}},
        "teachers": {"big": {"path": "/models/big", "weight": 0.5, "dtype": "bfloat16"}},
        "optim": {"learning_rate": 0.1, "betas": [0.9, 0.95], "of_tomorrow": "/home/somebody/x"},
        "target": {"num_hidden_layers": None, "head_dim": 64},
        "deepspeed": {"stage": 2, "config": {"zero_optimization": {"offload_path": "/nvme"}}},
        "run": {"seed": 1, "project": "secret"},
    }
    assert sinks.sent(settings) == {
        "steps": 10,
        "student.init": "checkpoint",
        "student.shape.hidden_size": 64,
        "teachers.big.weight": 0.5,
        "optim.learning_rate": 0.1,
        "optim.betas[0]": 0.9,
        "optim.betas[1]": 0.95,
        "target.head_dim": 64,
        "deepspeed.stage": 2,
        "run.seed": 1,
    }


def setting_names(schema: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a settings dataclass; entries of mappings are called ``x``."""
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        inner = typing.get_args(hint)[-1] if typing.get_origin(hint) is dict else hint
        if dataclasses.is_dataclass(inner):
            yield from setting_names(inner, f"{name}." if inner is hint else f"{name}.x.")
        else:
            yield name


def test_every_listed_setting_is_one_of_a_recipe(recipe: Callable[[str], ModuleType]) -> None:
    modules = ("distill", "prune", "cache", "prepare", "evaluate", "sft")
    known = {name for module in modules for name in setting_names(getattr(recipe(module), module.capitalize()))}
    unused = [p for p in sinks.SENT_SETTINGS if p != "recipe" and not fnmatch.filter(known, p)]
    assert not unused, sorted(known)
