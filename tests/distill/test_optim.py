"""Schedules in closed form, and what is decayed and clipped."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import toy

from llamita.distill.optim import OptimConfig, Schedule, adamw, clip, learning_rate


def rates(steps: int = 100, **settings: object) -> list[float]:
    config = OptimConfig(**{"learning_rate": 2.0, "warmup_steps": 10, **settings})
    return [learning_rate(step, steps, config) for step in range(1, steps + 1)]


@pytest.mark.parametrize("schedule", list(Schedule))
def test_the_rate_rises_linearly_to_the_peak(schedule: Schedule) -> None:
    assert rates(schedule=schedule)[:10] == pytest.approx([0.2 * step for step in range(1, 11)])


def test_cosine_is_halfway_down_halfway_through_and_ends_at_the_final_fraction() -> None:
    got = rates()
    assert got[54] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert got[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(got[10:]))


def test_wsd_is_constant_and_then_falls_like_one_minus_the_root() -> None:
    got = rates(schedule=Schedule.wsd, decay_fraction=0.25, final_fraction=0.0)
    assert got[9:75] == [2.0] * 66
    assert got[75:] == pytest.approx([2 * (1 - math.sqrt(i / 25)) for i in range(1, 26)])


def test_wsd_falls_no_further_back_than_the_warm_up_ends() -> None:
    got = rates(schedule=Schedule.wsd, decay_fraction=1.0, final_fraction=0.0)
    assert got[9] == 2.0
    assert got[10:] == pytest.approx([2 * (1 - math.sqrt(i / 90)) for i in range(1, 91)])


def test_wsd_without_a_decay_stays_up() -> None:
    assert rates(schedule=Schedule.wsd, decay_fraction=0.0)[9:] == [2.0] * 91


def test_constant_stays() -> None:
    assert rates(schedule=Schedule.constant)[9:] == [2.0] * 91


@pytest.mark.parametrize("schedule", list(Schedule))
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_runs_shorter_than_their_warm_up_have_a_rate_at_every_step(schedule: Schedule, steps: int) -> None:
    assert all(0 < rate <= 2 for rate in rates(steps, schedule=schedule, warmup_steps=1000))


def test_norms_and_embeddings_are_not_decayed_and_every_parameter_is_there_once() -> None:
    for tied in (False, True):
        model = toy.model(0, tied=tied)
        decayed, kept = adamw(model, OptimConfig()).param_groups
        names = {id(p): name for name, p in model.named_parameters()}
        assert decayed["weight_decay"] == 0.1
        assert kept["weight_decay"] == 0
        assert sorted(names.values()) == sorted(names[id(p)] for p in [*decayed["params"], *kept["params"]])
        assert all("norm" in names[id(p)] or "embed" in names[id(p)] for p in kept["params"])
        assert ("lm_head.weight" in {names[id(p)] for p in decayed["params"]}) is not tied


def test_clipping_scales_to_the_largest_norm_and_leaves_smaller_gradients() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    for gradient, wanted in [((3.0, 4.0), (0.6, 0.8)), ((0.3, 0.4), (0.3, 0.4))]:
        parameter.grad = torch.tensor(gradient)
        assert clip([parameter], 1.0) == pytest.approx(math.hypot(*gradient))
        torch.testing.assert_close(parameter.grad, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("final_fraction", 1.5),
        ("beta2", 1.0),
        ("warmup_steps", -1),
        ("weight_decay", float("nan")),
        ("clip_norm", float("nan")),
    ],
)
def test_settings_without_meaning_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"optim\.{field} .*{value}"):
        OptimConfig(**{field: value})
