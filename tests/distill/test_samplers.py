"""Stored entries stand for the whole distribution: on average exactly, with the variance that theory gives."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

from llamita.distill import cache_format, samplers
from llamita.distill.losses import IGNORE, LossConfig, TeacherStates, distillation_loss
from llamita.distill.samplers import Draws, Sampler
from llamita.distill.sparse import SparseTargets

VOCABULARY, SEEDS, SAMPLES = 40, 40_000, 12
UNBIASED = [Sampler.systematic, Sampler.random, Sampler.threshold]


def zipf(power: float = 1.2, vocabulary: int = VOCABULARY) -> Tensor:
    """Logits of a distribution with a long tail, in no order."""
    ranks = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0)) + 1
    return -power * ranks.double().log()


def dense(draws: Draws, vocabulary: int = VOCABULARY) -> Tensor:
    """The targets as whole rows, ``[C, V]``."""
    rows = torch.arange(len(draws.lengths)).repeat_interleave(draws.lengths)
    table = torch.zeros(len(draws.lengths), vocabulary, dtype=torch.float64)
    return table.index_put_((rows, draws.ids), draws.values.double())


def many(sampler: Sampler, logits: Tensor, samples: int = SAMPLES, seeds: int = SEEDS) -> Draws:
    """Draws of one distribution with independent random numbers."""
    uniform = torch.rand(
        seeds, sampler.num_uniforms(samples), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    return samplers.draw(logits.float().expand(seeds, -1), sampler, samples, uniform)


def variance(sampler: Sampler, p: Tensor, samples: int) -> Tensor:
    """E (t_i - p_i)^2 of each id, in closed form."""
    match sampler:
        case Sampler.systematic:
            fraction = (samples * p).frac()
            return fraction * (1 - fraction) / samples**2
        case Sampler.random:
            return p * (1 - p) / samples
        case Sampler.threshold:
            return torch.where(p * samples >= 1, 0, p * (1 / samples - p))
        case Sampler.top_k:
            return torch.zeros_like(p)


def gaps(sampler: Sampler) -> Tensor:
    """Distance of the mean target from p in standard errors; the floor is that of float32 and bfloat16 rounding."""
    p = zipf().softmax(-1)
    mean = dense(many(sampler, zipf())).mean(0)
    error = (variance(sampler, p, SAMPLES) / SEEDS).sqrt() + 2**-8 * p / SEEDS**0.5 + 1e-7
    return (mean - p).abs() / error


@pytest.mark.parametrize("sampler", UNBIASED)
def test_the_mean_of_the_targets_over_seeds_is_the_distribution(sampler: Sampler) -> None:
    assert gaps(sampler).max() < 5


def test_the_mean_of_top_k_is_not_the_distribution() -> None:
    assert gaps(Sampler.top_k).max() > 100


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("sampler", UNBIASED)
def test_the_variance_of_the_targets_is_that_of_theory(sampler: Sampler, power: float) -> None:
    logits = zipf(power)
    p = logits.softmax(-1)
    found = (dense(many(sampler, logits)) - p).square().sum(-1).mean()
    torch.testing.assert_close(found, variance(sampler, p, SAMPLES).sum(), rtol=0.03, atol=1e-5)


def test_systematic_sampling_varies_less_than_sampling_with_replacement() -> None:
    p = zipf().softmax(-1)
    systematic, random = (variance(sampler, p, SAMPLES).sum() for sampler in (Sampler.systematic, Sampler.random))
    assert systematic < 0.75 * random


@pytest.mark.parametrize("sampler", list(Sampler))
@hypothesis.given(seed=st.integers(0, 2**31), samples=st.integers(1, 63), scale=st.floats(0, 30))
@hypothesis.settings(max_examples=25)
def test_ids_rise_and_counts_are_lossless(sampler: Sampler, seed: int, samples: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(7, 90, generator=generator)
    uniform = torch.rand(7, sampler.num_uniforms(samples), dtype=torch.float64, generator=generator)
    draws = samplers.draw(logits, sampler, samples, uniform)
    table, p = dense(draws, 90), logits.double().softmax(-1)
    assert (draws.lengths >= 1).all()
    assert len(draws.ids) == draws.lengths.sum()
    for ids in draws.ids.split(draws.lengths.tolist()):
        assert (ids.diff() > 0).all()
    if sampler in (Sampler.systematic, Sampler.random):
        assert (dense(draws, 90).sum(-1) * samples - samples).abs().max() < 1e-4
        assert torch.equal(draws.values, draws.counts.float() / samples)
    if sampler is Sampler.systematic:
        assert ((table * samples - samples * p).abs() < 1 + 1e-4).all()
    if sampler is Sampler.threshold:
        assert ((table - p).abs()[p * samples >= 1 + 1e-6] <= 2**-7).all()
        # Which are the head is said of p: a value just above 1 / J may be rounded to one below it.
        drawn, head = p[torch.arange(7).repeat_interleave(draws.lengths), draws.ids] * samples, draws.counts == 0
        assert (drawn[head] >= 1 - 1e-6).all()
        assert (drawn[~head] < 1 + 1e-6).all()
        assert (draws.values[~head] == 1 / samples).all()


@pytest.mark.parametrize("sampler", UNBIASED)
def test_an_id_without_probability_is_never_drawn(sampler: Sampler) -> None:
    logits = zipf()
    logits[::2] = -torch.inf
    assert (many(sampler, logits, seeds=500).ids % 2 == 1).all()


@pytest.mark.parametrize("at", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("sampler", list(Sampler))
def test_the_ends_of_the_uniform_stay_inside_the_vocabulary(sampler: Sampler, at: float) -> None:
    uniform = torch.full((1, sampler.num_uniforms(63)), at, dtype=torch.float64)
    draws = samplers.draw(zipf(1.0, 131_072).float()[None], sampler, 63, uniform)
    assert draws.ids.min() >= 0
    assert draws.ids.max() < 131_072


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="logits are not finite"):
        samplers.draw(torch.full((1, 4), torch.nan), Sampler.systematic, 5, torch.rand(1, 1, dtype=torch.float64))


def test_chunks_of_positions_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = TeacherStates(torch.randn(50, 6), torch.randn(VOCABULARY, 6))
    uniform = torch.rand(50, 1, dtype=torch.float64)
    options = {"temperature": 1.5, "chunk_mebibytes": 1}
    whole = samplers.sample(teacher, Sampler.systematic, 20, uniform, **options)
    monkeypatch.setattr(samplers, "CHUNK_BYTES_PER_VALUE", 2**20 // VOCABULARY // 7)
    parts = samplers.sample(teacher, Sampler.systematic, 20, uniform, **options)
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in ("ids", "counts", "lengths"))


def problem(seeds: int, targets: SparseTargets | TeacherStates, rows: int = 2) -> tuple[Tensor, Tensor]:
    """The loss's gradient by each hidden state of a student that sees one position again and again."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, 1, 5, generator=generator).double().expand(seeds, rows, -1).clone().requires_grad_()
    head = torch.randn(VOCABULARY, 5, generator=generator).double()
    labels = torch.full((seeds, rows), IGNORE)
    labels[:, 1] = 4
    loss, _ = distillation_loss(hidden, head, labels, [targets], LossConfig())
    loss.backward()
    assert hidden.grad is not None
    return hidden.grad[:, 0], loss.detach()


