"""A cache of the toy problem's teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toy
from torch import Tensor

from llamita import runs
from llamita.distill import capture
from llamita.distill.cache import Cache, Identity
from llamita.distill.samplers import Sampler
from llamita.distill.teachers import Attention, ResidentTeacher

SEED = 2


@dataclass(frozen=True)
class Rows:
    """A split in memory."""

    data: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.data["labels"])

    def rows(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {name: tensor[indices] for name, tensor in self.data.items()}


def joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def splits() -> dict[str, Rows]:
    """What ``toy.go`` trains on and validates with."""
    held = [toy.rows(2, seed=7), toy.rows(3, seed=8), toy.rows(1, seed=9)]
    return {"train": Rows(toy.rows(40)), "validation": Rows(joined(held))}


def identity(**changes: Any) -> Identity:
    fields: dict[str, Any] = {
        "teacher": "abc",
        "tokenizer": "words",
        "data": "toy",
        "vocab_size": toy.VOCABULARY,
        "dtype": "float32",
        "temperature": 1.0,
        "sampler": Sampler.systematic,
        "samples_per_token": 50,
        "seed": 0,
        "rows_per_shard": 16,
    }
    return Identity(**{**fields, **changes})


def teacher(**changes: Any) -> capture.Capture:
    """The toy's teacher, ready to be captured."""
    model = ResidentTeacher("big", toy.model(SEED, hidden=24, tied=False))
    return capture.Capture(model, identity(**changes), torch.device("cpu"), Attention.sdpa, 1)


def make(out: Path, *, batch_rows: int = 8, rows: dict[str, Rows] | None = None, **changes: Any) -> Cache:
    """A finished cache in ``out``."""
    source, worker = rows or splits(), teacher(**changes)
    planned = capture.shards({name: len(split) for name, split in source.items()}, worker.identity.rows_per_shard)
    with runs.start(out, "cache", {}, runs.RunConfig()) as run:
        capture.claim(out, worker.identity)
        capture.capture_all(worker, capture.missing(out, planned), source, run, out, batch_rows=batch_rows)
        run.finish(capture.finish(out, worker.identity, planned))
    return Cache.open(out)


def dense(batch: dict[str, Tensor], temperature: float = 1.0) -> Tensor:
    """The teacher's probabilities ``[B, S, V]``."""
    states = teacher().teacher.states(batch, None)
    # Without a mask, transformers itself keeps documents apart where the positions restart.
    return (states.hidden @ states.head.T / temperature).softmax(-1)
