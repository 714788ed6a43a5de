"""Train a model on dialogues: on what the assistant says, and on a teacher's distributions where one is given.

python recipes/sft.py model.path=distilled data.path=dialogues epochs=2 out=sft
torchrun --nproc-per-node 8 recipes/sft.py … teachers.big.path=Llama-3.1-8B-Instruct loss.ce_weight=0.5 deepspeed=zero2
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip


import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from omegaconf import MISSING

import _dialogue_rows
import _teaching
import _training
from _dialogue_rows import Wanted
from _training import DataConfig, TrainingConfig
from llamita import chat, checkpoints, runs, storage
from llamita.adapters import LoraConfig
from llamita.align.dialogues import DialogueData
from llamita.data import tokens
from llamita.data.fit import Overlong
from llamita.data.shards import PackedData
from llamita.distill import launch, loop, losses, optim, state, student, teachers

EPOCHS = 2.0
"""Where neither steps nor epochs are given."""


@dataclass(kw_only=True)
class ModelConfig:
    """The model to train: a directory with weights and a tokenizer."""

    path: Path = MISSING


@dataclass(kw_only=True)
class DialoguesConfig:
    """A directory of dialogues, as ``dialogues`` and ``sample`` write it."""

    path: Path = MISSING
    max_refused: float = 0.05
    """Share of the dialogues that the encoder may refuse before the run ends."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if not 0 <= self.max_refused <= 1:
            raise ValueError(f"data.max_refused must be in 0..1, got {self.max_refused}")


def data_alone() -> losses.LossConfig:
    """Cross-entropy with what the assistant says."""
    return losses.LossConfig(ce_weight=1.0)


def gentle() -> optim.OptimConfig:
    """Llama 3.1's learning rate of SFT (2024, arXiv:2407.21783, section 4.1.3), and nothing pulled towards zero."""
    return optim.OptimConfig(learning_rate=1e-5, weight_decay=0.0)


@dataclass(kw_only=True)
class Sft(loop.LoopConfig):
    """Everything that this recipe can be told."""

    fewest_steps: ClassVar[int] = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DialoguesConfig = field(default_factory=DialoguesConfig)
    sequence_length: int = 4096
    """Tokens per row; dialogues share rows, and do not see each other."""
    overlong: Overlong = Overlong.drop
    """What becomes of a dialogue that is longer than a row."""
    steps: int = 0
    """0: as many as ``epochs`` make."""
    epochs: float | None = None
    """Times that every dialogue is seen, in the place of ``steps``; with neither of them 2."""
    teachers: dict[str, teachers.TeacherConfig] = field(default_factory=dict)
    loss: losses.LossConfig = field(default_factory=data_alone)
    optim: optim.OptimConfig = field(default_factory=gentle)
    deepspeed: launch.DeepSpeedConfig = field(default_factory=launch.DeepSpeedConfig)
    num_proc: int | None = None
    """Processes that encode dialogues; unset: one per core. The result does not depend on it."""
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        super().__post_init__()
        if self.epochs is not None and (self.steps or not 0 < self.epochs < math.inf):
            raise ValueError(f"epochs must be > 0 and finite, with steps not set, got {self.epochs}, {self.steps=}")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"num_proc must be at least 1, got {self.num_proc}")
        teachers.check_settings(self.teachers)
        if taken := {"student", "model", "data"} & set(self.teachers):
            raise ValueError(f"teachers.{min(taken)}: a teacher must not have the name student, model or data")
        if not self.teachers:
            self.loss.check_without_teacher()
        elif self.loss.ce_weight == 1:
            raise ValueError("loss.ce_weight=1 leaves the teachers no weight: it must be below 1, as in 0.5")

    def training(self, packed: Path, steps: int) -> TrainingConfig:
        """The same in the terms of the training that all recipes share, on rows in ``packed``."""
        shared = {f.name for f in dataclasses.fields(TrainingConfig)} - {"student", "data", "steps"}
        return TrainingConfig(
            **{name: getattr(self, name) for name in shared},
            student=student.StudentConfig(path=self.model.path, lora=self.lora),
            data=DataConfig(path=packed),
            steps=steps,
        )

    def num_steps(self, rows: int) -> int:
        """Optimiser steps, where so many rows are one epoch."""
        return self.steps or max(1, math.ceil((self.epochs or EPOCHS) * rows / self.global_batch_rows))


store("sft_schema", Sft)


def run(config: Sft) -> None:
    """Encode and pack, train, or go on training, in ``config.out``, and publish the model at its root."""
    wanted = None if (config.out / "DONE.json").is_file() else check(config)
    changes = ("num_proc", *_training.may_change(config.teachers))
    with runs.start(config.out, "sft", storage.plain(config), config.run, may_change=changes) as this:
        if not this.done and wanted is not None:
            train(config, this, wanted)
        if runs.is_main_process():
            state.prune(this.path / "checkpoints", config.keep_checkpoints)


def check(config: Sft) -> Wanted:
    """The dialogues and the tokenizer, opened; nothing is encoded, and no weight is read.

    Raises:
        ValueError: dialogues, model and teachers do not go together.
    """
    training, path = config.training(config.out / _dialogue_rows.FOLDER, max(1, config.steps)), config.model.path
    _training.check_launch(training)
    training.micro_batches(launch.world_size())
    data = DialogueData.open(config.data.path)
    data.need("train", "dialogues")
    if config.validation_rows and not data.count("validation", "dialogues"):
        raise ValueError(
            f"data.path={config.data.path} has no validation dialogues: validation_rows=0 trains without, "
            f"got {config.validation_rows}"
        )
    llama = checkpoints.load_config(path)
    if llama.max_position_embeddings < config.sequence_length:
        raise ValueError(
            f"sequence_length must be at most max_position_embeddings={llama.max_position_embeddings} of "
            f"model.path={path}, got {config.sequence_length}"
        )
    tokenizer = tokens.load(path)
    chat.Encoder(tokenizer)
    own = teachers.Vocabulary(tokens.vocab_size(tokenizer), checkpoints.tokenizer_hash(tokenizer), f"model.path={path}")
    _training.check_models(training, own, config.sequence_length)
    _teaching.pairs(training, llama)
    return Wanted(
        data=data,
        model=path,
        tokenizer=tokenizer,
        splits=("train", "validation") if config.validation_rows else ("train",),
        sequence_length=config.sequence_length,
        overlong=config.overlong,
        max_refused=config.data.max_refused,
        seed=config.run.seed,
        num_proc=config.num_proc,
    )


def train(config: Sft, this: runs.Run, wanted: Wanted) -> None:
    """The run itself: pack, load, train, publish."""
    packed = _dialogue_rows.ready(wanted, this)
    training = config.training(packed, config.num_steps(len(PackedData.open(packed).split("train"))))
    inputs = _training.check(training)
    inputs[1].eos_token_id = chat.Encoder(wanted.tokenizer).stop_ids
    accelerator = _training.begin(training, this, inputs[1])
    record = _training.Record(
        recipe="sft",
        student="model",
        data=(config.data.path, wanted.data.content_hash),
        source=packed / "tokenizer",
        counts=_dialogue_rows.counts(packed),
    )
    _training.train(training, this, accelerator, inputs, record)


main = command("sft", Sft, run)

if __name__ == "__main__":
    exit_with(main)
