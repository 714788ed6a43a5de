"""What each recipe's settings mean in bytes, operations and directories, and what is wrong with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import _compose
import _outlook_align
import _slurm
from _outlook_distill import cache, distill
from _outlook_prune import prune
from _world import (
    DTYPE_BYTES,
    UNKNOWN,
    Outlook,
    Rows,
    World,
    is_only_a_name,
    normal,
    same_tokens,
    split_of,
    tokenizer_mistakes,
)
from llamita import checkpoints, checks, estimate, evaluate, harness, redaction, runs, storage
from llamita.data import sources, tokens
from llamita.distill.teachers import Attention
from llamita.shapes import PUBLISHED, LlamaShape

MARGIN = 1.35


class Recipe(StrEnum):
    """What can be planned."""

    prepare = "prepare"
    prune = "prune"
    cache = "cache"
    distill = "distill"
    dialogues = "dialogues"
    sft = "sft"
    sample = "sample"
    dpo = "dpo"
    reward = "reward"
    rl = "rl"
    average = "average"
    assess = "assess"
    evaluate = "evaluate"
    report = "report"
    pipeline = "pipeline"


def of(recipe: str, overrides: Sequence[str], world: World, name: str | None = None) -> tuple[list[Outlook], list[str]]:
    """The outlook of a recipe's stages (a pipeline has several), and every mistake that can be seen beforehand."""
    config, mistakes = _compose.composed(recipe, overrides)
    mistakes = redaction.secrets_in(dict(override.partition("=")[::2] for override in overrides)) + mistakes
    if config is None:
        return [], list(map(redaction.redacted, mistakes))
    if recipe == "pipeline":
        return _pipeline(config, world, mistakes)
    outlook = Outlook(name or config.out.name, recipe, config.out)
    match recipe:
        case "prepare":
            _prepare(config, world, outlook)
        case "prune":
            prune(config, world, outlook)
        case "cache":
            cache(config, world, outlook)
        case "distill":
            distill(config, world, outlook)
        case "evaluate":
            _evaluate(config, world, outlook)
        case "report":
            _report(config, world, outlook)
        case "dialogues":
            _outlook_align.dialogues(config, world, outlook)
        case "sft":
            _outlook_align.sft(config, world, outlook)
        case "sample":
            _outlook_align.sample(config, world, outlook)
        case "dpo":
            _outlook_align.preferences(config, world, outlook)
        case "reward":
            _outlook_align.reward(config, world, outlook)
        case "rl":
            _outlook_align.reinforcement(config, world, outlook)
        case "assess":
            _outlook_align.assess(config, world, outlook)
        case "average":
            _outlook_align.average(config, world, outlook)
        case _:
            raise AssertionError(recipe)
    _common(config, world, outlook)
    world.made[normal(config.out)] = outlook.makes
    if outlook.tokenizer is not None:
        world.tokenizers[normal(config.out)] = outlook.tokenizer
    # What follows from a setting that was not given has been said once.
    mistakes += [mistake for mistake in outlook.mistakes if _compose.UNSET not in mistake]
    return [outlook], list(dict.fromkeys(map(redaction.redacted, mistakes)))


def _pipeline(config: Any, world: World, mistakes: list[str]) -> tuple[list[Outlook], list[str]]:
    """Every stage in order; what one makes, the next may read."""
    outlooks: list[Outlook] = []
    order = _compose.load("pipeline").in_order(config.stages)
    world.made |= {normal(config.out / name): UNKNOWN for name in order}
    before: dict[str, frozenset[str]] = {}
    on_slurm = config.launcher.kind == _slurm.Launcher.slurm
    for name in order:
        stage = config.stages[name]
        before[name] = frozenset(stage.after).union(*(before[parent] for parent in stage.after))
        world.waits_for = before[name]
        world.stage_processes = (
            _slurm.layout(stage.recipe, stage.processes, config.launcher).processes if on_slurm else stage.processes
        )
        for point, words in stage.points().items():
            label = f"{name}.{point}" if point else name
            out = f"out={config.out / name / point}"
            found, wrong = of(stage.recipe, [*stage.overrides, *words, out], world, label)
            outlooks += found
            mistakes += [f"stage {label}: {mistake}" for mistake in wrong]
    needed = sum(sum(outlook.disk.values()) for outlook in outlooks)
    mistakes += checks.space(config.out, needed, estimate.amount)
    return outlooks, mistakes


