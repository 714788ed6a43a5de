"""Half of a decoder layer, attention or MLP, fitted to the same half of the whole model's layer.

Shape letters: B = rows, S = positions, T = tokens that are not padding, D and d = hidden sizes before and after,
C = what a half computes inside: heads' outputs or MLP units, E = head size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from llamita import faults
from llamita.prune import tune
from llamita.prune.attention import Attention, divergence_in_chunks
from llamita.prune.basis import take, widened
from llamita.prune.compensation import CompensationConfig
from llamita.prune.importance import covariance
from llamita.prune.refit import LeastSquares, narrow_values
from llamita.prune.stream import Runner, summed
from llamita.prune.streams import Streams, weights
from llamita.prune.surgery import channels


@dataclass(frozen=True)
class Half:
    """Names within a decoder layer."""

    block: str
    norm: str
    readers: tuple[str, ...]
    writer: str

    def weight(self, layer: LlamaDecoderLayer, name: str) -> Tensor:
        """Weight of one of the half's matrices."""
        weight: Tensor = layer.get_submodule(f"{self.block}.{name}").weight  # type: ignore[assignment]
        return weight

    def norm_of(self, layer: LlamaDecoderLayer) -> LlamaRMSNorm:
        """The norm through which the half reads the stream."""
        norm = layer.get_submodule(self.norm)
        assert isinstance(norm, LlamaRMSNorm)
        return norm

    def inside(self, runner: Runner, layer: LlamaDecoderLayer, normed_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        """What its writer reads [B, S, C]."""
        if self is ATTENTION:
            return runner.heads(layer.self_attn, normed_BSD, positions_BS)
        mlp: LlamaMLP = layer.mlp
        units_BSC: Tensor = mlp.act_fn(mlp.gate_proj(normed_BSD)) * mlp.up_proj(normed_BSD)
        return units_BSC

    def output(self, runner: Runner, layer: LlamaDecoderLayer, x_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        """The stream behind the half."""
        inside_BSC = self.inside(runner, layer, self.norm_of(layer)(x_BSD), positions_BS)
        return x_BSD + inside_BSC @ self.weight(layer, self.writer).T


ATTENTION = Half("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj")
MLP = Half("mlp", "post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj")


@dataclass(frozen=True)
class Fit:
    """One layer while it is fitted; ``layer`` starts as the plan makes it, and changes."""

    streams: Streams
    config: CompensationConfig
    index: int
    source: LlamaDecoderLayer
    layer: LlamaDecoderLayer
    record: dict[str, float] = field(default_factory=dict)
    """What each part took (``seconds/...``) and leaves of the squared error or divergence that it fits (``left/...``),
    of least squares that of both halves."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the seconds of a part of the fit, both halves together."""
        started = time.monotonic()
        yield
        if torch.device(self.streams.device).type == "cuda":  # what is queued there is not done yet
            torch.cuda.synchronize(self.streams.device)
        key = f"seconds/{name}"
        self.record[key] = self.record.get(key, 0.0) + time.monotonic() - started

    def leaves(self, name: str, share: float) -> None:
        """Note a share of one half; of both the mean."""
        key = f"left/{name}"
        self.record[key] = (self.record[key] + share) / 2 if key in self.record else share

    def stored(self, name: str) -> Tensor:
        """A weight of the whole layer as it is stored, in the dtype of the fit: in ``source`` it may be rounded."""
        streams, plan = self.streams, self.streams.pruned.plan
        weight = streams.pruned.model.layer(int(plan.layers[self.index]))[f"{name}.weight"]
        return weight.to(device=streams.device, dtype=streams.cut_dtype)


def read(fit: Fit, half: Half, whole: Sequence[Tensor], cut: Sequence[Tensor], *, seed: int) -> None:
    """Fit what a half does with what it reads, from states before it."""
    source, norm, streams = half.norm_of(fit.source), half.norm_of(fit.layer), fit.streams
    if fit.config.gains:
        with fit.part("gains"):
            start_d = streams.basis.gain(fit.stored(half.norm))
            norm.weight.copy_(start_d * measured_gain(streams, whole, cut, source.variance_epsilon))
    seen_Dd = streams.basis.embed(fit.stored(half.norm))
    if fit.config.readers:
        with fit.part("readers"):
            seen_Dd, left = reading(streams, whole, cut, source, norm, fit.config.ridge)
            _fold(fit, half, seen_Dd)
        fit.leaves("readers", left)
    if half is ATTENTION and _narrows(fit):
        if fit.config.values:
            with fit.part("values"):
                _fit_values(fit, seen_Dd, whole)
        if fit.config.attention_steps:
            with fit.part("attention_steps"):
                tuned = _fit_attention(fit, whole, cut, seed)
            fit.leaves("attention_steps", min(tuned.before, tuned.after) / tuned.before if tuned.before else 1.0)


def write(fit: Fit, half: Half, cut: list[Tensor]) -> None:
    """Fit what a half writes to what ``cut``, the stream before it, lacks of the whole one; it becomes that behind it.

    W = W_0 + argmin sum_t w_t ||Q^T y_t - x'_t - W_0 z'_t - W z'_t||^2 + lambda |W|^2, y_t the whole model's stream
    behind the half and z'_t what the half computed: the ridge pulls towards the weights that were kept.
    """
    streams = fit.streams
    if fit.config.writers:
        with fit.part("writers"):
            left = _fit_writer(fit, half, cut)
        fit.leaves("writers", left)
    for batch, x_BSd in enumerate(cut):
        x_BSd = x_BSd.to(streams.device)
        cut[batch] = half.output(streams.cut_runner, fit.layer, x_BSd, streams.positions[batch]).cpu()


def _fit_writer(fit: Fit, half: Half, cut: Sequence[Tensor]) -> float:
    """Share of the squared error that is left."""
    streams, weight_dC = fit.streams, half.weight(fit.layer, half.writer)
    squares = LeastSquares(weight_dC.shape[1], weight_dC.shape[0], streams.device)
    for batch, y_BSD, x_BSd in streams.pairs(streams.whole, cut):
        mask_BS = streams.masks[batch]
        normed_BSd = half.norm_of(fit.layer)(x_BSd)
        z_TC = half.inside(streams.cut_runner, fit.layer, normed_BSd, streams.positions[batch])[mask_BS]
        lacking_Td = streams.basis.states(y_BSD[mask_BS].to(z_TC.dtype)) - x_BSd[mask_BS] - z_TC @ weight_dC.T
        squares.add(z_TC, lacking_Td, weights(y_BSD[mask_BS]))
    weight_dC += squares.solve(fit.config.ridge).to(weight_dC.dtype)
    return squares.left


def measured_gain(streams: Streams, whole: Sequence[Tensor], cut: Sequence[Tensor], epsilon: float) -> float:
    """Root mean square over tokens of what the cut norm divides by over what the whole one divides by."""
    squares = torch.zeros(2, dtype=torch.float64, device=streams.device)
    for batch, x_BSD, x_BSd in streams.pairs(whole, cut):
        mask_BS = streams.masks[batch]
        divisors = [widened(x[mask_BS]).square().mean(-1).double() + epsilon for x in (x_BSd, x_BSD)]
        squares += torch.stack([(divisors[0] / divisors[1]).sum(), mask_BS.sum().double()])
    ratio, count = summed(squares).tolist()
    return float((ratio / count) ** 0.5)


def reading(
    streams: Streams,
    whole: Sequence[Tensor],
    cut: Sequence[Tensor],
    source: LlamaRMSNorm,
    norm: LlamaRMSNorm,
    ridge: float,
) -> tuple[Tensor, float]:
    """M [D, d], by which the cut norm's output n' says best what the whole one's n is, and what share of the squared
    error of M_0 it leaves.

    M = M_0 + argmin sum_t ||n_t - M_0 n'_t - M n'_t||^2 + lambda |M|^2, with M_0 n' = n where nothing was lost. A
    matrix W that read n reads W M n': the least-squares fit of all that read n at once.
    """
    seen_Dd = streams.basis.embed(source.weight.to(streams.cut_dtype))
    squares = LeastSquares(seen_Dd.shape[1], seen_Dd.shape[0], streams.device)
    for batch, x_BSD, x_BSd in streams.pairs(whole, cut):
        mask_BS = streams.masks[batch]
        n_TD, n_Td = source(x_BSD[mask_BS]).to(seen_Dd.dtype), norm(x_BSd[mask_BS])
        squares.add(n_Td, n_TD - n_Td @ seen_Dd.T)
    return seen_Dd + squares.solve(ridge).to(seen_Dd.dtype), squares.left


def _fold(fit: Fit, half: Half, seen_Dd: Tensor) -> None:
    rows = fit.streams.pruned.readers(fit.index)
    for matrix in half.readers:
        index, factor = rows[f"{half.block}.{matrix}.weight"]
        kept_OD = take(fit.stored(f"{half.block}.{matrix}"), index, None)
        half.weight(fit.layer, matrix).copy_(factor * (kept_OD @ seen_Dd))


def _narrows(fit: Fit) -> bool:
    plan = fit.streams.pruned.plan
    return plan.target.head_dim < plan.source.head_dim


def _outer(fit: Fit, whole: Sequence[Tensor]) -> Tensor:
    """Sum of n n^T [D, D], n what the whole layer's attention reads."""
    streams, norm = fit.streams, fit.source.input_layernorm
    size = streams.pruned.plan.source.hidden_size
    outer_DD = torch.zeros(size, size, dtype=torch.float64, device=streams.device)
    for mask_BS, x_BSD in zip(streams.masks, whole, strict=True):
        outer_DD += covariance(norm(x_BSD.to(streams.device))[mask_BS].to(streams.cut_dtype))
    return summed(outer_DD)


def _fit_values(fit: Fit, seen_Dd: Tensor, whole: Sequence[Tensor]) -> None:
    """Values of each KV head through :func:`narrow_values`, read through M, and the output matrix to match."""
    plan = fit.streams.pruned.plan
    values_HD, writer_DC = fit.stored("self_attn.v_proj"), fit.stored("self_attn.o_proj")
    outer_DD = _outer(fit, whole)
    wide, narrow, group = plan.source.head_dim, plan.target.head_dim, plan.target.num_attention_heads
    group //= plan.target.num_key_value_heads
    value, out = fit.layer.self_attn.v_proj.weight, fit.layer.self_attn.o_proj.weight
    for place, key in enumerate(plan.kv_heads[fit.index].tolist()):
        value_ED = values_HD[key * wide : (key + 1) * wide]
        heads = plan.heads[fit.index][place * group : (place + 1) * group]
        columns = channels(heads, torch.arange(wide).expand(group, -1), wide)
        out_GDE = take(writer_DC, None, columns).view(-1, group, wide).transpose(0, 1)
        down, up = narrow_values(value_ED, out_GDE.flatten(0, 1), outer_DD, narrow)
        value[place * narrow : (place + 1) * narrow] = (down @ value_ED.double() @ seen_Dd.double()).to(value.dtype)
        for member, out_DE in enumerate(out_GDE):
            first = (place * group + member) * narrow
            out[:, first : first + narrow] = fit.streams.basis.writes(out_DE.double() @ up).to(out.dtype)


@faults.phase(
    "the steps on attention", memory="compensation.attention_steps=0, or rows of fewer tokens in calibration.path"
)
def _fit_attention(fit: Fit, whole: Sequence[Tensor], cut: Sequence[Tensor], seed: int) -> tune.Tuned:
    """Queries and keys by steps on sum over heads and positions of KL(whole || cut attention)."""
    streams, plan = fit.streams, fit.streams.pruned.plan
    wide = plan.source.head_dim
    every = torch.arange(wide)
    queries, keys = plan.heads[fit.index], plan.kv_heads[fit.index]
    rows = [channels(heads, every.expand(len(heads), -1), wide) for heads in (queries, keys)]
    source = fit.source.self_attn
    kept = [take(source.q_proj.weight, rows[0], None), take(source.k_proj.weight, rows[1], None)]
    whole_attention = Attention(streams.whole_runner, *kept)
    query, key = fit.layer.self_attn.q_proj.weight, fit.layer.self_attn.k_proj.weight
    cut_attention = Attention(streams.cut_runner, query, key)

    def objective(batch: int, learn: bool) -> tuple[Tensor, int]:
        mask_BS, positions_BS = streams.masks[batch], streams.positions[batch]
        with torch.no_grad():
            normed_BSD = fit.source.input_layernorm(whole[batch].to(streams.device))
            wanted = whole_attention.turned(normed_BSD, positions_BS)
            normed_BSd = fit.layer.input_layernorm(cut[batch].to(streams.device))
        found = cut_attention.turned(normed_BSd, positions_BS)
        return divergence_in_chunks(wanted, found, positions_BS, mask_BS, learn=learn), int(mask_BS.sum())

    return _steps(fit, {"query": query, "key": key}, objective, fit.config.attention_steps, seed)


@faults.phase("the steps on a layer", memory="a smaller calibration.batch_rows, or compensation.layer_steps=0")
def fit_layer(fit: Fit, target: Sequence[Tensor], cut: Sequence[Tensor], *, seed: int) -> None:
    """All weights of the layer by steps on sum_t w_t ||Q^T y_t - layer'(x'_t)||^2, y_t the stream that is wanted."""
    streams = fit.streams

    def objective(batch: int, learn: bool) -> tuple[Tensor, int]:
        mask_BS, y_BSD = streams.masks[batch], target[batch].to(streams.device)
        written_BSd = streams.cut_runner.layer(fit.layer, cut[batch].to(streams.device), streams.positions[batch])
        gap_Td = (streams.basis.states(y_BSD.to(written_BSd.dtype)) - written_BSd)[mask_BS]
        total = (weights(y_BSD[mask_BS]) * gap_Td.square().mean(-1)).sum()
        if learn:
            torch.autograd.backward(total)
        return total.detach(), int(mask_BS.sum())

    _steps(fit, dict(fit.layer.named_parameters()), objective, fit.config.layer_steps, seed)


def _steps(fit: Fit, parameters: dict[str, Tensor], objective: tune.Objective, steps: int, seed: int) -> tune.Tuned:
    return tune.tune(
        parameters,
        objective,
        batches=len(fit.streams.cut),
        steps=steps,
        learning_rate=fit.config.learning_rate,
        seed=seed,
    )
