"""Find the best shape of a pruned Llama under a budget: cut many, measure each, distil the best few for a short while.

python recipes/search.py model.path=llama-3.1-8b calibration.path=data budget.parameters=1.5e9 out=search
python recipes/prune.py --config-dir=search target=searched model.path=llama-3.1-8b calibration.path=data out=pruned
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import dataclasses
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import _search
from _calibrate import CalibrationConfig, ModelConfig, calibration, how, pad_id, process, score
from llamita import checkpoints, checks, runs, storage
from llamita.progress import Progress
from llamita.prune import latency, plan, predict, search, stream, surgery
from llamita.prune.compensation import CompensationConfig
from llamita.prune.ranking import ScoreConfig, check_wanted
from llamita.prune.target import TargetConfig, check_kind, target_shape
from llamita.shapes import LlamaShape

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Search:
    """Everything that this recipe can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    budget: search.BudgetConfig = field(default_factory=search.BudgetConfig)
    axes: search.AxesConfig = field(default_factory=search.AxesConfig)
    candidates: int = 16
    """How many shapes are cut and measured: those of least predicted loss, where there are more."""
    target: TargetConfig = field(default_factory=TargetConfig)
    """What all candidates share; a size that is set here is the only one of its axis."""
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    compensation: CompensationConfig = field(default_factory=CompensationConfig)
    """How every candidate is mended before it is measured; configs/search.yaml leaves the steps out."""
    held_out: _search.HeldOutConfig = field(default_factory=_search.HeldOutConfig)
    latency: latency.LatencyConfig = field(default_factory=latency.LatencyConfig)
    distill: _search.DistillConfig = field(default_factory=_search.DistillConfig)
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        self.budget.check_given()
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1, got {self.candidates}")
        if self.calibration.path is None:
            raise ValueError("calibration.path must be given: candidates are compared on its held-out rows")
        for name in ("keep_layers", "output_rows"):
            if getattr(self.target, name) is not None:
                raise ValueError(f"target.{name} cannot be searched with: it fixes what the search compares; unset it")


store("search_schema", Search)


class Laboratory:
    """The model, its scores and the held-out rows: everything that a candidate is made of and measured on."""

    def __init__(self, config: Search, weights: checkpoints.Weights, found: list[LlamaShape], run: runs.Run) -> None:
        self.config, self.weights, self.run = config, weights, run
        self.how: dict[str, Any] = how(config.calibration, weights)
        self.rows, parents = calibration(config.calibration, weights)
        parents["model"] = (config.model.path, checkpoints.content_hash(config.model.path))
        needs = _search.served(weights.shape, config.axes, config.target, found)
        self.scores = score(config.scores, config.target, config.calibration, weights, self.rows, parents, run, needs)
        self.lineage = {name: {"path": path, "sha256": digest} for name, (path, digest) in parents.items()}
        self.held_out = _search.held_out(config.held_out, config.calibration, weights)

    def loss(self, model: stream.Model) -> float:
        """Mean loss on the held-out rows, in nats per token."""
        _search.check_stop(self.run)
        loss = stream.mean_loss(model, self.held_out, **self.how)
        if loss is None:
            raise ValueError(f"held_out.split={self.config.held_out.split} holds no token that is to be predicted")
        return loss

    def candidate(self, shape: LlamaShape) -> AbstractContextManager[stream.Model]:
        """The model of that shape, mended."""
        config = self.config
        target = search.sized(config.target, search.sizes_of(shape))
        pruned = surgery.Pruned(self.weights, plan.make(self.scores, self.weights.shape, target, config.scores))
        passes = self.how | {"pad_id": pad_id(config.calibration), "seed": config.run.seed}
        return _search.mended(pruned, self.rows, config.compensation, self.run, **passes)

    def loss_of(self, shape: LlamaShape) -> float:
        """Mean loss of the candidate of that shape."""
        with self.candidate(shape) as model:
            return self.loss(model)


def fitting(config: Search, weights: checkpoints.Weights) -> list[LlamaShape]:
    """The shapes of the grid within the budget, latency apart; finds every mistake before anything is written."""
    checks.refuse(checks.device_here("calibration.device", config.calibration.device))
    check_kind(weights.config)
    source, rope = weights.shape, checkpoints.rope_type(weights.config)
    found = search.within(source, search.shapes(source, config.axes, config.target), config.budget)
    text = config.scores.have_text(calibrated=True)
    for shape in _search.served(source, config.axes, config.target, found):
        check_wanted(source, shape, config.target, config.scores, has_text=text, rope_type=rope)
    calibration(config.calibration, weights)
    if not _search.held_out(config.held_out, config.calibration, weights):
        raise ValueError(f"held_out.split={config.held_out.split} of calibration.path has no rows")
    assert config.calibration.path is not None
    _search.check(config.distill, config.model.path, config.calibration.path, config.out)
    return found