def _common(config: Any, world: World, outlook: Outlook) -> None:
    """What is checked for every recipe."""
    settings = storage.plain(config)
    outlook.mistakes += redaction.secrets_in(settings)
    outlook.mistakes += runs.names({"the last part of out": config.out.absolute().name})
    outlook.mistakes += runs.names({"run.project": config.run.project})
    outlook.mistakes += checks.errors_of(
        lambda: runs.check_out(config.out, outlook.recipe, settings, may_change=outlook.may_change)
    )
    outlook.mistakes += checks.space(config.out, sum(outlook.disk.values()), estimate.amount)
    if outlook.on_accelerator or not world.hardware.is_gpu:  # the memory of a GPU's host is not known here
        needed, device = sum(outlook.memory.values()), world.hardware
        outlook.mistakes += checks.memory(needed, device.name, device.memory_bytes, estimate.amount)
        if MARGIN * needed > device.memory_bytes >= needed:
            outlook.notes.append(
                f"{estimate.amount(needed)} of {device.name} is close: up to a third more than the items above is used "
                "in practice"
            )
    if not outlook.mistakes and not world.made:
        outlook.mistakes += checks.errors_of(lambda: _own_check(outlook.recipe, config))


def _own_check(recipe: str, config: Any) -> None:
    """What the recipe itself refuses before it starts, where everything that it reads is here to be looked at."""
    module = _compose.load(recipe)
    match recipe:
        case "prune":
            if checks.has_weights(config.model.path):
                module.calibration(config.calibration, checkpoints.Weights(config.model.path))
        case "distill":
            if all(map(checks.has_weights, module.models(config).values())):
                # That kernel needs a GPU, which the machine that plans may lack.
                module.check(dataclasses.replace(config, attention=Attention.sdpa))
        case "sft":
            paths = [config.model.path, *(teacher.path for teacher in config.teachers.values() if teacher.path)]
            if all(map(checks.has_weights, paths)):
                module.check(dataclasses.replace(config, attention=Attention.sdpa))
        case "evaluate":
            if all(map(checks.has_weights, config.paths().values())):
                module.check(config)


def _prepare(config: Any, world: World, outlook: Outlook) -> None:
    found = []
    for name, source in _compose.load("prepare").named(config).items():
        outlook.mistakes += runs.names({"sources": name})
        try:
            found.append(sources.resolve(name, source))
        except ValueError as error:
            outlook.mistakes.append(str(error))
    for source in found:
        if source.kind is sources.Kind.datasets and not Path(str(source.config.path)).is_dir():
            outlook.notes.append(
                f"source {source.name!r}: {source.config.path} is a name, whose size is not known here; "
                f"{'it is downloaded' if config.allow_network else 'allow_network=true lets it be downloaded'}"
            )
        elif source.files and not any(file.stat().st_size for file in source.files):
            outlook.mistakes.append(f"source {source.name!r}: path={source.config.path} is empty")
    vocabulary = _prepare_tokenizer(config.tokenizer, world, outlook)
    text = outlook.read_bytes = float(sum(file.stat().st_size for source in found for file in source.files))
    all_tokens = kept = estimate.num_text_tokens(text)
    if config.max_tokens is not None:
        kept = min(all_tokens, config.max_tokens)
    processes = config.num_proc or _compose.load("prepare").num_cores()
    outlook.hours = estimate.prepare_hours(all_tokens, processes)
    outlook.notes.append(
        f"{estimate.TEXT_BYTES_PER_TOKEN:.0f} bytes of text per token and {estimate.TOKENS_PER_CPU_SECOND:,.0f} tokens "
        f"per second in each of {processes} processes are assumed, compressed files counted as they lie"
    )
    outlook.disk = estimate.prepare_disk(text, all_tokens)
    outlook.on_accelerator = False
    outlook.may_change = ("num_proc",)
    rows = {}
    if text:
        held, per_row = config.validation.fraction, config.sequence_length
        # However short the text, something is trained on and, if asked for, something held out.
        rows = {"train": max(1, int(kept * (1 - held) / per_row))}
        rows["validation"] = max(1, int(all_tokens * held / per_row)) if held else 0
    outlook.makes = Rows(config.sequence_length, vocabulary, rows, outlook.tokenizer)


