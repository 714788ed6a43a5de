"""Pieces of a teacher: what is read from the files, and sums that find what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from llamita import checkpoints
from llamita.distill import sharded
from llamita.distill.saved import Saved
from llamita.distill.teachers import Attention, ResidentTeacher, document_mask
from llamita.metrics import read_metrics

PLAIN: Any = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": Attention.sdpa}


def saved(folder: Path, **model: Any) -> Path:
    checkpoints.save_model(toy.model(3, **model), folder, source=None, provenance={})
    return folder


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("tied", [True, False])
def test_pieces_laid_end_to_end_are_the_tensors_of_the_files(world: int, tied: bool, tmp_path: Path) -> None:
    weights = checkpoints.Weights(saved(tmp_path, tied=tied))
    units = sharded.units_of(weights)
    assert [unit.label for unit in units] == [sharded.EMBEDDING] * (not tied) + ["model.layers.0", "model.layers.1"]
    for unit in units:
        length = -(-unit.numel // world)
        pieces = [torch.full((length,), torch.nan) for _ in range(world)]
        for rank, piece in enumerate(pieces):
            sharded.read_piece(weights, unit, piece, rank * length)
        for name, view in unit.views(torch.cat(pieces)).items():
            assert torch.equal(view, weights[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_of_parts_add_up_and_are_those_of_plain_integers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(1000).to(dtype)
    whole = sharded.checksum(values)
    monkeypatch.setattr(sharded, "CHECKSUM_VALUES", 64)
    assert torch.equal(sharded.checksum(values[:333]) + sharded.checksum(values[333:], 333), whole)
    bits = values.view(torch.int32 if dtype is torch.float32 else torch.int16).tolist()
    assert whole.tolist() == [sum(bits), sum((index % 65521 + 1) * bit for index, bit in enumerate(bits))]


def test_a_sum_knows_a_flipped_bit_two_swapped_values_and_a_lost_sign_of_zero() -> None:
    values = torch.randn(100, dtype=torch.bfloat16)
    values[7] = 0.0
    right = sharded.checksum(values)
    flipped, swapped, signed = values.clone(), values.clone(), values.clone()
    flipped.view(torch.int16)[3] ^= 1
    swapped[[10, 60]] = values[[60, 10]]
    signed[7] = -0.0
    for wrong in (flipped, swapped, signed):
        assert not torch.equal(sharded.checksum(wrong), right)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_layers_that_take_turns_in_two_buffers_are_the_model(layers: int, tied: bool, tmp_path: Path) -> None:
    """Again and again: the next forward begins in a buffer that the last one has used."""
    path = saved(tmp_path, tied=tied, num_hidden_layers=layers)
    spread = sharded.ShardedTeacher.load("big", path, 1.0, **PLAIN)
    whole = ResidentTeacher.load("big", path, 1.0, **PLAIN)
    for seed in range(3):
        batch = toy.rows(3, seed=seed)
        mask = document_mask(batch["position_ids"])
        got, expected = spread.states(batch, mask), whole.states(batch, mask)
        assert torch.equal(got.hidden, expected.hidden)
        assert torch.equal(got.head, expected.head)
        assert not got.hidden.requires_grad


def test_values_that_are_not_the_files_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = sharded.read_piece

    def damaged(weights: checkpoints.Weights, unit: sharded.Unit, into: torch.Tensor, first: int) -> None:
        read(weights, unit, into, first)
        into.view(torch.int32)[5] ^= 1

    monkeypatch.setattr(sharded, "read_piece", damaged)
    with pytest.raises(ValueError, match=r"teacher big: 3 parts gathered .* are not those of .*embed_tokens.weight"):
        sharded.ShardedTeacher.load("big", saved(tmp_path, tied=False), 1.0, **PLAIN)


def test_a_teacher_in_pieces_teaches_what_it_teaches_whole_and_is_in_no_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path / "teacher", hidden=24, tied=False)
    curves = []
    for kind in (sharded.ShardedTeacher, ResidentTeacher):
        teacher = kind.load("big", path, 1.0, **PLAIN)
        job = toy.go(tmp_path / kind.__name__, teachers=[teacher])
        curves.append([row["train/loss"] for row in read_metrics(job.run.path) if "train/loss" in row])
        assert all(teacher.model not in model.modules() for model in job.accelerator._models)
        stored = dict(Saved(job.run.path / "checkpoints/step-6").tensors())
        assert stored.keys() == dict(job.engine.tensors()).keys()
    assert curves[0] == curves[1]
