"""Packed rows on disk: raw memory-mapped words, a manifest with a checksum for each file, and a strict reader.

A shard is its rows, ``sequence_length`` little-endian 32-bit words each, and behind them a CRC-32 of each row. The low
30 bits of a word are a token id; bit 31 says that a document (or a piece of one) starts here, bit 30 that the token is
not supervised. Padding at the end of a row is one more document of unsupervised pad tokens. Position ids and labels
follow from the two bits.

Shape letters: B = rows, S = positions.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llamita import faults, storage
from llamita.data.pack import Packing

FORMAT = 1
MANIFEST = "data.json"
FOLDER = "shards"
TOKENIZER = "tokenizer"
SHARD_BYTES = 2**28

START = np.uint32(2**31)
"""First token of a document or of a piece of one."""
UNSUPERVISED = np.uint32(2**30)
"""Token that nothing is to predict: padding, or what the user says in a dialogue."""
ID = np.uint32(2**30 - 1)
"""The bits of the token id."""

IGNORE = -100
"""Label of a position that is not predicted, as in transformers."""

BLOCK_WORDS = 2**22
"""How much is gathered in memory at a time while writing."""

Words = NDArray[np.uint32]
Batch = dict[str, Tensor]


def decode(word_BS: Words) -> Batch:
    """``input_ids``, ``labels`` and ``position_ids`` of rows of words, each ``[B, S]`` of int64.

    Labels are aligned with the ids (position s predicts label s + 1) and ``IGNORE`` at the first token of each
    document or piece and at unsupervised tokens. Positions restart at zero with each document: without an attention
    mask and without a cache this is how transformers tells packed documents apart.
    """
    id_BS = (word_BS & ID).astype(np.int64)
    starts_BS = (word_BS & START) != 0
    place_S = np.arange(word_BS.shape[1])
    position_BS = place_S - np.maximum.accumulate(np.where(starts_BS, place_S, 0), axis=1)
    label_BS = np.where((word_BS & (START | UNSUPERVISED)) != 0, IGNORE, id_BS)
    arrays = {"input_ids": id_BS, "labels": label_BS, "position_ids": position_BS}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def write(
    folder: Path, split: str, stream: Words, packing: Packing, *, pad_id: int, shard_bytes: int = SHARD_BYTES
) -> dict[str, Any]:
    """Write the rows of a packing as shards ``folder/split-NNNNN.bin``; returns the split's entry in the manifest.

    ``stream`` holds the words of all documents end to end; it may be memory-mapped, and is read piece by piece.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows_per_shard = max(1, shard_bytes // (4 * packing.sequence_length))
    entries = [
        _write_shard(folder / f"{split}-{index:05d}.bin", stream, packing, first, rows_per_shard, pad_id)
        for index, first in enumerate(range(0, packing.num_rows, rows_per_shard))
    ]
    return {
        "rows": packing.num_rows,
        "tokens": int(packing.length.sum()),
        "labels": sum(entry["labels"] for entry in entries),
        "padding": packing.padding,
        "pieces": packing.length.size,
        "shards": entries,
    }


def _write_shard(
    path: Path, stream: Words, packing: Packing, first: int, rows_per_shard: int, pad_id: int
) -> dict[str, Any]:
    last = min(first + rows_per_shard, packing.num_rows)
    digest, max_id, labels = hashlib.sha256(), 0, 0
    checks: list[Words] = []
    with path.open("wb") as file:
        for word_BS in blocks(stream, packing, first, last, pad_id):
            data = word_BS.astype("<u4", copy=False)
            file.write(data.data)
            digest.update(data.data)
            checks.append(row_checks(data))
            max_id = max(max_id, int((word_BS & ID).max()))
            labels += int(np.count_nonzero(word_BS < UNSUPERVISED))
        check_R = np.concatenate(checks).data
        file.write(check_R)
        digest.update(check_R)
    faults.crash_point("after_shard")
    return {
        "file": f"{FOLDER}/{path.name}",
        "rows": last - first,
        "bytes": _shard_size(last - first, packing.sequence_length),
        "labels": labels,
        "max_id": max_id,
        "sha256": digest.hexdigest(),
    }


def row_checks(word_BS: Words) -> Words:
    """CRC-32 of each row as it lies on disk."""
    return np.array([zlib.crc32(row) for row in np.ascontiguousarray(word_BS, dtype="<u4")], dtype="<u4")


def _shard_size(rows: int, sequence_length: int) -> int:
    return 4 * rows * (sequence_length + 1)


def blocks(stream: Words, packing: Packing, first: int, last: int, pad_id: int) -> Iterator[Words]:
    """Rows ``first`` to ``last`` of a packing as words, a block of rows at a time."""
    rows_per_block = max(1, BLOCK_WORDS // packing.sequence_length)
    for begin in range(first, last, rows_per_block):
        end = min(begin + rows_per_block, last)
        low, high = np.searchsorted(packing.row, [begin, end])
        start_P, length_P = packing.start[low:high], packing.length[low:high]
        row_P = packing.row[low:high] - begin
        used_B = np.bincount(row_P, weights=length_P, minlength=end - begin).astype(np.int64)
        before_P = np.cumsum(length_P) - length_P
        row_begin_B = np.cumsum(used_B) - used_B
        place_P = row_P * packing.sequence_length + before_P - row_begin_B[row_P]
        within = np.arange(length_P.sum()) - np.repeat(before_P, length_P)
        words = np.full((end - begin) * packing.sequence_length, np.uint32(pad_id) | UNSUPERVISED)
        words[np.repeat(place_P, length_P) + within] = stream[np.repeat(start_P, length_P) + within] & ~START
        words[place_P] |= START
        word_BS = words.reshape(end - begin, packing.sequence_length)
        padded = np.flatnonzero(used_B < packing.sequence_length)
        word_BS[padded, used_B[padded]] |= START
        yield word_BS


@contextmanager
def publishing(out: Path) -> Iterator[Path]:
    """A hidden folder inside ``out``, whose files and folders move to the root of ``out`` when the block ends well.

    What an earlier run, killed before it was done, has left in ``out`` is removed. Names that begin with a dot are
    scratch and are not moved.
    """
    folder = out / ".data"
    for stale in (folder, out / FOLDER, out / TOKENIZER):
        shutil.rmtree(stale, ignore_errors=True)
    (out / MANIFEST).unlink(missing_ok=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        for file in files(folder):
            storage.fsync(file)
            storage.fsync(file.parent)
        faults.crash_point("before_rename")
        for path in sorted(folder.glob("[!.]*")):
            path.rename(out / path.name)
            faults.crash_point("mid_rename")
        storage.fsync(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def files(folder: Path) -> list[Path]:
    """The files below ``folder`` that are to be published."""
    visible = (path for top in folder.glob("[!.]*") for path in [top, *top.rglob("*")])
    return sorted(path for path in visible if path.is_file())


@dataclass
class Split:
    """The packed rows of one split, in memory-mapped shards."""

    name: str
    path: Path
    sequence_length: int
    vocab_size: int
    shards: list[dict[str, Any]]
    _end: NDArray[np.int64] = field(init=False, repr=False)
    _maps: dict[int, tuple[Words, Words]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._end = np.cumsum([shard["rows"] for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._end[-1]) if self.shards else 0

    @property
    def content_hash(self) -> str:
        """Hash of every word of the split, in order; the same wherever it lies."""
        text = "\n".join([str(self.sequence_length), *(shard["sha256"] for shard in self.shards)])
        return hashlib.sha256(text.encode()).hexdigest()

    def words(self, indices: NDArray[np.int64]) -> Words:
        """The words of rows ``indices``, each held against its checksum: no run trains on a damaged row.

        Raises:
            ValueError: a row is not what was written.
        """
        word_BS = np.empty((len(indices), self.sequence_length), dtype=np.uint32)
        shard_B = np.searchsorted(self._end, indices, side="right")
        for shard in np.unique(shard_B).tolist():
            here = shard_B == shard
            row_B = indices[here] - (self._end[shard] - self.shards[shard]["rows"])
            rows, check_R = self._map(shard)
            word_BS[here] = read = rows[row_B]
            if (damaged := np.flatnonzero(row_checks(read) != check_R[row_B])).size:
                raise ValueError(
                    f"{self.path / self.shards[shard]['file']}: row {row_B[damaged[0]]} is not what was written: the "
                    "file was changed or its disk is failing; copy it again, or prepare the data again"
                )
        return word_BS

    def rows(self, indices: NDArray[np.int64]) -> Batch:
        """Rows ``indices`` as a batch, see :func:`decode`."""
        return decode(self.words(indices))

    def _map(self, shard: int) -> tuple[Words, Words]:
        """The rows of a shard and their checksums."""
        if shard not in self._maps:
            entry = self.shards[shard]
            word_N = np.memmap(self.path / entry["file"], dtype="<u4", mode="r")
            split = entry["rows"] * self.sequence_length
            self._maps[shard] = word_N[:split].reshape(-1, self.sequence_length), word_N[split:]
        return self._maps[shard]


@dataclass
class PackedData:
    """A data directory, opened and checked."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open the directory that ``prepare`` wrote; the content of a row is checked when it is read.

        Raises:
            ValueError: it is not a finished data directory, or a file is missing, cut short, or holds token
                ids outside the vocabulary.
        """
        if not (path / MANIFEST).is_file():
            unfinished = (path / "run.json").is_file() and not (path / "DONE.json").is_file()
            hint = "of an unfinished run: finish that stage first" if unfinished else f"without {MANIFEST}"
            raise ValueError(f"data.path={path} is a directory {hint}" if path.is_dir() else f"{path} does not exist")
        if (path / "run.json").is_file() and not (path / "DONE.json").is_file():
            raise ValueError(f"data.path={path} is the directory of an unfinished run: finish that stage first")
        manifest = storage.read_json(path / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path / MANIFEST} has format {manifest.get('format')!r}, this program reads {FORMAT}")
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                _check(path, shard, manifest)
        return cls(path, manifest)

    def split(self, name: str) -> Split:
        """The rows of ``train`` or ``validation``.

        Raises:
            ValueError: there is no such split, or it has no rows.
        """
        splits = self.manifest["splits"]
        if name not in splits or not splits[name]["rows"]:
            filled = [key for key, value in splits.items() if value["rows"]]
            raise ValueError(f"{self.path} has no rows in split {name!r}; it has {', '.join(filled)}")
        return Split(name, self.path, self.sequence_length, self.vocab_size, splits[name]["shards"])

    @property
    def sequence_length(self) -> int:
        """Positions per row."""
        return int(self.manifest["sequence_length"])

    @property
    def vocab_size(self) -> int:
        """Every token id is below this."""
        return int(self.manifest["vocab_size"])

    @property
    def tokenizer_hash(self) -> str:
        """``checkpoints.tokenizer_hash`` of the tokenizer that made the ids."""
        return str(self.manifest["tokenizer_hash"])

    @property
    def tokenizer_path(self) -> Path:
        """The directory of that tokenizer."""
        return self.path / TOKENIZER

    @property
    def content_hash(self) -> str:
        """Hash of all rows, their length and their tokenizer; the same wherever the directory lies."""
        hashes = [s["sha256"] for split in sorted(self.manifest["splits"].items()) for s in split[1]["shards"]]
        text = "\n".join([str(self.sequence_length), self.tokenizer_hash, *hashes])
        return hashlib.sha256(text.encode()).hexdigest()


def _check(path: Path, shard: Mapping[str, Any], manifest: Mapping[str, Any]) -> None:
    file = path / shard["file"]
    if not file.resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{path / MANIFEST} names a file outside its directory: {shard['file']!r}")
    size = file.stat().st_size if file.is_file() else None
    if size != shard["bytes"]:
        raise ValueError(f"{file} has {size} bytes, {MANIFEST} says {shard['bytes']}: it is cut short or was changed")
    if size != _shard_size(shard["rows"], manifest["sequence_length"]):
        raise ValueError(
            f"{file} has {size} bytes, which is not {shard['rows']} rows of sequence_length="
            f"{manifest['sequence_length']}: {path / MANIFEST} was changed"
        )
    if shard["max_id"] >= manifest["vocab_size"]:
        raise ValueError(
            f"{file} holds token id {shard['max_id']}, but the vocabulary has {manifest['vocab_size']} entries"
        )