def _prepare_tokenizer(tokenizer: Any, world: World, outlook: Outlook) -> int:
    """The size of the vocabulary, 0 where it is not known; what is wrong goes to ``outlook``."""
    path = tokenizer.path
    if path is None:
        return int(tokenizer.vocab_size)
    if is_only_a_name(path):
        outlook.notes.append(f"tokenizer.path={path} is no directory: the recipe will need one with tokenizer.json")
        return PUBLISHED[str(path)].vocab_size
    if normal(path) in world.made or world.is_inside_made(path):
        return 0
    if wrong := tokenizer_mistakes("tokenizer.path", path):
        outlook.mistakes += wrong
        return 0
    outlook.tokenizer = world.tokenizer(path)
    return tokens.vocab_size(checkpoints.load_tokenizer(path))


def _evaluate(config: Any, world: World, outlook: Outlook) -> None:
    rows = world.rows("data.path", config.data.path, outlook) if config.data.path is not None else None
    shapes: dict[str, LlamaShape] = {}
    for name, path in config.paths().items():
        outlook.mistakes += runs.names({"models": name})
        setting = f"models.{name}.path" if name in config.models else f"{name}.path"
        if (shape := world.model(setting, path, outlook, needs_tokenizer=bool(config.tasks))) is not None:
            shapes[name] = shape
            outlook.mistakes += same_tokens(setting, path, shape, "data.path", rows, world)
    sizes = {name: shape.vocab_size for name, shape in shapes.items()}
    if "teacher" in shapes and len(set(sizes.values())) > 1:
        outlook.mistakes.append(f"KL to the teacher needs one vocabulary, got sizes {sizes}")
    outlook.processes = world.sharing_processes
    outlook.parameters = {name: shape.num_parameters for name, shape in shapes.items()}
    if not shapes:
        return
    value = DTYPE_BYTES[config.dtype] if config.dtype else 2
    teacher = "teacher" if config.teacher.path is not None else None
    outlook.memory = estimate.evaluation_memory(
        shapes,
        batch_rows=config.data.batch_rows if rows is not None else 0,
        sequence_length=rows.sequence_length if rows is not None else 0,
        bytes_per_value=value,
        chunk_values=evaluate.CHUNK_VALUES,
        teacher=teacher,
    )
    if rows is not None:
        outlook.mistakes += split_of(rows, "data.path", config.data.path, config.data.split)
        there = rows.rows.get(config.data.split, config.data.max_rows or 0)
        outlook.flops = estimate.evaluation_flops(
            shapes,
            rows=min(config.data.max_rows or there, there),
            sequence_length=rows.sequence_length,
            teacher=teacher,
        )
    if config.tasks:
        outlook.mistakes += checks.errors_of(lambda: harness.task_manager(config.tasks, config.task_path))
        outlook.notes.append("the time of lm-eval tasks is not counted")
    outlook.read_bytes = 2.0 * value * sum(outlook.parameters.values())


def _report(config: Any, world: World, outlook: Outlook) -> None:
    outlook.on_accelerator = False
    if not config.runs:
        outlook.mistakes.append("runs must name at least one directory: runs.NAME=PATH")
    for name, path in config.runs.items():
        outlook.mistakes += runs.names({"runs": name})
        if normal(path) in world.made:
            world.check_order(f"runs.{name}", path, outlook)
            continue
        if not path.is_dir():
            outlook.mistakes.append(f"runs.{name}={path} does not exist")
        elif problems := checks.unfinished(f"runs.{name}", path):
            outlook.notes += problems
