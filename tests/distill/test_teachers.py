"""Masks, frozen teachers, and vocabularies that must agree."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from llamita import runs
from llamita.distill.teachers import (
    PlacementConfig,
    ResidentTeacher,
    Storage,
    TeacherConfig,
    Vocabulary,
    check_settings,
    check_vocabularies,
    document_mask,
    last_hidden,
)
from llamita.metrics import read_metrics


def test_a_document_in_a_packed_row_has_the_hidden_states_that_it_has_alone() -> None:
    model = toy.model(0)
    batch = toy.rows(4)
    packed = last_hidden(model, batch, document_mask(batch["position_ids"]))
    for row in range(4):
        starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), 12]
        for first, last in itertools.pairwise(starts):
            part = {key: value[row : row + 1, first:last] for key, value in batch.items()}
            torch.testing.assert_close(last_hidden(model, part, None)[0], packed[row, first:last])


def test_the_mask_is_that_of_transformers() -> None:
    model, batch = toy.model(0), toy.rows(4)
    ours = last_hidden(model, batch, document_mask(batch["position_ids"]))
    torch.testing.assert_close(ours, last_hidden(model, batch, None), rtol=0, atol=0)


def test_flash_attention_gets_one_row_because_it_finds_documents_in_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = toy.model(0), toy.rows(4)
    expected, forward, shapes = last_hidden(model, batch, None), model.model.forward, []

    def on_a_cpu(**inputs: torch.Tensor) -> object:
        shapes.append(tuple(inputs["input_ids"].shape))
        model.config._attn_implementation = "sdpa"
        return forward(**inputs)

    monkeypatch.setattr(model.model, "forward", on_a_cpu)
    model.config._attn_implementation = "flash_attention_2"
    torch.testing.assert_close(last_hidden(model, batch, None), expected)
    assert shapes == [(1, 48)]


def test_rows_of_one_document_need_no_mask() -> None:
    assert document_mask(torch.arange(5).expand(2, 5)) is None
    assert document_mask(torch.tensor([[0, 1, 0], [0, 1, 2]])) is not None


def test_a_document_of_one_token_is_cut_off_on_both_sides() -> None:
    mask = document_mask(torch.tensor([[0, 1, 0, 0, 1]]))
    assert mask is not None
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_a_teacher_gives_no_gradient_and_its_head_makes_its_logits() -> None:
    model, batch = toy.model(0, tied=False), toy.rows(2)
    teacher = ResidentTeacher("big", model, 2.0)
    states = teacher.states(batch, document_mask(batch["position_ids"]))
    assert not states.hidden.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    torch.testing.assert_close(states.hidden @ states.head.T, logits)


def test_ids_must_mean_the_same_to_data_student_and_teachers() -> None:
    data = Vocabulary(100, "same", "data")
    student = Vocabulary(104, "same", "student")
    check_vocabularies(data, [student, Vocabulary(128, "same", "big")])
    check_vocabularies(data, [])
    with pytest.raises(ValueError, match="tokenizer of big is not that of data"):
        check_vocabularies(data, [student, Vocabulary(104, "other", "big")])
    with pytest.raises(ValueError, match="small has a vocabulary of 90, data uses 100 ids"):
        check_vocabularies(data, [Vocabulary(90, "same", "small")])


def test_a_share_goes_straight_from_its_begin_to_its_end() -> None:
    moving = TeacherConfig(path=Path("x"), weight=1.0, weight_end=0.2)
    assert [moving.share(step, 4) for step in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert {TeacherConfig(path=Path("x"), weight=3.0).share(step, 4) for step in range(5)} == {3.0}


@pytest.mark.parametrize("name", ["weight", "weight_end", "max_kl"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_settings_of_a_teacher_without_meaning_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"teachers.big.{name} must be > 0 and finite"):
        check_settings({"big": TeacherConfig(path=Path("x"), **{name: value})})


def test_a_setting_that_nothing_would_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_kl=0.2 needs weights=int8 or nf4, got full"):
        PlacementConfig(path=Path("x"), max_kl=0.2).check("teacher")
    with pytest.raises(ValueError, match=r"teachers.big.weight_end=0.5 needs another teacher to share with"):
        check_settings({"big": TeacherConfig(path=Path("x"), weight_end=0.5)})
    with pytest.raises(ValueError, match=r"teachers.big.placement=resident .* say how a teacher is run"):
        check_settings({"big": TeacherConfig(cache=Path("x"), weights=Storage.int8)})


def go(out: Path, **arguments: Any) -> list[dict[str, Any]]:
    """Two teachers, one of whose shares moves; rows of the log."""
    given = [ResidentTeacher(name, toy.model(seed, tied=False)) for name, seed in (("big", 2), ("small", 4))]
    configs = {"big": TeacherConfig(path=out, weight=2.0, weight_end=0.5), "small": TeacherConfig(path=out)}
    with runs.start(out, "toy", {}, runs.RunConfig()) as run, contextlib.suppress(runs.Stopped):
        job = toy.trainer(run, teachers=given, **arguments)
        job.shares = {name: config.share for name, config in configs.items()}
        job.train()
    return read_metrics(out)


def test_moving_shares_are_those_of_the_step_and_a_restart_goes_on_with_them(tmp_path: Path) -> None:
    rows = [row for row in go(tmp_path / "whole") if "train/loss" in row]
    for row in rows:
        share = 2.0 - 1.5 * row["step"] / 6
        assert row["kd/share_big"] == pytest.approx(share / (share + 1))
        assert row["kd/share_big"] + row["kd/share_small"] == pytest.approx(1)
    go(tmp_path / "stopped", source=toy.Interrupted(batch=8, micro=8))
    again = [row for row in go(tmp_path / "stopped") if "train/loss" in row]
    assert [row["train/loss"] for row in again] == [row["train/loss"] for row in rows]
