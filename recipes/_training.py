"""What recipes that train on packed rows share: their settings, what they refuse, and the run itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from omegaconf import MISSING
from transformers import LlamaConfig

import _teaching
from llamita import checkpoints, preflight, runs
from llamita.data import loader
from llamita.data.shards import PackedData
from llamita.distill import cached, engines, launch, loop, losses, optim, placement, quantised, student, teachers
from llamita.distill.cache import Cache

Inputs = tuple[PackedData, LlamaConfig, dict[str, Cache]]
"""The data, the student's configuration, and the caches among the teachers."""


@dataclass(kw_only=True)
class DataConfig:
    """A directory that ``prepare`` wrote."""

    path: Path = MISSING


@dataclass(kw_only=True)
class TrainingConfig(loop.LoopConfig):
    """A student, its teachers if there are any, and the rows that it is trained on."""

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


@dataclass(frozen=True, kw_only=True)
class Record:
    """What the result of a run says of the run."""

    recipe: str
    student: str = "student"
    """The name of the student's own directory among the parents."""
    data: tuple[Path, str] | None = None
    """Place and content hash of what the rows were made from; unset: those of the rows."""
    source: Path | None = None
    """Whose tokenizer and generation settings are published; unset: the student's own, else the data's tokenizer."""
    counts: Mapping[str, float] = field(default_factory=dict)
    """What was counted before the first step, for the log and the summary."""


def may_change(names: Mapping[str, object]) -> tuple[str, ...]:
    """Settings that a restart may change, with teachers of these names."""
    return (*loop.MAY_CHANGE, *(f"teachers.{name}.max_kl" for name in names))


def models(config: TrainingConfig) -> dict[str, Path]:
    """The model directories that the run reads, by name."""
    found = {"student": config.student.path} if config.student.path else {}
    return found | {name: teacher.path for name, teacher in config.teachers.items() if teacher.path}


def check_launch(config: TrainingConfig) -> None:
    """Raise ``ValueError`` for what this launch cannot do; nothing is read."""
    launch.check_launch(config, config.deepspeed)
    for name, teacher in config.teachers.items():
        quantised.check(f"teachers.{name}", teacher.weights)
    if "student" in config.teachers:
        raise ValueError("teachers.student: a teacher must not have the name of the student")


def check_models(config: TrainingConfig, data: teachers.Vocabulary, sequence_length: int) -> dict[str, Cache]:
    """The caches among the teachers, where rows of ``data``'s ids go together with all models; no weight is read.

    Raises:
        ValueError: they do not.
    """
    for name, path in models(config).items():
        teachers.check_model(name, path, sequence_length)
    caches = cached.open_all(config.teachers, config.loss, data.tokenizer_hash)
    stored = [(cache.identity, f"{name} ({cache.path})") for name, cache in caches.items()]
    teachers.check_vocabularies(
        data,
        [
            *(teachers.Vocabulary.of_model(path, name) for name, path in models(config).items()),
            *(teachers.Vocabulary(made.vocab_size, made.tokenizer, owner) for made, owner in stored),
        ],
    )
    return caches


def check(config: TrainingConfig) -> Inputs:
    """What the run reads, opened; no weight is read.

    Raises:
        ValueError: data, student and teachers do not go together.
    """
    check_launch(config)
    data = PackedData.open(config.data.path)
    data.split("train")
    if config.validation_rows and not data.manifest["splits"].get("validation", {}).get("rows"):
        raise ValueError(
            f"data.path={config.data.path} has no held-out rows: validation_rows=0 trains without, "
            f"got {config.validation_rows}"
        )
    owner = f"data.path={config.data.path}"
    caches = check_models(
        config, teachers.Vocabulary(data.vocab_size, data.tokenizer_hash, owner), data.sequence_length
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


def begin(config: TrainingConfig, this: runs.Run, llama: LlamaConfig) -> Accelerator:
    """The processes of the run, on nodes and a disk that were looked at; every rank calls this."""
    accelerator = launch.new_accelerator(config, config.deepspeed, clip_norm=config.optim.clip_norm)
    room, floor = _teaching.room(config, llama), config.run.min_allreduce_gb_per_s
    preflight.check(this.path, accelerator.device, this.settings, disk_bytes=room, min_allreduce_gb_per_s=floor)
    return accelerator


def train(config: TrainingConfig, this: runs.Run, accelerator: Accelerator, inputs: Inputs, record: Record) -> None:
    """Load, train, publish."""
    data, llama, caches = inputs
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
        costs={**record.counts, **costs},
        meter=_teaching.meter(config, llama, accelerator.device),
    )
    metrics = {**job.train(), **record.counts}
    place, data_hash = record.data or (config.data.path, data.content_hash)
    names = {"student": record.student}
    hashes = {names.get(name, name): sha256 for name, sha256 in parents.items()} | {"data": data_hash}
    paths = {names.get(name, name): path for name, path in models(config).items()} | {"data": place}
    paths |= {key: cache.path for name, cache in caches.items() for key in (name, f"{name}/cache")}
    provenance = {
        "recipe": record.recipe,
        "parents": {name: {"path": str(paths[name]), "sha256": sha256} for name, sha256 in hashes.items()},
        "settings": this.settings,
        "metrics": metrics,
    }
    origin = record.source or config.student.path or data.tokenizer_path
    files = student.publish(engine, llama, this.path, main=main, source=origin, dtype=dtype, provenance=provenance)
    this.finish(files, parents=hashes, summary=metrics)
    accelerator.wait_for_everyone()
    accelerator.end_training()
