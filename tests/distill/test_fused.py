"""The pass over chunks: its memory, padding rows of heads, and what compiles around it."""

from __future__ import annotations

import math
import os

import pytest
import torch
from dense_loss import VOCABULARY, example
from torch import Tensor, nn
from torch.nn import functional

from llamita.distill import engines, fused
from llamita.distill.divergences import scratch_buffers
from llamita.distill.losses import Divergence, LossConfig, TeacherStates, distillation_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def peak_bytes(config: LossConfig, tokens: int, vocabulary: int, num_teachers: int) -> tuple[int, int]:
    """The most that exists at once while the loss runs, and how much of it depends on tokens or heads only."""
    hidden = torch.randn(1, tokens + 1, 8, requires_grad=True)
    head = torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.randint(vocabulary, (1, tokens + 1))
    teachers = [TeacherStates(torch.randn(1, tokens + 1, 4), torch.randn(vocabulary, 4)) for _ in range(num_teachers)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss, _ = distillation_loss(hidden, head, labels, teachers, config)
    assert loss > 0
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    per_token = tokens * (3 * 8 + num_teachers * 4 + 8) * 4
    return highest, per_token + head.nbytes


@pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps copies of its own")
@pytest.mark.parametrize("mebibytes", [1, 3])
@pytest.mark.parametrize(
    ("kind", "num_teachers"), [(Divergence.forward_kl, 0), *((kind, num) for kind in Divergence for num in (1, 2))]
)
def test_what_is_made_on_the_way_stays_within_the_budget(kind: Divergence, mebibytes: int, num_teachers: int) -> None:
    setting = {} if num_teachers == 0 else {"ce_weight": 0.5, "temperature": 2.0}
    config = LossConfig(chunk_mebibytes=mebibytes, divergence=kind, **setting)
    highest, kept = peak_bytes(config, 700, 3001, num_teachers)
    assert highest - kept <= mebibytes * 2**20
    assert highest - kept >= mebibytes * 2**20 / 3, "a budget that is not used makes more chunks than needed"


def test_where_nothing_is_recorded_no_gradient_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """autograd asks for gradients of parameters all the same; a head's takes a gigabyte."""
    made: list[int] = []
    add = fused._add_matmul
    monkeypatch.setattr(fused, "_add_matmul", lambda total, a, b: (made.append(1), add(total, a, b)))
    hidden, head = torch.randn(1, 6, 8), torch.randn(11, 8, requires_grad=True)
    labels = torch.randint(11, (1, 6))
    with torch.no_grad():
        measured, _ = distillation_loss(hidden, head, labels, [], LossConfig())
    assert not made
    recorded, _ = distillation_loss(hidden, head, labels, [], LossConfig())
    assert made
    assert measured == recorded.detach()


@pytest.mark.skipif(INTERPRETED, reason="other buffers")
def test_a_chunk_is_as_large_as_the_budget_and_chunks_are_even() -> None:
    config = LossConfig(chunk_mebibytes=16)
    job = job_of(config)
    rows, at_once = job.chunk_rows(10**6, 1000, torch.device("cpu"))
    fits = (16 * 2**20 - at_once * scratch_buffers(1) * 4000) // (2 * 4000)
    assert rows <= fits
    assert math.ceil(10**6 / rows) == math.ceil(10**6 / fits)
    assert job.chunk_rows(fits + 1, 1000, torch.device("cpu"))[0] == math.ceil((fits + 1) / 2)
    assert job.chunk_rows(100, 10**9, torch.device("cpu")) == (1, 1)


def job_of(config: LossConfig) -> fused.Job:
    """The job of a small problem with one teacher."""
    seen: list[fused.Job] = []

    class Spy:
        @staticmethod
        def apply(hidden: Tensor, head: Tensor, job: fused.Job) -> tuple[Tensor, Tensor]:
            seen.append(job)
            return hidden.sum(), head.sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamita.distill.losses.FusedLoss", Spy)
        distillation_loss(*example(1, torch.float32), config)
    return seen[0]


@pytest.mark.parametrize("kind", list(Divergence))
def test_padding_rows_have_no_probability_and_no_gradient(kind: Divergence) -> None:
    """Whatever they hold, and however many of them student and teachers have."""
    hidden, head, labels, teachers = example(2)
    config = LossConfig(divergence=kind, ce_weight=0.3)
    expected, sums = distillation_loss(hidden, head, labels, teachers, config)
    want = torch.autograd.grad(expected, [hidden, head])
    padded = torch.cat([head.detach(), torch.full((5, head.shape[1]), 1e3, dtype=head.dtype)]).requires_grad_()
    wider = [
        TeacherStates(t.hidden, functional.pad(t.head, (0, 0, 0, 3 + place), value=7.0), t.weight)
        for place, t in enumerate(teachers)
    ]
    loss, padded_sums = distillation_loss(hidden, padded, labels, wider, config, vocabulary=VOCABULARY)
    got = torch.autograd.grad(loss, [hidden, padded])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(padded_sums, sums)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][:VOCABULARY], want[1])
    assert not got[1][VOCABULARY:].any()


