"""The teacher and the rows that the cache recipe records: opened, checked, loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState

from llamita import checkpoints, runs
from llamita.data import loader
from llamita.data.shards import PackedData
from llamita.distill import cache_format, capture, placement, quantised, sharded, teachers
from llamita.distill.cache import Identity

NAME = "teacher"


class Inputs:
    """What the recipe reads, opened and checked; no weight is read.

    Raises:
        ValueError: teacher and data do not go together, or three bytes cannot hold an entry.
    """

    def __init__(self, config: Any) -> None:
        quantised.check("teacher", config.teacher.weights)
        self.data = PackedData.open(config.data.path)
        available = self.data.manifest["splits"]
        if unknown := [name for name in config.data.splits if name not in available]:
            raise ValueError(f"data.splits must be among {', '.join(available)}, got {unknown[0]}")
        filled = [name for name in config.data.splits if available[name]["rows"]]
        if not filled:
            raise ValueError(f"data.path={config.data.path} has no rows in {', '.join(config.data.splits)}")
        self.splits = {name: self.data.split(name) for name in filled}
        teachers.check_model("teacher.path", config.teacher.path, self.data.sequence_length)
        self.vocabulary = teachers.Vocabulary.of_model(config.teacher.path, "teacher.path")
        owner = f"data.path={config.data.path}"
        teachers.check_vocabularies(
            teachers.Vocabulary(self.data.vocab_size, self.data.tokenizer_hash, owner), [self.vocabulary]
        )
        cache_format.check_fits(self.data.vocab_size, config.samples_per_token)
        self.rows_per_shard = max(1, config.shard_tokens // self.data.sequence_length)
        self.shards = capture.shards({name: len(split) for name, split in self.splits.items()}, self.rows_per_shard)

    def identity(self, config: Any, device: torch.device) -> Identity:
        """What the cache is made from, and how."""
        return Identity(
            teacher=checkpoints.content_hash(config.teacher.path),
            tokenizer=self.vocabulary.tokenizer_hash,
            data=self.data.content_hash,
            vocab_size=self.data.vocab_size,
            dtype=str(config.teacher.precision.dtype(device)).removeprefix("torch."),
            weights=config.teacher.weights,
            temperature=config.temperature,
            sampler=config.sampler,
            samples_per_token=config.samples_per_token,
            seed=config.run.seed,
            rows_per_shard=self.rows_per_shard,
        )


@contextlib.contextmanager
def teacher_of(config: Any, identity: Identity, state: PartialState) -> Iterator[capture.Capture]:
    """The teacher that a directory was claimed for; of one that is ``is_common``, every rank needs its own at once."""
    wanted, dtype = config.teacher, checkpoints.dtype_named(identity.dtype)
    teacher = placement.load(NAME, wanted, dtype=dtype, device=state.device, attention=wanted.attention)
    company = teacher.uneven() if isinstance(teacher, sharded.ShardedTeacher) else contextlib.nullcontext()
    with company:
        yield capture.Capture(teacher, identity, state.device, wanted.attention, config.chunk_mebibytes)


def costs(worker: capture.Capture, config: Any, inputs: Inputs, state: PartialState, run: runs.Run) -> dict[str, float]:
    """What quantisation did to the teacher's distributions; nothing where it is not quantised, every rank calls this.

    Raises:
        ValueError: more than ``teacher.max_kl``.
    """
    rows = loader.Sequential(
        next(iter(inputs.splits.values())), batch_rows=config.batch_rows, max_rows=placement.KL_ROWS
    )
    dtype = checkpoints.dtype_named(worker.identity.dtype)
    given = {"processes": state, "dtype": dtype, "run": run, "prefix": ""}
    return placement.compare([worker.teacher], {NAME: config.teacher}, rows, **given)
