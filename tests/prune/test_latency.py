"""What is timed is a stock Llama of the shape, and of a large one its parts."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from conftest import tiny_config
from llamita import checkpoints
from llamita.prune import latency

SHAPE = checkpoints.shape_of(tiny_config())


def stopwatch(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[latency.Stopwatch, list[Any]]:
    """One whose answers take no time of their own: the model that each is given is noted, and the clock is ours."""
    watch = latency.Stopwatch(tiny_config(), latency.LatencyConfig(**settings), dtype=torch.float32, device="cpu")
    models: list[Any] = []
    monkeypatch.setattr(watch, "_answer", lambda model, prompt: models.append(model))
    monkeypatch.setattr(latency.Stopwatch, "_seconds", lambda self, action: (action(), seconds(models[-1]))[1])
    return watch, models


def seconds(model: Any) -> float:
    """A clock that is linear in layers, as large models are taken to be."""
    return 0.002 + 0.001 * model.config.num_hidden_layers * model.config.intermediate_size


def test_a_small_model_is_timed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, models = stopwatch(monkeypatch, warmup=2, repeats=3)
    assert watch.milliseconds(SHAPE) == pytest.approx(2 + 3 * 96)
    assert len(models) == 5
    assert checkpoints.shape_of(models[0].config) == SHAPE
    assert sum(parameter.numel() for parameter in models[0].parameters()) == SHAPE.num_parameters


def test_a_large_model_is_its_ends_and_so_many_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is timed once, however many shapes share it."""
    watch, models = stopwatch(monkeypatch, warmup=0, repeats=1, whole_parameters=0)
    assert watch.milliseconds(SHAPE) == pytest.approx(2 + 3 * 96)
    assert [model.config.num_hidden_layers for model in models] == [0, 1]
    assert watch.milliseconds(dataclasses.replace(SHAPE, num_hidden_layers=2)) == pytest.approx(2 + 2 * 96)
    assert len(models) == 2
    assert watch.milliseconds(dataclasses.replace(SHAPE, intermediate_size=32)) == pytest.approx(2 + 3 * 32)
    assert len(models) == 3


def test_more_tokens_take_longer() -> None:
    """The clock itself: 64 tokens one after the other against one."""
    times = []
    for new_tokens in (1, 64):
        settings = latency.LatencyConfig(prompt=4, new_tokens=new_tokens, repeats=3)
        watch = latency.Stopwatch(tiny_config(), settings, dtype=torch.float32, device="cpu")
        times.append(watch.milliseconds(SHAPE))
    assert times[1] > 4 * times[0] > 0


@pytest.mark.parametrize("setting", ["batch", "prompt", "new_tokens", "repeats"])
def test_nothing_cannot_be_timed(setting: str) -> None:
    with pytest.raises(ValueError, match=f"latency.{setting} must be at least 1, got 0"):
        latency.LatencyConfig(**{setting: 0})
