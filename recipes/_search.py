"""The slow half of a search: students written and distilled in processes of their own, and what is told in the end."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from _calibrate import CalibrationConfig, calibration
from _compose import composed, load
from _local import Job, LocalConfig, run_jobs
from llamita import checkpoints, checks, faults, runs, stops, storage
from llamita.prune import mend, predict, search, stream, surgery
from llamita.prune.compensation import CompensationConfig
from llamita.prune.search import BudgetConfig, Candidate
from llamita.prune.target import TargetConfig
from llamita.shapes import SIZES, LlamaShape

MENDED, STUDENTS, DISTILLED = "mended", "students", "distilled"
TARGET = "target/searched.yaml"
WHOLE = "whole.json"
"""The loss of the model itself; its own file, because every line of the other one is a candidate."""
WATCH_SECONDS = 1.0


@dataclass(kw_only=True)
class HeldOutConfig:
    """The rows of ``calibration.path`` on which candidates are compared."""

    split: str = "validation"
    tokens: int = 65536
    """How many to use, padding included; fewer when the split holds fewer."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"held_out.tokens must be at least 1, got {self.tokens}")


def held_out(config: HeldOutConfig, calibrated: CalibrationConfig, weights: checkpoints.Weights) -> list[stream.Batch]:
    """The rows that no score has seen."""
    rows: list[stream.Batch] = calibration(replace(calibrated, split=config.split, tokens=config.tokens), weights)[0]
    return rows


