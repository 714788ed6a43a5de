"""Run the stages of a pipeline, each in its own process and directory; go on where an earlier run ended.

python recipes/pipeline.py pipeline=demo
python recipes/pipeline.py pipeline=llama3.2_1b launcher=slurm out=/scratch/llama3.2_1b
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import hashlib
import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

import _local
from _local import Job, LocalConfig, run_jobs
from _slurm import Launcher, LauncherConfig, queued, submit
from llamita import runs


@dataclass(kw_only=True)
class Stage:
    """One recipe with its overrides; its ``out`` is the folder of the stage's name in the pipeline's ``out``."""

    recipe: str = MISSING
    overrides: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    """Stages whose directories this one reads."""
    processes: int = 1
    """Processes on this machine, each with a GPU of its own where there are as many; Slurm decides by itself."""
    show: bool = False
    """Print what the stage printed when everything is done."""


@dataclass(kw_only=True)
class Pipeline:
    """The stages and who runs them."""

    stages: dict[str, Stage] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    """Paths that the overrides name as ``${inputs.NAME}``; an empty one must be set."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a stage that could never run."""
        if missing := sorted(name for name, path in self.inputs.items() if not path):
            raise ValueError(
                f"inputs.{missing[0]}= is not set: this pipeline needs inputs.{', inputs.'.join(self.inputs)}"
            )
        if not self.stages:
            raise ValueError("there are no stages: choose a pipeline of configs/pipeline, as in pipeline=demo")
        for name, stage in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
                raise ValueError(f"stages: a name has 1 to 64 letters, digits, '.', '_' or '-', got {name!r}")
            if not (_local.RECIPES / f"{stage.recipe}.py").is_file():
                raise ValueError(f"stages.{name}.recipe: there is no recipes/{stage.recipe}.py")
            if unknown := set(stage.after) - set(self.stages):
                raise ValueError(f"stages.{name}.after names {sorted(unknown)}, which are no stages")
            if stage.processes < 1:
                raise ValueError(f"stages.{name}.processes must be at least 1, got {stage.processes}")
        in_order(self.stages)


store("pipeline_schema", Pipeline)


def in_order(stages: dict[str, Stage]) -> list[str]:
    """Names so that every stage comes after those it reads; ``ValueError`` where they wait for each other."""
    order: list[str] = []
    while len(order) < len(stages):
        ready = [name for name in stages if name not in order and set(stages[name].after) <= set(order)]
        if not ready:
            raise ValueError(f"stages {sorted(set(stages) - set(order))} wait for each other")
        order.append(ready[0])
    return order


def fingerprint(stage: Stage, parents: list[str]) -> str:
    """What a finished stage depends on: its recipe, its overrides, and what its parents depend on."""
    text = json.dumps([stage.recipe, stage.overrides, parents])
    return hashlib.sha256(text.encode()).hexdigest()


def run(config: Pipeline) -> None:
    """Run what is not finished, in order; stop at the first failure.

    Raises:
        ValueError: the directory is not a pipeline's, another launcher is at work in it, or a finished stage is of
            other settings.
    """
    record_file = config.out / "pipeline.json"
    with runs.owned(config.out, marker=record_file.name):
        record: dict[str, str] = runs.read_mapping(record_file) if record_file.is_file() else {}
        prints, jobs = planned(config, record)
        if not config.launcher.dry_run:
            runs.write_json(record_file, record)

        def note(name: str) -> None:
            record[name] = prints[name]
            runs.write_json(record_file, record)

        match config.launcher.kind:
            case Launcher.local:
                run_jobs(jobs, config.out / "logs", config.local, note)
                show(config)
            case Launcher.slurm:
                changed = {name for name in record if record[name] != prints.get(name)}
                submit_jobs(jobs, config.launcher, note, changed)


def planned(config: Pipeline, record: dict[str, str]) -> tuple[dict[str, str], list[Job]]:
    """What each stage depends on, and its job, in order; ``record`` tells what finished ones were made from."""
    prints: dict[str, str] = {}
    jobs: list[Job] = []
    stale: list[Path] = []
    for name in in_order(config.stages):
        stage = config.stages[name]
        prints[name] = fingerprint(stage, [prints[parent] for parent in stage.after])
        out = config.out.absolute() / name if config.launcher.kind is Launcher.slurm else config.out / name
        finished, parents = (out / "DONE.json").is_file(), {job.name for job in jobs if job.done}
        done = finished and record.get(name) == prints[name] and parents >= set(stage.after)
        if finished and name in record and not done:
            stale.append(out)
        jobs.append(Job(name, stage.recipe, [*stage.overrides, f"out={out}"], out, stage.after, stage.processes, done))
    if stale:
        raise ValueError(
            f"these stages are finished, but with other settings or from inputs that are not there any more: remove "
            f"{', '.join(map(str, stale))}, or choose another out"
        )
    return prints, jobs


def show(config: Pipeline) -> None:
    """Print what the stages for people printed."""
    for name, stage in config.stages.items():
        log = config.out / "logs" / f"{name}.log"
        if stage.show and log.is_file():
            print(log.read_text(encoding="utf-8", errors="replace"), end="")


def submit_jobs(
    jobs: list[Job], launcher: LauncherConfig, submitted: Callable[[str], None], changed: Collection[str] = ()
) -> None:
    """Hand every job that is not done to Slurm, each after those it reads.

    Raises:
        ValueError: the queue still holds one of the stages ``changed``, with its earlier settings.
    """
    for job in jobs:
        if job.name in changed and not launcher.dry_run and (number := queued(job.name, job.out)):
            raise ValueError(f"stage {job.name} waits in the queue with other settings: scancel {number} first")
    numbers: dict[str, str] = {}
    for job in jobs:
        if job.done:
            print(f"  {job.name:<20} finished earlier", flush=True)
            continue
        numbers[job.name] = submit(
            job.recipe,
            job.arguments,
            name=job.name,
            out=job.out,
            after=[numbers[parent] for parent in job.after if parent in numbers],
            nodes=launcher.nodes,
            gpus_per_node=launcher.gpus_per_node,
            time=launcher.time,
            options=launcher.options,
            dry_run=launcher.dry_run,
        )
        if not launcher.dry_run:
            submitted(job.name)
            print(f"  {job.name:<20} job {numbers[job.name]}", flush=True)


main = command("pipeline", Pipeline, run)

if __name__ == "__main__":
    exit_with(main)
