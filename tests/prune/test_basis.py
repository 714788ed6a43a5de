"""Laws of the axes that stay: turning the whole stream changes nothing, and only what lay outside of them is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calibration import ranked, saved, text
from conftest import tiny_model
from llamita import checkpoints
from llamita.prune import importance, plan, surgery
from llamita.prune.basis import Basis
from llamita.prune.scores import HiddenScore
from llamita.prune.target import TargetConfig, Tie

PCA = ranked(hidden=HiddenScore.pca)


def rotation(size: int, kept: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q[:, :kept].contiguous()


def exact_norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
    scaled: Tensor = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return scaled


@torch.no_grad()
def rotated(model: LlamaForCausalLM, path: Path) -> LlamaForCausalLM:
    """The model with its whole stream turned, nothing cut."""
    weights = saved(model, path / "source")
    kept = plan.make(None, weights.shape, TargetConfig(), ranked())
    pruned = surgery.Pruned(weights, dataclasses.replace(kept, rotation=rotation(64, 64)))
    path.joinpath("turned").mkdir()
    with checkpoints.ModelWriter(path / "turned", pruned.config) as writer:
        surgery.write(pruned, writer)
        writer.publish(None, {})
    return checkpoints.load_model(path / "turned", dtype=model.dtype).eval()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_turning_the_stream_leaves_the_logits(
    dtype: torch.dtype, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gains are folded into the readers, because RMSNorm without one commutes with a rotation."""
    if dtype == torch.float64:  # stock RMSNorm is float32 whatever comes in
        monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    model = tiny_model().to(dtype)
    turned = rotated(model, tmp_path)
    ids = text()["input_ids"]
    with torch.no_grad():
        gap = (turned(ids).logits - model(ids).logits).abs().max()
    assert float(gap) < most
    assert not torch.allclose(turned.model.embed_tokens.weight, model.model.embed_tokens.weight, atol=1e-2)


def test_a_stream_that_fills_few_directions_loses_nothing(tmp_path: Path) -> None:
    """All that is written lies in 32 of 64 directions, none of them a channel: principal directions find them."""
    model = tiny_model(rms_norm_eps=1e-12)
    span = rotation(64, 32, seed=1).float()
    with torch.no_grad():
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(span @ span.T @ writer.weight)
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ span @ span.T)
    weights = saved(model, tmp_path / "source")
    scores = importance.measure(weights, [text()], dtype=torch.float64)
    kept = plan.make(scores, weights.shape, TargetConfig(hidden_size=32), PCA)
    pruned = surgery.Pruned(weights, kept)
    path = tmp_path / "pruned"
    path.mkdir()
    with checkpoints.ModelWriter(path, pruned.config) as writer:
        surgery.write(pruned, writer)
        writer.publish(None, {})
    ids = text()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(checkpoints.load_model(path)(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_the_shared_matrix_of_a_turned_stream_is_the_least_squares_optimum(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    weights = saved(model, tmp_path / "source")
    scores = importance.measure(weights, [text()], dtype=torch.float64)
    kept = plan.make(scores, weights.shape, TargetConfig(hidden_size=32), PCA)
    assert kept.tie is Tie.least_squares
    pruned = surgery.Pruned(weights, kept)
    ratio = float(pruned["model.norm.weight"][0] / kept.norm_gain[-1])
    vectors, covariance = kept.rotation, scores["head.covariance"].double()
    assert vectors is not None
    table, gain = model.model.embed_tokens.weight.detach().double(), model.model.norm.weight.detach().double()
    size = (table * gain @ vectors).square().mean().sqrt() / (table @ vectors).square().mean().sqrt()
    assert ratio == pytest.approx(float(size), rel=1e-5)
    shared = pruned.embedding().double().detach().requires_grad_()
    pull = 4 * ratio**2 * (vectors.T @ covariance @ vectors).diagonal().mean()
    root = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(64).double())
    gap = (ratio * shared @ vectors.T - table * gain) @ root
    (pull * (shared - table @ vectors).square().sum() + gap.square().sum()).backward()
    assert shared.grad is not None
    assert float(shared.grad.norm()) < 1e-4 * float((pull * shared).detach().norm())


def test_channels_and_directions_share_what_their_spans_share() -> None:
    channels, directions = Basis(torch.arange(16)), Basis(torch.arange(16), torch.eye(64).double()[:, 8:24])
    assert channels.share(directions, 64) == pytest.approx(0.5)
    assert directions.share(directions, 64) == pytest.approx(1.0)
