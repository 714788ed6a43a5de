"""From a teacher's settings to a teacher: where its layers lie, in how many bits, and whether that does it harm."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator, PartialState

from llamita import faults, runs, storage
from llamita.distill import quantised
from llamita.distill.sharded import ShardedTeacher
from llamita.distill.state import agree_sum
from llamita.distill.teachers import (
    Attention,
    Batch,
    Placement,
    PlacementConfig,
    ResidentTeacher,
    Storage,
    Teacher,
    TeacherConfig,
)

log = logging.getLogger(__name__)

COSTS = "quantised.json"
KL_ROWS = 8
"""Rows on which a quantised teacher is compared with itself in full: tens of thousands of tokens at 8,192 each."""


@faults.phase(
    "loading the teachers", memory="teachers.NAME.placement=zero3, teachers.NAME.weights=nf4, teachers.NAME.cache"
)
def load_all(
    teachers: Mapping[str, TeacherConfig], *, dtype: torch.dtype, device: torch.device, attention: Attention
) -> list[Teacher]:
    """The teachers that are run beside the student: those without a cache; every rank calls this.

    Raises:
        ValueError: a directory's tensors are not those of its configuration, or were not read as they are.
    """
    return [
        load(name, config, config.weight, dtype=dtype, device=device, attention=attention)
        for name, config in teachers.items()
        if config.cache is None
    ]


def load(
    name: str,
    config: PlacementConfig,
    weight: float = 1.0,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: Attention,
) -> ResidentTeacher | ShardedTeacher:
    """The teacher that ``config`` describes, which has a path; every rank calls this.

    Raises:
        ValueError: as :func:`load_all`.
    """
    assert config.path is not None
    if config.weights is not Storage.full:
        model = quantised.load(config.path, config.weights, dtype=dtype, device=device, attention=attention)
        return ResidentTeacher(name, model, weight)
    match config.placement:
        case Placement.resident:
            kind: type[ResidentTeacher | ShardedTeacher] = ResidentTeacher
        case Placement.zero3:
            kind = ShardedTeacher
    return kind.load(name, config.path, weight, dtype=dtype, device=device, attention=attention)


def compare(
    teachers: Iterable[Teacher],
    configs: Mapping[str, PlacementConfig],
    batches: Iterable[Batch],
    *,
    processes: Accelerator | PartialState,
    dtype: torch.dtype,
    run: runs.Run,
    prefix: str = "teachers.",
) -> dict[str, float]:
    """KL(full || quantised) per token as ``teacher/kl_quantised_NAME``; measured once in a run, every rank calls this.

    ``prefix`` and a teacher's name are its setting, for messages.

    Each rank measures every world-th batch, and reads the model's files once, a layer at a time. What was measured is
    kept in the run's ``quantised.json``.

    Raises:
        ValueError: it is above ``max_kl``: such a teacher is not used in silence.
    """
    chosen = [teacher for teacher in teachers if configs[teacher.name].weights is not Storage.full]
    if not chosen:
        return {}
    file = run.path / COSTS
    known: dict[str, float] = {}
    if processes.is_main_process and file.is_file():
        known = {name: float(kl) for name, kl in storage.read_json(file).items()}
    measured = not agree_sum(processes, bool(known))
    if measured:
        known = _measure(chosen, configs, list(batches), processes=processes, dtype=dtype)
    for teacher in chosen if known else ():
        _refuse_above(f"{prefix}{teacher.name}", configs[teacher.name], known[_metric(teacher)])
    if measured and processes.is_main_process:
        storage.write_json(file, known)
    return known


def _metric(teacher: Teacher) -> str:
    return f"teacher/kl_quantised_{teacher.name}"


def _refuse_above(setting: str, config: PlacementConfig, kl: float) -> None:
    if kl <= config.max_kl:
        return
    other = "full" if config.weights is Storage.int8 else "int8 or full"
    raise ValueError(
        f"{setting}.weights={config.weights} moves its distributions by {kl:.4g} nats per token, "
        f"more than {setting}.max_kl={config.max_kl}: choose {other}, or allow more"
    )


def _measure(
    chosen: Sequence[Teacher],
    configs: Mapping[str, PlacementConfig],
    batches: Sequence[Batch],
    *,
    processes: Accelerator | PartialState,
    dtype: torch.dtype,
) -> dict[str, float]:
    mine, found = batches[processes.process_index :: processes.num_processes], {}
    for teacher in chosen:
        config = configs[teacher.name]
        assert isinstance(teacher, ResidentTeacher)
        assert config.path is not None
        total, count = 0.0, 0
        if mine:
            total, count = quantised.divergence(teacher.model, config.path, mine, dtype=dtype, device=processes.device)
        kl = agree_sum(processes, total) / max(agree_sum(processes, count), 1)
        log.info("teacher %s in %s differs from itself by %.4g nats per token", teacher.name, config.weights, kl)
        found[_metric(teacher)] = kl
    return found
