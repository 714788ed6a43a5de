"""Attention over packed rows, one document at a time, by the causal kernel and without a mask.

A row of S tokens whose documents have d tokens each costs sum(d²) instead of S² products, and no mask
``[B, 1, S, S]``, for which SDPA leaves its fast kernels and repeats keys and values for every query head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

NAME = "documents"
"""As transformers knows this kernel."""


def lengths(position_ids_BS: Tensor) -> list[list[int]]:
    """Tokens of each document, row by row: positions restart where a document begins."""
    starts_BS = functional.pad(position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1, (1, 0), value=True)
    size = position_ids_BS.shape[1]
    rows: list[list[int]] = [[] for _ in starts_BS]
    for row, start in starts_BS.nonzero().tolist():
        rows[row].append(start)
    return [[end - start for start, end in zip(row, [*row[1:], size], strict=True)] for row in rows]


def attend(
    module: torch.nn.Module,
    query_BHSE: Tensor,
    key_BKSE: Tensor,
    value_BKSE: Tensor,
    attention_mask: None,
    *,
    document_lengths: list[list[int]],
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each document, ``[B, S, H, E]``; H = query heads, K = KV heads, E = head size.

    Rows that are cut alike are computed together.
    """
    together = all(row == document_lengths[0] for row in document_lengths)
    groups = (
        [(slice(None), document_lengths[0])]
        if together
        else [(slice(index, index + 1), row) for index, row in enumerate(document_lengths)]
    )
    results = []
    for rows, sizes in groups:
        query, key, value = (torch.split(tensor[rows], sizes, dim=2) for tensor in (query_BHSE, key_BKSE, value_BKSE))
        parts = [_causal(q, k, v, scaling) for q, k, v in zip(query, key, value, strict=True)]
        results.append(torch.cat(parts, dim=1))
    return torch.cat(results), None


def _causal(query_BHSE: Tensor, key_BKSE: Tensor, value_BKSE: Tensor, scaling: float) -> Tensor:
    """One document of each row, ``[B, S, H, E]``."""
    output = functional.scaled_dot_product_attention(
        query_BHSE, key_BKSE, value_BKSE, is_causal=True, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2)


AttentionInterface.register(NAME, attend)
