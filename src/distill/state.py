"""Checkpoints of a training run: published whole or not at all, and gone on with from the newest good one.

``checkpoints/step-N/`` holds weights and moments, ``state.json`` (step, data position, counters), the random states of
each rank, and ``MANIFEST.json``. ``checkpoints/LATEST`` names the newest for people and tools; it is never trusted.
"""

from __future__ import annotations

import errno
import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, reduce

from llamita import faults, manifests, storage

log = logging.getLogger(__name__)

STATE = "state.json"
FEWEST = 2
"""As many checkpoints are kept while the run goes on, whatever is asked for."""


def agree_sum(processes: Accelerator | PartialState, value: float) -> float:
    """The sum of ``value`` over ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=processes.device)
    return float(reduce(tensor, reduction="sum").item())


def random_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators on this rank, as plain values."""
    version, words, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put all generators where :func:`random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(_bytes(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


class Checkpoints:
    """The checkpoints of one run, seen by all of its ranks."""

    def __init__(self, folder: Path, accelerator: Accelerator, *, keep: int) -> None:
        self.folder = folder
        self._accelerator = accelerator
        self._keep = max(FEWEST, keep)
        self._main = accelerator.is_main_process

    def save(
        self, step: int, state: Mapping[str, Any], write: Callable[[Path], Sequence[str]], *, size: int = 0
    ) -> None:
        """Publish ``step-N``; every rank calls this and ``write(folder)`` on the same folder.

        ``write`` returns the names of the files that this rank wrote. Each rank syncs and hashes its own: the main one
        may see them through another machine's cache, and would need as many times longer as there are ranks.
        ``size`` is how many bytes all ranks will write. Without room for them no rank calls ``write``: in one with
        collectives, the others would wait for a rank that failed.

        Raises:
            OSError: on every rank, when any could not write; older checkpoints are as they were.
        """
        final = self.folder / f"step-{step}"
        if self._main_finds(lambda: self._is_published(final)):
            return
        error: OSError | None = None
        try:
            with ExitStack() as stack:
                self._write(stack, final, state, write, size)
        except OSError as failure:
            error = failure
        self._raise_together(error)
        if self._main:
            faults.crash_point("before_pointer")
            self._tidy(final, keep=self._keep)
        self._accelerator.wait_for_everyone()

    def _tidy(self, final: Path, *, keep: int | None) -> None:
        """Point at what was published, and remove all but ``keep``; nothing depends on either."""
        try:
            storage.write_atomically(self.folder / "LATEST", f"{final.name}\n")
            if keep is not None:
                prune(self.folder, keep)
        except OSError as error:
            log.warning("%s is published, but its folder could not be tidied up: %s", final, error)

    def _is_published(self, final: Path) -> bool:
        """Whether this very step is there already; a damaged one, which an earlier start passed over, makes room."""
        if not final.is_dir():
            return False
        if manifests.check_manifest(final, hashes=True) is None:
            return True
        _remove(final)
        return False

    def _write(
        self, stack: ExitStack, final: Path, state: Mapping[str, Any], write: Callable[[Path], Sequence[str]], size: int
    ) -> None:
        error: OSError | None = None
        token = -1
        mine: dict[str, dict[str, Any]] = {}
        of_all: dict[str, dict[str, Any]] = {}
        if self._main:
            try:
                temporary = stack.enter_context(manifests.publishing(final, of_all))
                if (metrics := self.folder.parent / "metrics.jsonl").is_file():
                    storage.fsync(metrics)  # after a power cut, steps before a checkpoint are never taken again
                if shutil.disk_usage(temporary).free < size:
                    raise OSError(errno.ENOSPC, f"no space left for a checkpoint of {size} bytes", str(final))
                token = int(temporary.name.rpartition("-")[2], 16)
            except OSError as failure:
                error = failure
        token = int(agree_sum(self._accelerator, token if self._main else 0))
        if token >= 0:
            folder = final.with_name(f".tmp-{final.name}-{token:08x}")
            try:
                names = [*write(folder), f"random-{self._accelerator.process_index:05d}.json"]
                storage.write_json(folder / names[-1], random_state())
                if self._main:
                    storage.write_json(folder / STATE, state)
                mine = manifests.sync_and_hash(folder, names)
            except OSError as failure:
                error = failure
        self._raise_together(error)
        for entries in gather_object([mine]):
            of_all |= entries

    def _all_fine(self, error: OSError | None) -> bool:
        return agree_sum(self._accelerator, error is not None) == 0

    def _raise_together(self, error: OSError | None) -> None:
        if not self._all_fine(error):
            text = "another rank could not read or write its part of a checkpoint"
            raise error or OSError(errno.EIO, text, str(self.folder))

    def _main_finds(self, look: Callable[[], float]) -> float:
        """A number that the main process looks up. Its error is one of every rank: they would wait for it."""
        number, error = 0.0, None
        if self._main:
            try:
                number = look()
            except OSError as failure:
                error = failure
        self._raise_together(error)
        return agree_sum(self._accelerator, number)

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint whose files are those of its manifest, and its state; ``None`` when there is none.

        Raises:
            ValueError: there are checkpoints, but no good one. A run never starts afresh in silence.
            OSError: on every rank, when the file system does not answer.
        """
        step = int(self._main_finds(lambda: _swept(self.folder)))
        if step == -2:
            raise ValueError(
                f"{self.folder} holds checkpoints, but none is whole; remove that directory to start from the beginning"
            )
        if step == -1:
            return None
        folder = self.folder / f"step-{step}"
        if self._main:  # a crash may have come before it
            self._tidy(folder, keep=None)
        rank_file = folder / f"random-{self._accelerator.process_index:05d}.json"
        if rank_file.is_file():
            set_random_state(storage.read_json(rank_file))
        return folder, storage.read_json(folder / STATE)


def steps_in(folder: Path) -> list[int]:
    """Steps that have a folder, the newest first."""
    names = [p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def newest_good(folder: Path) -> int:
    """The newest step whose files have the sizes and hashes of its manifest; -1: no folders, -2: none is good."""
    steps = steps_in(folder)
    for step in steps:
        reason = manifests.check_manifest(folder / f"step-{step}", hashes=True)
        if reason is None:
            return step
        log.warning("checkpoint step-%d is passed over: %s", step, reason)
    return -2 if steps else -1


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` whole checkpoints; one that is not whole counts for nothing."""
    if not folder.is_dir():
        return
    for leftover in folder.glob(".trash-*"):  # a crash half way through this
        _delete(leftover)
    good = [step for step in steps_in(folder) if manifests.check_manifest(folder / f"step-{step}") is None]
    for step in good[keep:]:
        _remove(folder / f"step-{step}")
    for aside in folder.glob("damaged-step-*"):
        number = aside.name.removeprefix("damaged-step-")
        if good and number.isdecimal() and int(number) <= good[0]:
            _delete(aside)


def _remove(step: Path) -> None:
    """Delete a checkpoint so that a crash on the way leaves nothing that looks like one."""
    trash = step.with_name(f".trash-{step.name}")
    step.rename(trash)
    faults.crash_point("during_purge")
    _delete(trash)


def _delete(folder: Path) -> None:
    """Delete a folder, or the file or link that is in its place; what cannot be deleted stays."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _swept(folder: Path) -> int:
    """As :func:`newest_good`, after removing what a crash left half written or half deleted.

    Damaged checkpoints are put aside: of the right sizes, they would count as kept ones and push out good ones.
    """
    if folder.is_dir():
        for pattern in (".tmp-*", ".trash-*", ".LATEST.*.tmp"):
            for leftover in folder.glob(pattern):
                _delete(leftover)
    good = newest_good(folder)
    for step in steps_in(folder) if good >= 0 else []:
        if step > good:
            _put_aside(folder / f"step-{step}")
    return good


def _put_aside(step: Path) -> None:
    aside = step.with_name(f"damaged-{step.name}")
    try:
        _delete(aside)
        step.rename(aside)
    except OSError as error:
        log.warning("%s is damaged and stays where it is: %s", step, error)
