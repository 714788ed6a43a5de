"""What comes behind the last layer, fitted to the next-token distributions of the whole model.

Shape letters: B = rows, S = positions, T = tokens that are not padding, D and d = hidden sizes before and after,
V = vocabulary, or the output rows that are left of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from llamita import faults
from llamita.prune.basis import take
from llamita.prune.compensation import CompensationConfig
from llamita.prune.halves import measured_gain, reading
from llamita.prune.stream import final_norm
from llamita.prune.streams import Streams
from llamita.prune.tune import tune

CHUNK_BYTES = 2**28
"""Of one chunk's logits."""


@dataclass
class Final:
    """What comes behind the last layer of a cut model."""

    norm: LlamaRMSNorm
    matrix: Tensor
    """[V, d], in memory of its own; where it is tied it is the input matrix too."""
    divergences: dict[str, float]
    """Mean KL(whole || cut) over the held-out batches' tokens, in nats: ``start``, and after each kind of steps."""


@faults.phase("the end of mending", memory="a smaller calibration.batch_rows, or compensation.head_steps=0")
def fit(
    streams: Streams, layer: LlamaDecoderLayer, before: Sequence[Tensor], config: CompensationConfig, *, seed: int
) -> Final:
    """The final norm and, untied, the head of the cut model; ``layer``, the last, may change.

    ``before`` is the cut stream before ``layer``, and ``streams`` are behind it. First the norm's gain and the least
    squares map that the head reads through, as for the readers of every norm; then steps on KL(whole || cut).
    """
    pruned, device = streams.pruned, streams.device
    norm = final_norm(pruned, streams.cut_dtype, device)
    objective = Divergence(streams)
    if config.gains:
        gain = measured_gain(streams, streams.whole, streams.cut, objective.source.variance_epsilon)
        norm.weight.mul_(gain / float(pruned.plan.norm_gain[-1]))
    if config.readers and not pruned.shape.tie_word_embeddings:
        seen_Dd, _ = reading(streams, streams.whole, streams.cut, objective.source, norm, config.ridge)
        rows = take(pruned.model.head(), pruned.plan.output_rows, None)
        head = rows.to(device=device, dtype=streams.cut_dtype) @ seen_Dd
    else:  # in memory of its own: what is not cut lies in the source's file
        head = pruned.head().to(device=device, dtype=streams.cut_dtype, copy=True)
    final = Final(norm, head, {})
    if config.head_steps:
        parameters: dict[str, Tensor] = {**dict(layer.named_parameters()), "norm": norm.weight}
        if not pruned.shape.tie_word_embeddings:
            parameters["head"] = head

        def behind_the_last_layer(batch: int, learn: bool) -> tuple[Tensor, int]:
            states_BSd = streams.cut_runner.layer(layer, before[batch].to(device), streams.positions[batch])
            return objective(batch, states_BSd, final, learn)

        tuned = tune(
            parameters,
            behind_the_last_layer,
            batches=len(before),
            steps=config.head_steps,
            learning_rate=config.learning_rate,
            seed=seed,
        )
        final.divergences = {"start": tuned.before, "head": min(tuned.before, tuned.after)}
    return final


class Divergence:
    """Sum over tokens of KL(whole || cut) of the next-token distributions, a chunk of tokens' logits at a time."""

    def __init__(self, streams: Streams) -> None:
        pruned = streams.pruned
        self._streams = streams
        self.source = final_norm(pruned.model, streams.dtype, streams.device)
        rows = take(pruned.model.head(), pruned.plan.output_rows, None)
        self.head = rows.to(device=streams.device, dtype=streams.dtype)
        """The whole model's output matrix [V, D]."""

    def __call__(self, batch: int, states_BSd: Tensor, final: Final, learn: bool) -> tuple[Tensor, int]:
        """The sum for the cut model's states behind its last layer, and the number of tokens.

        To ``learn`` is to add the gradients to all that the states were made of, and to the matrix.
        """
        mask_BS = self._streams.masks[batch]
        wanted_TD = self.source(self._streams.whole[batch].to(self._streams.device)[mask_BS])
        read_Td = final.norm(states_BSd[mask_BS])
        cut_Td = read_Td.detach().requires_grad_(learn)
        total = cut_Td.new_zeros((), dtype=torch.float64)
        for chunk in torch.split(torch.arange(len(cut_Td)), max(1, CHUNK_BYTES // (4 * len(final.matrix)))):
            with torch.no_grad():
                whole_TV = functional.linear(wanted_TD[chunk], self.head).float().log_softmax(-1)
            cut_TV = functional.linear(cut_Td[chunk], final.matrix).float().log_softmax(-1)
            part = functional.kl_div(cut_TV, whole_TV, reduction="sum", log_target=True)
            if learn:
                torch.autograd.backward(part)
            total += part.detach()
        if learn:
            torch.autograd.backward(read_Td, cut_Td.grad)
        return total, int(mask_BS.sum())
