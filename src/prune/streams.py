"""Two streams side by side, one layer at a time: a whole model's states and those of the model that was cut from it.

Shape letters: B = rows, S = positions, T = tokens that are not padding, D and d = hidden sizes before and after.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamita.prune.basis import Basis, widened
from llamita.prune.stream import Batch, Runner, decoder_layer, embedded, real_tokens, summed
from llamita.prune.surgery import Pruned


@dataclass
class Streams:
    """The states of all rows, on the CPU, before a layer, and what it takes to run one."""

    whole: list[Tensor]
    """Of each batch [B, S, D]."""
    cut: list[Tensor]
    """[B, S, d], float32 or wider. Where nothing was lost it is ``basis.states`` of the whole one."""
    pruned: Pruned
    basis: Basis
    positions: list[Tensor]
    masks: list[Tensor]
    """Which positions [B, S] are not padding."""
    whole_runner: Runner
    cut_runner: Runner
    dtype: torch.dtype
    """Of the whole model's pass."""
    device: torch.device | str

    @classmethod
    def start(
        cls,
        pruned: Pruned,
        batches: Sequence[Batch],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        pad_id: int | None,
    ) -> Streams:
        """The embeddings of both models.

        Raises:
            ValueError: there is no token.
        """
        masks = [real_tokens(batch, pad_id).to(device) for batch in batches]
        if not int(summed(torch.tensor(sum(int(mask.sum()) for mask in masks), device=device))):
            raise ValueError("the calibration set holds no token that is not padding")
        return cls(
            whole=embedded(pruned.model, batches, dtype),
            cut=embedded(pruned, batches, _wide(dtype)),
            pruned=pruned,
            basis=pruned.plan.basis,
            positions=[batch["position_ids"].to(device) for batch in batches],
            masks=masks,
            whole_runner=Runner(pruned.model.config, device),
            cut_runner=Runner(pruned.config, device),
            dtype=dtype,
            device=device,
        )

    @property
    def cut_dtype(self) -> torch.dtype:
        """Of the cut model's pass, and of what is fitted."""
        return _wide(self.dtype)

    def source_layer(self, number: int) -> LlamaDecoderLayer:
        """A layer of the whole model."""
        return decoder_layer(self.pruned.model, number, self.whole_runner.config, self.dtype, self.device)

    def cut_layer(self, index: int) -> LlamaDecoderLayer:
        """A layer of the cut model as the plan makes it, in memory of its own: what is not cut lies in the file's."""
        layer = decoder_layer(self.pruned, index, self.cut_runner.config, self.cut_dtype, self.device)
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()
        return layer

    def pairs(self, whole: Iterable[Tensor], cut: Iterable[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Number of each batch and its states in both streams, on the device."""
        for batch, (x_BSD, x_BSd) in enumerate(zip(whole, cut, strict=True)):
            yield batch, x_BSD.to(self.device), x_BSd.to(self.device)

    def advance_whole(self, number: int) -> None:
        """Take the whole stream through one of its layers."""
        layer = self.source_layer(number)
        for batch, x_BSD in enumerate(self.whole):
            self.whole[batch] = self.whole_runner.layer(layer, x_BSD.to(self.device), self.positions[batch]).cpu()

    def passing(self, layer: LlamaDecoderLayer, cut: Iterable[Tensor]) -> Iterator[Tensor]:
        """What a cut layer makes of states, on the CPU, batch by batch as they are asked for."""
        for batch, x_BSd in enumerate(cut):
            yield self.cut_runner.layer(layer, x_BSd.to(self.device), self.positions[batch]).cpu()

    def along(self, whole: Iterable[Tensor]) -> Iterator[Tensor]:
        """States of the whole model along the axes that stay, batch by batch as they are asked for."""
        for x_BSD in whole:
            yield self.basis.states(x_BSD.to(self.device, self.cut_dtype)).cpu()

    def error(self, cut: Iterable[Tensor]) -> float:
        """Sum of w_t |Q^T x_t - x'_t|^2 over that of w_t |Q^T x_t|^2, with the weights of :func:`weights`."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch, x_BSD, cut_BSd in self.pairs(self.whole, cut):
            mask_BS, wanted_BSd = self.masks[batch], self.basis.states(x_BSD.to(self.cut_dtype))
            weight_T = weights(x_BSD[mask_BS])
            gap_Td, wanted_Td = (wanted_BSd - cut_BSd)[mask_BS], wanted_BSd[mask_BS]
            sums += torch.stack([(weight_T * part.square().sum(-1)).sum().double() for part in (gap_Td, wanted_Td)])
        gap, wanted = summed(sums).tolist()
        return float(gap / wanted) if wanted else 0.0


def weights(x_TD: Tensor) -> Tensor:
    """1 / mean x^2 [T]: the next norm divides a state by its size, so an error counts relative to it.

    A few tokens of a large Llama have states a thousand times the size of the others'; unweighted, squares of their
    errors would be all that least squares sees, and the mean by which its damping is measured.
    """
    return 1 / (widened(x_TD).square().mean(-1) + torch.finfo(torch.float32).tiny)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
