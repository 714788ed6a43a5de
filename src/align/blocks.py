"""Work that is done in blocks, each a file of its own that is whole or not there.

A file's first line says what its rows were made from and their hash; a kill loses the block that was in work, and a
block that is damaged or of other inputs is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamita import runs, storage

log = logging.getLogger(__name__)

WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Block:
    """Rows ``first`` to ``last`` (not included) of a split."""

    split: str
    index: int
    first: int
    last: int

    @property
    def name(self) -> str:
        """Its file's, without the ending."""
        return f"{self.split}-{self.index:05d}"


def blocks(split: str, rows: int, size: int) -> list[Block]:
    """The blocks of a split; they depend on rows and size alone, not on who works on them."""
    return [Block(split, index, first, min(first + size, rows)) for index, first in enumerate(range(0, rows, size))]


def identity(**parts: Any) -> str:
    """A hash of everything that decides what is in the blocks."""
    return hashlib.sha256(json.dumps(storage.plain(parts), sort_keys=True).encode()).hexdigest()


class Store:
    """A folder of finished blocks."""

    def __init__(self, folder: Path, made_from: str) -> None:
        self.folder = folder
        self._made_from = made_from

    def path(self, block: Block) -> Path:
        """The block's file."""
        return self.folder / f"{block.name}.jsonl"

    def missing(self, wanted: Sequence[Block]) -> list[Block]:
        """Those that have no file, or one that is damaged or of other inputs."""
        return [block for block in wanted if self._lines(block) is None]

    def write(self, block: Block, rows: Sequence[Mapping[str, Any]]) -> None:
        """Publish a block."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "".join(f"{json.dumps(row, ensure_ascii=False, allow_nan=False)}\n" for row in rows)
        head = {"made_from": self._made_from, "rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        storage.write_atomically(self.path(block), f"{json.dumps(head)}\n{text}")

    def read(self, block: Block) -> list[dict[str, Any]]:
        """The rows of a finished block.

        Raises:
            ValueError: it is not finished, or not what was written.
        """
        lines = self._lines(block)
        if lines is None:
            raise ValueError(f"{self.path(block)} is not what was written: run the same command again")
        return [json.loads(line) for line in lines]

    def _lines(self, block: Block, *, is_told: bool = True) -> list[str] | None:
        path = self.path(block)
        if not path.is_file():
            return None
        head, _, text = path.read_bytes().partition(b"\n")
        try:
            told = json.loads(head)
            whole = told["sha256"] == hashlib.sha256(text).hexdigest() and told["made_from"] == self._made_from
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            if is_told:
                log.warning("%s is damaged or of other inputs: it is made again", path)
            return None
        # Not splitlines, which would also cut at the line ends of Unicode that an answer may hold.
        return [line for line in text.decode().split("\n") if line]

    def wait(self, wanted: Sequence[Block], run: runs.Run) -> None:
        """Return when every block is there and whole: other processes write theirs, damaged ones again.

        Raises:
            Stopped: the run was asked to stop.
        """
        left = list(wanted)
        while left := [block for block in left if self._lines(block, is_told=False) is None]:
            check_stop(run)
            time.sleep(WAIT_SECONDS)


def check_stop(run: runs.Run) -> None:
    """Raise ``Stopped`` where the run was asked to stop; finished blocks are kept."""
    if run.stop.is_set():
        raise runs.Stopped(f"stopped in {run.path}: run the same command again, which goes on behind the last block")


def until_stopped(wanted: Sequence[Block], run: runs.Run) -> Iterator[Block]:
    """The blocks, one after the other.

    Raises:
        Stopped: the run was asked to stop.
    """
    for block in wanted:
        check_stop(run)
        yield block
