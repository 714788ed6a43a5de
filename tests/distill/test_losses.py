"""The fused loss against a dense oracle in float64, and the laws that hold for any divergence."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_loss import LENGTH, ROWS, VOCABULARY, dense, example, oracle
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from llamita.distill.losses import IGNORE, Divergence, LossConfig, TeacherStates, distillation_loss, statistics


def chunked(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr("llamita.distill.fused.Job.chunk_rows", lambda *_: (rows, max(1, rows // 2)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", list(Divergence))
@pytest.mark.parametrize("num_teachers", [1, 3])
def test_every_loss_and_gradient_is_that_of_the_dense_definition(
    kind: Divergence, temperature: float, num_teachers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, labels, teachers = example(num_teachers)
    for ce_weight, rows in [(0.0, 1), (0.3, 3), (0.3, 5), (0.0, 1000), (1.0, 4)]:
        chunked(monkeypatch, rows)
        config = LossConfig(divergence=kind, temperature=temperature, ce_weight=ce_weight, jsd_beta=0.3, skew=0.2)
        expected, ce = oracle(hidden, head, labels, teachers, config)
        want = torch.autograd.grad(expected, [hidden, head])
        loss, sums = distillation_loss(hidden, head, labels, teachers, config)
        got = torch.autograd.grad(2 * loss, [hidden, head])
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(sums[0], ce)
        torch.testing.assert_close(got, tuple(2 * gradient for gradient in want), rtol=1e-9, atol=1e-11)


def test_in_float32_the_gradients_of_64_chunks_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch, 1)
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 65, 32), torch.randn(301, 32)
    labels = torch.randint(301, (1, 65))
    teacher = TeacherStates(torch.randn(1, 65, 16), torch.randn(301, 16))
    config = LossConfig(ce_weight=0.2, temperature=2.0)
    want = [t.double().requires_grad_() for t in (hidden, head)]
    expected, _ = oracle(*want, labels, [TeacherStates(teacher.hidden.double(), teacher.head.double())], config)
    expected.backward()
    for dtype, tolerance in [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]:
        got = [t.clone().requires_grad_() for t in (hidden, head)]
        loss, _ = distillation_loss(*got, labels, [teacher], config, compute_dtype=dtype)
        loss.backward()
        assert abs(loss.item() / expected.item() - 1) < tolerance
        for a, b in zip(got, want, strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert a.grad.dtype == torch.float32
            assert (a.grad - b.grad).norm() < tolerance * b.grad.norm()


def test_no_teacher_is_language_modelling_whatever_the_weights() -> None:
    hidden, head, labels, _ = example()
    config = LossConfig(ce_weight=0.25, temperature=3.0)
    loss, _ = distillation_loss(hidden, head, labels, [], config)
    torch.testing.assert_close(loss, oracle(hidden, head, labels, [], config)[0])
    want = torch.autograd.grad(oracle(hidden, head, labels, [], config)[0], [hidden, head])
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, head]), want)


def test_a_tied_head_adds_its_gradient_to_that_of_the_embedding() -> None:
    _, head, labels, teachers = example()
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH))
    config = LossConfig(ce_weight=0.5)
    want = torch.autograd.grad(oracle(head[ids] * 0.1, head, labels, teachers, config)[0], head)
    loss, _ = distillation_loss(head[ids] * 0.1, head, labels, teachers, config)
    torch.testing.assert_close(torch.autograd.grad(loss, head), want)


@pytest.mark.parametrize("kind", list(Divergence))
def test_a_teacher_has_no_divergence_from_itself_and_no_gradient(kind: Divergence) -> None:
    hidden, head, labels, _ = example()
    twice = [TeacherStates(hidden.detach(), head.detach(), weight) for weight in (1.0, 2.0)]
    for teachers in (twice[:1], twice):
        loss, sums = distillation_loss(hidden, head, labels, teachers, LossConfig(divergence=kind, temperature=2.0))
        assert abs(loss.item()) < 1e-12
        for gradient in torch.autograd.grad(loss, [hidden, head]):
            # The derivative of total variation jumps at equality: the sign of a rounding error decides it.
            assert kind is Divergence.total_variation or gradient.abs().max() < 1e-12
        agree = sums[statistics(["a"]).index("top1_agree")]
        assert agree == (labels[:, 1:] != IGNORE).sum()


def test_the_mixture_of_teachers_has_the_gradient_of_the_weighted_sum_of_forward_divergences() -> None:
    hidden, head, labels, teachers = example(3)
    config = LossConfig(temperature=2.0)
    mixed, _ = distillation_loss(hidden, head, labels, teachers, config)
    total = sum(teacher.weight for teacher in teachers)
    parts = [
        teacher.weight / total * distillation_loss(hidden, head, labels, [replace(teacher, weight=1.0)], config)[0]
        for teacher in teachers
    ]
    want = torch.autograd.grad(sum(parts, torch.zeros(())), [hidden, head])
    torch.testing.assert_close(torch.autograd.grad(mixed, [hidden, head]), want)


@pytest.mark.parametrize(("kind", "limit"), [("forward_kl", 0.02), ("reverse_kl", 0.02), ("jsd", 0.02)])
def test_the_gradient_of_small_logits_keeps_its_size_at_any_temperature(kind: str, limit: float) -> None:
    hidden, head, labels, teachers = example(scale=1e-3)
    norms = []
    for temperature in (1.0, 4.0):
        config = LossConfig(divergence=Divergence(kind), temperature=temperature)
        loss, _ = distillation_loss(hidden, head, labels, teachers, config)
        norms.append(torch.autograd.grad(loss, hidden)[0].norm())
    assert abs(norms[1] / norms[0] - 1) < limit


def test_the_statistics_are_those_of_the_dense_distributions() -> None:
    hidden, head, labels, teachers = example(2)
    config = LossConfig(divergence=Divergence.reverse_kl, temperature=1.5)
    _, sums = distillation_loss(hidden, head, labels, teachers, config)
    got = dict(zip(statistics(["one", "two"]), sums.tolist(), strict=True))
    keep = labels[:, 1:] != IGNORE
    logits = (hidden @ head.T)[:, :-1][keep]
    q, q1 = (logits / 1.5).softmax(-1), logits.softmax(-1)
    ps = [((t.hidden @ t.head.T)[:, :-1][keep] / 1.5).softmax(-1) for t in teachers]
    total = sum(t.weight for t in teachers)
    p = sum(t.weight / total * one for t, one in zip(teachers, ps, strict=True))
    assert isinstance(p, Tensor)
    want = {
        "ce": functional.nll_loss(q1.log(), labels[:, 1:][keep], reduction="sum"),
        "kd": 1.5**2 * dense(p, q, config),
        "student_entropy": -(q1 * q1.log()).sum(),
        "teacher_entropy": -(p * p.log()).sum(),
        "top1_agree": (p.argmax(-1) == q.argmax(-1)).sum(),
        "kl_one": dense(ps[0], q, LossConfig()),
        "kl_two": dense(ps[1], q, LossConfig()),
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert math.isclose(got[name], value.item(), rel_tol=1e-9), name


def test_one_supervised_token_influences_one_position() -> None:
    hidden, head, labels, teachers = example()
    labels[:] = IGNORE
    labels[1, 4] = 5
    loss, _ = distillation_loss(hidden, head, labels, teachers, LossConfig(ce_weight=0.5))
    gradient = torch.autograd.grad(loss, hidden)[0]
    touched = gradient.abs().sum(-1).nonzero().tolist()
    assert touched == [[1, 3]]


def test_a_batch_without_labels_gives_zeros_and_no_nan() -> None:
    hidden, head, labels, teachers = example()
    labels[:] = IGNORE
    loss, sums = distillation_loss(hidden, head, labels, teachers, LossConfig(ce_weight=0.5))
    gradients = torch.autograd.grad(loss, [hidden, head])
    assert loss == 0
    assert sums.abs().sum() == 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_logits_far_beyond_any_probability_make_no_nan() -> None:
    for kind in Divergence:
        hidden, head, labels, teachers = example(2, torch.float32, scale=1e4)
        config = LossConfig(divergence=kind, ce_weight=0.5)
        loss, sums = distillation_loss(hidden, head, labels, teachers, config)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(sums).all()
        assert torch.isfinite(hidden.grad).all()
        assert torch.isfinite(head.grad).all()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter keeps copies of its own")
def test_logits_never_exist_for_the_whole_batch() -> None:
    """No tensor made on the way is larger than a chunk's logits, the head, or the hidden states."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    vocabulary, tokens = 3000, 500
    hidden = torch.randn(1, tokens + 1, 8, requires_grad=True)
    head = torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens + 1))
    teachers = [TeacherStates(torch.randn(1, tokens + 1, 4), torch.randn(vocabulary, 4)) for _ in range(2)]
    with Largest() as largest:
        config = LossConfig(chunk_mebibytes=1, ce_weight=0.5, temperature=2.0)
        distillation_loss(hidden, head, labels, teachers, config)[0].backward()
    assert largest.numel * 4 <= 2**20
    assert largest.numel < tokens * vocabulary / 10


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.0), ("ce_weight", 1.5), ("jsd_beta", 1.0), ("skew", 1.0), ("chunk_mebibytes", 0)],
)
def test_settings_without_meaning_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"loss\.{field} .*{value}"):
        LossConfig(**{field: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_bfloat16_projections_accumulate_in_float32() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 65, 64), torch.randn(1001, 64)
    labels = torch.randint(1001, (2, 65))
    teacher = TeacherStates(torch.randn(2, 65, 32), torch.randn(1001, 32))
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device, copy=True).requires_grad_() for t in (hidden, head)]
        states = TeacherStates(teacher.hidden.to(device).bfloat16(), teacher.head.to(device).bfloat16())
        loss, _ = distillation_loss(
            *leaves, labels.to(device), [states], LossConfig(ce_weight=0.2), compute_dtype=torch.bfloat16
        )
        loss.backward()
        results.append([loss.detach().cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
