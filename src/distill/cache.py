"""A store of one teacher's token distributions, few entries each, from which any number of students learn.

``shards/<split>-NNNNN/`` holds a fixed range of the data's rows, whoever wrote it, and ``MANIFEST.json`` with the
hashes of its files; it appears under its name whole or not at all. ``index.bin`` tells where each document slice lies,
and ``cache.json``, written last, what all of it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from llamita import runs, storage
from llamita.distill import cache_format
from llamita.distill.samplers import Sampler
from llamita.distill.teachers import Batch, Storage

FORMAT = 2
MANIFEST, INDEX, IDENTITY, SHARDS = "cache.json", "index.bin", "identity.json", "shards"
MASK = "document"
"""Every document attends to itself only, at positions from 0: the one mask rule there is."""
HASHED_BYTES = 64 * 2**30
"""As much is hashed before training starts; of a larger cache a sample is, and each slice is checked as it is read."""
SAMPLED_SLICES = 64
"""Of each shard."""


class Rows(Protocol):
    """Packed rows of one split."""

    def __len__(self) -> int:
        """How many."""
        ...

    def rows(self, indices: NDArray[np.int64], /) -> Batch:
        """``input_ids``, ``labels`` and ``position_ids`` of these rows."""
        ...


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a cache was made from and how: caches of one identity hold the same bytes."""

    teacher: str
    """Content hash of its weights and configuration."""
    tokenizer: str
    data: str
    """Content hash of the packed rows."""
    vocab_size: int
    """Ids of the data; what rows the teacher's head has beyond them is padding."""
    dtype: str
    """In which the teacher ran."""
    temperature: float
    sampler: Sampler
    samples_per_token: int
    seed: int
    rows_per_shard: int
    weights: Storage = Storage.full
    """What the teacher's layers were stored in."""
    mask: str = MASK
    format: int = FORMAT

    @classmethod
    def read(cls, path: Path) -> Identity:
        """From a JSON file; ``ValueError`` where this program does not know its format or mask rule."""
        found = storage.read_mapping(path)
        for name, known in (("format", FORMAT), ("mask", MASK)):
            if found.get(name) != known:
                raise ValueError(f"{path} has {name} {found.get(name)!r}, this program knows {known!r}")
        values = {name: found[name] for name in cls.__dataclass_fields__}
        return cls(**values | {"sampler": Sampler(values["sampler"]), "weights": Storage(values["weights"])})


def check_same(where: str, found: Identity, wanted: Identity) -> None:
    """Raise ``ValueError`` naming every part of two identities that differs."""
    mine, theirs = asdict(wanted), asdict(found)
    differ = [f"{name}: {theirs[name]} there, {mine[name]} now" for name in mine if mine[name] != theirs[name]]
    if differ:
        raise ValueError(f"{where} holds a cache of something else ({'; '.join(differ)}); choose another out")