@dataclass(kw_only=True)
class DistillConfig:
    """The short distillation of the best candidates from the model that they were cut out of."""

    best: int = 3
    """How many candidates get it; 0: none, and the loss behind the cut decides."""
    steps: int = 200
    processes: int = 1
    """Of ``recipes/distill.py``, each with a GPU of its own where there are as many."""
    overrides: list[str] = field(default_factory=list)
    """Any of that recipe, such as ``optim.learning_rate=1e-3``; data are ``calibration.path`` unless named here."""

    def __post_init__(self) -> None:
        for name, least in (("best", 0), ("steps", 1), ("processes", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"distill.{name} must be at least {least}, got {value}")
        if taken := [o for o in self.overrides if o.startswith(("out=", "steps=", "student.", "teachers."))]:
            raise ValueError(f"distill.overrides must leave student, teachers, steps and out alone, got {taken[0]}")


@dataclass
class Record:
    """What was found out so far, on disk after every finding, so that none is made twice."""

    run: runs.Run
    whole: float
    candidates: list[Candidate]

    @classmethod
    def of(cls, run: runs.Run, whole: Callable[[], float], choose: Callable[[float], list[Candidate]]) -> Record:
        """The record of an earlier start, or a new one."""
        if not (run.path / WHOLE).is_file():
            storage.write_json(run.path / WHOLE, {"loss": whole()})
        loss = float(storage.read_mapping(run.path / WHOLE)["loss"])
        candidates = search.load(run.path)
        if not candidates:
            candidates = choose(loss)
            search.save(candidates, run.path)
            faults.crash_point("after_choice")
        return cls(run, loss, candidates)

    def note(self, candidate: Candidate, **found: float) -> None:
        """Add to what is known of a candidate."""
        place = next(index for index, other in enumerate(self.candidates) if other.shape == candidate.shape)
        fields: dict[str, Any] = {**found}
        self.candidates[place] = replace(self.candidates[place], **fields)
        search.save(self.candidates, self.run.path)
        named = {f"search/{name}": value for name, value in (candidate.costs | found).items()}
        # Findings are counted, so that a restart's rows stand behind those of the start before.
        known = sum((c.loss is not None) + (c.recovered is not None) for c in self.candidates)
        self.run.log({"candidate": candidate.name, **named}, step=known - 1)
        faults.crash_point("after_candidate")


def arguments(config: DistillConfig, student: Path, teacher: Path, data: Path, out: Path) -> list[str]:
    """Overrides of ``recipes/distill.py``."""
    told = [f"student.path={student}", f"teachers.teacher.path={teacher}", f"steps={config.steps}", f"out={out}"]
    return [f"data.path={data}", *config.overrides, *told]


def check(config: DistillConfig, model: Path, data: Path, out: Path) -> None:
    """Find, before anything is cut, what the distillation would refuse; the model stands for the students.

    Raises:
        ValueError: settings, data and model do not go together.
    """
    if config.best == 0:
        return
    settings, mistakes = composed("distill", arguments(config, model, model, data, out / DISTILLED / "any"))
    checks.refuse([f"distill.overrides: {mistake}" for mistake in mistakes])
    if config.processes == 1:  # that of several must be asked under their launcher
        load("distill").check(settings)


def check_stop(run: runs.Run) -> None:
    """Hold that the run may go on.

    Raises:
        Stopped: it was asked to stop.
    """
    if run.stop.is_set():
        raise runs.Stopped("stopped, what was measured is saved: run the same command again to go on")


@contextmanager
def mended(
    pruned: surgery.Pruned, rows: list[stream.Batch], config: CompensationConfig, run: runs.Run, **passes: Any
) -> Iterator[stream.Model]:
    """A candidate as the pruning recipe would publish it; the files that it lives in go when it is not needed any more.

    One that is interrupted keeps them, and goes on behind its last layer.
    """
    if not (pruned.plan.cuts and config.wanted):
        yield pruned
        return
    folder = run.path / MENDED / pruned.plan.content_hash[:12]
    yield mend.mend(pruned, rows, config, folder, watch=lambda _: check_stop(run), **passes)
    shutil.rmtree(folder)


def write(
    candidate: AbstractContextManager[stream.Model], out: Path, source: Path, provenance: Mapping[str, Any]
) -> None:
    """Publish a candidate as a model directory, layer by layer; one that is there stays."""
    if (out / "config.json").is_file():  # the last file that is published
        return
    with candidate as model, checkpoints.ModelWriter(out, model.config) as writer:
        surgery.write(model, writer)
        writer.publish(source, provenance)


def distil(config: DistillConfig, name: str, teacher: Path, data: Path, run: runs.Run) -> Path:
    """Distil the student of that name, or go on with it; the directory of the result.

    Raises:
        Stopped, ValueError, Crashed: as :func:`_local.run_jobs`.
    """
    out = run.path / DISTILLED / name
    told = arguments(config, run.path / STUDENTS / name, teacher, data, out)
    done = (out / "DONE.json").is_file()
    job = Job(f"distill-{name}", "distill", told, out, [], config.processes, done)
    with _stop_file_as_signal(run.stop):
        run_jobs([job], run.path / "logs", LocalConfig(), lambda _: None)
    return out


@contextmanager
def _stop_file_as_signal(stop: stops.StopSignal) -> Iterator[None]:
    """Turn a stop that is asked for by a file into the signal that a launcher of processes listens to."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            if stop.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def write_target(shape: LlamaShape, target: TargetConfig, source: Path, out: Path) -> None:
    """The winner as a target: ``recipes/prune.py --config-dir=<out> target=searched``."""
    fields = {name: getattr(shape, name) for name in SIZES} | {"tie_word_embeddings": shape.tie_word_embeddings}
    fields |= {"rope": target.rope.value, "pairs": target.pairs.value}
    fields |= {} if target.tie is None else {"tie": target.tie.value}
    head = f"# found by a search in {source.name}: {shape.num_parameters:,} parameters\n"
    (out / TARGET).parent.mkdir(exist_ok=True)
    storage.write_atomically(out / TARGET, head + yaml.safe_dump(fields, sort_keys=False))


def show(whole: float, candidates: Sequence[Candidate], budget: BudgetConfig) -> None:
    """Print every candidate, the best first."""
    table = Table(title=f"loss of the whole model {whole:.4f} nats per token", title_justify="left")
    titles = {"latency_ms": "ms", "kv_bytes_per_token": "KV bytes/token"}
    limits = [name for name in ("parameters", *search.LIMITS[1:]) if name == "parameters" or name in budget.limits]
    for column in ("shape", *(titles.get(name, name) for name in limits), "predicted", "cut", "distilled"):
        table.add_column(column, justify="left" if column == "shape" else "right", no_wrap=True)
    for row, candidate in enumerate(candidates):
        numbers = [candidate.predicted, candidate.loss, candidate.recovered]
        table.add_row(
            candidate.name,
            *(f"{candidate.costs[name]:,.{1 if name == 'latency_ms' else 0}f}" for name in limits),
            *("–" if number is None else f"{number:.4f}" for number in numbers),
            style="bold" if row == 0 else "",
        )
    Console(width=160).print(table)


def smallest(source: LlamaShape, found: Sequence[LlamaShape]) -> list[LlamaShape]:
    """For each size that any of the shapes cuts the first that has least of it: scores that serve these serve all."""
    least = [(name, min(found, key=lambda shape: getattr(shape, name))) for name in SIZES]
    return list(dict.fromkeys(shape for name, shape in least if getattr(shape, name) < getattr(source, name)))


def served(
    source: LlamaShape, axes: search.AxesConfig, target: TargetConfig, found: Sequence[LlamaShape]
) -> list[LlamaShape]:
    """Of all shapes that are cut, to be compared or to predict, those that need most of the scores."""
    alone = predict.alone(source, search.sizes(source, axes, target), target)
    return smallest(source, [*found, *alone.values()])
