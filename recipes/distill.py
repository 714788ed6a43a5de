"""Train a student on its teachers' next-token distributions; without a teacher, on the data alone.

python recipes/distill.py student.path=… teachers.big.path=… data.path=… steps=1000 out=…
torchrun --nproc-per-node 8 recipes/distill.py … deepspeed=zero2
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip
from dataclasses import dataclass, field
from pathlib import Path

import torch
from omegaconf import MISSING
from transformers import LlamaConfig

import _teaching
from llamita import checkpoints, preflight, runs
from llamita.data import loader
from llamita.data.shards import PackedData
from llamita.distill import cached, engines, launch, loop, losses, optim, placement, quantised, state, student, teachers
from llamita.distill.cache import Cache


@dataclass(kw_only=True)
class DataConfig:
    """A directory that ``prepare`` wrote."""

    path: Path = MISSING


@dataclass(kw_only=True)
class Distill(loop.LoopConfig):
    """Everything that this recipe can be told."""

    student: student.StudentConfig = field(default_factory=student.StudentConfig)
    teachers: dict[str, teachers.TeacherConfig] = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    loss: losses.LossConfig = field(default_factory=losses.LossConfig)
    optim: optim.OptimConfig = field(default_factory=optim.OptimConfig)
    deepspeed: launch.DeepSpeedConfig = field(default_factory=launch.DeepSpeedConfig)
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        super().__post_init__()
        self.student.check()
        teachers.check_settings(self.teachers)
        if not self.teachers:
            self.loss.check_without_teacher()


store("distill_schema", Distill)


def run(config: Distill) -> None:
    """Train, or go on training, in ``config.out``, and publish the student at its root."""
    if not (config.out / "DONE.json").is_file():  # what is wrong with the input is said before anything is written
        check(config)
    with runs.start(config.out, "distill", runs.plain(config), config.run, may_change=may_change(config)) as this:
        if not this.done:
            train(config, this)
        if runs.is_main_process():
            state.prune(this.path / "checkpoints", config.keep_checkpoints)


def may_change(config: Distill) -> tuple[str, ...]:
    """Settings that a restart may change."""
    return (*loop.MAY_CHANGE, *(f"teachers.{name}.max_kl" for name in config.teachers))


def models(config: Distill) -> dict[str, Path]:
    """The model directories that the run reads, by name."""
    found = {"student": config.student.path} if config.student.path else {}
    return found | {name: teacher.path for name, teacher in config.teachers.items() if teacher.path}


def check(config: Distill) -> tuple[PackedData, LlamaConfig, dict[str, Cache]]:
    """The data, the student's configuration, and the caches among the teachers; no weight is read.

    Raises:
        ValueError: data, student and teachers do not go together.
    """
    launch.check_launch(config, config.deepspeed)
    for name, teacher in config.teachers.items():
        quantised.check(f"teachers.{name}", teacher.weights)
    data = PackedData.open(config.data.path)
    data.split("train")
    if config.validation_rows and not data.manifest["splits"].get("validation", {}).get("rows"):
        raise ValueError(
            f"data.path={config.data.path} has no held-out rows: validation_rows=0 trains without, "
            f"got {config.validation_rows}"
        )
    if "student" in config.teachers:
        raise ValueError("teachers.student: a teacher must not have the name of the student")
    for name, path in models(config).items():
        teachers.check_model(name, path, data.sequence_length)
    caches = cached.open_all(config.teachers, config.loss, data.tokenizer_hash)
    stored = [(cache.identity, f"{name} ({cache.path})") for name, cache in caches.items()]
    teachers.check_vocabularies(
        teachers.Vocabulary(data.vocab_size, data.tokenizer_hash, f"data.path={config.data.path}"),
        [
            *(teachers.Vocabulary.of_model(path, name) for name, path in models(config).items()),
            *(teachers.Vocabulary(made.vocab_size, made.tokenizer, owner) for made, owner in stored),
        ],
    )
    llama = student.llama_config(
        config.student,
        vocab_size=data.vocab_size,
        tokenizer_path=data.tokenizer_path,
        sequence_length=data.sequence_length,
    )
    config.micro_batches(launch.world_size())
    _teaching.pairs(config, llama)
    return data, llama, caches


def train(config: Distill, this: runs.Run) -> None:
    """The run itself: load, train, publish."""
    data, llama, caches = check(config)
    accelerator = launch.new_accelerator(config, config.deepspeed, clip_norm=config.optim.clip_norm)
    room, floor = _teaching.room(config, llama), config.run.min_allreduce_gb_per_s
    preflight.check(this.path, accelerator.device, this.settings, disk_bytes=room, min_allreduce_gb_per_s=floor)
    main, dtype = accelerator.is_main_process, config.precision.dtype(accelerator.device)
    parents = {name: checkpoints.content_hash(path) for name, path in models(config).items() if main}
    if main:
        splits = {name: data.split(name) for name in ("train", "validation")[: 2 if config.validation_rows else 1]}
        cached.check_content(caches, parents, splits, data.content_hash)
    accelerator.wait_for_everyone()  # in a group that waits for hours: hashes of 70B take longer than NCCL's own limit
    stored = cached.teachers_of(caches, config.teachers)
    model = student.load(
        config.student,
        llama,
        seed=config.run.seed,
        attention=config.attention,
        resting=dtype,
        # DeepSpeed itself brings to the device what stays there.
        device=torch.device("cpu") if config.deepspeed.stage else accelerator.device,
    )
    beside = placement.load_all(config.teachers, dtype=dtype, device=accelerator.device, attention=config.attention)
    given = [*beside, *stored]
    matching = _teaching.matching(config, llama, given, seed=config.run.seed)
    engine = engines.build(
        accelerator, model, config.loss, config.optim, config, vocabulary=data.vocab_size, matching=matching
    )
    # Dropout draws something else on every rank, and goes on with what a checkpoint says.
    torch.manual_seed(config.run.seed + 1 + accelerator.process_index)
    split = data.split("train")
    source = loader.Loader(
        split,
        seed=config.run.seed,
        global_batch_rows=config.global_batch_rows,
        micro_batch_rows=config.micro_batch_rows,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    rows = loader.Sequential(
        data.split("validation") if config.validation_rows else split,
        batch_rows=config.micro_batch_rows,
        max_rows=placement.KL_ROWS,
    )
    costs = placement.compare(beside, config.teachers, rows, processes=accelerator, dtype=dtype, run=this)
    job = loop.Trainer(
        accelerator=accelerator,
        engine=engine,
        teachers=given,
        shares={name: t.share for name, t in config.teachers.items()},
        source=cached.CachedSource(source, stored) if stored else source,
        config=config,
        optim=config.optim,
        run=this,
        validation=_teaching.held_out(config, data),
        rows_per_epoch=len(split),
        parents=parents,
        costs=costs,
        meter=_teaching.meter(config, llama, accelerator.device),
    )
    metrics = job.train()
    hashes = parents | {"data": data.content_hash}
    paths = {**models(config), "data": config.data.path}
    paths |= {key: cache.path for name, cache in caches.items() for key in (name, f"{name}/cache")}
    provenance = {
        "recipe": "distill",
        "parents": {name: {"path": str(paths[name]), "sha256": sha256} for name, sha256 in hashes.items()},
        "settings": this.settings,
        "metrics": metrics,
    }
    origin = config.student.path or data.tokenizer_path
    files = student.publish(engine, llama, this.path, main=main, source=origin, dtype=dtype, provenance=provenance)
    this.finish(files, parents=hashes, summary=metrics)
    accelerator.wait_for_everyone()
    accelerator.end_training()


main = command("distill", Distill, run)

if __name__ == "__main__":
    exit_with(main)
