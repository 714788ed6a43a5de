"""What every process checks before anything expensive starts, each check with a time limit that holds.

A device that computes wrongly, hangs or is not there is the node's fault (:class:`llamita.runs.BadNode`); a full disk,
or processes of other settings or packages than the others, is the user's (``ValueError``). The processes tell each
other what they found over the store that they met at, which needs no device: all of them end with the same words.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import platform
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import distributed

from llamita import runs, storage

log = logging.getLogger(__name__)

LIMIT_SECONDS = 60.0
"""Of each check on this process alone."""
REPORT_SECONDS = 300.0
"""How long to wait for what the others found: they may still be importing from a slow file system."""
REDUCE_SECONDS = 300.0
"""Of the first collective, in which NCCL connects all processes."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "safetensors", "numpy")
USERS_TO_MEND = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
"""What the system says of a directory that is as bad on every other node."""
REDUCED_BYTES = {"cuda": 2**28, "cpu": 2**24}
"""Of each all-reduce whose bandwidth is measured: far above where latency counts."""
REDUCTIONS = 5
ALLOCATION_BYTES = {"cuda": 2**30, "cpu": 2**26}
PROBE = "preflight"
_calls = itertools.count()


@dataclass(frozen=True)
class Report:
    """What one process found."""

    rank: int
    host: str
    settings: str
    """SHA-256 of the settings."""
    versions: Mapping[str, str]
    node_fault: str = ""
    user_fault: str = ""


def check(
    folder: Path,
    device: torch.device,
    settings: Mapping[str, Any],
    *,
    disk_bytes: float = 0,
    min_allreduce_gb_per_s: float | None = None,
) -> None:
    """Check this process and its company; every rank of the launch calls this, in the process group where there is one.

    ``folder`` is the run directory, in which ``disk_bytes`` must be free. With ``min_allreduce_gb_per_s`` the processes
    measure how fast they are together.

    Raises:
        BadNode: on every rank, when a device or the run directory fails on any, or they do not reach each other, or
            not as fast as they must.
        ValueError: on every rank, when there is too little space, or not all have equal settings and packages.
    """
    mine = _report(folder, device, settings, disk_bytes)
    reports = _exchange(mine)
    host = mine.host
    if bad := [report for report in reports if report.node_fault]:
        raise runs.BadNode(
            "\n".join(f"rank {each.rank} on {each.host}: {each.node_fault}" for each in bad),
            here=any(each.host == host for each in bad),
        )
    if wrong := [f"rank {each.rank} on {each.host}: {each.user_fault}" for each in reports if each.user_fault]:
        raise ValueError("\n".join(wrong))
    _check_equal(reports)
    if len(reports) > 1:
        _check_reduce(device, len(reports))
        if min_allreduce_gb_per_s is not None:
            _check_bandwidth(device, len(reports), min_allreduce_gb_per_s)


def _report(folder: Path, device: torch.device, settings: Mapping[str, Any], disk_bytes: float) -> Report:
    text = json.dumps(storage.plain(settings), sort_keys=True)
    node_fault = user_fault = ""
    checks: list[Callable[[], None]] = [
        lambda: _check_present(device),
        lambda: _check_matmul(device),
        lambda: _check_allocation(device),
        lambda: _check_folder(folder, disk_bytes),
    ]
    for action in checks:
        try:
            _within(LIMIT_SECONDS, action)
        except ValueError as error:
            user_fault = str(error)
        except (RuntimeError, OSError) as error:  # a time limit that passed is an OSError
            node_fault = f"{type(error).__name__}: {error}"
        if node_fault or user_fault:
            break
    return Report(
        rank=distributed.get_rank() if distributed.is_initialized() else 0,
        host=socket.gethostname(),
        settings=hashlib.sha256(text.encode()).hexdigest(),
        versions=_versions(),
        node_fault=node_fault,
        user_fault=user_fault,
    )


def _within(seconds: float, action: Callable[[], None]) -> None:
    """Do ``action`` in a thread that is left behind when it takes longer: nothing can interrupt a device that hangs.

    Raises:
        TimeoutError: it did take longer.
    """
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            action()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if failures:
        raise failures[0]


def _check_present(device: torch.device) -> None:
    promised = int(os.environ.get("SLURM_GPUS_ON_NODE", "0") or 0)
    if promised and device.type != "cuda":
        raise RuntimeError(f"Slurm gave this node {promised} GPUs, and torch sees none")


def _check_matmul(device: torch.device) -> None:
    """Small whole numbers, whose product every arithmetic gives exactly."""
    left = (torch.arange(256 * 256) % 7).view(256, 256)
    right = (torch.arange(256 * 256) % 5).view(256, 256)
    product = (left.float().to(device) @ right.float().to(device)).cpu()
    if not torch.equal(product, (left @ right).float()):
        raise RuntimeError(f"{device} multiplies two matrices wrongly")


def _check_allocation(device: torch.device) -> None:
    block = torch.empty(ALLOCATION_BYTES.get(device.type, 2**26), dtype=torch.uint8, device=device).fill_(1)
    if int(block[:: 2**20].sum()) != len(block) // 2**20:
        raise RuntimeError(f"memory of {device} does not hold what was written")


