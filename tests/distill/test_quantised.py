"""Teachers in eight and four bits: what is stored, what it costs in nats, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch.nn import functional

from llamita import checkpoints, runs
from llamita.distill import placement, quantised
from llamita.distill.teachers import (
    Attention,
    Placement,
    PlacementConfig,
    Storage,
    TeacherConfig,
    document_mask,
    last_hidden,
)

PLAIN: Any = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": Attention.sdpa}
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
STORAGES = [Storage.int8, pytest.param(Storage.nf4, marks=needs_bitsandbytes)]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with matrices of more than one block."""
    out = tmp_path_factory.mktemp("teacher")
    model = toy.model(3, hidden=64, tied=request.param, intermediate_size=128)
    checkpoints.save_model(model, out, source=None, provenance={})
    return out


def test_eight_bits_are_wrong_by_half_a_step_at_most() -> None:
    weight = torch.randn(7, 33) * torch.logspace(-4, 3, 7)[:, None]
    weight[3] = 0
    layer = quantised.Int8Linear(weight)
    restored = layer(torch.eye(33)).T
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((restored - weight).abs() <= step / 2 * (1 + 1e-5)).all()
    assert layer.quantised.dtype is torch.int8
    assert layer.quantised.abs().max() == 127


@needs_bitsandbytes
def test_four_bits_are_sixteen_values_for_each_block() -> None:
    weight = torch.randn(8, 128)
    layer = quantised.Nf4Linear(weight)
    restored = layer(torch.eye(128)).T
    assert layer.packed.nbytes == weight.numel() / 2
    for block in restored.flatten().split(quantised.NF4_BLOCK):
        assert len(block.unique()) <= 16
    assert (restored - weight).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize(
    ("storage", "bytes_per_weight"), [(Storage.int8, 1), pytest.param(Storage.nf4, 0.5, marks=needs_bitsandbytes)]
)
def test_only_the_matrices_of_decoder_layers_are_quantised(
    path: Path, storage: Storage, bytes_per_weight: float
) -> None:
    whole, model = checkpoints.load_model(path), quantised.load(path, storage, **PLAIN)
    kept = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            assert name not in kept
        else:
            torch.testing.assert_close(kept[name], parameter, rtol=0, atol=0)
    matrices = sum(p.numel() for name, p in whole.named_parameters() if name.endswith("proj.weight"))
    stored = sum(b.nbytes for name, b in model.named_buffers() if name.endswith((".quantised", ".packed")))
    assert stored == bytes_per_weight * matrices


@pytest.mark.parametrize("storage", STORAGES)
def test_the_divergence_is_that_of_dense_logits(path: Path, storage: Storage) -> None:
    """Between the model whole in memory and the quantised one, in float64, over supervised positions."""
    model, whole, batch = quantised.load(path, storage, **PLAIN), checkpoints.load_model(path), toy.rows(3)
    total, count = quantised.divergence(model, path, [batch], dtype=torch.float32, device=torch.device("cpu"))
    mask, picked = document_mask(batch["position_ids"]), batch["labels"][:, 1:] != -100
    with torch.no_grad():
        full, ours = ((last_hidden(m, batch, mask) @ m.lm_head.weight.T)[:, :-1][picked] for m in (whole, model))
    log_p, log_q = (functional.log_softmax(logits.double(), -1) for logits in (full, ours))
    assert count == picked.sum()
    assert total == pytest.approx(functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item(), rel=1e-4)
    assert total / count > 1e-6


def test_layers_read_one_at_a_time_give_the_hidden_states_of_the_model(path: Path) -> None:
    model, batches = checkpoints.load_model(path), [toy.rows(2), toy.rows(3, seed=1)]
    got = quantised.full_states(path, batches, dtype=torch.float32, device=torch.device("cpu"))
    for batch, states in zip(batches, got, strict=True):
        torch.testing.assert_close(states, last_hidden(model, batch, document_mask(batch["position_ids"])))


def compare(path: Path, out: Path, **settings: Any) -> dict[str, float]:
    config = TeacherConfig(path=path, weights=Storage.int8, **settings)
    with runs.start(out, "toy", {}, runs.RunConfig()) as run:
        accelerator = toy.trainer(run).accelerator
        teacher = placement.load("big", config, **PLAIN)
        return placement.compare(
            [teacher], {"big": config}, [toy.rows(3)], processes=accelerator, dtype=torch.float32, run=run
        )


def test_the_cost_of_quantisation_is_measured_once_in_a_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compare(path, tmp_path / "run")
    assert 0 < first["teacher/kl_quantised_big"] < 0.1
    monkeypatch.setattr(placement.quantised, "divergence", None)
    assert compare(path, tmp_path / "run") == first
    with pytest.raises(ValueError, match=r"teachers.big.weights=int8 moves .* more than teachers.big.max_kl=1e-09"):
        compare(path, tmp_path / "run", max_kl=1e-9)


def test_a_teacher_that_quantisation_has_harmed_is_not_used_in_silence(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"teachers.big.weights=int8 moves .* more than teachers.big.max_kl=1e-09"):
        compare(path, tmp_path / "run", max_kl=1e-9)


def test_four_bits_without_the_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    quantised.check("teachers.big", Storage.int8)
    with pytest.raises(ValueError, match=r"teachers.big.weights=nf4 needs the package bitsandbytes"):
        quantised.check("teachers.big", Storage.nf4)


def test_spread_weights_are_not_quantised() -> None:
    with pytest.raises(ValueError, match=r"teacher.weights=int8 does not go with placement=zero3"):
        PlacementConfig(path=Path("x"), weights=Storage.int8, placement=Placement.zero3).check("teacher")


@pytest.mark.parametrize("config", [{"weights": Storage.int8}, {"placement": Placement.zero3}, {}])
@pytest.mark.parametrize(
    ("change", "message"), [("missing", "lacks 1 tensors: model.norm"), ("extra", "has no use for: stray")]
)
def test_missing_and_unexpected_tensors_are_fatal_however_a_teacher_is_placed(
    config: dict[str, Any], change: str, message: str, path: Path, tmp_path: Path
) -> None:
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors, metadata = checkpoints.read_tensors(path / "model.safetensors")
    if change == "missing":
        del tensors["model.norm.weight"]
    else:
        tensors["stray"] = torch.zeros(1)
    checkpoints.write_tensors(tmp_path / "model.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=message):
        placement.load("big", TeacherConfig(path=tmp_path, **config), **PLAIN)
