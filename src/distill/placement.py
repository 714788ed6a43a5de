"""From a teacher's settings to a teacher: where its layers lie, in how many bits, and whether that does it harm."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from accelerate import Accelerator

from llamita import runs
from llamita.distill import quantised
from llamita.distill.sharded import ShardedTeacher
from llamita.distill.state import agree_sum
from llamita.distill.teachers import Attention, Batch, Placement, ResidentTeacher, Storage, Teacher, TeacherConfig

log = logging.getLogger(__name__)

KL_ROWS = 8
"""Rows on which a quantised teacher is compared with itself in full: tens of thousands of tokens at 8,192 each."""


def check(teachers: Mapping[str, TeacherConfig]) -> None:
    """Refuse what cannot be done here, before anything is read.

    Raises:
        ValueError: naming the setting.
    """
    for name, config in teachers.items():
        quantised.check(name, config.weights)


def load_all(
    teachers: Mapping[str, TeacherConfig], *, dtype: torch.dtype, device: torch.device, attention: Attention
) -> list[Teacher]:
    """The teachers that are run beside the student: those without a cache; every rank calls this.

    Raises:
        ValueError: a directory's tensors are not those of its configuration, or were not read as they are.
    """
    return [
        load(name, config, dtype=dtype, device=device, attention=attention)
        for name, config in teachers.items()
        if config.cache is None
    ]


def load(
    name: str, config: TeacherConfig, *, dtype: torch.dtype, device: torch.device, attention: Attention
) -> Teacher:
    """The teacher that ``config`` describes, which has a path; every rank calls this.

    Raises:
        ValueError: as :func:`load_all`.
    """
    assert config.path is not None
    if config.weights is not Storage.full:
        model = quantised.load(config.path, config.weights, dtype=dtype, device=device, attention=attention)
        return ResidentTeacher(name, model, config.weight)
    match config.placement:
        case Placement.resident:
            kind: type[ResidentTeacher | ShardedTeacher] = ResidentTeacher
        case Placement.zero3:
            kind = ShardedTeacher
    return kind.load(name, config.path, config.weight, dtype=dtype, device=device, attention=attention)


def compare(
    teachers: Iterable[Teacher],
    configs: Mapping[str, TeacherConfig],
    batches: Iterable[Batch],
    *,
    accelerator: Accelerator,
    dtype: torch.dtype,
    run: runs.Run,
) -> None:
    """Log KL(full || quantised) per token as ``teacher/kl_quantised_NAME``; once in a run, every rank calls this.

    Each rank measures every world-th batch, and reads the model's files once, a layer at a time.

    Raises:
        ValueError: it is above ``max_kl``: such a teacher is not used in silence.
    """
    chosen = [teacher for teacher in teachers if configs[teacher.name].weights is not Storage.full]
    if not chosen or agree_sum(accelerator, accelerator.is_main_process and _are_measured(run, chosen)):
        return
    mine = list(batches)[accelerator.process_index :: accelerator.num_processes]
    for teacher in chosen:
        config = configs[teacher.name]
        assert isinstance(teacher, ResidentTeacher)
        assert config.path is not None
        total, count = 0.0, 0
        if mine:
            total, count = quantised.divergence(
                teacher.model, config.path, mine, dtype=dtype, device=accelerator.device
            )
        kl = agree_sum(accelerator, total) / max(agree_sum(accelerator, count), 1)
        log.info("teacher %s in %s differs from itself by %.4g nats per token", teacher.name, config.weights, kl)
        if not kl <= config.max_kl:
            raise ValueError(
                f"teachers.{teacher.name}.weights={config.weights} moves its distributions by {kl:.4g} nats per token, "
                f"more than teachers.{teacher.name}.max_kl={config.max_kl}: choose int8 or full, or allow more"
            )
        run.log({f"teacher/kl_quantised_{teacher.name}": kl})


def _are_measured(run: runs.Run, teachers: Iterable[Teacher]) -> bool:
    rows = runs.read_metrics(run.path) if (run.path / "metrics.jsonl").is_file() else []
    return all(any(f"teacher/kl_quantised_{teacher.name}" in row for row in rows) for teacher in teachers)
