"""Scores that cost passes of their own, and are therefore measured only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llamita.prune import depth, gradients, stream
from llamita.prune.partial import Partial
from llamita.prune.stream import Batch, Model


@dataclass(frozen=True, kw_only=True)
class Further:
    """Which of them to measure, on how much text, and within how much memory."""

    by_gradient: bool = False
    greedy_rounds: int = 0
    longest_block: int = 0
    gradient_tokens: int = 32768
    depth_tokens: int = 16384
    depth_gib: float = 4.0
    spill_path: Path | None = None

    def measure(
        self,
        model: Model,
        batches: Sequence[Batch],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        watch: Callable[[], None] = lambda: None,
        so_far: Partial | None = None,
    ) -> dict[str, Tensor]:
        """The tensors that :class:`llamita.prune.scores.Scores` lists as measured where asked for.

        The rounds of a greedy pass are noted in ``so_far``, and those that it holds are not measured again.

        Raises:
            ValueError: nothing in ``batches`` has a label, more layers are to leave than the model can lose, or a loss
                is not finite.
        """
        tensors: dict[str, Tensor] = {}
        if self.by_gradient:
            text = first_rows(batches, self.gradient_tokens)
            tensors |= gradients.measure(model, text, dtype=dtype, device=device, spill=self.spill_path, watch=watch)
        text = first_rows(batches, self.depth_tokens)
        how = depth.Removals(dtype=dtype, device=device, memory_gib=self.depth_gib, watch=watch)
        if self.greedy_rounds:
            rounds = {} if so_far is None else so_far.rounds_on(stream.digest(text))
            rank_L, table_RL = depth.greedy(model, text, self.greedy_rounds, how, **rounds)
            tensors |= {"layers.greedy": rank_L, "depth.greedy": table_RL}
        if self.longest_block:
            tensors["depth.contiguous"] = depth.contiguous(model, text, self.longest_block, how)
        return tensors


def first_rows(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The rows from the first on that together hold at most ``tokens``, padding included; one at least.

    Where batches are dealt to several processes in turn, the rows are counted in the order of all, and each process
    gets those of its own batches: the text is the same for any number of processes, and a process may have none of it.
    """
    rest, rows, least = iter(batches), list[Batch](), 1
    for is_mine, count, length in stream.dealt(batches):
        keep = min(count, max(tokens // length, least))
        tokens, least = tokens - keep * length, 0
        batch = next(rest) if is_mine else {}
        if batch and keep:
            rows.append({name: tensor[:keep] for name, tensor in batch.items()})
    return rows
