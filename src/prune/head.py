"""What comes behind the last layer, fitted to the next-token distributions of the whole model.

Shape letters: B = rows, S = positions, T = tokens that are not padding, D and d = hidden sizes before and after,
V = vocabulary, or the output rows that are left of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from llamita.prune.basis import take
from llamita.prune.compensation import CompensationConfig
from llamita.prune.halves import measured_gain, reading
from llamita.prune.stream import final_norm
from llamita.prune.streams import Streams
from llamita.prune.tune import tune

CHUNK_BYTES = 2**28
"""Of one chunk's logits."""


def fit(
    streams: Streams, layer: LlamaDecoderLayer, before: Sequence[Tensor], config: CompensationConfig, *, seed: int
) -> tuple[LlamaRMSNorm, Tensor | None]:
    """The final norm and, untied, the head [V, d] of the cut model; ``layer``, the last, may change.

    ``before`` is the cut stream before ``layer``, and ``streams`` are behind it. First the norm's gain and the least
    squares map that the head reads through, as for the readers of every norm; then steps on KL(whole || cut).
    """
    pruned, device = streams.pruned, streams.device
    source = final_norm(pruned.model, streams.dtype, device)
    norm = final_norm(pruned, streams.cut_dtype, device)
    whole_head = take(pruned.model.head(), pruned.plan.output_rows, None).to(device=device, dtype=streams.dtype)
    if config.gains:
        gain = measured_gain(streams, streams.whole, streams.cut, source.variance_epsilon)
        norm.weight.mul_(gain / float(pruned.plan.norm_gain[-1]))
    if config.readers and not pruned.shape.tie_word_embeddings:
        seen_Dd = reading(streams, streams.whole, streams.cut, source, norm, config.ridge)
        head = whole_head.to(streams.cut_dtype) @ seen_Dd
    else:  # in memory of its own: what is not cut lies in the source's file
        head = pruned.head().to(device=device, dtype=streams.cut_dtype, copy=True)
    if config.head_steps:
        parameters: dict[str, Tensor] = {**dict(layer.named_parameters()), "norm": norm.weight}
        if not pruned.shape.tie_word_embeddings:
            parameters["head"] = head
        objective = _Divergence(streams, source, whole_head, layer, before, norm, head)
        tune(
            parameters,
            objective,
            batches=len(before),
            steps=config.head_steps,
            learning_rate=config.learning_rate,
            seed=seed,
        )
    return norm, None if pruned.shape.tie_word_embeddings else head


class _Divergence:
    """Sum over tokens of KL(whole || cut), a chunk of tokens' logits at a time."""

    def __init__(
        self,
        streams: Streams,
        source: LlamaRMSNorm,
        whole_head: Tensor,
        layer: LlamaDecoderLayer,
        before: Sequence[Tensor],
        norm: LlamaRMSNorm,
        head: Tensor,
    ) -> None:
        self._streams, self._source, self._whole_head = streams, source, whole_head
        self._layer, self._before, self._norm, self._head = layer, before, norm, head

    def __call__(self, batch: int, learn: bool) -> tuple[Tensor, int]:
        streams = self._streams
        mask_BS = streams.masks[batch]
        wanted_TD = self._source(streams.whole[batch].to(streams.device)[mask_BS])
        states_BSd = self._before[batch].to(streams.device)
        written_BSd = streams.cut_runner.layer(self._layer, states_BSd, streams.positions[batch])
        read_Td = self._norm(written_BSd[mask_BS])
        cut_Td = read_Td.detach().requires_grad_(learn)
        total = cut_Td.new_zeros((), dtype=torch.float64)
        for chunk in torch.split(torch.arange(len(cut_Td)), max(1, CHUNK_BYTES // (4 * len(self._head)))):
            with torch.no_grad():
                whole_TV = functional.linear(wanted_TD[chunk], self._whole_head).float().log_softmax(-1)
            cut_TV = functional.linear(cut_Td[chunk], self._head).float().log_softmax(-1)
            part = functional.kl_div(cut_TV, whole_TV, reduction="sum", log_target=True)
            if learn:
                torch.autograd.backward(part)
            total += part.detach()
        if learn:
            torch.autograd.backward(read_Td, cut_Td.grad)
        return total, int(mask_BS.sum())
