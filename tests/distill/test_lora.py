"""Adapters: they alone are trained and saved, and what is published is a stock Llama that computes the same."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from transformers import LlamaForCausalLM

from llamita import checkpoints, runs
from llamita.adapters import LoraConfig, Projection
from llamita.distill import engines, fused, lora, losses, student
from llamita.metrics import read_metrics
from llamita.shapes import SIZES


def merged(model: LlamaForCausalLM, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A stock Llama with the weights that would be published."""
    stock = toy.model(9, tied=model.config.tie_word_embeddings).to(dtype)
    tensors = {name: tensor.to(dtype) for name, tensor in lora.tensors(model)}
    missing, unexpected = stock.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    return stock


def stirred(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """With an adapter that corrects something: at the start B is zero."""
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train(False)


@pytest.mark.parametrize("targets", [list(Projection), [Projection.q_proj, Projection.down_proj]], ids=len)
@torch.no_grad()
def test_a_merged_student_says_what_its_adapters_say(targets: list[Projection]) -> None:
    adapted = stirred(toy.adapted(targets=targets, alpha=3.0))
    ids = torch.arange(20).reshape(2, 10)
    assert not torch.allclose(adapted(ids).logits, toy.model(1)(ids).logits, atol=0.1)
    torch.testing.assert_close(merged(adapted)(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_correction_too_small_for_one_rounding_is_not_lost_in_two() -> None:
    """W + 2 B A in float64, rounded to bfloat16 once."""
    adapted = stirred(toy.adapted())
    layer: Any = adapted.model.layers[1].mlp.down_proj
    a, b = layer.lora_A.default.weight.double(), layer.lora_B.default.weight.double()
    wanted = (layer.base_layer.weight.double() + 2 * b @ a).bfloat16()
    got = dict(lora.tensors(adapted))["model.layers.1.mlp.down_proj.weight"].bfloat16()
    assert (got != wanted).float().mean() < 0.01
    twice = layer.base_layer.weight.bfloat16() + (2 * b @ a).bfloat16()
    assert (twice != wanted).float().mean() > 0.1


def test_adapters_begin_by_changing_nothing_and_are_drawn_from_the_seed() -> None:
    ids = torch.arange(10)[None]
    first, again, other = toy.adapted(), toy.adapted(), toy.model(1)
    lora.adapt(other, LoraConfig(rank=4), seed=4)
    torch.testing.assert_close(first(ids).logits, toy.model(1)(ids).logits, rtol=0, atol=0)
    a = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(a), again.get_parameter(a))
    assert not torch.equal(first.get_parameter(a), other.get_parameter(a))


@pytest.mark.parametrize("targets", [list(Projection), [Projection.k_proj]], ids=len)
def test_the_parameters_counted_are_those_trained(targets: list[Projection]) -> None:
    adapted = toy.adapted(targets=targets)
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    shape = checkpoints.shape_of(adapted.config)
    assert LoraConfig(rank=4, targets=targets).num_parameters(shape) == trained


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_trained_and_saved_beside_the_adapters(tied: bool, tmp_path: Path) -> None:
    model = toy.model(1, tied=tied)
    before = model.model.embed_tokens.weight.detach().clone()
    config = LoraConfig(rank=4, embeddings=True)
    lora.adapt(model, config, seed=3)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert {name for name in trained if not lora.is_adapter(name)} == ends
    counted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert config.num_parameters(checkpoints.shape_of(model.config)) == counted
    job = toy.go(tmp_path / "run", student=model, steps=4)
    published = dict(job.engine.tensors())
    assert not torch.equal(published["model.embed_tokens.weight"], before)
    with checkpoints.safe_open(tmp_path / "run/checkpoints/step-4/weights.safetensors", "pt") as weights:
        assert set(weights.keys()) == trained


def test_only_adapters_move_and_only_they_are_saved(tmp_path: Path) -> None:
    job = toy.go(tmp_path / "run", student=toy.adapted(), steps=4)
    before = toy.model(1).state_dict()
    model = job.engine.student  # type: ignore[attr-defined]
    for name, parameter in model.named_parameters():
        if not lora.is_adapter(name):
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
        elif ".lora_B." in name:
            assert parameter.abs().max() > 0
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    step = tmp_path / "run/checkpoints/step-4"
    with checkpoints.safe_open(step / "weights.safetensors", "pt") as weights:
        assert all(map(lora.is_adapter, weights.keys()))
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) == trained  # noqa: SIM118
    assert job.engine.checkpoint_bytes == 12 * trained
    assert [name for name, _ in job.engine.tensors()] == [name for name, _ in toy.model(1).named_parameters()]


def test_adapters_move_the_student_towards_its_teacher(tmp_path: Path) -> None:
    toy.go(tmp_path / "run", student=toy.adapted(rank=8), steps=30, validation_every=0, loss=losses.LossConfig())
    curve = [row["val/held/kd"] for row in read_metrics(tmp_path / "run") if "val/held/kd" in row]
    assert curve[-1] < 0.9 * curve[0]


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}], ids=str)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = toy.go(tmp_path / "whole", student=toy.adapted(**options))
    source = toy.Interrupted(batch=8, micro=8)
    with contextlib.suppress(runs.Stopped):
        toy.go(tmp_path / "parts", student=toy.adapted(**options), source=source)
    parts = toy.go(tmp_path / "parts", student=toy.adapted(**options))
    assert toy.digest(parts.engine) == toy.digest(whole.engine)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    """The embedding rests, so no input of a layer has a gradient before the first adapter."""
    plain = toy.go(tmp_path / "plain", student=toy.adapted())
    again = toy.go(tmp_path / "again", student=toy.adapted(), activation_checkpointing=True)
    for name, value in toy.weights(again.engine).items():
        torch.testing.assert_close(value, toy.weights(plain.engine)[name], rtol=1e-5, atol=1e-6)


