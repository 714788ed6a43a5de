"""What the benchmarks of the cache print is what was measured."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import recovery
from llamita.distill.losses import IGNORE, TeacherStates
from test_benchmarks import benchmark


def test_the_squared_error_is_that_of_whole_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("cache")
    torch.manual_seed(0)
    hidden, head = torch.randn(5, 4), torch.randn(11, 4)
    labels = torch.tensor([[IGNORE, 1, 2, IGNORE], [IGNORE, 3, 4, 5]])
    found = {
        "ids": torch.tensor([0, 3, 10, 1, 2, 9]),
        "values": torch.tensor([0.5, 0.5, 1.0, 1.0, 1.0, 0.7]),
        "lengths": torch.tensor([[2, 1, 0, 0], [1, 1, 1, 0]]),
    }
    table = torch.zeros(5, 11)
    table[[0, 0, 1, 2, 3, 4], found["ids"]] = found["values"]
    wanted = (table - (hidden @ head.T).softmax(-1)).square().sum()
    worker = SimpleNamespace(states=lambda *_: TeacherStates(hidden, head))
    got = module.Bench.squared_error(None, worker, {"labels": labels}, found)
    assert got == pytest.approx(wanted.item(), rel=1e-5)


def row(method: str, seed: int, loss: float) -> dict[str, Any]:
    cached = method.startswith("systematic")
    return {
        "method": method,
        "seed": seed,
        "loss": loss,
        "bits_per_byte": 1.0,
        "tokens": 1000,
        "entries_per_token": 12.0 * cached,
        "bytes_per_token": 37.0 * cached,
    }


def test_losses_are_means_over_seeds_and_held_against_the_online_teacher() -> None:
    rows = [row("online", 0, 3.0), row("online", 1, 5.0), row("systematic, N = 50", 0, 4.02)]
    lines = recovery.table(rows).splitlines()
    assert lines[2] == "| online | 0.0 | 0.0 | 4.0000 | +0.00% | 1.0000 | 2 | 1,000 |"
    assert lines[3] == "| systematic, N = 50 | 12.0 | 37.0 | 4.0200 | +0.50% | 1.0000 | 1 | 1,000 |"


def test_top_k_has_the_entries_of_the_default_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Namespace(teacher=Path("a"), second=Path("b"), samples=[50, 12], out=Path("out"))
    bench = recovery.Bench(told)
    monkeypatch.setattr(bench, "entries", lambda stored: {"systematic": 31}[stored.sampler])
    methods = {method.name: method for method in bench.methods()}
    assert {"cross-entropy", "online", "second online", "both online", "both cached"} <= methods.keys()
    assert methods["top-k, k = 31"].stored[0].samples == 31
    assert [one.teacher for one in methods["both cached"].stored] == [Path("a"), Path("b")]
    assert methods["random, N = 12"].stored[0].samples == 12
