"""What a cache and a distillation will take, and what is wrong with their settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import _ways
from _world import Outlook, Rows, World, same_tokens, split_of
from llamita import checkpoints, checks, estimate, runs
from llamita.distill import cache_format, capture, fused, loop
from llamita.distill.teachers import Attention
from llamita.precision import Precision
from llamita.shapes import PUBLISHED, SIZES, LlamaShape


def cache(config: Any, world: World, outlook: Outlook) -> None:
    rows = world.rows("data.path", config.data.path, outlook)
    outlook.may_change = capture.MAY_CHANGE
    outlook.processes = world.processes
    if (shape := world.model("teacher.path", config.teacher.path, outlook)) is None:
        return
    outlook.mistakes += same_tokens("teacher.path", config.teacher.path, shape, "data.path", rows, world)
    outlook.mistakes += checks.errors_of(lambda: cache_format.check_fits(shape.vocab_size, config.samples_per_token))
    half = config.teacher.precision.dtype(torch.device("cuda" if world.hardware.is_gpu else "cpu")) is torch.bfloat16
    tokens = rows.sequence_length * sum(rows.rows.get(split, 0) for split in config.data.splits)
    value = 2 if half else 4
    teacher = estimate.Teacher(name="teacher", shape=shape, bytes_per_value=value)
    teacher = _ways.placed(teacher, config.teacher, world.processes)
    weights, forward = estimate.teacher_bytes(teacher, config.batch_rows * rows.sequence_length).values()
    chunk = (config.chunk_mebibytes or capture.default_chunk_mebibytes(on_cpu=not world.hardware.is_gpu)) * 2**20
    outlook.parameters = {"teacher": shape.num_parameters}
    outlook.memory = {"teacher, weights": weights, "teacher, forward": forward, "distributions": chunk}
    outlook.flops = {"teacher, forward": tokens * shape.forward_flops_per_token(rows.sequence_length / 2)}
    # What is spread is compared with its files, what is quantised with itself in full.
    outlook.read_bytes = float(value * shape.num_parameters * (2 if config.teacher.is_common else 1))
    entries = min(world.entries_per_token, config.samples_per_token)
    outlook.disk = {"entries": float(cache_format.ENTRY_BYTES * entries * tokens), "lengths": float(tokens)}
    outlook.notes.append(
        f"{entries:g} entries per token are assumed, for a teacher of billions of weights; a weak one needs up to "
        f"three times as many, and never more than samples_per_token={config.samples_per_token}"
    )


def distill(config: Any, world: World, outlook: Outlook) -> None:
    rows = world.rows("data.path", config.data.path, outlook)
    trained(config, rows, _student(config, rows, world, outlook), world, outlook)


def trained(
    config: Any, rows: Rows, student: LlamaShape | None, world: World, outlook: Outlook, *, own: str = "student.path"
) -> None:
    """A training on packed rows; ``own`` is the setting of the student's directory."""
    paths = {"student": config.student.path} if config.student.path else {}
    shapes = {"student": student}
    for name, teacher in config.teachers.items():
        outlook.mistakes += runs.names({"teachers": name})
        if name == "student":
            outlook.mistakes.append("teachers.student: a teacher must not have the name of the student")
        if teacher.cache is not None:
            world.stage(f"teachers.{name}.cache", teacher.cache, outlook)
            continue  # it is not run, whatever stands beside it
        paths[name] = teacher.path
        shapes[name] = world.model(f"teachers.{name}.path", teacher.path, outlook)
    _agree(paths, shapes, rows, world, outlook, own)
    outlook.tokenizer = world.tokenizer(config.student.path) if config.student.path else rows.tokenizer_hash
    outlook.mistakes += split_of(rows, "data.path", config.data.path, "train")
    if config.validation_rows and rows.rows and not rows.rows.get("validation"):
        outlook.mistakes.append(
            f"data.path={config.data.path} has no held-out rows: validation_rows=0 trains without, "
            f"got {config.validation_rows}"
        )
    if config.compile and config.deepspeed.stage:
        outlook.mistakes.append("compile=true does not go with deepspeed: choose deepspeed=none")
    outlook.mistakes += checks.division(config.global_batch_rows, config.micro_batch_rows, world.processes)
    if student is None:
        return
    half = config.precision is Precision.bfloat16 or (config.precision is Precision.auto and world.hardware.is_gpu)
    if config.attention is Attention.flash_attention_2 and not (half and world.hardware.is_gpu):
        outlook.mistakes.append(
            f"attention=flash_attention_2 needs a GPU and precision=bfloat16, got {world.hardware.name} and "
            f"{config.precision}; attention=sdpa runs everywhere"
        )
    stage = config.deepspeed.stage
    precision = estimate.Precision.float32
    if half:
        precision = estimate.Precision.bfloat16 if stage else estimate.Precision.autocast
    mebibytes = config.loss.chunk_mebibytes or fused.default_mebibytes("cuda" if world.hardware.is_gpu else "cpu")
    training = estimate.Training(
        student=student,
        teachers=[],
        precision=precision,
        zero_stage=stage,
        processes=world.processes,
        micro_batch_rows=config.micro_batch_rows,
        rows_per_step=config.global_batch_rows,
        sequence_length=rows.sequence_length,
        steps=config.steps,
        packed=config.attention in (Attention.sdpa, Attention.eager),
        recompute=config.activation_checkpointing,
        chunk_bytes=mebibytes * 2**20,
        checkpoint_every=config.checkpoint_every,
        kept_checkpoints=max(2, config.keep_checkpoints),
        validation_rows=min(config.validation_rows, rows.rows.get("validation", config.validation_rows)),
        validation_every=config.validation_every,
        adapter_parameters=config.student.lora.num_parameters(student),
    )
    found = [
        estimate.Teacher(name=name, shape=shape, bytes_per_value=2 if half else 4)
        for name, shape in shapes.items()
        if shape is not None and name != "student"
    ]
    online = [_ways.placed(teacher, config.teachers[teacher.name], world.processes) for teacher in found]
    outlook.ways = _ways.compare(
        training,
        found,
        world.hardware,
        mfu=world.mfu,
        data_tokens=rows.rows.get("train", 0) * rows.sequence_length,
        entries_per_token=world.entries_per_token,
    )
    training = dataclasses.replace(training, teachers=online)
    outlook.processes = world.processes
    outlook.parameters = {name: shape.num_parameters for name, shape in shapes.items() if shape is not None}
    outlook.memory = estimate.training_memory(training)
    if not world.hardware.is_gpu:
        outlook.memory = {"Python and its libraries": estimate.PYTHON_BYTES} | outlook.memory
    outlook.flops = estimate.training_flops(training)
    outlook.read_bytes = float(sum(2 * shape.num_parameters for shape in shapes.values() if shape))
    saved = 2 if half else 4
    outlook.disk = estimate.training_disk(training, saved_bytes_per_value=saved)
    outlook.written_bytes = estimate.training_written(training, saved_bytes_per_value=saved)
    outlook.may_change = loop.MAY_CHANGE
    outlook.makes = student
    tokens = config.steps * config.global_batch_rows * rows.sequence_length
    text = f"{tokens:,} tokens in {config.steps:,} steps"
    if there := rows.rows.get("train"):
        text += f", {config.steps * config.global_batch_rows / there:,.1f} times the data"
    outlook.notes.append(text)


