"""Learning from a model's own answers: by rewards that a program or a reward model gives, or by a teacher.

python recipes/rl.py model.path=… data.path=… method=grpo out=…
python recipes/rl.py model.path=… data.path=… method=rloo reward.path=… out=…
python recipes/rl.py model.path=… data.path=… method=distill teacher.path=… out=…
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip


import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import _aligning
import _judging
from llamita import checkpoints, runs, storage
from llamita.align import reinforce, trainer_keys, trainers, watch

NAMES = {
    "reward": "rl/reward",
    "reward_std": "rl/reward_std",
    "frac_reward_zero_std": "rl/groups_without_signal",
    "kl": "rl/kl",
    "completions/mean_length": "rl/answer_tokens",
    "completions/clipped_ratio": "rl/cut_answers",
}

MANY = 8
"""Answers of a group where nothing else is told."""


class Method(StrEnum):
    """What is learnt from an answer."""

    grpo = "grpo"
    """Its reward, against those of the other answers to the prompt, in units of their spread."""
    rloo = "rloo"
    """Its reward, against the mean of the other answers to the prompt."""
    distill = "distill"
    """The teacher's distribution at each of its tokens."""


@dataclass(kw_only=True)
class OtherModel:
    """A model beside the one that is trained."""

    path: Path | None = None


