"""Run the stages of a pipeline, each in its own process and directory; go on where an earlier run ended.

python recipes/pipeline.py pipeline=demo
python recipes/pipeline.py pipeline=llama3.2_1b launcher=slurm out=/scratch/llama3.2_1b
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import contextlib
from collections.abc import Callable, Mapping

import yaml

import _local  # noqa: F401  (tests give it recipes of their own)
from _local import Job, run_jobs
from _slurm import BatchStage, Launcher, Snapshot, queued, submit
from _stages import Pipeline, Stage, in_order, planned  # noqa: F401  (plan.py puts the stages in order too)
from llamita import directories, storage

RECORD = "pipeline.json"
SETTINGS = "pipeline.yaml"


store("pipeline_schema", Pipeline)


def run(config: Pipeline) -> None:
    """Run what is not finished, in order; stop at the first failure.

    Raises:
        ValueError: the directory is not a pipeline's, another launcher is at work in it, or a finished stage is of
            other settings.
    """
    record_file = config.out / RECORD
    if config.launcher.kind == Launcher.slurm and config.launcher.dry_run:
        record = storage.read_mapping(record_file) if record_file.is_file() else {}
        submit_stages(config, planned(config, record)[1])
        with contextlib.suppress(OSError):
            config.out.rmdir()  # Hydra made it
        return
    with directories.owned(config.out, marker=RECORD):
        record = storage.read_mapping(record_file) if record_file.is_file() else {}
        prints, by_stage = planned(config, record)
        if config.launcher.kind == Launcher.slurm:
            refuse_changed(by_stage, prints, record)
        storage.write_json(record_file, record)
        storage.write_atomically(config.out / SETTINGS, yaml.safe_dump(storage.plain(config), sort_keys=False))

        def note(name: str) -> None:
            record[name] = prints[name]
            storage.write_json(record_file, record)

        match config.launcher.kind:
            case Launcher.local:
                run_jobs([job for jobs in by_stage.values() for job in jobs], config.out / "logs", config.local, note)
                show(config)
            case Launcher.slurm:
                submit_stages(config, by_stage, note)


def show(config: Pipeline) -> None:
    """Print what the stages for people printed."""
    for name, stage in config.stages.items():
        for point in stage.points() if stage.show else ():
            log = config.out / "logs" / f"{name}.{point}".strip(".")
            if (file := log.with_name(f"{log.name}.log")).is_file():
                print(file.read_text(encoding="utf-8", errors="replace"), end="")


def refuse_changed(by_stage: Mapping[str, list[Job]], prints: Mapping[str, str], record: Mapping[str, str]) -> None:
    """Raise ``ValueError`` where the queue still holds a stage with other settings than these."""
    for name, jobs in by_stage.items():
        changed = [job for job in jobs if not job.done and record.get(job.name) != prints[job.name]]
        if changed and (number := queued(name, jobs[0].out.parent if jobs[0].spares_others else jobs[0].out)):
            raise ValueError(f"stage {name} waits in the queue with other settings: scancel {number} first")


def submit_stages(
    config: Pipeline, by_stage: Mapping[str, list[Job]], note: Callable[[str], None] = lambda name: None
) -> None:
    """Hand every stage that is not done to Slurm, each after those it reads.

    What a run is made from is noted before it is submitted: a launcher that dies in between submits nothing twice.
    """
    snapshot = Snapshot(config.out.absolute())
    if config.launcher.dry_run:
        snapshot.check()
    else:
        snapshot.write()
    numbers: dict[str, str] = {}
    for name, jobs in by_stage.items():
        if all(job.done for job in jobs):
            print(f"  {name:<20} finished earlier", flush=True)
            continue
        stage = config.stages[name]
        batch = BatchStage(
            name=name,
            recipe=stage.recipe,
            overrides=stage.overrides,
            out=config.out.absolute() / name,
            processes=stage.processes,
            workers=stage.workers,
            points=stage.points() if stage.sweep else {},
            left=[index for index, job in enumerate(jobs) if not job.done],
        )
        for job in jobs:
            if not job.done:
                note(job.name)
        after = [numbers[parent] for parent in stage.after if parent in numbers]
        numbers[name] = submit(batch, config.launcher, snapshot, after=after)
        if not config.launcher.dry_run:
            print(f"  {name:<20} job {numbers[name]}", flush=True)


main = command("pipeline", Pipeline, run)

if __name__ == "__main__":
    exit_with(main)
