"""A reward model from preference pairs: one number for a dialogue, higher for the answer that people prefer.

python recipes/reward.py model.path=… data.path=… out=…
torchrun --nproc-per-node 8 recipes/reward.py … deepspeed=zero2
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip


import functools
import math
from dataclasses import dataclass
from typing import Any

import _aligning
from llamita import runs, storage
from llamita.align import preferences, trainers, watch

NAMES = {"margin": "reward/margin", "accuracy": "reward/accuracy", "mean_reward": "reward/mean"}


@dataclass(kw_only=True)
class Reward(_aligning.AlignConfig):
    """Everything that this recipe can be told."""

    center_weight: float = 0.01
    """Weight of the squared sum of a pair's rewards, which keeps them around zero (Eisenstein et al., 2023,
    arXiv:2312.09244, equation 2); 0: none."""
    validation_pairs: int = 512
    """Held-out pairs on which the model is measured before and after; 0: none."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        super().__post_init__()
        for name in ("center_weight", "validation_pairs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")


store("reward_schema", Reward)


def run(config: Reward) -> None:
    """Train, or go on training, in ``config.out``, and publish the reward model at its root."""
    if not (config.out / "DONE.json").is_file():  # what is wrong with the input is said before anything is written
        check(config)
    with runs.start(config.out, "reward", storage.plain(config), config.run, may_change=trainers.MAY_CHANGE) as this:
        if not this.done:
            train(config, this)


def check(config: Reward) -> tuple[_aligning.Given, dict[str, preferences.Rows], dict[str, Any]]:
    """What is read, the pairs of both splits as ids, and what TRL is told.

    Raises:
        ValueError: settings, model and data do not go together.
    """
    given, rows = _aligning.open_pairs(config, held_out=config.validation_pairs)
    if any(answer[-1] == given.encoder.borders.pad_id for answer in rows["train"].chosen):
        raise ValueError(
            f"model.path={config.model.path} pads with the token that ends a turn, where a reward is read: give its "
            "tokenizer a padding token of its own"
        )
    from trl.trainer.reward_config import RewardConfig

    ours = {"center_rewards_coefficient": config.center_weight or None}
    return given, rows, _aligning.told_of_pairs(config, RewardConfig, rows, **ours)


def train(config: Reward, this: runs.Run) -> None:
    """The run itself: rewards before, training, rewards after, and the model."""
    from trl.trainer.reward_config import RewardConfig

    from llamita.align.reward_trainer import DialogueTrainer, with_score

    given, rows, told = check(config)
    stage = _aligning.Stage(config, given, this, trainers.arguments(RewardConfig, config.trainer, told))
    stage.hash_parents(model=config.model.path)
    model = with_score(stage.load(config.model.path), pad_id=given.encoder.borders.pad_id, seed=config.run.seed)
    collate = preferences.Collator(given.encoder.borders.pad_id, tuple(given.encoder.stop_ids))
    before = {}
    if "validation" in rows:
        say = functools.partial(stage.say_of_pairs, model, rows["validation"], collate, preferences.rewards)
        file = this.path / "reference" / "validation.safetensors"
        with stage.as_trained(model):
            before = preferences.ahead("reward", watch.measured_once(file, stage.about, say))
    counts = _aligning.counts(rows)
    stage.log_start(counts | before)
    steps = told["max_steps"]
    order = trainers.order(len(rows["train"]), steps * config.global_batch_rows, config.run.seed)
    trainer = DialogueTrainer(
        model=stage.handed_over(model),
        args=stage.arguments,
        train_dataset=preferences.dialogues(rows["train"]).select(order),
        processing_class=stage.tokenizer(model),
        peft_config=trainers.adapters(config.lora, model),
    )
    rows_of = _aligning.rows_of(order, rows["train"].ids, config.global_batch_rows)
    metrics: dict[str, Any] = watch.train(trainer, stage.watch("reward", NAMES, rows_of, steps))
    if "validation" in rows:
        sides = stage.say_of_pairs(trainer.model_wrapped, rows["validation"], collate, preferences.rewards)
        after = preferences.ahead("reward", sides) | {"val/held_out/reward_mean": sides.mean().item()}
        this.log(after, step=steps)
        metrics |= after | {f"before/{name}": value for name, value in before.items()}
    stage.finish(trainer, metrics | counts, architecture="LlamaForSequenceClassification")


main = command("reward", Reward, run)

if __name__ == "__main__":
    exit_with(main)