class Cache:
    """A finished cache, opened and checked."""

    @classmethod
    def open(cls, path: Path, setting: str = "cache") -> Self:
        """A cache that its run has finished; ``setting`` is what named it.

        Raises:
            ValueError: it is not a finished cache, or a file is missing or cut short.
        """
        if not path.is_dir():
            raise ValueError(f"{setting}={path} does not exist")
        if not (path / MANIFEST).is_file():
            unfinished = (path / IDENTITY).is_file()
            hint = "of an unfinished run: finish that stage first" if unfinished else f"without {MANIFEST}"
            raise ValueError(f"{setting}={path} is a directory {hint}")
        runs.check_done(path)
        return cls(path)

    def __init__(self, path: Path) -> None:
        """Open a directory that has a manifest.

        Raises:
            ValueError: a file is missing or cut short.
        """
        self.path = path
        self.identity = Identity.read(path / MANIFEST)
        self.manifest = storage.read_mapping(path / MANIFEST)
        for entry in self.manifest["shards"]:
            for name, file in entry["files"].items():
                place = self._folder(entry) / name
                size = place.stat().st_size if place.is_file() else None
                if size != file["bytes"]:
                    raise ValueError(f"{place} has {size} bytes, {path / MANIFEST} says {file['bytes']}: damaged cache")
        self._index: NDArray[np.uint64] = cache_format.read_index(path / INDEX)
        self._readers: dict[int, cache_format.ShardReader] = {}

    @property
    def content_hash(self) -> str:
        """One hash of everything in it, the same wherever it lies."""
        return storage.sha256(self.path / MANIFEST)

    def summary(self) -> dict[str, float]:
        """What it takes, in all and for each token that has something to predict."""
        entries = self.manifest["shards"]
        totals = {name: sum(e[name] for e in entries) for name in ("tokens", "predicted", "entries", "bytes")}
        totals["bytes"] += self._index.nbytes
        predicted = max(1, totals["predicted"])
        return totals | {f"{name}_per_token": totals[name] / predicted for name in ("entries", "bytes")}

    def _folder(self, entry: Mapping[str, Any]) -> Path:
        name = str(entry["name"])
        if Path(name).name != name:
            raise ValueError(f"{self.path / MANIFEST} names a shard outside its directory: {name!r}")
        return self.path / SHARDS / name

    def _reader(self, shard: int) -> cache_format.ShardReader:
        if shard not in self._readers:
            folder = self._folder(self.manifest["shards"][shard])
            stores_values = self.identity.sampler.stores_values
            self._readers[shard] = cache_format.ShardReader(folder, stores_values=stores_values)
        return self._readers[shard]

    def check_content(self) -> None:
        """Hold the content against its hashes: all of it, or of more than ``HASHED_BYTES`` some slices of each shard.

        Raises:
            ValueError: a file is not what was written.
        """
        if storage.sha256(self.path / INDEX) != self.manifest["index"]:
            raise ValueError(f"{self.path / INDEX} is not what was written: damaged cache")
        entries = self.manifest["shards"]
        total = sum(file["bytes"] for entry in entries for file in entry["files"].values())
        check = self._hash_shard if total <= HASHED_BYTES else self._sample_shard
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(check, range(len(entries))))

    def _hash_shard(self, shard: int) -> None:
        for name in self.manifest["shards"][shard]["files"]:
            self._hash_file(shard, name)

    def _sample_shard(self, shard: int) -> None:
        self._hash_file(shard, "slices.bin")
        reader = self._reader(shard)
        for index in np.linspace(0, len(reader.slices) - 1, min(SAMPLED_SLICES, len(reader.slices))).astype(int):
            reader.read(int(index))

    def _hash_file(self, shard: int, name: str) -> None:
        entry = self.manifest["shards"][shard]
        if storage.sha256(self._folder(entry) / name) != entry["files"][name]["sha256"]:
            raise ValueError(f"{self._folder(entry) / name} is not what was written: damaged cache")

    def find(self, keys: list[bytes]) -> list[tuple[int, int] | None]:
        """Shard and slice of each key, ``None`` where there is none."""
        if not keys:
            return []
        halves = np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2)
        first_D = np.searchsorted(self._index[0], halves[:, 0])
        return [self._exact(first, half) for first, half in zip(first_D.tolist(), halves, strict=True)]

    def _exact(self, place: int, half: NDArray[np.uint64]) -> tuple[int, int] | None:
        # Two keys may share their first half: the table behind the index has both halves.
        while place < self._index.shape[1] and self._index[0, place] == half[0]:
            shard, index = divmod(int(self._index[1, place]), 2**32)
            if self._reader(shard).slices[index]["key"][1] == half[1]:
                return shard, index
            place += 1
        return None

    def lookup(self, batch: Batch) -> dict[str, torch.Tensor]:
        """``ids``, ``values`` and ``lengths`` as :class:`losses.SparseTargets` wants them, of a batch on the CPU.

        Raises:
            ValueError: a document of the batch is not in the cache, or what is stored of it is damaged.
        """
        found = list(cache_format.slices(batch))
        places = self.find([one.key for one in found])
        records = []
        for one, place in zip(found, places, strict=True):
            if place is None:
                raise ValueError(
                    f"cache={self.path} has nothing for a document of {one.length} tokens (row {one.row} of a batch, "
                    f"from token {one.first}): the data was packed or masked in another way than what the teacher saw"
                )
            records.append((one, self._reader(place[0]).read(place[1])))
        rows, length = batch["labels"].shape
        return cache_format.targets((rows, length), records, self.identity.samples_per_token)

    def check_covers(self, splits: Mapping[str, Rows], data_hash: str) -> None:
        """Refuse data that the cache does not hold; other data than it was made from is read through once.

        Raises:
            ValueError: naming how many documents are missing.
        """
        held = {entry["split"] for entry in self.manifest["shards"]}
        if lacks := sorted(splits.keys() - held):
            raise ValueError(f"cache={self.path} holds {', '.join(sorted(held))} and lacks the split {lacks[0]}")
        if data_hash == self.identity.data:
            return
        for name, rows in splits.items():
            lacking = total = 0
            for first in range(0, len(rows), 64):
                batch = rows.rows(np.arange(first, min(first + 64, len(rows))))
                keys = [one.key for one in cache_format.slices(batch)]
                total += len(keys)
                lacking += self.find(keys).count(None)
            if lacking:
                raise ValueError(
                    f"cache={self.path} was made from other data ({self.identity.data[:12]}, this is {data_hash[:12]}) "
                    f"and lacks {lacking} of {total} documents of its split {name}: cache this data"
                )


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], vocab_size: int) -> float:
    """Mean total variation distance, half the sum of abs(t - t'), of the targets of the same positions."""
    rows = [torch.arange(t["lengths"].numel()).repeat_interleave(t["lengths"].flatten()) for t in (one, other)]
    keys = torch.cat([row * vocab_size + t["ids"] for row, t in zip(rows, (one, other), strict=True)])
    values = torch.cat([one["values"], -other["values"]]).double()
    found, place = torch.unique(keys, return_inverse=True)
    gap = torch.zeros(len(found), dtype=torch.float64).index_add_(0, place, values)
    positions = int((one["lengths"] > 0).sum())
    return float(gap.abs().sum()) / 2 / max(1, positions)
