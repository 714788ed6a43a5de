"""Cut a Llama down to the sizes of a smaller one.

python recipes/prune.py model.path=llama-3.1-8b target=llama3.2_1b calibration.path=data out=pruned
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip
import hashlib
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from _calibrate import (
    FOLDER,
    CalibrationConfig,
    ModelConfig,
    Parents,
    calibration,
    how,
    pad_id,
    processes,
    score,
    watched,
)
from llamita import checkpoints, checks, runs, storage
from llamita.prune import mend, plan, stream, surgery
from llamita.prune.compensation import CompensationConfig
from llamita.prune.ranking import ScoreConfig, check_wanted
from llamita.prune.target import TargetConfig, check_kind, target_shape

log = logging.getLogger(__name__)

MENDED = "mended"


@dataclass(kw_only=True)
class Prune:
    """Everything that this recipe can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    compensation: CompensationConfig = field(default_factory=CompensationConfig)
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING


store("prune_schema", Prune)


def run(config: Prune) -> None:
    """Score the units of the model, choose those that stay, write the smaller model."""
    if not (config.out / "DONE.json").is_file():  # what cannot work is said before anything is written
        checks.refuse(checks.device_here("calibration.device", config.calibration.device))
        model = checkpoints.Weights(config.model.path)
        check_kind(model.config)
        shape, rope = target_shape(model.shape, config.target), checkpoints.rope_type(model.config)
        text = config.scores.have_text(calibrated=config.calibration.path is not None)
        check_wanted(model.shape, shape, config.target, config.scores, has_text=text, rope_type=rope)
    with processes(), runs.start(config.out, "prune", storage.plain(config), config.run) as run:
        if not run.done:
            cut(config, run)
        elif runs.is_main_process():
            tidy(config.out)


def cut(config: Prune, run: runs.Run) -> None:
    """Scores, plan, what mends it, and the files; every process counts its own rows, the first one writes."""
    weights = checkpoints.Weights(config.model.path)
    rows, parents = calibration(config.calibration, weights)
    if runs.is_main_process():
        parents["model"] = (config.model.path, checkpoints.content_hash(config.model.path))
    scores = score(config.scores, config.target, config.calibration, weights, rows, parents, run)
    kept = plan.make(scores, weights.shape, config.target, config.scores).shared()
    if kept.tie is None and config.target.tie is not None:
        log.warning("target.tie=%s has no effect: model.path has one matrix already, and keeps it", config.target.tie)
    for layer, row in enumerate(scores.layer_means()):
        run.log({f"prune/{name}": value for name, value in row.items()}, step=layer)
    pruned, folder = surgery.Pruned(weights, kept), config.out / FOLDER
    if runs.is_main_process():
        print(kept, flush=True)
        kept.save(folder)
    stages: dict[str, stream.Model] = {"before": weights, "cut": pruned}
    if not kept.cuts:
        log.info("nothing is cut, so nothing is mended")
    elif config.calibration.path is not None and config.compensation.wanted:
        stages["mended"] = mended(config, pruned, rows, parents, run)
    elif config.compensation.wanted:
        log.warning("without calibration.path nothing that the cut broke can be mended")
    summary = kept.summary() | losses(config, stages, rows)
    if runs.is_main_process():
        publish(config, list(stages.values())[-1], pruned, summary, parents, run)


def mended(
    config: Prune, pruned: surgery.Pruned, rows: list[stream.Batch], parents: Parents, run: runs.Run
) -> mend.Mended:
    """The model mended on the calibration rows, finished layers of an interrupted run not anew."""
    layers, passes = pruned.shape.num_hidden_layers, how(config.calibration, pruned)
    made_of = pruned.plan.content_hash + str(parents["calibration"][1])
    folder = config.out / FOLDER / f"{MENDED}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    with watched("mend", layers, run) as watch:
        passes |= {"pad_id": pad_id(config.calibration), "seed": config.run.seed, "watch": watch}
        result = mend.mend(pruned, rows, config.compensation, folder, **passes)
    for layer, row in enumerate(mend.records(folder, layers)):
        run.log({f"prune/{name}": value for name, value in row.items()}, step=layer)
    return result


def losses(config: Prune, stages: dict[str, stream.Model], rows: list[stream.Batch]) -> dict[str, float]:
    """Mean loss on the calibration rows of the whole, the cut and the mended model, where there is a whole head."""
    if not rows or config.target.output_rows is not None:
        return {}
    found = {
        f"loss_{name}": stream.mean_loss(model, rows, **how(config.calibration, model))
        for name, model in stages.items()
    }
    found["loss_after"] = list(found.values())[-1]
    return {name: loss for name, loss in found.items() if loss is not None}


def publish(
    config: Prune,
    result: stream.Model,
    pruned: surgery.Pruned,
    summary: dict[str, Any],
    parents: Parents,
    run: runs.Run,
) -> None:
    """Write the model's directory, and say that it is done."""
    numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
    run.log({f"prune/{name}": value for name, value in (numbers | {"params": numbers["parameters_after"]}).items()})
    lineage = {name: {"path": path, "sha256": digest} for name, (path, digest) in parents.items()}
    made_by = summary | {"file": f"{FOLDER}/{plan.FILE}"}
    provenance = {"recipe": "prune", "parents": lineage, "plan": made_by, "settings": run.settings}
    with checkpoints.ModelWriter(config.out, surgery.final_config(pruned, config.model.path)) as writer:
        surgery.write(result, writer)
        files = writer.publish(config.model.path, provenance)
    files += [f"{FOLDER}/{file.name}" for file in sorted((config.out / FOLDER).glob("[!.]*")) if file.is_file()]
    run.finish(files, parents={name: digest for name, (_, digest) in parents.items()}, summary=summary)
    tidy(config.out)


def tidy(out: Path) -> None:
    """Remove the mended layers, which a finished run needs no more; until then a kill would cost all of them."""
    for folder in (out / FOLDER).glob(f"{MENDED}-*"):
        shutil.rmtree(folder, ignore_errors=True)


main = command("prune", Prune, run)

if __name__ == "__main__":
    exit_with(main)