def test_heads_that_disagree_need_to_be_told_how_many_ids_there_are() -> None:
    hidden, head, labels, teachers = example()
    wider = [TeacherStates(teachers[0].hidden, functional.pad(teachers[0].head, (0, 0, 0, 3)))]
    with pytest.raises(ValueError, match=r"\[37, 40\] rows"):
        distillation_loss(hidden, head, labels, wider, LossConfig())
    with pytest.raises(ValueError, match="fewer than the 38 ids"):
        distillation_loss(hidden, head, labels, wider, LossConfig(), vocabulary=38)


def test_a_compiled_model_around_the_loss_has_the_same_gradients() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(6, 6, dtype=torch.float64)
            self.head = engines.LossHead(6, VOCABULARY, bias=False, dtype=torch.float64)

        def forward(self, x: Tensor, labels: Tensor, teachers: list[TeacherStates], config: LossConfig) -> Tensor:
            loss, _ = self.head(self.layer(x).tanh(), labels, teachers, config)
            return loss * 2

    hidden, _, labels, teachers = example()
    results = []
    for compiled in (False, True):
        model = Model()
        call = torch.compile(model, backend="aot_eager") if compiled else model
        loss = call(hidden.detach(), labels, teachers, LossConfig(ce_weight=0.5))
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(other, plain)


def test_triton_is_used_where_it_can_run_and_nowhere_else() -> None:
    assert fused.uses_kernels(torch.device("cuda")) == fused._has_triton()
    assert fused.uses_kernels(torch.device("cpu")) == (fused._has_triton() and INTERPRETED)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", list(Divergence))
@pytest.mark.parametrize("num_teachers", [1, 2])
def test_on_a_gpu_the_kernels_give_what_plain_pytorch_gives(kind: Divergence, num_teachers: int) -> None:
    torch.manual_seed(0)
    config = LossConfig(divergence=kind, ce_weight=0.2, temperature=1.5, chunk_mebibytes=8)
    hidden, head = torch.randn(1, 301, 64), torch.randn(5003, 64) / 4
    labels = torch.randint(5000, (1, 301))
    given = [(torch.randn(1, 301, 32), torch.randn(5003, 32) / 4) for _ in range(num_teachers)]
    results = []
    for device in ("cpu", "cuda"):
        leaves = [t.to(device, copy=True).requires_grad_() for t in (hidden, head)]
        teachers = [TeacherStates(*(t.to(device).bfloat16() for t in pair)) for pair in given]
        loss, sums = distillation_loss(
            *leaves, labels.to(device), teachers, config, compute_dtype=torch.bfloat16, vocabulary=5000
        )
        loss.backward()
        results.append(
            [loss.detach().cpu(), sums.cpu(), *(leaf.grad.cpu() for leaf in leaves if leaf.grad is not None)]
        )
    for plain, other in zip(*results, strict=True):
        assert (other - plain).norm() < 1e-2 * plain.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [2048, 4096])
def test_on_a_gpu_8192_tokens_need_less_than_one_and_a_half_gibibytes(size: int) -> None:
    """By default, V = 128256, above inputs and gradients."""
    tokens, vocabulary = 8192, 128256

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16) / size**0.25

    hidden, head = draw(1, tokens + 1, size).requires_grad_(), draw(vocabulary, size).requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens + 1), device="cuda")
    teacher = TeacherStates(draw(1, tokens + 1, size), draw(vocabulary, size))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distillation_loss(hidden, head, labels, [teacher], LossConfig(), measure=False)
    gradients = hidden.nbytes + 4 * head.numel()
    assert torch.cuda.max_memory_allocated() - before - gradients < 1.5 * 2**30
