"""Matched hidden states: the distance in closed form, what it trains, and what is kept of it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from llamita import checkpoints, runs
from llamita.distill import hidden
from llamita.distill.hidden import Distance, HiddenConfig, Matching
from llamita.distill.losses import LossConfig
from llamita.metrics import read_metrics


@pytest.mark.parametrize("distance", Distance)
def test_the_distance_is_its_closed_form(distance: Distance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over supervised positions, averaged over layers; chunks of two positions change nothing."""
    monkeypatch.setattr(hidden, "CHUNK_POSITIONS", 2)
    torch.manual_seed(0)
    student = [torch.randn(2, 5, 4) for _ in range(2)]
    teacher = [100 * torch.randn(2, 5, 6) for _ in range(2)]
    picked = torch.tensor([[True, False, True, True], [False, False, True, True]])
    module = Matching(HiddenConfig(weight=1.0, layers=[0, 1], distance=distance), [0, 1], 4, 6)
    wanted = 0.0
    for projection, mine, theirs in zip(module.projections, student, teacher, strict=True):
        assert isinstance(projection, nn.Linear)
        for row, position in picked.nonzero().tolist():
            s, t = mine[row, position].double(), theirs[row, position].double()
            s = projection.weight.double() @ (s / s.square().mean().sqrt())
            t = t / t.square().mean().sqrt()
            mse, cosine = (s - t).square().mean(), 1 - s @ t / s.norm() / t.norm()
            wanted += (mse if distance is Distance.mse else cosine).item() / 2
    assert module(student, teacher, picked).item() == pytest.approx(wanted, rel=1e-5)


def test_equal_states_are_at_no_distance() -> None:
    states = [torch.randn(2, 5, 4)]
    module = Matching(HiddenConfig(weight=1.0, layers=[0]), [0], 4, 4)
    picked = torch.ones(2, 4, dtype=torch.bool)
    assert module(states, states, picked).item() == pytest.approx(0, abs=1e-6)
    assert module(states, [3 * states[0]], picked).item() == pytest.approx(0, abs=1e-6)


def test_a_batch_without_labels_gives_zero_gradients_and_not_none() -> None:
    module = Matching(HiddenConfig(weight=1.0, layers=[0]), [0], 4, 6)
    module([torch.randn(2, 5, 4)], [torch.randn(2, 5, 6)], torch.zeros(2, 4, dtype=torch.bool)).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


def test_what_is_captured_is_what_the_layers_give() -> None:
    model, batch = toy.model(1, num_hidden_layers=3), toy.rows(2)
    ids = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with hidden.captured(model, [2, 0]) as states:
        model(**ids, use_cache=False)
    assert not any(layer._forward_hooks for layer in model.model.layers)
    wanted = model(**ids, use_cache=False, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[1], wanted[1])
    torch.testing.assert_close(model.model.norm(states[0]), wanted[-1])


def test_the_loss_holds_the_distance_and_training_lessens_it(tmp_path: Path) -> None:
    arguments = toy.matched()
    loss = LossConfig()
    toy.go(tmp_path / "run", steps=30, validation_every=0, loss=loss, **arguments)
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    for row in rows:
        assert row["train/loss"] == pytest.approx(row["train/kd"] + 0.5 * row["kd/hidden"], rel=1e-5)
    assert rows[-1]["kd/hidden"] < 0.8 * rows[0]["kd/hidden"]
    assert any("val/held/hidden" in row for row in read_metrics(tmp_path / "run"))


def test_projections_are_saved_and_not_published(tmp_path: Path) -> None:
    job = toy.go(tmp_path / "run", steps=2, **toy.matched())
    with checkpoints.safe_open(tmp_path / "run/checkpoints/step-2/weights.safetensors", "pt") as weights:
        names = {name for name in weights.keys() if name.startswith("matching.")}  # noqa: SIM118
    assert names == {"matching.projections.0.weight", "matching.projections.1.weight"}
    assert [name for name, _ in job.engine.tensors()] == [name for name, _ in toy.model(1).named_parameters()]


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"micro_batch_rows": 2}], ids=str)
def test_stopping_recomputing_and_splitting_change_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    whole = toy.go(tmp_path / "whole", **toy.matched())
    source = toy.Interrupted(batch=8, micro=options.get("micro_batch_rows", 8))
    with contextlib.suppress(runs.Stopped):
        toy.go(tmp_path / "parts", source=source, **toy.matched(), **options)
    parts = toy.go(tmp_path / "parts", **toy.matched(), **options)
    if not options:
        assert toy.digest(parts.engine) == toy.digest(whole.engine)
    for name, value in toy.weights(parts.engine).items():
        torch.testing.assert_close(value, toy.weights(whole.engine)[name], rtol=1e-4, atol=1e-6)


def test_a_plan_says_which_layer_was_which() -> None:
    assert hidden.layer_map(3, 3, None) == [0, 1, 2]
    plan = {"layers": torch.tensor([0, 3, 5])}
    assert HiddenConfig(weight=1.0, layers=[2, 0]).pairs(hidden.layer_map(3, 6, plan)) == {2: 5, 0: 0}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hidden.layer_map(2, 3, None), "has no pruning plan"),
        (lambda: hidden.layer_map(3, 5, {"layers": torch.tensor([0, 3, 5])}), "it is the plan of others"),
        (lambda: HiddenConfig(weight=1.0, layers=[3]).pairs([0, 1, 2]), r"has layers 0\.\.2, got \[3\]"),
        (lambda: HiddenConfig(weight=1.0), r"needs loss\.hidden\.layers"),
        (lambda: HiddenConfig(weight=-1.0), r"loss\.hidden\.weight must be >= 0"),
        (lambda: HiddenConfig(weight=1.0, layers=[1, 1]), r"must be different layers"),
        (lambda: HiddenConfig(layers=[1]), r"need loss\.hidden\.weight above 0"),
        (
            lambda: LossConfig(hidden=HiddenConfig(weight=1.0, layers=[0])).check_without_teacher(),
            r"loss\.hidden\.weight=1\.0 needs a teacher",
        ),
        (
            lambda: Matching(HiddenConfig(weight=1.0, layers=[0]), [0], 4, 4)([], [], torch.ones(1, 1)),
            "gives the states of 0 layers, 1 are matched",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
