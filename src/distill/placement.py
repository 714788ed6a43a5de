"""From a teacher's settings to a teacher: where its layers lie, in how many bits, and whether that does it harm."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

import torch
from accelerate import Accelerator

from llamita import runs
from llamita.distill import quantised
from llamita.distill.sharded import ShardedTeacher
from llamita.distill.state import agree_sum
from llamita.distill.teachers import Attention, Batch, Placement, ResidentTeacher, Storage, Teacher, TeacherConfig

log = logging.getLogger(__name__)

COSTS = "quantised.json"
KL_ROWS = 8
"""Rows on which a quantised teacher is compared with itself in full: tens of thousands of tokens at 8,192 each."""


def check(teachers: Mapping[str, TeacherConfig]) -> None:
    """Refuse what cannot be done here, before anything is read.

    Raises:
        ValueError: naming the setting.
    """
    for name, config in teachers.items():
        if len(teachers) == 1 and config.weight_end is not None:
            raise ValueError(f"teachers.{name}.weight_end={config.weight_end} needs another teacher to share with")
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
) -> dict[str, float]:
    """KL(full || quantised) per token as ``teacher/kl_quantised_NAME``; measured once in a run, every rank calls this.

    Each rank measures every world-th batch, and reads the model's files once, a layer at a time. What was measured is
    kept in the run's ``quantised.json``.

    Raises:
        ValueError: it is above ``max_kl``: such a teacher is not used in silence.
    """
    chosen = [teacher for teacher in teachers if configs[teacher.name].weights is not Storage.full]
    if not chosen:
        return {}
    file = run.path / COSTS
    known = {}
    if accelerator.is_main_process and file.is_file():
        known = {name: float(kl) for name, kl in runs.read_json(file).items()}
    if not agree_sum(accelerator, bool(known)):
        known = _measure(chosen, configs, list(batches), accelerator=accelerator, dtype=dtype)
        if accelerator.is_main_process:
            runs.write_json(file, known)
    return known


def _measure(
    chosen: Sequence[Teacher],
    configs: Mapping[str, TeacherConfig],
    batches: Sequence[Batch],
    *,
    accelerator: Accelerator,
    dtype: torch.dtype,
) -> dict[str, float]:
    mine, found = batches[accelerator.process_index :: accelerator.num_processes], {}
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
            other = "full" if config.weights is Storage.int8 else "int8 or full"
            raise ValueError(
                f"teachers.{teacher.name}.weights={config.weights} moves its distributions by {kl:.4g} nats per token, "
                f"more than teachers.{teacher.name}.max_kl={config.max_kl}: choose {other}, or allow more"
            )
        found[f"teacher/kl_quantised_{teacher.name}"] = kl
    return found
