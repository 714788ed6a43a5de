"""Sparse targets: exact where everything is stored, unbiased where not, and never renormalised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense_loss import HIDDEN, LENGTH, ROWS, VOCABULARY, example, oracle
from torch import Tensor
from torch.nn import functional

from llamita.distill.losses import IGNORE, Divergence, LossConfig, TeacherStates, distillation_loss, statistics
from llamita.distill.sparse import SparseTargets, merge, pick


def probabilities(teacher: TeacherStates, temperature: float = 1.0) -> Tensor:
    return (teacher.hidden @ teacher.head.T / temperature).softmax(-1)


def stored(values_BSV: Tensor, keep_BSV: Tensor, weight: float = 1.0) -> SparseTargets:
    """The kept entries in the order of a cache."""
    return SparseTargets(keep_BSV.nonzero()[:, 2], values_BSV[keep_BSV], keep_BSV.sum(-1), weight)


def whole(teacher: TeacherStates, temperature: float = 1.0) -> SparseTargets:
    """Every entry of the teacher's distributions, nothing at positions that no label follows in any batch."""
    values = probabilities(teacher, temperature)
    keep = torch.ones_like(values, dtype=torch.bool)
    keep[:, -1] = False
    return stored(values, keep, teacher.weight)


def some(seed: int, weight: float = 1.0) -> SparseTargets:
    """Entries whose sum is not one, in random numbers per position."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(ROWS, LENGTH, VOCABULARY, dtype=torch.float64, generator=generator) / 5
    keep = torch.rand(ROWS, LENGTH, VOCABULARY, generator=generator) < 0.2
    keep[..., seed] = True
    return stored(values, keep, weight)


def spread(targets: SparseTargets) -> Tensor:
    """Dense ``[B, S, V]`` of sparse targets."""
    dense = torch.zeros(ROWS * LENGTH, VOCABULARY, dtype=torch.float64)
    rows = torch.arange(ROWS * LENGTH).repeat_interleave(targets.lengths.flatten())
    dense[rows, targets.ids] = targets.values.double()
    return dense.view(ROWS, LENGTH, VOCABULARY)


def definition(hidden: Tensor, head: Tensor, labels: Tensor, mixed_BSV: Tensor, config: LossConfig) -> Tensor:
    """c CE + (1 - c) T^2 (sum m log m - sum m z / T + log Z) of any non-negative m."""
    keep = labels[:, 1:] != IGNORE
    logits = (hidden @ head.T)[:, :-1][keep]
    m, z = mixed_BSV[:, :-1][keep], logits / config.temperature
    kd = torch.xlogy(m, m).sum() - (m * z).sum() + z.logsumexp(-1).sum()
    ce = functional.cross_entropy(logits, labels[:, 1:][keep], reduction="sum")
    return config.ce_weight * ce + (1 - config.ce_weight) * config.temperature**2 * kd


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.3), (2.0, 0.3), (1.0, 1.0)])
@pytest.mark.parametrize("sparse", [{0}, {1}, {0, 2}, {0, 1, 2}])
def test_where_everything_is_stored_a_sparse_teacher_is_the_dense_one(
    sparse: set[int], temperature: float, ce_weight: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K = V; alone, and in mixtures with dense and other sparse teachers."""
    monkeypatch.setattr("llamita.distill.fused.Job.chunk_rows", lambda *_: (rows, max(1, rows // 2)))
    hidden, head, labels, teachers = example(max(sparse) + 1)
    config = LossConfig(temperature=temperature, ce_weight=ce_weight)
    expected, _ = oracle(hidden, head, labels, teachers, config)
    want = torch.autograd.grad(expected, [hidden, head])
    mixed = [whole(t, temperature) if place in sparse else t for place, t in enumerate(teachers)]
    loss, _ = distillation_loss(hidden, head, labels, mixed, config)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, head]), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (1.0, 0.4), (3.0, 0.4)])
@pytest.mark.parametrize("with_dense", [False, True])
@pytest.mark.parametrize("num_sparse", [1, 2])
def test_the_gradient_is_q_minus_t_whatever_t_sums_to(
    num_sparse: int, with_dense: bool, temperature: float, ce_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamita.distill.fused.Job.chunk_rows", lambda *_: (4, 3))
    hidden, head, labels, teachers = example()
    config = LossConfig(temperature=temperature, ce_weight=ce_weight)
    given = [some(seed, weight=1.0 + seed) for seed in range(num_sparse)]
    dense = teachers if with_dense else []
    total = sum(teacher.weight for teacher in [*given, *dense])
    mixed = sum(t.weight / total * spread(t) for t in given) + sum(
        t.weight / total * probabilities(t, temperature) for t in dense
    )
    assert isinstance(mixed, Tensor)
    expected = definition(hidden, head, labels, mixed, config)
    want = torch.autograd.grad(expected, [hidden, head])
    loss, _ = distillation_loss(hidden, head, labels, [*given, *dense], config)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, head]), want, rtol=1e-9, atol=1e-11)


def test_the_mean_of_sampled_gradients_is_the_dense_gradient() -> None:
    """Of random draws with replacement, within five standard errors in every entry."""
    hidden, head, labels, teachers = example()
    p = probabilities(teachers[0])
    samples, draws = 400, 8
    want = torch.autograd.grad(distillation_loss(hidden, head, labels, teachers, LossConfig())[0], hidden)[0]
    torch.manual_seed(0)
    found = []
    for _ in range(samples):
        counts = torch.zeros_like(p).view(-1, VOCABULARY)
        drawn = torch.multinomial(p.view(-1, VOCABULARY), draws, replacement=True)
        values = counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=counts.dtype)).view_as(p) / draws
        loss, _ = distillation_loss(hidden, head, labels, [stored(values, values > 0)], LossConfig())
        found.append(torch.autograd.grad(loss, hidden)[0])
    gradients = torch.stack(found)
    error = gradients.std(0) / samples**0.5
    assert ((gradients.mean(0) - want).abs() <= 5 * error + 1e-12).all()


