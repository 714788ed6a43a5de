"""A Llama run one decoder layer at a time: the weights of a layer are read, used and dropped.

Hidden states of all rows stay in memory between the layers, on the CPU.

Shape letters: B = rows, S = positions, T = tokens that are not padding, D = hidden size, V = vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as distributed
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from llamita.shapes import LlamaShape

Batch = Mapping[str, Tensor]
IGNORE = -100
HEAD_CHUNK_ROWS = 8192
"""Rows of the output matrix whose logits are held at a time: 128 MiB of float32 at hidden size 4096."""


def summed(tensor: Tensor) -> Tensor:
    """Sum over the processes, each of which has rows of its own; the tensor itself where there is one process."""
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def greatest(number: int) -> int:
    """The greatest of the processes' numbers."""
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        return number
    found = torch.tensor(number)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return int(found)


def of_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first process's tensors for all, each of which has tensors of the same names and sizes; on the CPU.

    What every process computes from the same sums may differ in a last bit, or an eigenvector in its sign, where nodes
    are not alike: what is cut and mended together must come from one.
    """
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        return dict(tensors)
    shared = {name: tensors[name].cpu().contiguous() for name in sorted(tensors)}
    for tensor in shared.values():
        distributed.broadcast(tensor, 0)
    return shared


def dealt(batches: Sequence[Batch]) -> list[tuple[bool, int, int]]:
    """Of every batch of all processes whether it is this one's, its rows and their length, in the order of all.

    Batches are dealt to the processes in turn: the first of each process, then the second of each, and so on.
    """
    rank, world_size = 0, 1
    if distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
    sizes = torch.zeros(greatest(len(batches)), world_size, 2, dtype=torch.long)
    for turn, batch in enumerate(batches):
        sizes[turn, rank] = torch.tensor(batch["input_ids"].shape)
    turns = summed(sizes).tolist()
    return [(owner == rank, *size) for turn in turns for owner, size in enumerate(turn) if size[0]]


def digest(batches: Sequence[Batch]) -> str:
    """A number that tells the rows of all processes from others, in whatever batches they are."""
    total = 0
    for batch in batches:
        rows = torch.stack([batch[name].cpu().long() for name in sorted(batch)], 1)
        total += sum(int.from_bytes(hashlib.sha256(row.numpy().tobytes()).digest()[:6]) for row in rows)
    return str(int(summed(torch.tensor(total))))


class Model(Protocol):
    """Weights that are read layer by layer: a directory's, or what a plan makes of them."""

    @property
    def config(self) -> LlamaConfig: ...
    @property
    def shape(self) -> LlamaShape: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __getitem__(self, name: str, /) -> Tensor: ...
    def layer(self, index: int, /) -> dict[str, Tensor]: ...
    def head(self) -> Tensor: ...


def real_tokens(batch: Batch, pad_id: int | None = None) -> Tensor:
    """Which positions [B, S] are not padding.

    Padding is the last document of a row (from where its position ids restart for the last time) when nothing in it
    is supervised and it holds nothing but ``pad_id``; where that is not known, one token over and over.
    """
    ids, labels, positions = batch["input_ids"], batch["labels"], batch["position_ids"]
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = place >= torch.where(positions == 0, place, 0).amax(1, keepdim=True)
    text = (labels != IGNORE) | (ids != (ids[:, -1:] if pad_id is None else pad_id))
    return ~last | (last & text).any(1, keepdim=True)


