"""Train a student on its teachers' next-token distributions; without a teacher, on the data alone.

python recipes/distill.py student.path=… teachers.big.path=… data.path=… steps=1000 out=…
torchrun --nproc-per-node 8 recipes/distill.py … deepspeed=zero2
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip


from dataclasses import dataclass
from pathlib import Path

import _training
from llamita import runs, storage
from llamita.distill import state


@dataclass(kw_only=True)
class Distill(_training.TrainingConfig):
    """Everything that this recipe can be told."""


store("distill_schema", Distill)


def run(config: Distill) -> None:
    """Train, or go on training, in ``config.out``, and publish the student at its root."""
    if not (config.out / "DONE.json").is_file():  # what is wrong with the input is said before anything is written
        check(config)
    changes = _training.may_change(config.teachers)
    with runs.start(config.out, "distill", storage.plain(config), config.run, may_change=changes) as this:
        if not this.done:
            train(config, this)
        if runs.is_main_process():
            state.prune(this.path / "checkpoints", config.keep_checkpoints)


def models(config: Distill) -> dict[str, Path]:
    """The model directories that the run reads, by name."""
    return _training.models(config)


def check(config: Distill) -> _training.Inputs:
    """What the run reads, opened; ``ValueError`` where data, student and teachers do not go together."""
    return _training.check(config)


def train(config: Distill, this: runs.Run) -> None:
    """The run itself: load, train, publish."""
    inputs = check(config)
    accelerator = _training.begin(config, this, inputs[1])
    _training.train(config, this, accelerator, inputs, _training.Record(recipe="distill"))


main = command("distill", Distill, run)

if __name__ == "__main__":
    exit_with(main)
