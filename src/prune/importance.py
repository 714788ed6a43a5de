"""What each unit of a Llama does on calibration text, in one pass that holds one decoder layer at a time.

The hidden states of all calibration tokens stay in memory between the layers; the weights of a layer are read, used
and dropped. The result, :class:`Scores`, is saved once and serves any number of targets.

Shape letters: B = rows, S = positions, T = tokens that are not padding, D = hidden size, F = MLP width, L = layers,
H = query heads, K = KV heads, C = channels of whatever is looked at.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamita import faults
from llamita.prune import depth, obs
from llamita.prune.basis import widened
from llamita.prune.further import Further
from llamita.prune.partial import Partial
from llamita.prune.scores import FORMAT, Scores
from llamita.prune.stream import Batch, Model, forward, loss_sum, mean, real_tokens, summed
from llamita.shapes import LlamaShape

log = logging.getLogger(__name__)

SQUARE_ROWS = 256
RIDGE = 1e-4
"""Damping of second-order scores, in means of the covariance's diagonal."""


@faults.phase("scoring", memory="a smaller calibration.batch_rows or calibration.tokens")
def measure(
    model: Model,
    batches: Iterable[Batch],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    pad_id: int | None = None,
    second_order: bool = False,
    further: Further | None = None,
    info: Mapping[str, Any] | None = None,
    partial: Path | None = None,
    watch: Callable[[int], None] = lambda layer: None,
) -> Scores:
    """Run ``batches`` through ``model`` once and return the scores of all its units.

    Batches stay whole in memory, so give as many as are wanted; where there are several processes each gives its own,
    and all get the scores of all. The forward pass runs in ``dtype`` on ``device``; sums over tokens are float32
    (float64 for ``dtype=float64``) within a row and float64 over rows. ``second_order`` adds ``obs`` and ``leverage``,
    which hold two matrices of [F, F] in float64 on the device; ``further`` adds scores that cost passes of their own.
    ``partial`` names a file for what is measured so far: a later call with the same ``info`` and settings goes through
    the layers that it holds without measuring them again, and takes over the rounds of ``greedy``. ``watch`` is told
    how many layers are done.

    Raises:
        ValueError: there is no token to measure on, ``partial`` is damaged, or what is measured is not finite.
    """
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    masks = [real_tokens(batch, pad_id) for batch in batches]
    sizes = [sum(int(mask.sum()) for mask in masks), sum(len(mask) for mask in masks)]
    num_tokens, num_rows = (int(size) for size in summed(torch.tensor(sizes, device=device)))
    if num_tokens == 0:
        raise ValueError("the calibration set holds no token that is not padding")
    shape = model.shape
    weights = _WeightScores(model)
    embedding = model["model.embed_tokens.weight"]
    ends = [depth.last_tokens((embedding[batch["input_ids"].cpu()] for batch in batches), masks)]
    del embedding
    extra = {"format": FORMAT, "tokens": num_tokens, "rows": num_rows, "dtype": str(dtype)}
    so_far = Partial(
        stream=torch.zeros(shape.hidden_size, shape.hidden_size, dtype=torch.float64, device=device),
        file=partial,
        key=json.dumps([extra, second_order, dict(info or {})], sort_keys=True),
    )
    finished = so_far.read()
    if finished:
        log.info("%d of %d layers were measured before", finished, shape.num_hidden_layers)

    def visit(index: int, layer: LlamaDecoderLayer, outputs: Iterator[Tensor]) -> list[Tensor]:
        magnitudes = weights.layer(dict(layer.named_parameters()))
        if index < finished:
            kept = list(outputs)
        else:
            kept = []
            with _LayerStatistics(layer, shape, second_order=second_order) as statistics:
                for mask, output in zip(masks, outputs, strict=True):
                    statistics.update(mask)
                    kept.append(output)
            scores = statistics.scores(num_tokens)
            found = {name: scores[name] for name in scores if name != "stream"} | magnitudes
            _check_finite(Scores(tensors=found, info={}), so_far)
            so_far.add(found, scores["stream"])
        ends.append(depth.last_tokens(kept, masks))
        watch(index + 1)
        return kept

    hidden = forward(model, batches, dtype=dtype, device=device, visit=visit)
    tensors = {name: torch.stack([layer[name] for layer in so_far.layers]) for name in so_far.layers[0]}
    head_DD, epsilon = _final_statistics(model, hidden, masks, num_tokens, device)
    tensors["norm.energy"] = torch.cat([tensors["norm.energy"].flatten(0, 1), head_DD.diagonal()[None].cpu()])
    tensors["norm.epsilon"] = torch.cat([tensors["norm.epsilon"].flatten(), epsilon[None].cpu()])
    tensors["head.covariance"] = head_DD.float()
    mean_DD = (so_far.stream + head_DD) / len(tensors["norm.energy"])
    tensors["directions.vectors"], tensors["directions.energy"] = principal_directions(mean_DD)
    tensors["depth.angular"] = depth.angular(ends, device)
    loss = mean(loss_sum(model, hidden, batches, device), device)
    del hidden
    if further is not None:
        done = functools.partial(watch, shape.num_hidden_layers)
        tensors |= further.measure(model, batches, dtype=dtype, device=device, watch=done, so_far=so_far)
    scores = Scores(
        tensors={name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        info={**extra, "loss": loss, **(info or {})},
    )
    _check_finite(scores, so_far)
    return scores


def _check_finite(scores: Scores, so_far: Partial) -> None:
    """Raise ``ValueError`` where scores are not finite; a corrected run finds no rest of this one."""
    try:
        scores.check_finite()
    except ValueError:
        so_far.remove()
        raise


def principal_directions(covariance_DD: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors [D, D], column by column, and eigenvalues [D], falling.

    The covariance is that of the normalised stream, x x^T / (mean x^2 + eps), on average over all norms and tokens:
    what a norm's readers see, so that neither a late layer's large states nor a token of huge norm outweigh the others.
    """
    energy_D, vectors_DD = torch.linalg.eigh(covariance_DD.double())
    return vectors_DD.flip(1), energy_D.flip(0).clamp(min=0)


def from_weights(model: Model, *, info: Mapping[str, Any] | None = None) -> Scores:
    """Scores that need no text: the magnitudes, and what they say about the energy at each norm.

    Raises:
        ValueError: they are not finite.
    """
    weights = _WeightScores(model)
    layers = []
    for index in range(model.shape.num_hidden_layers):
        layers.append(weights.layer(model.layer(index)))
    tensors = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    tensors["norm.energy"] = torch.stack([*weights.energies, weights.energy()])
    tensors["norm.epsilon"] = torch.zeros(len(tensors["norm.energy"]), dtype=torch.float64)
    scores = Scores(tensors=tensors, info={"format": FORMAT, "tokens": 0, **(info or {})})
    scores.check_finite()
    return scores


def _mean_magnitude(x_BSC: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum over rows of the squared mean over tokens of |x|: the running part of Minitron's statistic.

    Megatron's tensors are [sequence, batch, channel]; these are [batch, sequence, channel], so the mean is over
    axis 1 and the norm over axis 0.
    """
    x_BSC = widened(x_BSC)
    weight_BS = mask_BS.to(x_BSC.dtype) / mask_BS.sum(1, keepdim=True).clamp(min=1)
    mean_BC = torch.einsum("bs,bsc->bc", weight_BS, x_BSC.abs())
    return mean_BC.double().square().sum(0)


def _energy(x_BSC: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum over tokens of the square, per channel."""
    x_BSC = widened(x_BSC)
    return torch.einsum("bs,bsc->bc", mask_BS.to(x_BSC.dtype), x_BSC.square()).double().sum(0)


def _variance_sums(x_BSC: Tensor, mask_BS: Tensor) -> Tensor:
    """Sums over tokens [2, C] of x and of x^2, both in float64 throughout: the variance is a difference of the two."""
    sums = torch.zeros(2, x_BSC.shape[-1], dtype=torch.float64, device=x_BSC.device)
    for x_SC, mask_S in zip(x_BSC, mask_BS, strict=True):  # a row at a time, because the copy is wide
        x_TC = x_SC[mask_S].double()
        sums += torch.stack([x_TC.sum(0), x_TC.square_().sum(0)])
    return sums


def _variance(sums_2C: Tensor, num_tokens: int) -> Tensor:
    return (sums_2C[1] / num_tokens - (sums_2C[0] / num_tokens).square()).clamp(min=0)


def _norm_statistics(x_BSD: Tensor, mask_BS: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Sums over tokens of x x^T / (mean x^2 + eps) and of eps / (mean x^2 + eps)."""
    x_TD = widened(x_BSD[mask_BS])
    inverse_T = 1 / (x_TD.square().mean(-1) + epsilon)
    return covariance(x_TD * inverse_T.sqrt()[:, None]), (epsilon * inverse_T).double().sum()


def covariance(x_TC: Tensor) -> Tensor:
    """Sum over tokens of x x^T [C, C], in float64."""
    return (x_TC.T @ x_TC).double()


class _LayerStatistics:
    """Watches one decoder layer through hooks and sums what its tensors are over tokens."""

    def __init__(self, layer: LlamaDecoderLayer, shape: LlamaShape, *, second_order: bool) -> None:
        self._layer = layer
        self._shape = shape
        self._second_order = second_order
        self._seen: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._epsilon = layer.input_layernorm.variance_epsilon

    def __enter__(self) -> _LayerStatistics:
        layer, attention = self._layer, self._layer.self_attn
        self._hooks = [
            layer.input_layernorm.register_forward_hook(self._keep("norm_in.0", "norm_out.0")),
            layer.post_attention_layernorm.register_forward_hook(self._keep("norm_in.1", "norm_out.1")),
            attention.q_proj.register_forward_hook(self._keep(None, "query")),
            attention.k_proj.register_forward_hook(self._keep(None, "key")),
            attention.o_proj.register_forward_hook(self._keep("heads", None)),
            layer.mlp.down_proj.register_forward_hook(self._keep("mlp", None)),
            layer.register_forward_hook(self._keep("in", "out")),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._seen.clear()

    def _keep(self, before: str | None, after: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if before is not None:
                self._seen[before] = arguments[0]
            if after is not None:
                self._seen[after] = output

        return hook

    def _add(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += value
        else:
            self._sums[name] = value

    def update(self, mask_BS: Tensor) -> None:
        """Add the tokens of the batch that just went through the layer."""
        seen, shape = self._seen, self._shape
        cosine_BS = functional.cosine_similarity(widened(seen["in"]), widened(seen["out"]), dim=-1)
        self._add("cosine", cosine_BS[mask_BS].double().sum())
        for unit in ("mlp", "heads"):
            self._add(f"{unit}.mean", _mean_magnitude(seen[unit], mask_BS))
            self._add(f"{unit}.energy", _energy(seen[unit], mask_BS))
            self._add(f"{unit}.variance", _variance_sums(seen[unit], mask_BS))
            if self._second_order:
                self._add(f"{unit}.covariance", covariance(widened(seen[unit][mask_BS])))
        for norm in ("0", "1"):
            self._add(f"norm.{norm}.mean", _mean_magnitude(seen[f"norm_out.{norm}"], mask_BS))
            covariance_DD, epsilon = _norm_statistics(seen[f"norm_in.{norm}"], mask_BS, self._epsilon)
            self._add("stream", covariance_DD)
            self._add(f"{norm}.energy", covariance_DD.diagonal().clone())
            self._add(f"{norm}.epsilon", epsilon)
        for unit in ("query", "key"):
            # Half-split layout: a pair is channels (j, j + head_dim / 2) of its head; turning it keeps its norm.
            halves = _energy(seen[unit], mask_BS).view(-1, 2, shape.head_dim // 2)
            self._add(unit, halves.sum(1))
        self._seen.clear()

    def scores(self, num_tokens: int) -> dict[str, Tensor]:
        """The scores that ``num_tokens`` tokens give, and ``stream``, the mean of x x^T / (mean x^2 + eps) summed over
        both norms."""
        sums, heads = self._sums, (self._shape.num_attention_heads, self._shape.head_dim)
        for value in sums.values():
            summed(value)
        down, out = self._layer.mlp.down_proj.weight, self._layer.self_attn.o_proj.weight
        scores = {
            "layers.block_influence": 1 - sums["cosine"] / num_tokens,
            "mlp.activation": sums["mlp.mean"].sqrt(),
            "mlp.norm_product": (sums["mlp.energy"] * _square_sums(down)[1]).sqrt(),
            "attention.activation": sums["heads.mean"].sqrt().view(heads),
            "attention.norm_product": (sums["heads.energy"] * _square_sums(out)[1]).sqrt().view(heads),
            "mlp.fluctuation": _variance(sums["mlp.variance"], num_tokens) * _square_sums(down)[1],
            "attention.fluctuation": (_variance(sums["heads.variance"], num_tokens) * _square_sums(out)[1]).view(heads),
            "hidden.activation": torch.stack([sums["norm.0.mean"], sums["norm.1.mean"]]).sqrt(),
            "rotary.query": sums["query"] / num_tokens,
            "rotary.key": sums["key"] / num_tokens,
            "norm.energy": torch.stack([sums["0.energy"], sums["1.energy"]]) / num_tokens,
            "norm.epsilon": torch.stack([sums["0.epsilon"], sums["1.epsilon"]]) / num_tokens,
            "stream": sums["stream"] / num_tokens,
        }
        return scores | (self._second_order_scores() if self._second_order else {})

    def _second_order_scores(self) -> dict[str, Tensor]:
        shape, heads_FF, mlp_FF = self._shape, self._sums.pop("heads.covariance"), self._sums.pop("mlp.covariance")
        down, out = self._layer.mlp.down_proj.weight, self._layer.self_attn.o_proj.weight
        keys, queries = shape.num_key_value_heads, shape.num_attention_heads
        heads, units = obs.Inverse.of(heads_FF, RIDGE), obs.Inverse.of(mlp_FF, RIDGE)
        return {
            "mlp.obs": obs.ranks(obs.unit_order(units, down)[0]),
            "mlp.leverage": units.leverage(),
            "heads.obs": obs.ranks(obs.block_order(heads, out, blocks=queries, families=keys)[0]),
            "groups.obs": obs.ranks(obs.block_order(heads, out, blocks=keys, families=1)[0]),
            "attention.leverage": heads.leverage().view(queries, shape.head_dim),
        }


@torch.no_grad()
def _final_statistics(
    model: Model, hidden: Sequence[Tensor], masks: Sequence[Tensor], num_tokens: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Means over tokens of x x^T / (mean x^2 + eps) and of eps / (mean x^2 + eps) at the final norm."""
    epsilon, size = model.config.rms_norm_eps, model.shape.hidden_size
    outer_DD = torch.zeros(size, size, dtype=torch.float64, device=device)
    epsilons = torch.zeros((), dtype=torch.float64, device=device)
    for x_BSD, mask_BS in zip(hidden, masks, strict=True):
        part_DD, part = _norm_statistics(x_BSD.to(device), mask_BS, epsilon)
        outer_DD += part_DD
        epsilons += part
    return summed(outer_DD) / num_tokens, summed(epsilons) / num_tokens


def _square_sums(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares of each row and of each column, in float64; a few rows at a time, so that they stay in cache."""
    rows, columns = [], torch.zeros(matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for first in range(0, len(matrix), SQUARE_ROWS):
        squares = widened(matrix.detach()[first : first + SQUARE_ROWS]).square()
        rows.append(squares.sum(1).double())
        columns += squares.sum(0).double()
    return torch.cat(rows), columns


class _WeightScores:
    """Magnitudes of the units of one layer after another.

    What a hidden channel holds at a norm is estimated by what was written into it before: the mean square of its
    embedding column plus the squared norms of its rows of every earlier o_proj and down_proj, as if their inputs
    were white. A channel into which nothing was written has no energy.
    """

    def __init__(self, model: Model) -> None:
        self._shape = model.shape
        embedding = model["model.embed_tokens.weight"]
        self._written = _square_sums(embedding)[1] / len(embedding)
        self.energies: list[Tensor] = []

    def energy(self) -> Tensor:
        """Estimated energy of each channel behind a norm, one on average."""
        return self._written / self._written.mean()

    @torch.no_grad()
    def layer(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Scores of the next layer, whose tensors are ``weights``."""
        shape = self._shape
        rows, columns = {}, {}
        for name, weight in weights.items():
            rows[name.split(".")[-2]], columns[name.split(".")[-2]] = _square_sums(weight.view(len(weight), -1))
        energies, hidden = [], []
        for norm, readers, writer in (
            ("input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj"),
            ("post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj"),
        ):
            energies.append(self.energy())
            read = torch.stack([columns[reader] for reader in readers]).sum(0)
            hidden.append(energies[-1].to(read.device) * rows[norm] * read)
            self._written = self._written + rows[writer].to(self._written.device)
        self.energies += energies
        group = shape.num_attention_heads // shape.num_key_value_heads
        values = rows["v_proj"].view(shape.num_key_value_heads, shape.head_dim).repeat_interleave(group, 0)
        return {
            "layers.magnitude": torch.stack([squares.sum() for squares in rows.values()]).sum().sqrt(),
            "mlp.magnitude": (rows["gate_proj"] * rows["up_proj"] * columns["down_proj"]).sqrt(),
            "attention.magnitude": (values * columns["o_proj"].view(values.shape)).sqrt(),
            "hidden.magnitude": torch.stack(hidden),
        }


def norm_gain(energy_D: Tensor, epsilon: Tensor, keep: Tensor) -> Tensor:
    """Factor of an RMSNorm's weight when only the channels ``keep`` of its input are left.

    The whole norm divides by sqrt(mean_D x^2 + eps), the cut one by sqrt(mean_S x^2 + eps). The root mean square over
    tokens of their quotient is sqrt(1/|S| sum_S energy + epsilon), with energy_c = E[x_c^2 / (mean_D x^2 + eps)] and
    epsilon = E[eps / (mean_D x^2 + eps)]; for small eps, sqrt(D / |S|) times the kept part of the input's norm.
    Exactly 1 when every channel is kept.
    """
    if len(keep) == len(energy_D):
        return torch.ones((), dtype=torch.float64)
    return (energy_D[keep].double().mean() + epsilon.double()).sqrt()
