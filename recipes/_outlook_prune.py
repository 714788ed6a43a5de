"""What pruning will take, and what is wrong with its settings."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any

from _world import DTYPE_BYTES, Outlook, Rows, World, normal, same_tokens, split_of
from llamita import checkpoints, checks, estimate, storage
from llamita.prune import attention, costs, head
from llamita.prune.further import Further
from llamita.prune.ranking import check_wanted
from llamita.prune.target import target_shape
from llamita.shapes import LlamaShape


def prune(config: Any, world: World, outlook: Outlook) -> None:
    source = world.model("model.path", config.model.path, outlook, needs_tokenizer=False)
    rows = None
    if config.calibration.path is not None:
        rows = world.rows("calibration.path", config.calibration.path, outlook)
    if source is None:
        return
    outlook.mistakes += same_tokens("model.path", config.model.path, source, "calibration.path", rows, world)
    outlook.tokenizer = world.tokenizer(config.model.path)
    target, mistakes = _target(source, config.target)
    outlook.mistakes += mistakes + _wanted(source, target, config, world)
    outlook.processes = world.sharing_processes
    outlook.parameters = {"before": source.num_parameters, "after": target.num_parameters}
    stored = DTYPE_BYTES.get(_dtype(config.model.path), 2)
    run = _run(config, source, target, rows, stored)
    if rows is not None:
        outlook.mistakes += split_of(rows, "calibration.path", config.calibration.path, config.calibration.split)
    work = costs.operations(run)
    outlook.flops = {name: each.flops for name, each in work.items()}
    outlook.arithmetic = {name: each.arithmetic for name, each in work.items()}
    outlook.on_accelerator = bool(run.tokens) and config.calibration.device != "cpu" and world.hardware.is_gpu
    memory = costs.memory(run)
    outlook.memory = memory.device if outlook.on_accelerator else memory.together
    outlook.host_memory = memory.host if outlook.on_accelerator else {}
    if run.tokens and config.calibration.device == "cpu" and world.hardware.is_gpu:
        outlook.notes.append(f"calibration.device=cpu: the time is that of {world.hardware.name} all the same")
    if run.spills:
        spilt = source.num_hidden_layers * run.gradient_tokens * source.hidden_size * run.compute_bytes
        outlook.notes.append(f"{estimate.amount(spilt)} lie in scores.spill_path while gradients are measured")
    # Once for the scores, once for surgery, once more for the content hash, and once for the whole stream of mending.
    outlook.read_bytes = (3.0 + run.mended) * stored * source.num_parameters
    outlook.disk = {"model": float(stored * target.num_parameters)}
    if run.mended:
        outlook.disk["mended layers, until the end"] = float(stored * target.num_parameters)
    outlook.makes = target


def _run(config: Any, source: LlamaShape, target: LlamaShape, rows: Rows | None, stored: int) -> costs.Pruning:
    """What the settings mean; the scores with passes of their own are those that the recipe itself would ask for."""
    calibration, mending = config.calibration, config.compensation
    length = rows.sequence_length if rows else 0
    there = rows.rows.get(calibration.split, calibration.tokens) if rows else 0
    tokens = min(calibration.tokens, there * length)
    scores, further, second_order = config.scores, Further(), False
    with contextlib.suppress(ValueError):  # said with the target
        further, second_order = scores.further(source, config.target), scores.eliminates(source, config.target)
    gradient_tokens = min(tokens, further.gradient_tokens) if further.by_gradient else 0
    return costs.Pruning(
        source=source,
        target=target,
        tokens=tokens,
        row_tokens=min(length, calibration.tokens),
        batch_tokens=min(tokens, calibration.batch_rows * length),
        stored_bytes=stored,
        compute_bytes=DTYPE_BYTES[calibration.dtype] if calibration.dtype else stored,
        shard_bytes=checkpoints.SHARD_BYTES,
        measured=scores.path is None,
        second_order=second_order,
        greedy_rounds=further.greedy_rounds,
        longest_block=further.longest_block,
        depth_tokens=min(tokens, further.depth_tokens),
        depth_bytes=further.depth_gib * estimate.GIB,
        gradient_tokens=gradient_tokens,
        spills=bool(gradient_tokens) and further.spill_path is not None,
        mended=tokens > 0 and mending.wanted and source != target,
        attention_steps=mending.attention_steps,
        layer_steps=mending.layer_steps,
        head_steps=mending.head_steps,
        tied_steps=mending.tied_steps,
        attention_chunk_bytes=attention.CHUNK_BYTES,
        logit_chunk_bytes=head.CHUNK_BYTES,
    )


def _target(source: LlamaShape, target: Any) -> tuple[LlamaShape, list[str]]:
    """The shape that is asked for and every mistake in it; a field that is wrong is left as in the source."""
    mistakes: list[str] = []
    while True:
        try:
            return target_shape(source, target), mistakes
        except ValueError as error:
            mistakes.append(str(error))
            named = re.search(r"target\.(\w+)", str(error))
            if named is None or getattr(target, named[1]) is None:
                return source, mistakes
            target = dataclasses.replace(target, **{named[1]: None})


def _wanted(source: LlamaShape, target: LlamaShape, config: Any, world: World) -> list[str]:
    """What the plan of units lacks: text, or a model with the rotary scaling that is asked for."""
    kinds, has_text, mistakes = config.scores, True, []
    future = kinds.path is not None and normal(kinds.path) in world.made
    if not future:
        calibrated = config.calibration.path is not None
        mistakes = checks.errors_of(lambda: kinds.have_text(calibrated=calibrated))
        has_text = bool(mistakes) or kinds.have_text(calibrated=calibrated)
    if future or mistakes:  # what it holds is not known
        kinds = dataclasses.replace(kinds, path=None)
    rope = None
    if (config.model.path / "config.json").is_file():
        rope = checkpoints.rope_type(checkpoints.load_config(config.model.path))
    return mistakes + checks.errors_of(
        lambda: check_wanted(source, target, config.target, kinds, has_text=has_text, rope_type=rope)
    )


def _dtype(path: Path) -> str:
    if not (path / "config.json").is_file():
        return "bfloat16"
    config = storage.read_json(path / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype"))