def test_in_low_precision_the_gap_at_a_stored_entry_is_not_lost() -> None:
    """Where q is close to t, subtracting after rounding q to bfloat16 would leave noise of a hundredth of q."""
    torch.manual_seed(0)
    hidden, head = torch.randn(1, 9, 16), torch.randn(50, 16)
    labels = torch.randint(50, (1, 9))
    q = (hidden.bfloat16().float() @ head.bfloat16().float().T).softmax(-1)
    targets = stored(q * (1 + 1e-3), torch.ones_like(q, dtype=torch.bool))
    leaf = hidden.clone().requires_grad_()
    loss, _ = distillation_loss(leaf, head, labels, [targets], LossConfig(), compute_dtype=torch.bfloat16)
    want = -1e-3 * (q @ head.bfloat16().float())[:, :-1]
    got = torch.autograd.grad(loss, leaf)[0][:, :-1]
    assert (got - want).norm() < 0.02 * want.norm()


def test_statistics_of_sparse_targets_are_only_those_that_they_determine() -> None:
    hidden, head, labels, teachers = example(2)
    given = [whole(teachers[0]), teachers[1]]
    _, sums = distillation_loss(hidden, head, labels, given, LossConfig())
    names = statistics(["cached", "online"], sparse=["cached"])
    assert names == ["ce", "student_entropy", "kd", "soft_ce_cached", "kl_online"]
    got = dict(zip(names, sums.tolist(), strict=True))
    _, dense = distillation_loss(hidden, head, labels, teachers, LossConfig())
    want = dict(zip(statistics(["cached", "online"]), dense.tolist(), strict=True))
    keep = labels[:, 1:] != IGNORE
    p = probabilities(teachers[0])[:, :-1][keep]
    entropy = -(p * p.log()).sum().item()
    assert got["soft_ce_cached"] == pytest.approx(want["kl_cached"] + entropy)
    for name in ("ce", "student_entropy", "kd", "kl_online"):
        assert got[name] == pytest.approx(want[name])


@pytest.mark.parametrize("kind", [kind for kind in Divergence if kind is not Divergence.forward_kl])
def test_other_divergences_are_refused_with_sparse_targets(kind: Divergence) -> None:
    config = LossConfig(divergence=kind)
    with pytest.raises(ValueError, match=rf"loss\.divergence={kind} needs whole distributions, and teacher big"):
        config.check_sparse("big")
    hidden, head, labels, teachers = example()
    with pytest.raises(ValueError, match=r"loss\.divergence"):
        distillation_loss(hidden, head, labels, [whole(teachers[0])], config)


def test_another_temperature_than_that_of_the_targets_is_refused() -> None:
    LossConfig(temperature=2.0).check_sparse("big", 2.0)
    with pytest.raises(ValueError, match=r"loss\.temperature=2\.0 .* temperature 1\.0 .* teacher big"):
        LossConfig(temperature=2.0).check_sparse("big")


def test_a_label_without_a_stored_distribution_is_refused() -> None:
    hidden, head, labels, teachers = example()
    targets = whole(teachers[0])
    values = spread(targets)
    keep = values > 0
    keep[0, 0] = False
    with pytest.raises(ValueError, match="1 positions with a label have no stored distribution"):
        distillation_loss(hidden, head, labels, [stored(values, keep)], LossConfig())
    labels[0, 1] = IGNORE
    distillation_loss(hidden, head, labels, [stored(values, keep)], LossConfig())


def test_ids_and_values_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        SparseTargets(torch.arange(3), torch.ones(2), torch.tensor([[3]]))


def test_a_batch_without_labels_gives_zeros_with_sparse_targets_too() -> None:
    hidden, head, labels, teachers = example()
    labels[:] = IGNORE
    loss, sums = distillation_loss(hidden, head, labels, [whole(teachers[0]), some(1)], LossConfig())
    assert loss == 0
    assert sums.abs().sum() == 0
    assert all(gradient.abs().sum() == 0 for gradient in torch.autograd.grad(loss, [hidden, head]))


def test_an_id_that_two_teachers_store_becomes_one_entry() -> None:
    picked = torch.ones(1, 2, dtype=torch.bool)
    first = pick(
        SparseTargets(torch.tensor([1, 4, 2]), torch.tensor([0.5, 0.5, 1.0]), torch.tensor([[2, 1, 0]])), picked
    )
    second = pick(
        SparseTargets(torch.tensor([4, 0, 2]), torch.tensor([1.0, 0.5, 0.5]), torch.tensor([[1, 2, 0]])), picked
    )
    both = merge([first, second], [0.5, 0.5], 5)
    assert list(zip(both.rows.tolist(), both.ids.tolist(), both.values.tolist(), strict=True)) == [
        (0, 1, 0.25),
        (0, 4, 0.75),
        (1, 0, 0.25),
        (1, 2, 0.75),
    ]


def test_shares_of_sparse_and_dense_teachers_are_divided_by_one_sum() -> None:
    hidden, head, labels, teachers = example(2)
    once = [whole(teachers[0]), teachers[1]]
    twice = [replace(teacher, weight=2 * teacher.weight) for teacher in once]
    first, second = (distillation_loss(hidden, head, labels, given, LossConfig())[0] for given in (once, twice))
    torch.testing.assert_close(first, second)
    assert hidden.shape == (ROWS, LENGTH, HIDDEN)