def whole(logits: Tensor) -> TeacherStates:
    """A teacher with these logits at every position."""
    return TeacherStates(torch.ones(1, 2, 1, dtype=torch.float64), logits[:, None])


def stored(draws: Draws) -> SparseTargets:
    lengths = torch.stack([draws.lengths, torch.zeros_like(draws.lengths)], dim=1)
    return SparseTargets(draws.ids, draws.values, lengths)


@pytest.mark.parametrize("sampler", list(Sampler))
def test_the_mean_gradient_of_unbiased_targets_is_the_dense_gradient(sampler: Sampler) -> None:
    seeds = 4000
    want, _ = problem(1, whole(zipf()))
    got, _ = problem(seeds, stored(many(sampler, zipf(), seeds=seeds)))
    error = got.std(0) / seeds**0.5 + 1e-6
    gap = ((got.mean(0) - want[0]).abs() / error).max()
    assert gap > 100 if sampler is Sampler.top_k else gap < 5


def test_all_ids_stored_give_the_dense_loss_and_gradient() -> None:
    draws = many(Sampler.top_k, zipf(), samples=VOCABULARY, seeds=1)
    want, got = problem(1, whole(zipf())), problem(1, stored(draws))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 2**17 - 1), st.integers(0, 63)), max_size=200),
)
def test_three_bytes_hold_an_entry_without_loss(entries: list[tuple[int, int]]) -> None:
    ids, counts = (np.array([entry[place] for entry in entries], dtype=np.int64) for place in (0, 1))
    packed = cache_format.pack(ids, counts)
    assert packed.nbytes == 3 * len(entries)
    found = cache_format.unpack(packed)
    np.testing.assert_array_equal(found[0], ids)
    np.testing.assert_array_equal(found[1], counts)


@hypothesis.given(st.lists(st.floats(0, 1, width=16)))
def test_bfloat16_bits_come_back(values: list[float]) -> None:
    given = torch.tensor(values).to(torch.bfloat16)
    found = torch.from_numpy(cache_format.from_bfloat16(cache_format.to_bfloat16(given.float())))
    assert torch.equal(found, given.float())


@pytest.mark.parametrize(("vocab_size", "samples", "message"), [(131_073, 50, "vocabulary of 131073"), (9, 64, "64")])
def test_what_three_bytes_cannot_hold_is_refused(vocab_size: int, samples: int, message: str) -> None:
    cache_format.check_fits(131_072, 63)
    with pytest.raises(ValueError, match=message):
        cache_format.check_fits(vocab_size, samples)


def test_random_numbers_depend_on_seed_key_and_position_alone() -> None:
    key = bytes(range(16))
    short, long = (cache_format.uniforms(7, key, length, 3) for length in (5, 90))
    np.testing.assert_array_equal(short, long[:5])
    assert not np.isin(cache_format.uniforms(8, key, 90, 3), long).any()
    assert not np.isin(cache_format.uniforms(7, key[::-1], 90, 3), long).any()
    assert len(np.unique(long)) == 270
    assert abs(cache_format.uniforms(0, key, 10_000, 1).mean() - 0.5) < 0.015
