"""Ways to have the teachers of a distillation, and what each takes: run beside the student, or read from a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from llamita import estimate
from llamita.distill.cache_format import ENTRY_BYTES
from llamita.distill.teachers import Placement, PlacementConfig, Storage
from llamita.estimate import Device, Teacher, Training

LENGTH_BYTES = 1.0
"""How many entries a position has."""
NODE_PROCESSES = 8
"""Among which a spread teacher is divided, at most."""
CAPTURED = ("online, resident", "online, ZeRO-3")
"""Ways to hold a teacher that give a cache of the distributions that it has in full."""
WORTH = 0.95
"""Share of the GPU-hours online below which a cache is recommended."""
INT8_BYTES = 1.0
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Four bits; a scale for every 64 values, in a byte, and a float32 for every 256 scales (Dettmers et al., 2023,
arXiv:2305.14314, section 3)."""


def placed(teacher: Teacher, config: PlacementConfig, processes: int) -> Teacher:
    """The teacher as its settings place and store it."""
    matrix = {Storage.int8: INT8_BYTES, Storage.nf4: NF4_BYTES}.get(config.weights)
    spread = config.placement is Placement.zero3
    return dataclasses.replace(teacher, processes=min(processes, NODE_PROCESSES) if spread else 1, matrix_bytes=matrix)


def compare(
    training: Training,
    teachers: Sequence[Teacher],
    device: Device,
    *,
    mfu: float,
    data_tokens: int,
    entries_per_token: float,
) -> list[dict[str, Any]]:
    """Memory per process, GPU-hours and disk of each way; all teachers are had in the same way.

    A cache is captured once, over the tokens that training will see, each of them once however often it is seen; any
    number of students then train from it, so its hours are told apart. ``data_tokens=0``: the data is as long as the
    training. Among the ways that fit, that of the fewest GPU-hours is recommended; the first of those that are equal.
    """
    if not teachers:
        return []
    seen = training.rows_per_step * training.sequence_length * training.steps
    tokens = float(min(seen, data_tokens) if data_tokens else seen)
    shared = min(training.processes, NODE_PROCESSES)
    kinds = {
        "online, resident": [dataclasses.replace(t, processes=1, matrix_bytes=None) for t in teachers],
        "online, ZeRO-3": [dataclasses.replace(t, processes=shared, matrix_bytes=None) for t in teachers],
        "online, 8 bits": [dataclasses.replace(t, processes=1, matrix_bytes=INT8_BYTES) for t in teachers],
        "online, 4 bits": [dataclasses.replace(t, processes=1, matrix_bytes=NF4_BYTES) for t in teachers],
    }
    if shared == 1:
        del kinds["online, ZeRO-3"]
    ways = [_way(name, dataclasses.replace(training, teachers=kind), device, mfu) for name, kind in kinds.items()]
    cached = _way("cached", dataclasses.replace(training, teachers=()), device, mfu)
    # recipes/cache.py runs one teacher after the other, whole or spread.
    held = [min(_held(kinds[kind][place]) for kind in kinds if kind in CAPTURED) for place in range(len(teachers))]
    cached["fits"] = cached["fits"] and max(held) <= device.memory_bytes
    context = training.sequence_length / 2
    if training.validation_rows:
        tokens += training.validation_rows * training.sequence_length
    flops = sum(tokens * teacher.shape.forward_flops_per_token(context) for teacher in teachers)
    cached["capture_gpu_hours"] = estimate.hours(flops, 1, device, mfu)
    cached["gpu_hours"] += cached["capture_gpu_hours"]
    cached["cache_bytes"] = len(teachers) * tokens * (ENTRY_BYTES * entries_per_token + LENGTH_BYTES)
    ways.append(cached)
    # Nothing is gained by a cache that is read once, and disk and a stage are lost.
    fitting = [way for way in ways if way["fits"]]
    if fitting:
        min(fitting, key=lambda way: way["gpu_hours"] / (WORTH if way is cached else 1))["recommended"] = True
    return ways


def _held(teacher: Teacher) -> float:
    """Bytes of its weights in one process."""
    return next(iter(estimate.teacher_bytes(teacher, tokens=0).values()))


def _way(name: str, training: Training, device: Device, mfu: float) -> dict[str, Any]:
    memory = sum(estimate.training_memory(training).values())
    return {
        "way": name,
        "memory_bytes": memory,
        "fits": memory <= device.memory_bytes,
        "gpu_hours": estimate.hours(sum(estimate.training_flops(training).values()), 1, device, mfu),
        "capture_gpu_hours": 0.0,
        "cache_bytes": 0.0,
        "recommended": False,
    }


def table(ways: Sequence[dict[str, Any]]) -> Table:
    """The ways for a reader."""
    result = Table(title="ways to have the teachers", title_justify="left", caption_justify="left")
    result.caption = (
        "* recommended, x too large for the device (cached: its teacher is); capture: once, part of the GPU-hours"
    )
    for title in ("", "way", "memory", "GPU-hours", "capture", "cache"):
        result.add_column(title, justify="left" if title in ("", "way") else "right", no_wrap=True)
    for way in ways:
        result.add_row(
            "*" if way["recommended"] else "" if way["fits"] else "x",
            way["way"],
            estimate.amount(way["memory_bytes"]),
            f"{way['gpu_hours']:,.1f}",
            f"{way['capture_gpu_hours']:,.1f}" if way["capture_gpu_hours"] else "",
            estimate.amount(way["cache_bytes"]) if way["cache_bytes"] else "",
        )
    return result
