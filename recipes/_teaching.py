"""What the distill recipe makes of its settings beside models and data: which layers are matched, what is counted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from llamita import checkpoints, estimate
from llamita.data import loader
from llamita.data.shards import PackedData
from llamita.distill import hidden, loop, speed, state, teachers
from llamita.evaluate import token_bytes
from llamita.prune.plan import Plan

log = logging.getLogger(__name__)


def meter(config: Any, llama: LlamaConfig, device: torch.device) -> speed.Meter:
    """Counts the operations of the student and of the teachers that run beside it."""
    shape = checkpoints.shape_of(llama)
    known = speed.peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return speed.Meter(
        student=shape,
        teachers=[_shape(teacher.path) for teacher in config.teachers.values() if teacher.cache is None],
        adapter_parameters=config.student.lora.num_parameters(shape),
        peak_tflops=config.peak_tflops or known,
    )


def room(config: Any, llama: LlamaConfig) -> float:
    """Bytes that the checkpoints still need of the disk: those that are kept and one being written.

    Of those that are there, none is written again.
    """
    shape = checkpoints.shape_of(llama)
    trained: int = config.student.lora.num_parameters(shape) or shape.num_parameters
    wanted: int = max(state.FEWEST, config.keep_checkpoints) + 1
    most: int = -(-config.steps // config.checkpoint_every)
    there = len(state.steps_in(config.out / "checkpoints"))
    left: int = max(1, min(wanted, most) - there)
    return estimate.checkpoint_bytes(trained) * left


def _shape(path: Path) -> Any:
    return checkpoints.shape_of(checkpoints.load_config(path))


def pairs(config: Any, llama: LlamaConfig) -> dict[int, int]:
    """The matched layers, student's to teacher's; none where hidden states do not count.

    Raises:
        ValueError: it is not known whose or which, or the settings do not go together.
    """
    wanted = config.loss.hidden
    if not wanted.weight:
        return {}
    name = _teacher(config)
    if config.compile:
        raise ValueError("compile=true does not go with loss.hidden.weight above 0: layers are listened to")
    teacher = config.teachers[name]
    if teacher.cache is not None or teacher.placement is not teachers.Placement.resident:
        raise ValueError(f"loss.hidden.weight={wanted.weight} needs teacher {name} resident: others give no layers")
    folder = wanted.plan or config.student.path
    plan = None
    if wanted.plan is None and config.student.init != "checkpoint":
        folder = None  # fresh weights were no layer of the teacher
    if folder is not None and (folder / "pruning").is_dir():
        plan = Plan.load(folder / "pruning").tensors()
    elif wanted.plan is not None:
        raise ValueError(f"loss.hidden.plan={wanted.plan} has no pruning plan: it must be what recipes/prune.py wrote")
    layers = hidden.layer_map(llama.num_hidden_layers, _shape(teacher.path).num_hidden_layers, plan)
    found: dict[int, int] = wanted.pairs(layers)
    return found


def _teacher(config: Any) -> str:
    wanted = config.loss.hidden.teacher
    if wanted is None and len(config.teachers) == 1:
        return str(next(iter(config.teachers)))
    if wanted not in config.teachers:
        raise ValueError(f"loss.hidden.teacher must be one of {', '.join(config.teachers)}, got {wanted}")
    return str(wanted)


def matching(
    config: Any, llama: LlamaConfig, all_teachers: list[teachers.Teacher], *, seed: int
) -> hidden.Matching | None:
    """The projections, and the teacher told to give the states of its layers."""
    if not (matched := pairs(config, llama)):
        return None
    name = _teacher(config)
    index = next(place for place, teacher in enumerate(all_teachers) if teacher.name == name)
    teacher = all_teachers[index]
    assert isinstance(teacher, teachers.ResidentTeacher)
    teacher.layers = tuple(matched.values())
    torch.manual_seed(seed)
    size = _shape(config.teachers[name].path).hidden_size
    return hidden.Matching(config.loss.hidden, list(matched), llama.hidden_size, size, index=index)


def held_out(config: Any, data: PackedData) -> loop.Validation:
    """The first rows of the held-out documents; bits per byte where the tokenizer's tokens are bytes."""
    if config.validation_rows == 0:
        return loop.Validation()
    batches = loader.Sequential(
        data.split("validation"), batch_rows=config.micro_batch_rows, max_rows=config.validation_rows
    )
    table: torch.Tensor | None = None
    try:
        table = token_bytes(checkpoints.load_tokenizer(data.tokenizer_path))
    except ValueError as reason:
        log.info("no bits per byte: %s", reason)
    return loop.Validation(sets={"held_out": list(batches)}, token_bytes=table)
