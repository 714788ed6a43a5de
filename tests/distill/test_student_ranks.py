"""Adapters and matched layers on two processes, under DDP and ZeRO, stopped on the way and gone on with: as on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from llamita.distill import lora
from llamita.metrics import read_metrics

LORA = ("lora_ddp", "lora_zero1", "lora_zero2", "lora_zero2_resume", "lora_zero3_resume", "lora_zero3_again")
HIDDEN = ("hidden_ddp", "hidden_zero2_resume", "hidden_zero3_resume_again")
IN_TURN = sorted((*LORA, *HIDDEN), key=lambda phase: not phase.endswith("ddp"))
"""A process that made accelerate use DeepSpeed once does not get DDP from it any more, so DDP comes first."""
MATCHED = {"lora": ("train/loss",), "hidden": ("train/loss", "kd/hidden")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks say about each phase."""
    return toy.two_ranks("student_ranks.py", tmp_path_factory.mktemp("ranks"), *IN_TURN)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[dict[str, Any]], Tensor]]:
    """The log and the weights of one process, for each kind."""
    found = {}
    for kind, given in {"lora": {"student": toy.adapted()}, "hidden": toy.matched()}.items():
        out = tmp_path_factory.mktemp("alone") / kind
        job = toy.go(out, **given)
        weights = torch.cat([tensor.flatten() for tensor in toy.weights(job.engine).values()])
        found[kind] = (read_metrics(out), weights)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("phase", [*LORA, *HIDDEN])
def test_two_processes_learn_what_one_learns(
    phase: str, results: list[dict[str, Any]], alone: dict[str, tuple[list[dict[str, Any]], Tensor]]
) -> None:
    kind = phase.partition("_")[0]
    first, second = (result[phase] for result in results)
    assert first["equal_ranks"]
    assert first["digest"] == second["digest"]
    for metric in MATCHED[kind]:
        curves = [
            {row["step"]: row[metric] for row in rows if metric in row} for rows in (first["rows"], alone[kind][0])
        ]
        assert curves[0].keys() == curves[1].keys()
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    torch.testing.assert_close(torch.tensor(first["weights"]), alone[kind][1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("phase", [phase for phase in LORA if "zero" in phase])
def test_a_checkpoint_holds_no_weight_that_rests(phase: str, results: list[dict[str, Any]]) -> None:
    trained = {name for name, _ in toy.adapted().named_parameters() if lora.is_adapter(name)}
    assert set(results[0][phase]["stored"]) == trained