def _check_folder(folder: Path, disk_bytes: float) -> None:
    place = folder / "control"  # which a batch job, or another worker of the same directory, may have made before
    probe = place / f"{PROBE}-{socket.gethostname()}-{os.getpid()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        for earlier in place.glob(f"{PROBE}-{socket.gethostname()}-*"):  # of a start that was killed here
            if not psutil.pid_exists(int(earlier.name.removesuffix("-renamed").rpartition("-")[2])):
                earlier.unlink(missing_ok=True)
        probe.write_text("here")
        storage.fsync(probe)
        renamed = probe.replace(probe.with_name(f"{probe.name}-renamed"))
        if renamed.read_text() != "here":
            raise RuntimeError(f"{renamed} does not hold what was written")
        renamed.unlink()
    except OSError as error:
        if error.errno in USERS_TO_MEND:
            raise ValueError(f"out={folder} cannot be written: {error.strerror}") from error
        raise
    free = shutil.disk_usage(folder).free
    if free < disk_bytes:
        raise ValueError(
            f"out={folder} has {free / 2**30:.1f} GiB of free disk, and checkpoints need {disk_bytes / 2**30:.1f} GiB: "
            "make room, keep fewer (keep_checkpoints), or choose another out"
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _exchange(mine: Report) -> list[Report]:
    """What every rank found, in order.

    Raises:
        BadNode: some rank says nothing; which nodes those are is in the message.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [mine]
    # Collectives need the very device that is in doubt, and gloo's need host names that NCCL does without. torch has
    # no public name for the store of its default group.
    store = distributed.distributed_c10d._get_default_store()
    prefix = f"preflight-{next(_calls)}"
    store.set(f"{prefix}-{mine.rank}", json.dumps(asdict(mine)))
    reports, silent = [], []
    patience = REPORT_SECONDS
    for rank in range(distributed.get_world_size()):
        try:
            store.wait([f"{prefix}-{rank}"], timedelta(seconds=patience))
        except (RuntimeError, ValueError):
            silent.append(rank)
            patience = 0.1
            continue
        reports.append(Report(**json.loads(store.get(f"{prefix}-{rank}"))))
    if silent:
        raise runs.BadNode(f"ranks {silent} said nothing within {REPORT_SECONDS:.0f} s", here=False)
    return reports


def _check_equal(reports: Sequence[Report]) -> None:
    first = reports[0]
    for other in reports[1:]:
        where = f"rank {other.rank} on {other.host}"
        if other.settings != first.settings:
            raise ValueError(
                f"{where} has other settings than rank {first.rank} on {first.host}: start all with one command line"
            )
        for name, version in first.versions.items():
            if other.versions.get(name) != version:
                raise ValueError(
                    f"{where} has {name} {other.versions.get(name)}, rank {first.rank} on {first.host} has {version}: "
                    "all must run the same environment"
                )


def _check_reduce(device: torch.device, world_size: int) -> None:
    total = torch.ones(1, device=device)

    def reduce() -> None:
        distributed.all_reduce(total)
        total.cpu()  # waits for it

    _together(reduce)
    if float(total) != world_size:
        raise runs.BadNode(f"a sum of ones over {world_size} processes is {float(total)}", here=False)


def _check_bandwidth(device: torch.device, world_size: int, floor: float) -> None:
    """Hold the best of some large all-reduces against the floor; the slowest rank speaks for all."""
    block = torch.zeros(REDUCED_BYTES.get(device.type, 2**24) // 4, device=device)
    seconds = torch.full((1,), float("inf"), dtype=torch.float64, device=device)

    def measure() -> None:
        for _ in range(1 + REDUCTIONS):  # NCCL opens its channels in the first
            begun = time.perf_counter()
            distributed.all_reduce(block)
            block[:1].cpu()  # waits for it
            seconds.clamp_(max=time.perf_counter() - begun)
        distributed.all_reduce(seconds, op=distributed.ReduceOp.MAX)
        seconds.cpu()

    _together(measure)
    found = bus_bandwidth(block.nbytes, world_size, float(seconds))
    told = f"an all-reduce of {block.nbytes / 2**20:.0f} MiB over {world_size} processes makes {found:.3g} GB/s"
    log.info("%s; run.min_allreduce_gb_per_s=%g", told, floor)
    if found < floor:
        raise runs.BadNode(f"{told}, less than run.min_allreduce_gb_per_s={floor:g}", here=False)


def bus_bandwidth(size: int, world_size: int, seconds: float) -> float:
    """What an all-reduce of so many bytes asks of each link, in 10^9 bytes per second.

    ``2 (n - 1) / n * size / seconds``: comparable over numbers of processes (NVIDIA, nccl-tests, PERFORMANCE.md, "bus
    bandwidth").
    """
    return 2 * (world_size - 1) / world_size * size / seconds / 1e9


def _together(collective: Callable[[], None]) -> None:
    """Do what needs all processes.

    Raises:
        BadNode: it failed, or took too long.
    """
    try:
        _within(REDUCE_SECONDS, collective)
    except (RuntimeError, OSError) as error:
        text = f"processes do not reach each other: {type(error).__name__}: {error}"
        raise runs.BadNode(text, here=False) from error
