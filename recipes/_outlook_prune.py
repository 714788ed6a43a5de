"""What pruning will take, and what is wrong with its settings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from _world import DTYPE_BYTES, Outlook, World, normal, same_tokens, split_of
from llamita import checkpoints, checks, estimate, storage
from llamita.prune.ranking import check_wanted
from llamita.prune.scores import LayerScore
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
    compute = DTYPE_BYTES[config.calibration.dtype] if config.calibration.dtype else stored
    num_tokens = 0
    batch_tokens = config.calibration.batch_rows * (rows.sequence_length if rows else 0)
    measured = config.scores.path is None and rows is not None
    second_order = measured and config.scores.second_order
    mended = rows is not None and config.compensation.wanted and source != target
    if rows is not None:
        outlook.mistakes += split_of(rows, "calibration.path", config.calibration.path, config.calibration.split)
        there = rows.rows.get(config.calibration.split, config.calibration.tokens)
        num_tokens = min(config.calibration.tokens, there * rows.sequence_length)
        row_tokens = min(rows.sequence_length, config.calibration.tokens)
        outlook.flops = estimate.prune_flops(
            source,
            target,
            tokens=num_tokens,
            row_tokens=row_tokens,
            batch_tokens=batch_tokens,
            second_order=second_order,
            greedy_rounds=(source.num_hidden_layers - target.num_hidden_layers)
            * (config.scores.layers is LayerScore.greedy and measured),
            depth_tokens=min(num_tokens, config.scores.depth_tokens),
            mended=mended,
            layer_steps=config.compensation.layer_steps,
            head_steps=config.compensation.head_steps,
            tied_steps=config.compensation.tied_steps,
        )
    outlook.memory = estimate.prune_memory(
        source,
        target,
        tokens=num_tokens,
        batch_tokens=min(num_tokens, batch_tokens),
        stored_bytes=stored,
        compute_bytes=compute,
        shard_bytes=checkpoints.SHARD_BYTES,
        second_order=second_order,
        mended=mended,
        tied_steps=config.compensation.tied_steps,
    )
    # Once for the scores, once for surgery, once more for the content hash, and once for the whole stream of mending.
    outlook.read_bytes = (3.0 + mended) * stored * source.num_parameters
    outlook.disk = {"model": float(stored * target.num_parameters)}
    if mended:
        outlook.disk["mended layers, until the end"] = float(stored * target.num_parameters)
    outlook.on_accelerator = False
    outlook.makes = target


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
