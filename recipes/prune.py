"""Cut a Llama down to the sizes of a smaller one.

python recipes/prune.py model.path=llama-3.1-8b target=llama3.2_1b calibration.path=data out=pruned
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

from llamita import checkpoints, checks, runs
from llamita.data import loader, shards, tokens
from llamita.progress import Progress
from llamita.prune import importance, plan, stream, surgery

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
    """Rows that go through a layer at once."""
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


@dataclass(kw_only=True)
class Prune:
    """Everything that this recipe can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    target: plan.TargetConfig = field(default_factory=plan.TargetConfig)
    scores: plan.ScoreConfig = field(default_factory=plan.ScoreConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING


store("prune_schema", Prune)


def run(config: Prune) -> None:
    """Score the units of the model, choose those that stay, write the smaller model."""
    if not (config.out / "DONE.json").is_file():  # what cannot work is said before anything is written
        checks.refuse(checks.device_here("calibration.device", config.calibration.device))
        model = checkpoints.Weights(config.model.path)
        shape, rope = plan.target_shape(model.shape, config.target), checkpoints.rope_type(model.config)
        text = config.scores.have_text(calibrated=config.calibration.path is not None)
        plan.check_wanted(model.shape, shape, config.target, config.scores, has_text=text, rope_type=rope)
    with runs.start(config.out, "prune", runs.plain(config), config.run) as run:
        if run.done or not runs.is_main_process():
            return
        weights = checkpoints.Weights(config.model.path)
        rows, parents = calibration(config.calibration, weights)
        parents["model"] = (config.model.path, checkpoints.content_hash(config.model.path))
        scores = score(config, weights, rows, parents, run)
        kept = plan.make(scores, weights.shape, config.target, config.scores)
        for layer, row in enumerate(scores.layer_means()):
            run.log({f"prune/{name}": value for name, value in row.items()}, step=layer)
        pruned = surgery.Pruned(weights, kept)
        print(kept, flush=True)
        kept.save(config.out / FOLDER)
        summary = kept.summary() | losses(config, pruned, rows, scores)
        numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
        run.log({f"prune/{name}": value for name, value in (numbers | {"params": numbers["parameters_after"]}).items()})
        lineage = {name: {"path": path, "sha256": digest} for name, (path, digest) in parents.items()}
        cut = summary | {"file": f"{FOLDER}/{plan.FILE}"}
        provenance = {"recipe": "prune", "parents": lineage, "plan": cut, "settings": run.settings}
        with checkpoints.ModelWriter(config.out, surgery.final_config(pruned, config.model.path)) as writer:
            surgery.write(pruned, writer)
            files = writer.publish(config.model.path, provenance)
        files += [f"{FOLDER}/{file.name}" for file in sorted((config.out / FOLDER).glob("[!.]*"))]
        run.finish(files, parents={name: digest for name, (_, digest) in parents.items()}, summary=summary)


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
    rows = min(config.tokens // columns, len(split))
    if rows * columns < config.tokens:
        log.warning("calibration.tokens=%d, of which %d are used", config.tokens, rows * columns)
    batches = loader.Sequential(split, batch_rows=config.batch_rows, max_rows=rows)
    text = [{name: tensor[:, :columns] for name, tensor in batch.items()} for batch in batches]
    return list[stream.Batch](text), {"calibration": (config.path, data.content_hash)}


def how(config: CalibrationConfig, model: stream.Model) -> dict[str, Any]:
    """Arguments of a forward pass: its dtype and its device."""
    dtype = checkpoints.dtype_named(config.dtype) if config.dtype else model.dtype
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return {"dtype": dtype, "device": device}


def score(
    config: Prune, weights: checkpoints.Weights, text: list[stream.Batch], parents: Parents, run: runs.Run
) -> importance.Scores:
    """The scores of ``scores.path``, those that this run saved before it was interrupted, or new ones."""
    info: dict[str, Any] = {name: parents[name][1] for name in ("model", "calibration") if name in parents}
    if config.scores.path is not None:
        scores = importance.Scores.load(config.scores.path)
        if scores.info["model"] != info["model"]:
            raise ValueError(f"scores.path={config.scores.path} was measured on another model than {weights.path}")
        parents["scores"] = (config.scores.path, scores.content_hash)
        return scores
    folder = config.out / FOLDER
    if (folder / importance.FILE).is_file():
        scores = importance.Scores.load(folder)
        if {name: scores.info.get(name) for name in info} == info:
            return scores
    if (path := config.calibration.path) is not None:
        with Progress("calibrate", weights.shape.num_hidden_layers) as progress:

            def watch(layers: int) -> None:
                progress.update(layers)
                if run.stop.is_set():
                    raise runs.Stopped("stopped while scoring; start again and it is done anew")

            pad_id = tokens.borders(checkpoints.load_tokenizer(shards.PackedData.open(path).tokenizer_path)).pad_id
            passes = how(config.calibration, weights) | {"second_order": config.scores.second_order}
            log.info("scoring in %s on %s", passes["dtype"], passes["device"])
            passes["further"] = config.scores.further(weights.shape, config.target)
            scores = importance.measure(weights, text, watch=watch, pad_id=pad_id, info=info, **passes)
    else:
        scores = importance.from_weights(weights, info=info)
    scores.save(folder)
    runs.crash_point("after_scores")
    return scores


def losses(
    config: Prune, pruned: surgery.Pruned, text: list[stream.Batch], scores: importance.Scores
) -> dict[str, float]:
    """Mean loss on the calibration rows before and after, in nats, where there are rows and a whole head."""
    if not text or pruned.shape.output_rows is not None:
        return {}
    before, after = scores.info.get("loss"), stream.mean_loss(pruned, text, **how(config.calibration, pruned))
    if config.scores.path is not None:  # may have been measured on other text
        before = stream.mean_loss(pruned.model, text, **how(config.calibration, pruned))
    return {"loss_before": before, "loss_after": after} if before is not None and after is not None else {}


main = command("prune", Prune, run)

if __name__ == "__main__":
    exit_with(main)