def chosen(lab: Laboratory, found: list[LlamaShape], whole: float) -> list[search.Candidate]:
    """The candidates: not dominated, close to the budget, and of too many those of least predicted loss."""
    config = lab.config
    removed = predict.Removed(lab.scores, lab.weights.shape, config.scores)
    prediction = None
    if len(found) > config.candidates:
        prediction = predicted(lab, removed, whole)
    watch = latency.Stopwatch(lab.weights.config, config.latency, **lab.how)

    def costs(shape: LlamaShape) -> dict[str, float]:
        if config.budget.latency_ms is None:
            return config.budget.costs(shape)
        if lab.run.stop.is_set():
            raise runs.Stopped("stopped while shapes were timed; start again and that is done anew")
        milliseconds = watch.milliseconds(shape)
        log.info("%s takes %.2f ms", search.name_of(shape), milliseconds)
        return {**config.budget.costs(shape), "latency_ms": milliseconds}

    lost = {shape: removed.shares(shape) for shape in found}
    order = {shape: prediction.loss(shares) if prediction else sum(shares.values()) for shape, shares in lost.items()}
    kept = search.pick(order, config.budget, costs, config.candidates)
    return kept if prediction else [dataclasses.replace(candidate, predicted=None) for candidate in kept]


def predicted(lab: Laboratory, removed: predict.Removed, whole: float) -> predict.Prediction:
    """What a removed share costs along each axis: one cut for each."""
    config, source = lab.config, lab.weights.shape
    base = target_shape(source, search.sized(config.target, {}))
    floor = whole if base == source else lab.loss_of(base)
    grid = search.sizes(source, config.axes, config.target)
    increases = {
        axis: (lab.loss_of(shape) - floor, removed.shares(shape)[axis])
        for axis, shape in predict.alone(source, grid, config.target).items()
    }
    log.info("nats and removed share of one cut along each axis: %s", increases)
    return predict.Prediction.fitted(floor, increases)


def run(config: Search) -> None:
    """Choose candidates, cut and measure each, distil the best, and write what won as a target."""
    if process()[1] > 1:
        raise ValueError("recipes/search.py is one process; distill.processes says how many train a student")
    out, found = config.out, list[LlamaShape]()
    if not (out / "DONE.json").is_file():  # what cannot work is said before anything is written
        found = fitting(config, checkpoints.Weights(config.model.path))
    with runs.start(out, "search", storage.plain(config), config.run) as this:
        if this.done:
            return
        lab = Laboratory(config, checkpoints.Weights(config.model.path), found, this)
        record = _search.Record.of(this, lambda: lab.loss(lab.weights), lambda whole: chosen(lab, found, whole))
        with Progress("cut and measure", len(record.candidates)) as progress:
            for candidate in progress.count(record.candidates):
                if candidate.loss is None:
                    record.note(candidate, loss=lab.loss_of(candidate.shape))
        for candidate in search.ranked(record.candidates)[: config.distill.best]:
            if candidate.recovered is None:
                record.note(candidate, recovered=recovered(lab, candidate))
        best = search.ranked(record.candidates)
        _search.show(record.whole, best, config.budget)
        _search.write_target(best[0].shape, config.target, config.model.path, out)
        parents = {name: str(parent["sha256"]) for name, parent in lab.lineage.items()}
        this.finish([search.FILE, _search.WHOLE, _search.TARGET], parents=parents, summary=best[0].row())


def recovered(lab: Laboratory, candidate: search.Candidate) -> float:
    """The loss of a candidate behind the short distillation from the whole model."""
    config, this = lab.config, lab.run
    assert config.calibration.path is not None
    provenance = {"recipe": "search", "parents": lab.lineage, "settings": this.settings}
    student = this.path / _search.STUDENTS / candidate.name
    _search.write(lab.candidate(candidate.shape), student, config.model.path, provenance)
    result = _search.distil(config.distill, candidate.name, config.model.path, config.calibration.path, this)
    return lab.loss(checkpoints.Weights(result))


main = command("search", Search, run)

if __name__ == "__main__":
    exit_with(main)