def mean_loss(
    model: Model, batches: Iterable[Batch], *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> float | None:
    """Mean next-token cross entropy over the labels of ``batches``, in nats, one layer in memory at a time."""
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    hidden = forward(model, batches, dtype=dtype, device=device)
    return mean(loss_sum(model, hidden, batches, device), device)


def mean(part: tuple[float, int], device: torch.device | str) -> float | None:
    """Total over count, both summed over the processes."""
    total, count = summed(torch.tensor(part, dtype=torch.float64, device=device)).tolist()
    return total / count if count else None


class Runner:
    """What a decoder layer of one configuration needs to be run: rotary angles, and a mask that parts documents."""

    def __init__(self, config: LlamaConfig, device: torch.device | str) -> None:
        self.config = LlamaConfig.from_dict(config.to_dict())
        self.config._attn_implementation = "sdpa"
        self.rotary = LlamaRotaryEmbedding(self.config).to(device)

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        size: int | None = self.config.head_dim
        return size or self.config.hidden_size // self.config.num_attention_heads

    def layer(self, layer: LlamaDecoderLayer, states_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        """Output [B, S, D] of a whole layer."""
        output_BSD: Tensor = layer(states_BSD, **self._seen(states_BSD, positions_BS))
        return output_BSD

    def heads(self, attention: LlamaAttention, normed_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        """The heads' outputs side by side, what o_proj reads [B, S, H E]."""
        out = attention.o_proj
        attention.add_module("o_proj", nn.Identity())
        try:
            heads_BSC: Tensor = attention(normed_BSD, **self._seen(normed_BSD, positions_BS))[0]
        finally:
            attention.add_module("o_proj", out)
        return heads_BSC

    def _seen(self, states_BSD: Tensor, positions_BS: Tensor) -> dict[str, Any]:
        return {
            "attention_mask": create_causal_mask(self.config, states_BSD, None, None, positions_BS),
            "position_ids": positions_BS,
            "position_embeddings": self.rotary(states_BSD, positions_BS),
        }


def embedded(model: Model, batches: Sequence[Batch], dtype: torch.dtype) -> list[Tensor]:
    """Embeddings [B, S, D] of each batch, on the CPU."""
    embedding = model["model.embed_tokens.weight"]
    return [embedding[batch["input_ids"].cpu()].to(dtype) for batch in batches]


Visit = Callable[[int, LlamaDecoderLayer, Iterator[Tensor]], list[Tensor]]


@torch.no_grad()
def forward(
    model: Model,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    visit: Visit | None = None,
) -> list[Tensor]:
    """Hidden states [B, S, D] of each batch behind the last layer, before the final norm, on the CPU.

    ``visit(index, layer, outputs)`` may watch each layer: it draws the output of one batch after another, which is
    computed when it is drawn, and returns them.
    """
    runner = Runner(model.config, device)
    hidden = embedded(model, batches, dtype)

    def outputs(layer: LlamaDecoderLayer, hidden: list[Tensor]) -> Iterator[Tensor]:
        # Each batch's input goes when its output is there, so that the states are held once, not twice.
        for batch in batches:
            yield runner.layer(layer, hidden.pop(0).to(device), batch["position_ids"]).cpu()

    for index in range(model.shape.num_hidden_layers):
        layer = decoder_layer(model, index, runner.config, dtype, device)
        drawn = outputs(layer, hidden)
        hidden = visit(index, layer, drawn) if visit else list(drawn)
        # Let go before the next one is read: two layers would double the memory.
        del drawn, layer
    return hidden


def decoder_layer(
    model: Model, index: int, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str
) -> LlamaDecoderLayer:
    """Layer ``index`` of the model, frozen."""
    return layer_of(model.layer(index), config, dtype, device)


def layer_of(
    tensors: Mapping[str, Tensor], config: LlamaConfig, dtype: torch.dtype, device: torch.device | str
) -> LlamaDecoderLayer:
    """A frozen layer of these tensors; they are not copied where ``dtype`` and ``device`` are theirs."""
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, layer_idx=0).eval()
    cast = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    layer.load_state_dict(cast, strict=True, assign=True)
    return layer.requires_grad_(False)


def final_norm(model: Model, dtype: torch.dtype, device: torch.device | str) -> LlamaRMSNorm:
    """The final norm, in memory of its own."""
    norm = LlamaRMSNorm(model.shape.hidden_size, eps=model.config.rms_norm_eps)
    norm.weight = nn.Parameter(
        model["model.norm.weight"].to(device=device, dtype=dtype, copy=True), requires_grad=False
    )
    return norm


@torch.no_grad()
def loss_sum(
    model: Model, hidden: Sequence[Tensor], batches: Sequence[Batch], device: torch.device | str
) -> tuple[float, int]:
    """Sum of the cross entropy over labels, and their number; logits of a slice of the vocabulary at a time.

    What the head reads stays on the CPU, and is on ``device`` one batch at a time. Nothing, of no batches.
    """
    if not hidden:
        return 0.0, 0
    dtype = hidden[0].dtype
    norm, head = final_norm(model, dtype, device), model.head()
    labels = [batch["labels"][:, 1:] for batch in batches]
    states = [norm(h[:, :-1][t.cpu() != IGNORE].to(device)).cpu() for h, t in zip(hidden, labels, strict=True)]
    targets = [t[t != IGNORE] for t in labels]
    log_sums = [torch.full(t.shape, -math.inf, dtype=torch.float64, device=device) for t in targets]
    chosen = [torch.zeros(t.shape, dtype=torch.float64, device=device) for t in targets]
    for first in range(0, len(head), HEAD_CHUNK_ROWS):
        rows_VD = head[first : first + HEAD_CHUNK_ROWS].to(device=device, dtype=dtype)
        for number, target_T in enumerate(targets):
            if len(target_T) == 0:
                continue
            logits_TV = functional.linear(states[number].to(device), rows_VD)
            logits_TV = logits_TV if dtype == torch.float64 else logits_TV.float()
            log_sums[number] = torch.logaddexp(log_sums[number], logits_TV.logsumexp(1).double())
            inside = (target_T >= first) & (target_T < first + len(rows_VD))
            local = (target_T - first).clamp(0, len(rows_VD) - 1)[:, None]
            chosen[number] += torch.where(inside, logits_TV.gather(1, local)[:, 0].double(), 0.0)
    total = sum(float((a - b).sum()) for a, b in zip(log_sums, chosen, strict=True))
    return total, sum(len(t) for t in targets)
