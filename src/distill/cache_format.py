"""The bytes of a logit cache: entries of three bytes, the document slices they belong to, and the random numbers.

A slice is one document, or piece of one, in a packed row. Its positions start at zero and it attends to itself only,
so the teacher's distributions over it depend on nothing else in the row: they hold in any row, batch and order. Its
key is a hash of its tokens and of which of them are supervised.

A shard is a folder of ``entries.bin`` (three bytes each), ``values.bin`` (bfloat16, for entries of count 0),
``lengths.bin`` (one byte for each token position: how many entries it has) and ``slices.bin`` (the offsets table).

Shape letters: B = rows, S = positions, M = entries, L = tokens of a slice, K = uniform numbers per position.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamita import storage
from llamita.distill.losses import IGNORE

ID_BITS, COUNT_BITS = 17, 6
MOST_IDS, MOST_SAMPLES = 2**ID_BITS, 2**COUNT_BITS - 1
ENTRY_BYTES = 3

SLICE = np.dtype(
    [
        ("key", "<u8", 2),
        ("position", "<u8"),
        ("entry", "<u8"),
        ("value", "<u8"),
        ("length", "<u4"),
        ("check", "<u4"),
    ]
)
"""Where a slice begins in each of the other files, how many positions it has, and a CRC-32 of all its bytes."""
Bytes = NDArray[np.uint8]
Int = NDArray[np.int64]
Record = tuple[Bytes, Bytes, NDArray[np.uint16]]
"""What is stored of a slice: entries per position, the entries, and the values of those of count 0."""


def check_fits(vocab_size: int, samples: int) -> None:
    """Refuse what three bytes cannot hold without loss.

    Raises:
        ValueError: naming the setting.
    """
    if vocab_size > MOST_IDS:
        raise ValueError(
            f"the data has a vocabulary of {vocab_size}, an entry of {ENTRY_BYTES} bytes holds ids below {MOST_IDS}"
        )
    if not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"samples_per_token must be in 1..{MOST_SAMPLES}, which 6 bits can count, got {samples}")


def pack(ids_M: Int, counts_M: Int) -> Bytes:
    """Ids of 17 bits and counts of 6 bits as three little-endian bytes each, ``[3 M]``."""
    word_M = (ids_M | counts_M << ID_BITS).astype("<u4")
    return np.ascontiguousarray(word_M.view(np.uint8).reshape(-1, 4)[:, :ENTRY_BYTES]).reshape(-1)


def unpack(packed: Bytes) -> tuple[Int, Int]:
    """The ids and counts that :func:`pack` was given."""
    bytes_M4 = np.zeros((len(packed) // ENTRY_BYTES, 4), dtype=np.uint8)
    bytes_M4[:, :ENTRY_BYTES] = packed.reshape(-1, ENTRY_BYTES)
    word_M = bytes_M4.view("<u4")[:, 0].astype(np.int64)
    return word_M & (MOST_IDS - 1), word_M >> ID_BITS


def to_bfloat16(values_M: Tensor) -> NDArray[np.uint16]:
    """The bits of values rounded to bfloat16."""
    bits: NDArray[np.uint16] = values_M.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return bits


def from_bfloat16(bits_M: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values of bfloat16 bits."""
    return (bits_M.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Slice:
    """One document in a row of a batch that has anything to predict."""

    row: int
    first: int
    length: int
    key: bytes


def slices(batch: Mapping[str, Tensor]) -> Iterator[Slice]:
    """The slices of a batch, row by row; documents without a supervised token, such as padding, are left out."""
    id_BS, label_BS, position_BS = (batch[name].numpy() for name in ("input_ids", "labels", "position_ids"))
    supervised_BS = label_BS != IGNORE
    word_BS = (id_BS.astype(np.uint32) | supervised_BS.astype(np.uint32) << 31).astype("<u4")
    starts_BS = np.ones_like(supervised_BS)
    starts_BS[:, 1:] = position_BS[:, 1:] != position_BS[:, :-1] + 1
    for row in range(len(word_BS)):
        first_D = np.flatnonzero(starts_BS[row])
        for first, last in zip(first_D.tolist(), [*first_D[1:].tolist(), word_BS.shape[1]], strict=True):
            if supervised_BS[row, first + 1 : last].any():
                digest = hashlib.blake2b(word_BS[row, first:last].tobytes(), digest_size=16)
                yield Slice(row, first, last - first, digest.digest())


def uniforms(seed: int, key: bytes, length: int, number: int) -> NDArray[np.float64]:
    """``[L, K]`` numbers in 0..1 that depend on seed, key and position alone: SHAKE-128 read 53 bits at a time.

    The stream is read position by position, so that of a position does not depend on how long the slice is read.
    """
    stream = hashlib.shake_128(seed.to_bytes(8, "little") + key).digest(8 * length * number)
    words = np.frombuffer(stream, dtype="<u8").reshape(length, number)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def targets(shape: tuple[int, int], records: list[tuple[Slice, Record]], samples: int) -> dict[str, Tensor]:
    """``ids``, ``values`` and ``lengths`` as :class:`losses.SparseTargets` has them, of a batch of that shape."""
    length_BS = np.zeros(shape, dtype=np.int64)
    for one, (lengths, _, _) in records:
        length_BS[one.row, one.first : one.first + one.length] = lengths
    empty = np.zeros(0, dtype=np.uint8)
    ids_M, counts_M = unpack(np.concatenate([empty, *(packed for _, (_, packed, _) in records)]))
    values_M = counts_M.astype(np.float32) / np.float32(samples)
    exact = np.concatenate([empty.astype(np.uint16), *(values for _, (_, _, values) in records)])
    values_M[counts_M == 0] = from_bfloat16(exact)
    arrays = {"ids": ids_M, "values": values_M, "lengths": length_BS}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class ShardWriter:
    """Writes the files of a shard into a folder, slice after slice."""

    def __init__(self, folder: Path, *, stores_values: bool) -> None:
        self._folder = folder
        self._files = {name: (folder / f"{name}.bin").open("wb") for name in names(stores_values)}
        self._table: list[tuple[Any, ...]] = []
        self.tokens = self.entries = self.values = self.predicted = 0

    def add(self, key: bytes, record: Record) -> None:
        """Append a slice."""
        lengths, packed, values = record
        check = _check(record)
        half = np.frombuffer(key, dtype="<u8")
        self._table.append((half, self.tokens, self.entries, self.values, len(lengths), check))
        self._files["entries"].write(packed.data)
        self._files["lengths"].write(lengths.data)
        if "values" in self._files:
            self._files["values"].write(values.data)
        self.tokens += len(lengths)
        self.entries += len(packed) // ENTRY_BYTES
        self.values += len(values)
        self.predicted += int(np.count_nonzero(lengths))

    def close(self) -> dict[str, int]:
        """Finish the files; returns how much they hold."""
        self._files["slices"].write(np.array(self._table, dtype=SLICE).data)
        for file in self._files.values():
            file.close()
        held = {name: getattr(self, name) for name in ("tokens", "predicted", "entries")}
        held["bytes"] = sum((self._folder / f"{name}.bin").stat().st_size for name in self._files)
        storage.write_json(self._folder / "shard.json", held)
        return held


def names(stores_values: bool) -> list[str]:
    """The binary files of a shard."""
    return ["entries", "lengths", "slices", *(["values"] if stores_values else [])]


def _check(record: Record) -> int:
    lengths, packed, values = record
    return zlib.crc32(values.tobytes(), zlib.crc32(packed.tobytes(), zlib.crc32(lengths.tobytes())))


class ShardReader:
    """The files of a shard, memory-mapped."""

    def __init__(self, folder: Path, *, stores_values: bool) -> None:
        self._folder = folder
        self.slices = _map(folder / "slices.bin", SLICE)
        self._entries = _map(folder / "entries.bin", np.dtype(np.uint8))
        self._lengths = _map(folder / "lengths.bin", np.dtype(np.uint8))
        self._values = _map(folder / "values.bin", np.dtype("<u2")) if stores_values else np.zeros(0, dtype=np.uint16)

    def read(self, index: int) -> Record:
        """What was stored of a slice.

        Raises:
            ValueError: it is not what was written.
        """
        entry = self.slices[index]
        position, first, value = (int(entry[name]) for name in ("position", "entry", "value"))
        lengths = self._lengths[position : position + int(entry["length"])]
        packed = self._entries[ENTRY_BYTES * first : ENTRY_BYTES * (first + int(lengths.sum(dtype=np.int64)))]
        values = self._values[:0]
        if len(self._values):
            is_exact = packed[ENTRY_BYTES - 1 :: ENTRY_BYTES] < 2 ** (ID_BITS - 16)
            values = self._values[value : value + int(np.count_nonzero(is_exact))]
        if _check((lengths, packed, values)) != int(entry["check"]):
            raise ValueError(
                f"{self._folder}: slice {index} is not what was written: the file was changed or its disk is failing; "
                "copy it again, or remove this shard and DONE.json and run the recipe again"
            )
        return lengths, packed, values


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file as an array; an empty one cannot be mapped."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype=dtype)


def write_index(path: Path, tables: list[NDArray[Any]]) -> None:
    """Write the first halves of all keys, sorted, and behind them where each lies: shard * 2^32 + slice."""
    keys = np.concatenate([table["key"][:, 0] for table in tables])
    places = np.concatenate(
        [np.arange(len(table), dtype=np.uint64) + np.uint64(number << 32) for number, table in enumerate(tables)]
    )
    order = np.argsort(keys, kind="stable")
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(keys[order].astype("<u8").data)
        file.write(places[order].astype("<u8").data)
    storage.fsync(temporary)
    temporary.replace(path)
    storage.fsync(path.parent)


def read_index(path: Path) -> NDArray[np.uint64]:
    """``[2, slices]``, memory-mapped: sorted keys and their places."""
    return _map(path, np.dtype("<u8")).reshape(2, -1)
