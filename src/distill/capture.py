"""A teacher's pass over packed rows, whose distributions go into a cache shard by shard.

A shard is a fixed range of rows, whoever captures it: so any number of workers, stopped and started at any time, write
the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamita import checkpoints, runs
from llamita.distill import cache_format, samplers
from llamita.distill.cache import IDENTITY, INDEX, MANIFEST, SHARDS, Cache, Identity, Rows, distance
from llamita.distill.cache_format import ENTRY_BYTES, Slice
from llamita.distill.losses import TeacherStates, supervised
from llamita.distill.samplers import Sampler
from llamita.distill.teachers import Attention, Batch, Teacher, document_mask

Record = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]
"""Of a slice: entries per position, the entries, the values of those that have one of their own."""


@dataclass(kw_only=True)
class CaptureConfig:
    """What is stored of each distribution, and how the work is divided."""

    sampler: Sampler = Sampler.systematic
    samples_per_token: int = 50
    """Draws of a distribution, J in the samplers; the entries of ``top_k``."""
    temperature: float = 1.0
    """Of the distributions that are stored; a student must use the same ``loss.temperature``."""
    batch_rows: int = 8
    """Rows that the teacher sees at a time."""
    shard_tokens: int = 2**24
    """About so many tokens, in whole rows, are published at a time: what a kill costs at most."""
    chunk_mebibytes: int | None = None
    """Memory for distributions at any time; unset: 2048 on an accelerator, 64 on a CPU."""
    worker: int = 0
    """Which of ``workers`` this is: each takes every ``workers``-th shard."""
    workers: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be > 0 and finite, got {self.temperature}")
        for name in ("batch_rows", "shard_tokens", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.chunk_mebibytes is not None and self.chunk_mebibytes < 1:
            raise ValueError(f"chunk_mebibytes must be at least 1, got {self.chunk_mebibytes}")
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"worker must be in 0..workers-1 = 0..{self.workers - 1}, got {self.worker}")
        cache_format.check_fits(1, self.samples_per_token)


MAY_CHANGE = ("batch_rows", "chunk_mebibytes", "worker", "workers")
"""Settings that a restart, or another worker, may change."""


def claim(out: Path, identity: Identity) -> None:
    """Say in ``out`` what is being made there, or hold it against what an earlier start or another worker said.

    Raises:
        ValueError: the shards that are there are of another teacher, other data, or drawn in another way.
    """
    file = out / IDENTITY
    if not file.is_file():
        runs.write_json(file, asdict(identity))
    check_same(f"out={out}", Identity.read(file), identity)


def check_same(where: str, found: Identity, wanted: Identity) -> None:
    """Raise ``ValueError`` naming every part of two identities that differs."""
    mine, theirs = asdict(wanted), asdict(found)
    differ = [f"{name}: {theirs[name]} there, {mine[name]} now" for name in mine if mine[name] != theirs[name]]
    if differ:
        raise ValueError(f"{where} holds a cache of something else ({'; '.join(differ)}); choose another out")


@dataclass(frozen=True)
class Shard:
    """A range of the rows of a split, the same for any number of workers."""

    split: str
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.split}-{self.number:05d}"

    def batches(self, rows: Rows, batch_rows: int) -> Iterator[Batch]:
        """Its rows in order."""
        for first in range(self.first, self.last, batch_rows):
            yield rows.rows(np.arange(first, min(first + batch_rows, self.last)))


def shards(sizes: Mapping[str, int], rows_per_shard: int) -> list[Shard]:
    """All shards of splits with so many rows."""
    return [
        Shard(split, number, first, min(first + rows_per_shard, size))
        for split, size in sizes.items()
        for number, first in enumerate(range(0, size, rows_per_shard))
    ]


@dataclass(frozen=True)
class Capture:
    """Turns rows into stored distributions."""

    teacher: Teacher
    identity: Identity
    device: torch.device
    attention: Attention
    chunk_mebibytes: int

    def records(self, batch: Batch) -> Iterator[tuple[Slice, Record]]:
        """Each slice of a batch with what :meth:`cache_format.ShardWriter.add` stores of it."""
        identity = self.identity
        found = list(cache_format.slices(batch))
        if not found:
            return
        picked_BS = supervised(batch["labels"])
        number = identity.sampler.num_uniforms(identity.samples_per_token)
        uniform_BSK = np.zeros((*batch["labels"].shape, number))
        for one in found:
            uniform_BSK[one.row, one.first : one.first + one.length] = cache_format.uniforms(
                identity.seed, one.key, one.length, number
            )
        draws = samplers.sample(
            self._states(batch, picked_BS),
            identity.sampler,
            identity.samples_per_token,
            torch.from_numpy(uniform_BSK[:, :-1][picked_BS.numpy()]).to(self.device),
            temperature=identity.temperature,
            chunk_mebibytes=self.chunk_mebibytes,
        )
        length_BS = np.zeros(batch["labels"].shape, dtype=np.uint8)
        length_BS[:, :-1][picked_BS.numpy()] = draws.lengths.cpu().numpy()
        counts = draws.counts.cpu()
        packed = cache_format.pack(draws.ids.cpu().numpy(), counts.numpy())
        values = cache_format.to_bfloat16(draws.values.cpu()[counts == 0])
        before_M = np.concatenate([[0], np.cumsum(counts.numpy() == 0)])
        before_BS = np.concatenate([[0], np.cumsum(length_BS, dtype=np.int64)])
        for one in found:
            place = one.row * length_BS.shape[1] + one.first
            begin, end = before_BS[place], before_BS[place + one.length]
            yield (
                one,
                (
                    length_BS[one.row, one.first : one.first + one.length],
                    packed[ENTRY_BYTES * begin : ENTRY_BYTES * end],
                    values[before_M[begin] : before_M[end]],
                ),
            )

    @torch.no_grad()
    def _states(self, batch: Batch, picked_BS: Tensor) -> TeacherStates:
        """Hidden states of the supervised positions, ``[N, E]``."""
        on_device = {name: tensor.to(self.device) for name, tensor in batch.items()}
        mask = document_mask(on_device["position_ids"]) if self.attention is Attention.sdpa else None
        states = self.teacher.states(on_device, mask)
        assert isinstance(states, TeacherStates)
        return TeacherStates(states.hidden[:, :-1][picked_BS.to(self.device)], states.head)

    def write(self, shard: Shard, batches: Iterator[Batch], out: Path) -> dict[str, int]:
        """Publish a shard; returns how much it holds."""
        final = out / SHARDS / shard.name
        for stale in final.parent.glob(f".tmp-{shard.name}-*"):  # of a start that was killed; this one owns the shard
            shutil.rmtree(stale)
        with checkpoints.publishing(final) as folder:
            writer = cache_format.ShardWriter(folder, stores_values=self.identity.sampler.stores_values)
            for batch in batches:
                for one, stored in self.records(batch):
                    writer.add(one.key, *stored)
                runs.crash_point("mid_shard")
            return writer.close()


def missing(out: Path, wanted: list[Shard]) -> list[Shard]:
    """The shards that are not there whole; what is there and is not whole is removed.

    A folder under its final name was whole once: what lacks something now was damaged by others.
    """
    lacking = []
    for shard in wanted:
        folder = out / SHARDS / shard.name
        if checkpoints.check_manifest(folder) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            lacking.append(shard)
    return lacking


def finish(out: Path, identity: Identity, wanted: list[Shard]) -> dict[str, Any]:
    """Write index and manifest of a cache whose shards are all there; returns the manifest."""
    folders = [out / SHARDS / shard.name for shard in wanted]
    tables = [
        cache_format.ShardReader(folder, stores_values=identity.sampler.stores_values).slices for folder in folders
    ]
    cache_format.write_index(out / INDEX, tables)
    entries = [
        {
            "name": shard.name,
            "split": shard.split,
            "rows": shard.last - shard.first,
            **runs.read_json(folder / "shard.json"),
            "files": runs.read_json(folder / "MANIFEST.json")["files"],
        }
        for shard, folder in zip(wanted, folders, strict=True)
    ]
    manifest = {**asdict(identity), "index": runs.sha256(out / INDEX), "shards": entries}
    runs.write_json(out / MANIFEST, manifest)
    return manifest


def verify(cache: Cache, capture: Capture, rows: Mapping[str, Rows], *, batches: int, batch_rows: int) -> float:
    """Compute some batches again and return how far what is stored lies from that, see :func:`cache.distance`.

    The batches are those of the capture, of the same rows together: so on the same machine, even rounding is the same.
    """
    every = [(shard, first) for shard in shards({name: len(split) for name, split in rows.items()},
             cache.identity.rows_per_shard) for first in range(shard.first, shard.last, batch_rows)]
    chosen = np.random.default_rng(cache.identity.seed).permutation(len(every))[:batches]
    distances = []
    for place in sorted(chosen.tolist()):
        shard, first = every[place]
        batch = rows[shard.split].rows(np.arange(first, min(first + batch_rows, shard.last)))
        distances.append(distance(cache.lookup(batch), capture.targets(batch), cache.identity.vocab_size))
    return float(np.mean(distances))
