"""Run a teacher once over packed rows and store its distributions; any number of students then learn from them.

python recipes/cache.py teacher.path=Llama-3.1-8B data.path=data samples_per_token=50 out=cache
torchrun --nproc-per-node 8 recipes/cache.py … worker=3 workers=16        (an array of 16 jobs of 8 GPUs)
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import dataclasses
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from omegaconf import MISSING

from llamita import checkpoints, evaluate, runs
from llamita.data.shards import PackedData
from llamita.distill import cache, cache_format, capture, launch, teachers
from llamita.distill.cache import Identity

log = logging.getLogger(__name__)

WAIT_SECONDS = 600.0
"""How long a worker waits for another one that looks at the same directory."""


@dataclass(kw_only=True)
class TeacherConfig:
    """The model that is run."""

    path: Path = MISSING
    precision: launch.Precision = launch.Precision.auto
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
        if not self.data.splits or len(set(self.data.splits)) != len(self.data.splits):
            raise ValueError(f"data.splits must name each split once, got {self.data.splits}")


store("cache_schema", Cache)


class Inputs:
    """What the recipe reads, opened and checked; no weight is read.

    Raises:
        ValueError: teacher and data do not go together, or three bytes cannot hold an entry.
    """

    def __init__(self, config: Cache) -> None:
        self.data = PackedData.open(config.data.path)
        available = self.data.manifest["splits"]
        if unknown := [name for name in config.data.splits if name not in available]:
            raise ValueError(f"data.splits must be among {', '.join(available)}, got {unknown[0]}")
        filled = [name for name in config.data.splits if available[name]["rows"]]
        if not filled:
            raise ValueError(f"data.path={config.data.path} has no rows in {', '.join(config.data.splits)}")
        self.splits = {name: self.data.split(name) for name in filled}
        teachers.check_model("teacher.path", config.teacher.path, self.data.sequence_length)
        self.vocabulary = teachers.Vocabulary.of_model(config.teacher.path, "teacher.path")
        owner = f"data.path={config.data.path}"
        teachers.check_vocabularies(
            teachers.Vocabulary(self.data.vocab_size, self.data.tokenizer_hash, owner), [self.vocabulary]
        )
        cache_format.check_fits(self.data.vocab_size, config.samples_per_token)
        self.rows_per_shard = max(1, config.shard_tokens // self.data.sequence_length)
        self.shards = capture.shards({name: len(split) for name, split in self.splits.items()}, self.rows_per_shard)

    def identity(self, config: Cache, device: torch.device) -> Identity:
        """What the cache is made from, and how."""
        return Identity(
            teacher=checkpoints.content_hash(config.teacher.path),
            tokenizer=self.vocabulary.tokenizer_hash,
            data=self.data.content_hash,
            vocab_size=self.data.vocab_size,
            dtype=str(config.teacher.precision.dtype(device)).removeprefix("torch."),
            temperature=config.temperature,
            sampler=config.sampler,
            samples_per_token=config.samples_per_token,
            seed=config.run.seed,
            rows_per_shard=self.rows_per_shard,
        )


def run(config: Cache) -> None:
    """Capture the shards of this process; whoever finds all of them there finishes the cache."""
    if not (config.out / "DONE.json").is_file():  # what is wrong with the input is said before anything is written
        Inputs(config)
    state = evaluate.join_launch()
    inputs, main = Inputs(config), state.is_main_process
    # Before anything is owned: of a large teacher this takes minutes.
    identity = inputs.identity(config, state.device) if main and not (config.out / "DONE.json").is_file() else None
    with owned(config) as whole:
        if whole.done:
            if config.verify and main:
                verify(config, inputs, state.device)
            return
        if main:
            capture.claim(config.out, identity or inputs.identity(config, state.device))
        state.wait_for_everyone()
        if config.workers == 1:
            work(config, inputs, state, whole)
            state.wait_for_everyone()
            finish(config, inputs, state.device, whole)
            return
    folder = config.out / "workers" / f"{config.worker:05d}-of-{config.workers:05d}"
    if main and capture.missing(config.out, inputs.shards[config.worker :: config.workers]):
        (folder / "DONE.json").unlink(missing_ok=True)  # it was done once, and a damaged shard has been removed since
    state.wait_for_everyone()
    with runs.start(folder, "cache", runs.plain(config), config.run, may_change=capture.MAY_CHANGE) as mine:
        if not mine.done:
            work(config, inputs, state, mine)
            state.wait_for_everyone()
            mine.finish([])
    with owned(config) as whole:
        if left := len(capture.missing(config.out, inputs.shards)):
            log.info("%d of %d shards are still missing, which other workers capture", left, len(inputs.shards))
        elif not whole.done:
            finish(config, inputs, state.device, whole)


def owned(config: Cache) -> AbstractContextManager[runs.Run]:
    """Own ``out``; workers share it, and each waits while another one looks at it."""
    shared = config.workers > 1
    # A dashboard gets a run for each worker, not for each look at what they share.
    quiet = dataclasses.replace(config.run, wandb=runs.WandbMode.off) if shared else config.run
    plain, seconds = runs.plain(config), WAIT_SECONDS if shared else 0.0
    return runs.start_when_free(config.out, "cache", plain, quiet, may_change=capture.MAY_CHANGE, seconds=seconds)


def work(config: Cache, inputs: Inputs, state: PartialState, run: runs.Run) -> None:
    """Capture what is missing of this process's share: every n-th shard, over workers and their processes."""
    part, parts = config.worker * state.num_processes + state.process_index, config.workers * state.num_processes
    if mine := capture.missing(config.out, inputs.shards[part::parts]):
        teacher = load(config, state.device)
        capture.capture_all(teacher, mine, inputs.splits, run, config.out, batch_rows=config.batch_rows)


def load(config: Cache, device: torch.device) -> capture.Capture:
    """The teacher that the directory was claimed for."""
    identity, teacher = Identity.read(config.out / cache.IDENTITY), config.teacher
    return capture.Capture.load(teacher.path, identity, device, teacher.attention, config.chunk_mebibytes)


def finish(config: Cache, inputs: Inputs, device: torch.device, run: runs.Run) -> None:
    """Index the shards, compare some again, and publish."""
    if not runs.is_main_process():
        return
    identity = Identity.read(config.out / cache.IDENTITY)
    files = capture.finish(config.out, identity, inputs.shards)
    summary = cache.Cache(config.out).summary()
    if config.verify:
        summary["distance"] = verify(config, inputs, device)
    log.info("%s: %s", config.out, summary)
    run.log({f"cache/{name}": value for name, value in summary.items()}, step=len(inputs.shards))
    run.finish(files, parents={"teacher": identity.teacher, "data": identity.data}, summary=summary)


def verify(config: Cache, inputs: Inputs, device: torch.device) -> float:
    """How far the stored targets are from those that the teacher gives now.

    Raises:
        ValueError: further than is allowed, or teacher or data are not those of the cache.
    """
    made, batches = cache.Cache(config.out), {"batches": config.verify, "batch_rows": config.batch_rows}
    cache.check_same(f"out={config.out}", made.identity, inputs.identity(config, device))
    made.check_content()
    return capture.verify(made, load(config, device), inputs.splits, **batches, allowed=config.max_distance)


main = command("cache", Cache, run)

if __name__ == "__main__":
    exit_with(main)