def _student(config: Any, rows: Rows, world: World, outlook: Outlook) -> LlamaShape | None:
    wanted = config.student
    if wanted.path is not None:
        return world.model("student.path", wanted.path, outlook)
    outlook.mistakes += checks.positions(rows.sequence_length, "student.shape", wanted.shape.max_position_embeddings)
    sizes = {name: getattr(wanted.shape, name) for name in SIZES}
    sizes["head_dim"] = sizes["head_dim"] or sizes["hidden_size"] // max(1, sizes["num_attention_heads"])
    vocabulary = rows.vocab_size or PUBLISHED["meta-llama/Llama-3.1-8B"].vocab_size
    try:
        return LlamaShape(**sizes, vocab_size=vocabulary, tie_word_embeddings=wanted.shape.tie_word_embeddings)
    except ValueError as error:
        outlook.mistakes.append(f"student.shape: {error}")
        return None


def _agree(
    paths: Mapping[str, Path],
    shapes: Mapping[str, LlamaShape | None],
    rows: Rows,
    world: World,
    outlook: Outlook,
    own: str,
) -> None:
    """One vocabulary and one tokenizer for data, student and teachers."""
    for name, path in paths.items():
        if (shape := shapes[name]) is None:
            continue
        setting = own if name == "student" else f"teachers.{name}.path"
        outlook.mistakes += same_tokens(setting, path, shape, "data.path", rows, world)
        if (path / "config.json").is_file():
            most = checkpoints.load_config(path).max_position_embeddings
            outlook.mistakes += checks.positions(rows.sequence_length, f"{setting}={path}", most)
    sizes = {name: shape.vocab_size for name, shape in shapes.items() if shape is not None}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        outlook.mistakes.append(f"student and teachers must have the same vocabulary, got {listed}")
    for name, shape in shapes.items():
        if shape is not None and shape.output_rows is not None:
            outlook.mistakes.append(f"{name} has {shape.output_rows} output rows: it is no language model any more")
    hashes = {name: digest for name, path in paths.items() if (digest := world.tokenizer(path))}
    if rows.tokenizer_hash is None and len(set(hashes.values())) > 1:
        listed = ", ".join(f"{name} {digest[:12]}" for name, digest in hashes.items())
        outlook.mistakes.append(f"student and teachers must have the same tokenizer, got {listed}")
