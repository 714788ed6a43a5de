"""Masks, frozen teachers, and vocabularies that must agree."""

from __future__ import annotations

import itertools

import pytest
import torch
import toy

from llamita.distill.teachers import ResidentTeacher, Vocabulary, check_vocabularies, document_mask, last_hidden


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
