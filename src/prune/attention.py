"""What a head attends to, and queries and keys that attend to the same in fewer dimensions or from a narrower stream.

Shape letters: B = rows, S = positions, D = hidden size, H = query heads, K = KV heads, E = head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamita.prune.basis import widened
from llamita.prune.stream import Runner


@dataclass(frozen=True)
class Attention:
    """Queries and keys of one layer with what turns them."""

    runner: Runner
    query: Tensor
    """[H E, D]"""
    key: Tensor
    """[K E, D]"""

    def log_probabilities(self, normed_BSD: Tensor, positions_BS: Tensor) -> Tensor:
        """Logarithm of each query head's attention [B, H, S, S]; minus infinity where nothing may be seen."""
        size = self.runner.head_dim
        query, key = (
            (normed_BSD @ weight.T).view(*positions_BS.shape, -1, size).transpose(1, 2)
            for weight in (self.query, self.key)
        )
        query, key = apply_rotary_pos_emb(query, key, *self.runner.rotary(normed_BSD, positions_BS))
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits_BHSS: Tensor = query @ key.mT / size**0.5
        seen = self.runner.mask(normed_BSD, positions_BS)
        return widened(logits_BHSS).masked_fill(~seen, -torch.inf).log_softmax(-1)


def divergence(whole_BHSS: Tensor, cut_BHSS: Tensor, mask_BS: Tensor) -> Tensor:
    """Sum over heads and positions of KL(whole || cut) in nats, of two logarithms of attention."""
    # Where nothing is seen both are minus infinity, and their difference is not a number.
    gap_BHSS = (whole_BHSS - cut_BHSS).masked_fill(whole_BHSS.isinf(), 0.0)
    total_BHS = (whole_BHSS.exp() * gap_BHSS).sum(-1)
    return (total_BHS * mask_BS[:, None]).sum()
