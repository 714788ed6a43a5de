"""Run a teacher once over packed rows and store its distributions; any number of students then learn from them.

python recipes/cache.py teacher.path=Llama-3.1-8B data.path=data samples_per_token=50 out=cache
torchrun --nproc-per-node 8 recipes/cache.py … worker=3 workers=16        (an array of 16 jobs of 8 GPUs)
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import dataclasses
import logging
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from omegaconf import MISSING

from _recording import Inputs, costs, teacher_of
from llamita import evaluate, preflight, runs, storage
from llamita.distill import cache, capture, teachers
from llamita.distill.cache import Identity
from llamita.distill.state import agree_sum
from llamita.precision import Precision

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TeacherConfig(teachers.PlacementConfig):
    """The model that is run."""

    path: Path = MISSING
    precision: Precision = Precision.auto
    attention: teachers.Attention = teachers.Attention.sdpa


@dataclass(kw_only=True)
class DataConfig:
    """A directory that ``prepare`` wrote."""

    path: Path = MISSING
    splits: list[str] = field(default_factory=lambda: ["train", "validation"])
    """What is cached; a student that validates needs ``validation`` too. One that has no rows is passed over."""


@dataclass(kw_only=True)
class Cache(capture.CaptureConfig):
    """Everything that this recipe can be told."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        super().__post_init__()
        self.teacher.check("teacher")
        if not self.data.splits or len(set(self.data.splits)) != len(self.data.splits):
            raise ValueError(f"data.splits must name each split once, got {self.data.splits}")


store("cache_schema", Cache)


def run(config: Cache) -> None:
    """Capture the shards of this process; whoever finds all of them there finishes the cache."""
    if not (config.out / "DONE.json").is_file():  # what is wrong with the input is said before anything is written
        Inputs(config)
    state = evaluate.join_launch()
    inputs, main = Inputs(config), state.is_main_process
    floor = config.run.min_allreduce_gb_per_s
    preflight.check(config.out, state.device, storage.plain(config), min_allreduce_gb_per_s=floor)
    # Before anything is owned: of a large teacher this takes minutes.
    identity = inputs.identity(config, state.device) if main and not (config.out / "DONE.json").is_file() else None
    with owned(config) as whole:
        if agreed(state, whole.done):
            if config.verify:
                verify(config, inputs, state, whole)
            return
        if main:
            capture.claim(config.out, identity or inputs.identity(config, state.device))
        state.wait_for_everyone()
        if config.workers == 1:
            work(config, inputs, state, whole)
            finish(config, inputs, state, whole)
            return
    folder = config.out / "workers" / f"{config.worker:05d}-of-{config.workers:05d}"
    if main and capture.missing(config.out, share(config, inputs)):
        (folder / "DONE.json").unlink(missing_ok=True)  # it was done once, and a damaged shard has been removed since
    state.wait_for_everyone()
    with runs.start(folder, "cache", storage.plain(config), config.run, may_change=capture.MAY_CHANGE) as mine:
        if not agreed(state, mine.done):
            work(config, inputs, state, mine)
            mine.finish([])
    with owned(config) as whole:
        left = len(capture.missing(config.out, inputs.shards)) if main else 0
        if agreed(state, left > 0):
            log.info("%d of %d shards are still missing, which other workers capture", left, len(inputs.shards))
        elif not agreed(state, whole.done):
            finish(config, inputs, state, whole)


def agreed(state: PartialState, here: bool) -> bool:
    """What the main process says: others may have looked a moment before or after it."""
    return agree_sum(state, here and state.is_main_process) > 0


def owned(config: Cache) -> AbstractContextManager[runs.Run]:
    """Own ``out``; workers share it, and each waits while another one looks at it."""
    shared = config.workers > 1
    # A dashboard gets a run for each worker, not for each look at what they share.
    quiet = dataclasses.replace(config.run, wandb=runs.WandbMode.off) if shared else config.run
    begin = runs.start_when_free if shared else runs.start
    return begin(config.out, "cache", storage.plain(config), quiet, may_change=capture.MAY_CHANGE)


def share(config: Cache, inputs: Inputs) -> list[capture.Shard]:
    """The shards of this worker; its processes take them in turns."""
    return inputs.shards[config.worker :: config.workers]


def work(config: Cache, inputs: Inputs, state: PartialState, run: runs.Run) -> None:
    """Capture what is missing of this process's share, and wait for the others of this worker."""
    all_mine = share(config, inputs)
    here = all_mine[state.process_index :: state.num_processes]
    mine = capture.missing(config.out, here)
    done = len(here) - len(mine)
    if agree_sum(state, bool(mine)) if config.teacher.is_common else mine:
        with teacher_of(config, Identity.read(config.out / cache.IDENTITY), state) as worker:
            if found := costs(worker, config, inputs, state, run):
                run.log(found, step=done + 1)
            capture.capture_all(worker, mine, inputs.splits, run, config.out, batch_rows=config.batch_rows, done=done)
    capture.wait(all_mine, run, config.out)
    state.wait_for_everyone()


def finish(config: Cache, inputs: Inputs, state: PartialState, run: runs.Run) -> None:
    """Index the shards, compare some again, and publish; every rank calls this."""
    identity, files, summary = Identity.read(config.out / cache.IDENTITY), [], {}
    if state.is_main_process:
        files = capture.finish(config.out, identity, inputs.shards)
        summary = cache.Cache(config.out).summary()
    if config.verify:
        summary["distance"] = verify(config, inputs, state, run)
    if state.is_main_process:
        log.info("%s: %s", config.out, summary)
        run.log({f"cache/{name}": value for name, value in summary.items()}, step=len(inputs.shards) + 1)
        run.finish(files, parents={"teacher": identity.teacher, "data": identity.data}, summary=summary)


def verify(config: Cache, inputs: Inputs, state: PartialState, run: runs.Run) -> float:
    """How far the stored targets are from those that the teacher gives now; every rank calls this, the main one asks.

    Raises:
        ValueError: further than is allowed, or teacher or data are not those of the cache.
    """
    if state.is_main_process:
        made = cache.Cache(config.out)
        cache.check_same(f"out={config.out}", made.identity, inputs.identity(config, state.device))
        made.check_content()
        with teacher_of(config, made.identity, state) as worker:
            batches = {"batches": config.verify, "batch_rows": config.batch_rows}
            return capture.verify(made, worker, inputs.splits, **batches, allowed=config.max_distance)
    if config.teacher.placement is teachers.Placement.zero3:
        with teacher_of(config, Identity.read(config.out / cache.IDENTITY), state):
            pass
    # The launchers of other nodes would end the main process's soon after their own are done.
    while (config.out / ".lock").exists() and not run.stop.is_set():
        time.sleep(capture.WAIT_SECONDS)
    return 0.0


main = command("cache", Cache, run)

if __name__ == "__main__":
    exit_with(main)
