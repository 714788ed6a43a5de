"""Batches in an order that depends on the seed and the samples consumed, on nothing else.

Shape letters: B = rows, S = positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llamita.data import order
from llamita.data.shards import Batch, Split


class Loader:
    """This rank's micro-batches of each optimiser step, without end: epoch follows epoch.

    Step ``k`` is samples ``k * global_batch_rows`` and following of the order; rank ``r`` takes the ``r``-th of
    ``world_size`` equal parts, cut into micro-batches. The union over ranks is the same for every world size and
    micro-batch, so a run may go on with another number of processes.
    """

    def __init__(
        self,
        split: Split,
        *,
        seed: int,
        global_batch_rows: int,
        micro_batch_rows: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Check the sizes; nothing is read before the first step.

        Raises:
            ValueError: the global batch is not a whole number of micro-batches on each rank.
        """
        if min(global_batch_rows, micro_batch_rows, world_size) < 1:
            raise ValueError(
                "global_batch_rows, micro_batch_rows and world_size must be at least 1, "
                f"got {global_batch_rows}, {micro_batch_rows} and {world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if global_batch_rows % (micro_batch_rows * world_size):
            raise ValueError(
                f"global_batch_rows must be a multiple of micro_batch_rows * world_size = {micro_batch_rows} * "
                f"{world_size}, got {global_batch_rows}"
            )
        self.split = split
        self.seed = seed
        self.global_batch_rows = global_batch_rows
        self.micro_batch_rows = micro_batch_rows
        self.rank = rank
        self.world_size = world_size
        self.samples_consumed = 0

    def __iter__(self) -> Iterator[list[Batch]]:
        """Itself: the position is part of its state."""
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next step; it counts as consumed from here on."""
        share = self.global_batch_rows // self.world_size
        first = self.samples_consumed + self.rank * share
        rows = order.rows(self.seed, len(self.split), first, first + share)
        batches = [self.split.rows(part) for part in rows.reshape(-1, self.micro_batch_rows)]
        self.samples_consumed += self.global_batch_rows
        return batches

    @property
    def epoch(self) -> float:
        """How often the split was gone through so far."""
        return self.samples_consumed / len(self.split)

    def state_dict(self) -> dict[str, Any]:
        """Three numbers; they hold for any world size, micro-batch and machine."""
        return {
            "seed": self.seed,
            "samples_consumed": self.samples_consumed,
            "data_hash": self.split.content_hash,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where the saved loader would have gone on.

        Raises:
            ValueError: the state is of other data or of another seed.
        """
        for name, mine in (("data_hash", self.split.content_hash), ("seed", self.seed)):
            if state[name] != mine:
                raise ValueError(
                    f"the saved position belongs to {name}={state[name]}, this run has {name}={mine} "
                    f"({self.split.path}, {self.split.name}): the rows would not be those that were planned"
                )
        if state["samples_consumed"] < 0:
            raise ValueError(f"samples_consumed must be at least 0, got {state['samples_consumed']}")
        self.samples_consumed = int(state["samples_consumed"])

    def row_ids(self, first: int, stop: int) -> list[int]:
        """Rows of the split that samples ``first`` to ``stop`` of the order are."""
        found: list[int] = order.rows(self.seed, len(self.split), first, stop).tolist()
        return found


class Sequential:
    """The rows of a split as they are stored, once; of the batches, rank ``r`` reads every ``world_size``-th.

    ``prepare`` stores rows in a pseudo-random order, so the first ``max_rows`` are a fair sample. The last batch may
    be smaller, and a rank may have one batch less than another.
    """

    def __init__(
        self, split: Split, *, batch_rows: int, max_rows: int | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        """Check the sizes; nothing is read before the first batch.

        Raises:
            ValueError: a size is below one.
        """
        if batch_rows < 1 or (max_rows is not None and max_rows < 1):
            raise ValueError(f"batch_rows and max_rows must be at least 1, got {batch_rows} and {max_rows}")
        self.split = split
        self.total = len(split) if max_rows is None else min(max_rows, len(split))
        self.batch_rows = batch_rows
        self.firsts = range(rank * batch_rows, self.total, world_size * batch_rows)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self.firsts)

    def __iter__(self) -> Iterator[Batch]:
        """Read one batch after another."""
        for first in self.firsts:
            yield self.split.rows(np.arange(first, min(first + self.batch_rows, self.total)))
