"""What a head attends to, and queries and keys that attend to the same in fewer dimensions or from a narrower stream.

Shape letters: B = rows, S = positions, D = hidden size, H = query heads, K = KV heads, E = head size, h = the query
heads of a few KV heads, Q = a run of positions that look back, P = the positions that they can look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamita.prune.basis import widened
from llamita.prune.stream import Runner

CHUNK_BYTES = 2**30
"""Of all that exists for one chunk of two attentions: a small part of a GPU, where one float32 tensor of all 32 heads
of a row of 8,192 tokens is 8 GiB. Smaller chunks would start more kernels and save nothing that matters."""
CHUNK_TENSORS = 6
"""Tensors of a chunk's size that exist at once: see :func:`divergence_in_chunks`; 5.7 were measured."""


@dataclass(frozen=True)
class Chunk:
    """The query heads of some KV heads, and a run of positions."""

    keys: slice
    """KV heads."""
    rows: slice
    """Positions that look back, at those up to the last of them."""


def chunks(batch: int, keys: int, group: int, length: int, value_bytes: int) -> Iterator[Chunk]:
    """All of [B, K group, S, S] in pieces within ``CHUNK_BYTES``: one where that is enough, else some KV heads at a
    time, else one KV head and some positions."""
    most = CHUNK_BYTES // (CHUNK_TENSORS * value_bytes)
    head = batch * group * length * length
    heads = min(keys, max(1, most // head))
    rows = length if head <= most else max(1, most // (batch * group * length))
    for key in range(0, keys, heads):
        for row in range(0, length, rows):
            yield Chunk(slice(key, min(key + heads, keys)), slice(row, min(row + rows, length)))


@dataclass(frozen=True)
class Turned:
    """Queries and keys of one batch, turned by their positions."""

    query: Tensor
    """[B, H, S, E]"""
    key: Tensor
    """[B, K, S, E]"""

    def log_probabilities(self, chunk: Chunk, seen_BQP: Tensor) -> Tensor:
        """Logarithm of a chunk's attention [B, h, Q, P]; minus infinity where nothing may be seen."""
        group = self.query.shape[1] // self.key.shape[1]
        heads = slice(group * chunk.keys.start, group * chunk.keys.stop)
        query_BhQE = self.query[:, heads, chunk.rows]
        key_BhPE = self.key[:, chunk.keys, : chunk.rows.stop].repeat_interleave(group, 1)
        logits_BhQP: Tensor = query_BhQE @ key_BhPE.mT / query_BhQE.shape[-1] ** 0.5
        return widened(logits_BhQP).masked_fill(~seen_BQP, -torch.inf).log_softmax(-1)


@dataclass(frozen=True)
class Attention:
    """Queries and keys of one layer with what turns them."""

    runner: Runner
    query: Tensor
    """[H E, D]"""
    key: Tensor
    """[K E, D]"""

    def turned(self, normed_BSD: Tensor, positions_BS: Tensor) -> Turned:
        """Queries and keys for what the norm gives."""
        query, key = (
            (normed_BSD @ weight.T).view(*positions_BS.shape, -1, self.runner.head_dim).transpose(1, 2)
            for weight in (self.query, self.key)
        )
        return Turned(*apply_rotary_pos_emb(query, key, *self.runner.rotary(normed_BSD, positions_BS)))

    def log_probabilities(self, normed_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        """Logarithm of each query head's attention [B, H, S, S]; minus infinity where nothing may be seen."""
        turned = self.turned(normed_BSD, positions_BS)
        everything = Chunk(slice(0, turned.key.shape[1]), slice(0, positions_BS.shape[1]))
        return turned.log_probabilities(everything, seen(positions_BS, everything.rows))


def seen(positions_BS: Tensor, rows: slice) -> Tensor:
    """Which positions [B, 1, Q, P] those of ``rows`` see: those of their document up to themselves."""
    document_BS, place_S = (
        (positions_BS == 0).cumsum(1),
        torch.arange(positions_BS.shape[1], device=positions_BS.device),
    )
    same = document_BS[:, None, rows, None] == document_BS[:, None, None, : rows.stop]
    return same & (place_S[rows, None] >= place_S[: rows.stop])


def divergence(whole_BhQP: Tensor, cut_BhQP: Tensor, mask_BQ: Tensor) -> Tensor:
    """Sum over heads and positions of KL(whole || cut) in nats, of two logarithms of attention."""
    # Where nothing is seen both are minus infinity, and their difference is not a number.
    gap_BhQP = (whole_BhQP - cut_BhQP).masked_fill(whole_BhQP.isinf(), 0.0)
    total_BhQ = (whole_BhQP.exp() * gap_BhQP).sum(-1)
    return (total_BhQ * mask_BQ[:, None]).sum()


def divergence_in_chunks(whole: Turned, cut: Turned, positions_BS: Tensor, mask_BS: Tensor, *, learn: bool) -> Tensor:
    """Sum over heads and positions of KL(whole || cut) in nats, in float64, within ``CHUNK_BYTES``.

    To ``learn`` is to add its gradients to all that ``cut`` was made of: backward goes through one chunk after another,
    then once through the projections. A chunk holds the whole attention and its exponential, the cut one and their gap,
    and on the way back two gradients.
    """
    key = whole.key
    leaves = [turned.detach().requires_grad_(learn) for turned in (cut.query, cut.key)]
    value_bytes = max(4, key.dtype.itemsize, leaves[0].dtype.itemsize)
    total = torch.zeros((), dtype=torch.float64, device=key.device)
    group = whole.query.shape[1] // key.shape[1]
    for chunk in chunks(len(key), key.shape[1], group, key.shape[2], value_bytes):
        seen_BQP = seen(positions_BS, chunk.rows)
        with torch.no_grad():
            wanted_BhQP = whole.log_probabilities(chunk, seen_BQP)
        part = divergence(wanted_BhQP, Turned(*leaves).log_probabilities(chunk, seen_BQP), mask_BS[:, chunk.rows])
        if learn:
            torch.autograd.backward(part)
        total += part.detach()
    if learn:
        torch.autograd.backward([cut.query, cut.key], [leaf.grad for leaf in leaves])
    return total
