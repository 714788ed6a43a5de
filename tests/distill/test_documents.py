"""Attention document by document is attention under the document mask, in value and gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toy
from transformers import LlamaForCausalLM

from llamita.distill import documents
from llamita.distill.teachers import Attention, Batch, document_mask, last_hidden
from llamita.metrics import read_metrics


def test_lengths_are_the_runs_of_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [3, 4, 0, 0, 0, 1]])
    assert documents.lengths(positions) == [[3, 2, 1], [6], [2, 1, 1, 2]]


def batches() -> list[Batch]:
    """Rows cut in different places, in the same place, and not at all."""
    packed = toy.rows(5, 30)
    alike = {name: value[:1].expand(3, -1) for name, value in packed.items()}
    whole = packed | {"position_ids": torch.arange(30).expand(5, -1)}
    return [packed, alike, whole]


@pytest.mark.parametrize("batch", batches(), ids=("packed", "alike", "whole"))
@pytest.mark.parametrize("heads", [1, 2], ids=("grouped", "ungrouped"))
def test_each_document_at_a_time_equals_all_under_a_mask(batch: Batch, heads: int) -> None:
    results = []
    for kind in (Attention.sdpa, Attention.documents):
        model: LlamaForCausalLM = toy.model(1, num_key_value_heads=heads).double()
        model.config._attn_implementation = kind.value
        mask = document_mask(batch["position_ids"]) if kind is Attention.sdpa else None
        hidden = last_hidden(model, batch, mask)
        hidden.square().sum().backward()
        results.append([hidden, *(p.grad for p in model.model.parameters())])
    for masked, apart in zip(*results, strict=True):
        torch.testing.assert_close(apart, masked, rtol=1e-5, atol=1e-5)  # the rotary angles are float32


@pytest.mark.parametrize("again", [False, True], ids=("kept", "computed again"))
def test_training_is_the_same(again: bool, tmp_path: Path) -> None:
    options = {"micro_batch_rows": 2, "activation_checkpointing": again}
    curves = []
    for kind in (Attention.sdpa, Attention.documents):
        student, teacher = toy.model(1), toy.model(2, hidden=24, tied=False)
        for model in (student, teacher):
            model.config._attn_implementation = kind.value
        out = tmp_path / kind.value
        toy.go(out, student=student, teachers=[toy.ResidentTeacher("big", teacher)], attention=kind, **options)
        curves.append({row["step"]: row["train/loss"] for row in read_metrics(out) if "train/loss" in row})
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert len(curves[0]) == 6