@dataclass(kw_only=True)
class Rl(_aligning.AlignConfig):
    """Everything that this recipe can be told."""

    learning_rate: float = 1e-6
    method: Method = Method.grpo
    num_generations: int = MANY
    """Answers to each prompt; ``global_batch_rows`` counts answers. ``distill`` learns from each alone, and draws 1."""
    max_answer_tokens: int = 512
    """The prompt may have what is left of ``max_length``."""
    temperature: float = 1.0
    """At which answers are drawn; 1 for ``distill``: TRL would soften the divergence's distributions by it too."""
    kl_weight: float | None = None
    """How dear it is to leave the model that training starts from; unset: TRL's own, 0 for grpo and 0.05 for rloo."""
    reward: OtherModel = field(default_factory=OtherModel)
    """A directory of ``recipes/reward.py``; unset: the checks of the tasks."""
    teacher: OtherModel = field(default_factory=OtherModel)
    validation_tasks: int = 256
    """Held-out tasks that are answered before and after; 0: none."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        super().__post_init__()
        self._check_method()
        least = 1 if self.method is Method.distill else 2
        if self.num_generations < least or self.global_batch_rows % self.num_generations:
            raise ValueError(
                f"num_generations must be at least {least} and divide global_batch_rows={self.global_batch_rows}, got "
                f"{self.num_generations}"
            )
        if not 0 < self.max_answer_tokens < self.max_length:
            raise ValueError(
                f"max_answer_tokens must be in 1..{self.max_length - 1} (max_length - 1), got {self.max_answer_tokens}"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be > 0 and finite, got {self.temperature}")
        if self.kl_weight is not None and not 0 <= self.kl_weight < math.inf:
            raise ValueError(f"kl_weight must be >= 0 and finite, got {self.kl_weight}")
        if self.validation_tasks < 0:
            raise ValueError(f"validation_tasks must be >= 0, got {self.validation_tasks}")

    def _check_method(self) -> None:
        distils = self.method is Method.distill
        if distils != (self.teacher.path is not None):
            raise ValueError(f"teacher.path={self.teacher.path} and method={self.method}: distill needs it, alone")
        if distils and (self.reward.path is not None or self.kl_weight is not None):
            raise ValueError("method=distill reads no reward: leave out reward.path and kl_weight")
        if distils and self.num_generations not in (1, MANY):
            raise ValueError(f"num_generations must be 1 with method=distill, got {self.num_generations}")
        if distils and self.temperature != 1:
            raise ValueError(f"temperature must be 1 with method=distill, got {self.temperature}")
        if distils:
            self.num_generations = 1


store("rl_schema", Rl)


def run(config: Rl) -> None:
    """Train, or go on training, in ``config.out``, and publish the model at its root."""
    if not (config.out / "DONE.json").is_file():  # what is wrong with the input is said before anything is written
        check(config)
    with runs.start(config.out, "rl", storage.plain(config), config.run, may_change=trainers.MAY_CHANGE) as this:
        if not this.done:
            train(config, this)


def check(config: Rl) -> tuple[_aligning.Given, dict[str, reinforce.Prompts], dict[str, Any]]:
    """What is read, the tasks of both splits, and what TRL is told.

    Raises:
        ValueError: settings, models and data do not go together.
    """
    trainers.check_installed()
    _judging.check_backend(config.trainer)
    given = _aligning.open_all(config, "tasks")
    prompts = _judging.encoded(config, given)
    if config.teacher.path is not None:
        checkpoints.Weights(config.teacher.path)
        if checkpoints.tokenizer_of(config.teacher.path) != checkpoints.tokenizer_of(config.model.path):
            raise ValueError(
                f"teacher.path={config.teacher.path} and model.path={config.model.path} have different tokenizers: "
                "their distributions are over different tokens"
            )
    else:
        _judging.check([task for part in prompts.values() for task in part.tasks], config.reward.path)
    more: dict[str, Any] = {"max_completion_length": config.max_answer_tokens, "shuffle_dataset": False}
    more |= {"temperature": config.temperature}
    if config.method is not Method.distill:
        more["num_generations"] = config.num_generations
        more |= {} if config.kl_weight is None else {"beta": config.kl_weight}
    steps = config.num_steps(len(prompts["train"]), config.num_generations)
    told = _aligning.told(config, steps=steps, **more)
    trainer_keys.check(_judging.kind(config.method)[0], config.trainer, told)
    return given, prompts, told


def train(config: Rl, this: runs.Run) -> None:
    """The run itself: answers before, training, answers after, and the model."""
    given, prompts, told = check(config)
    arguments, trainer_class = _judging.kind(config.method)
    stage = _aligning.Stage(config, given, this, trainers.arguments(arguments, config.trainer, told))
    others = {"reward": config.reward.path, "teacher": config.teacher.path}
    stage.hash_parents(model=config.model.path, **{name: path for name, path in others.items() if path})
    model = stage.load(config.model.path)
    teacher = stage.load_other(config.teacher.path) if config.teacher.path else None
    judge = None if teacher is not None else _judging.judge(config.reward.path, stage)
    measure = _judging.HeldOut(stage, prompts.get("validation"), judge, teacher)
    before = measure.before(model)
    counts = _judging.counts(prompts)
    stage.log_start(counts | before)
    steps, each = told["max_steps"], config.global_batch_rows // config.num_generations
    order = trainers.order(len(prompts["train"]), steps * each, config.run.seed)
    tokenizer = stage.tokenizer(model)
    # Where TRL finds the model to stay near to, and vLLM the one to draw with.
    model.config._name_or_path = model.name_or_path = str(config.model.path)
    model.generation_config.eos_token_id = given.encoder.stop_ids
    reads = (
        {"teacher_model": teacher}
        if judge is None
        else {"reward_funcs": reinforce.reward_function(judge, prompts["train"].tasks, given.encoder)}
    )
    trainer = trainer_class(
        model=stage.handed_over(model),
        args=stage.arguments,
        train_dataset=reinforce.dataset(prompts["train"]).select(order),
        processing_class=tokenizer,
        peft_config=trainers.adapters(config.lora, model),
        **reads,
    )
    trainer.encoder = given.encoder
    rows_of = _aligning.rows_of(order, [task.id for task in prompts["train"].tasks], each)
    metrics: dict[str, Any] = watch.train(trainer, stage.watch("rl", NAMES, rows_of, steps))
    after = measure.after(trainer)
    this.log(after, step=steps)
    metrics |= after | counts | {f"before/{name}": value for name, value in before.items()}
    stage.finish(trainer, metrics)


main = command("rl", Rl, run)

if __name__ == "__main__":
    exit_with(main)