def test_a_resting_head_gets_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither computed nor stored: at 128,256 ids it would be a gigabyte and a third of the loss's products."""
    products: list[tuple[int, ...]] = []
    add = fused._add_matmul
    monkeypatch.setattr(fused, "_add_matmul", lambda total, a, b: (products.append(total.shape), add(total, a, b)))
    for model, wanted in ((toy.adapted(), 0), (toy.model(1), 1)):
        products.clear()
        module = engines.Student(model, losses.LossConfig(), torch.float32, autocast=False)
        work = engines.MicroBatch(toy.rows(4), None, [])
        module(work, False)[0].backward()
        assert len(products) == wanted
        assert (model.lm_head.weight.grad is not None) == bool(wanted)
        assert any(parameter.grad is not None for parameter in model.model.parameters())


def test_the_student_of_a_directory_gets_them_beside_resting_bfloat16_weights(tmp_path: Path) -> None:
    toy.model(1).save_pretrained(tmp_path / "model")
    config = student.StudentConfig(path=tmp_path / "model", lora=LoraConfig(rank=2))
    model = student.load(
        config,
        checkpoints.load_config(tmp_path / "model"),
        seed=0,
        attention=student.Attention.sdpa,
        device=torch.device("cpu"),
        resting=torch.bfloat16,
    )
    kinds = {(parameter.dtype, parameter.requires_grad) for parameter in model.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    module = engines.Student(model.train(), losses.LossConfig(), torch.bfloat16, autocast=True)
    loss, _ = module(engines.MicroBatch(toy.rows(4), None, []), True)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("fields", [{"init": student.Init.random, "path": Path("x")}, {"path": None}], ids=str)
def test_adapters_need_weights_to_correct(fields: dict[str, Any]) -> None:
    sizes = dict.fromkeys(SIZES, 8) if fields["path"] is None else {}
    config = student.StudentConfig(lora=LoraConfig(rank=2), shape=student.ShapeConfig(**sizes), **fields)
    with pytest.raises(ValueError, match=r"student\.lora\.rank=2 corrects weights that are there"):
        config.check()
