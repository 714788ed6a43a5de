"""A teacher's pass over packed rows, whose distributions go into a cache shard by shard.

A shard is a fixed range of rows, whoever captures it: so any number of workers, stopped and started at any time, write
the same bytes.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llamita import faults, manifests, runs, stops, storage
from llamita.distill import cache_format, samplers
from llamita.distill.cache import IDENTITY, INDEX, MANIFEST, SHARDS, Cache, Identity, Rows, check_same, distance
from llamita.distill.cache_format import ENTRY_BYTES, Record, Slice
from llamita.distill.losses import TeacherStates, supervised
from llamita.distill.samplers import Sampler
from llamita.distill.teachers import Attention, Batch, Teacher, mask_for
from llamita.progress import Progress

log = logging.getLogger(__name__)


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
    verify: int = 0
    """Batches, drawn from all, that are computed again and compared; also on a cache that is finished."""
    max_distance: float = 0.0
    """Mean total variation by which ``verify`` may find the targets moved; another kind of device rounds otherwise."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be > 0 and finite, got {self.temperature}")
        for name in ("batch_rows", "shard_tokens", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.chunk_mebibytes is not None and self.chunk_mebibytes < 1:
            raise ValueError(f"chunk_mebibytes must be at least 1, got {self.chunk_mebibytes}")
        if self.verify < 0:
            raise ValueError(f"verify must be >= 0, got {self.verify}")
        if not 0 <= self.max_distance <= 1:
            raise ValueError(f"max_distance must be in 0..1, got {self.max_distance}")
        if not 0 <= self.worker < self.workers:
            raise ValueError(f"worker must be in 0..workers-1 = 0..{self.workers - 1}, got {self.worker}")
        cache_format.check_fits(1, self.samples_per_token)


WAIT_SECONDS = 0.5
"""Between looks at the shards of other processes."""
USUAL_ENTRIES = 16
"""Assumed per token at 50 systematic samples of a teacher of billions of weights. With replacement the authors of
Random Sampling KD find about 12 (arXiv:2503.16870); systematic counts are spread over a few more. Measure some rows."""
MAY_CHANGE = (
    *("batch_rows", "chunk_mebibytes", "worker", "workers", "verify", "max_distance"),
    *("teacher.placement", "teacher.max_kl"),
)
"""Settings that a restart, or another worker, may change."""


def default_chunk_mebibytes(*, on_cpu: bool) -> int:
    """Memory for distributions where none is set."""
    return 64 if on_cpu else 2048


def claim(out: Path, identity: Identity) -> None:
    """Say in ``out`` what is being made there, or hold it against what an earlier start or another worker said.

    Raises:
        ValueError: the shards that are there are of another teacher, other data, or drawn in another way.
    """
    file = out / IDENTITY
    if not file.is_file():
        storage.write_json(file, asdict(identity))
    check_same(f"out={out}", Identity.read(file), identity)


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
    chunk_mebibytes: int | None
    """Memory for distributions at any time; ``None``: see :class:`CaptureConfig`."""

    def records(self, batch: Batch) -> Iterator[tuple[Slice, Record]]:
        """Each slice of a batch with what is stored of it."""
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
            self.states(batch, picked_BS),
            identity.sampler,
            identity.samples_per_token,
            torch.from_numpy(uniform_BSK[:, :-1][picked_BS.numpy()]).to(self.device),
            temperature=identity.temperature,
            chunk_mebibytes=self.chunk_mebibytes or default_chunk_mebibytes(on_cpu=self.device.type == "cpu"),
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

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """What the cache gives for a batch, computed now."""
        rows, length = batch["labels"].shape
        return cache_format.targets((rows, length), list(self.records(batch)), self.identity.samples_per_token)

    @torch.no_grad()
    def states(self, batch: Batch, picked_BS: Tensor) -> TeacherStates:
        """Hidden states of the supervised positions, ``[N, E]``, and the head without the rows that are no ids."""
        on_device = {name: tensor.to(self.device) for name, tensor in batch.items()}
        states = self.teacher.states(on_device, mask_for(self.attention, on_device["position_ids"]))
        assert isinstance(states, TeacherStates)
        head_VE = states.head[: self.identity.vocab_size]
        return TeacherStates(states.hidden[:, :-1][picked_BS.to(self.device)], head_VE)

    def write(self, shard: Shard, batches: Iterable[Batch], out: Path) -> dict[str, int]:
        """Publish a shard, which no other process may be writing; returns how much it holds."""
        final = out / SHARDS / shard.name
        for stale in [final, *final.parent.glob(f".tmp-{shard.name}-*")]:  # damaged, or left by a start that was killed
            shutil.rmtree(stale, ignore_errors=True)
        with manifests.publishing(final) as folder:
            writer = cache_format.ShardWriter(folder, stores_values=self.identity.sampler.stores_values)
            for batch in batches:
                for one, stored in self.records(batch):
                    writer.add(one.key, stored)
                faults.crash_point("mid_shard")
            return writer.close()


def missing(out: Path, wanted: list[Shard]) -> list[Shard]:
    """The shards that are not there, or not whole any more."""
    return [shard for shard in wanted if manifests.check_manifest(out / SHARDS / shard.name) is not None]


@faults.phase(
    "capturing", memory="a smaller batch_rows or chunk_mebibytes, teacher.placement=zero3, teacher.weights=nf4"
)
def capture_all(
    teacher: Capture,
    wanted: Sequence[Shard],
    rows: Mapping[str, Rows],
    run: runs.Run,
    out: Path,
    *,
    batch_rows: int,
    done: int = 0,
) -> None:
    """Publish these shards in ``out``, and log speed and size of each, behind the ``done`` of earlier starts.

    Raises:
        Stopped: ``run`` was asked to stop, or whatever is at work in ``out``; shards that are whole stay.
    """
    signals = (run.stop, stops.StopSignal(out))
    total = sum(-(-(shard.last - shard.first) // batch_rows) for shard in wanted)
    with run.watchdog, Progress("cache", total) as progress:
        for number, shard in enumerate(wanted, done + 1):
            begin = time.perf_counter()
            batches = progress.count(shard.batches(rows[shard.split], batch_rows), note=shard.name)
            held = teacher.write(shard, _until_stopped(batches, signals, run.watchdog, out), out)
            predicted, seconds = max(1, held["predicted"]), time.perf_counter() - begin
            speed = {"cache/tokens_per_s": held["tokens"] / seconds, "cache/tokens": held["tokens"]}
            size = {f"cache/{name}_per_token": held[name] / predicted for name in ("entries", "bytes")}
            run.log(speed | size, step=number)


def wait(wanted: Sequence[Shard], run: runs.Run, out: Path) -> None:
    """Return when these shards are whole, whoever captures them.

    A collective would give up on a process that is hours behind, and would not hear of a stop.

    Raises:
        Stopped: as :func:`capture_all`.
    """
    signals = (run.stop, stops.StopSignal(out))
    while left := missing(out, list(wanted)):
        if any(signal.is_set() for signal in signals):
            raise runs.Stopped(f"stopped in {out}: the shards that are whole stay; start it again to go on")
        wanted = left
        time.sleep(WAIT_SECONDS)


def _until_stopped(
    batches: Iterator[Batch], signals: Sequence[stops.StopSignal], watchdog: faults.Watchdog, out: Path
) -> Iterator[Batch]:
    for batch in batches:
        watchdog.beat()
        if any(signal.is_set() for signal in signals):
            raise runs.Stopped(f"stopped in {out}: the shards that are whole stay; start it again to go on")
        yield batch


def finish(out: Path, identity: Identity, wanted: list[Shard]) -> list[str]:
    """Write index and manifest of a cache whose shards are all there; returns the names of its files."""
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
            **storage.read_json(folder / "shard.json"),
            "files": storage.read_json(folder / "MANIFEST.json")["files"],
        }
        for shard, folder in zip(wanted, folders, strict=True)
    ]
    manifest = {**asdict(identity), "index": storage.sha256(out / INDEX), "shards": entries}
    storage.write_json(out / MANIFEST, manifest)
    return [MANIFEST, INDEX, IDENTITY]


def verify(
    cache: Cache, capture: Capture, rows: Mapping[str, Rows], *, batches: int, batch_rows: int, allowed: float
) -> float:
    """Compute some batches again, and return how far what is stored lies from that, see :func:`cache.distance`.

    The batches are those of the capture, of the same rows together: so on the same machine, even rounding is the same.

    Raises:
        ValueError: further than ``allowed``.
    """
    planned = shards({name: len(split) for name, split in rows.items()}, cache.identity.rows_per_shard)
    every = [(shard, first) for shard in planned for first in range(shard.first, shard.last, batch_rows)]
    chosen = np.random.default_rng(cache.identity.seed).permutation(len(every))[:batches]
    distances = []
    for place in sorted(chosen.tolist()):
        shard, first = every[place]
        batch = rows[shard.split].rows(np.arange(first, min(first + batch_rows, shard.last)))
        distances.append(distance(cache.lookup(batch), capture.targets(batch), cache.identity.vocab_size))
    found = float(np.mean(distances))
    log.info("%s: %d batches computed again differ by %.3g", cache.path, len(chosen), found)
    if found > allowed:
        raise ValueError(
            f"cache={cache.path}: {len(chosen)} batches computed again differ by {found:.3g} (mean total variation) "
            f"from what is stored, max_distance={allowed} is allowed: another batch_rows, device or library rounds in "
            "another way; more than a few percent mean that the cache is of something else"
        )
    return found
