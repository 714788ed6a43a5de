"""Calibration text, and what a model's units do on it: what the recipes that cut a model have in common."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from omegaconf import MISSING

from llamita import chat, checkpoints, checks, faults, runs
from llamita.data import loader, shards
from llamita.progress import Progress
from llamita.prune import importance, stream
from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import FILE, Scores
from llamita.prune.target import TargetConfig
from llamita.shapes import LlamaShape

log = logging.getLogger(__name__)

# Some servers load every safetensors file that lies beside config.json.
FOLDER = "pruning"


@dataclass(kw_only=True)
class ModelConfig:
    """The model to prune."""

    path: Path = MISSING


@dataclass(kw_only=True)
class CalibrationConfig:
    """The text on which units are scored."""

    path: Path | None = None
    """A data directory of ``recipes/prepare.py``; unset: each axis that is cut must be ranked by ``magnitude``."""
    split: str = "train"
    tokens: int = 65536
    """How many to use, padding included; fewer when the split holds fewer."""
    batch_rows: int = 1
    """Rows that go through a layer at once, and that one step of mending sees."""
    dtype: str | None = None
    """Of the forward pass; unset: as the weights are stored."""
    device: str = "auto"
    """``cpu``, ``cuda`` or ``cuda:N``: where one layer at a time is run; ``auto``: a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("tokens", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"calibration.{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype is not None:
            checkpoints.dtype_named(self.dtype)
        checks.refuse(checks.device_name("calibration.device", self.device))


Parents = dict[str, tuple[Path, str]]
"""Path and content hash of each directory that was read."""


def calibration(config: CalibrationConfig, weights: checkpoints.Weights) -> tuple[list[stream.Batch], Parents]:
    """The calibration rows and where they come from.

    Raises:
        ValueError: the data is not of the model's tokenizer, or its rows are too long for the model.
    """
    if config.path is None:
        return [], {}
    data = shards.PackedData.open(config.path)
    where, tokenizer = f"calibration.path={config.path}", checkpoints.tokenizer_of(weights.path)
    if tokenizer is None:
        log.warning("model.path=%s has no tokenizer: that of calibration.path is taken to be its own", weights.path)
    model, size = f"model.path={weights.path}", weights.shape.vocab_size
    checks.refuse(checks.same_tokens(model, size, tokenizer, where, data.vocab_size, data.tokenizer_hash))
    split = data.split(config.split)
    columns, most = min(config.tokens, data.sequence_length), weights.config.max_position_embeddings
    if columns > most:
        raise ValueError(
            f"calibration.path={config.path} has rows of {columns} tokens, but model.path={weights.path} has "
            f"max_position_embeddings={most}: set calibration.tokens={most} or prepare shorter rows"
        )
    rows, rank, world_size = min(config.tokens // columns, len(split)), *process()
    if rows * columns < config.tokens:
        log.warning("calibration.tokens=%d, of which %d are used", config.tokens, rows * columns)
    if (number := math.ceil(rows / config.batch_rows)) < world_size:
        raise ValueError(
            f"calibration.tokens={config.tokens} are {rows} rows, of which calibration.batch_rows={config.batch_rows} "
            f"makes {number} batches: too few for {world_size} processes, each of which needs one"
        )
    batches = loader.Sequential(split, batch_rows=config.batch_rows, max_rows=rows, rank=rank, world_size=world_size)
    text = [{name: tensor[:, :columns] for name, tensor in batch.items()} for batch in batches]
    return list[stream.Batch](text), {"calibration": (config.path, data.content_hash)}


def how(config: CalibrationConfig, model: stream.Model) -> dict[str, Any]:
    """Arguments of a forward pass: its dtype and its device."""
    dtype = checkpoints.dtype_named(config.dtype) if config.dtype else model.dtype
    local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    return {"dtype": dtype, "device": local if config.device == "auto" else config.device}


def process() -> tuple[int, int]:
    """Number of this process and of all of them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def processes() -> Iterator[None]:
    """Let the processes of a launcher sum what each counted; nothing where there is one."""
    if process()[1] == 1:
        yield
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def agreed(flag: bool) -> bool:
    """Whether any process says so."""
    return bool(stream.summed(torch.tensor(float(flag))))


def pad_id(config: CalibrationConfig) -> int | None:
    """Token of the padding of the calibration rows."""
    if config.path is None:
        return None
    tokenizer = checkpoints.load_tokenizer(shards.PackedData.open(config.path).tokenizer_path)
    return chat.borders(tokenizer).pad_id


@contextmanager
def watched(name: str, layers: int, run: runs.Run) -> Iterator[Any]:
    """A function to be told how many layers are done; it ends all processes when one was asked to stop."""
    with Progress(name, layers) as progress:

        def watch(done: int) -> None:
            progress.update(done)
            if agreed(run.stop.is_set()):
                raise runs.Stopped("stopped: the same command goes on from the last finished part")

        yield watch


def score(
    scores: ScoreConfig,
    target: TargetConfig,
    calibrated: CalibrationConfig,
    weights: checkpoints.Weights,
    text: list[stream.Batch],
    parents: Parents,
    run: runs.Run,
    shapes: Sequence[LlamaShape] = (),
) -> Scores:
    """The scores of ``scores.path``, those that this run saved before it was interrupted, or new ones.

    New ones are those that ``shapes`` need; of none, that of ``target``.
    """
    info: dict[str, Any] = {name: parents[name][1] for name in ("model", "calibration") if name in parents}
    if scores.path is not None:
        found = Scores.load(scores.path)
        if runs.is_main_process() and found.info["model"] != info["model"]:
            raise ValueError(f"scores.path={scores.path} was measured on another model than {weights.path}")
        parents["scores"] = (scores.path, found.content_hash)
        return found
    folder, same = run.path / FOLDER, False
    if runs.is_main_process() and (folder / FILE).is_file():
        saved = Scores.load(folder).info
        same = {name: saved.get(name) for name in info} == info
    partial = folder / "partial.safetensors"
    if agreed(same):
        partial.unlink(missing_ok=True)
        return Scores.load(folder)
    if calibrated.path is not None:
        with watched("calibrate", weights.shape.num_hidden_layers, run) as watch:
            passes = how(calibrated, weights)
            passes["second_order"] = scores.eliminates(weights.shape, target, shapes)
            log.info("scoring in %s on %s", passes["dtype"], passes["device"])
            passes["further"] = scores.further(weights.shape, target, shapes)
            passes |= {"pad_id": pad_id(calibrated), "info": info, "partial": partial}
            measured = importance.measure(weights, text, watch=watch, **passes)
    else:
        measured = importance.from_weights(weights, info=info)
    measured = replace(measured, tensors=stream.of_first(measured.tensors))
    if runs.is_main_process():
        measured.save(folder)
        partial.unlink(missing_ok=True)
    faults.crash_point("after_scores")
    return measured
