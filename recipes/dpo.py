"""Direct preference optimisation with the settings of Llama 3.1: of two answers, make the preferred one likelier.

python recipes/dpo.py model.path=… data.path=… out=…
torchrun --nproc-per-node 8 recipes/dpo.py … deepspeed=zero2
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip


import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

import _aligning
from llamita import runs, storage
from llamita.align import preferences, trainers, watch

NAMES = {
    "rewards/margins": "dpo/margin",
    "rewards/accuracies": "dpo/accuracy",
    "rewards/chosen": "dpo/reward_chosen",
    "rewards/rejected": "dpo/reward_rejected",
}


@dataclass(kw_only=True)
class Dpo(_aligning.AlignConfig):
    """Everything that this recipe can be told. Defaults are Llama 3.1's where they are known."""

    beta: float = 0.1
    """How dear it is to leave the reference, which is the model that training starts from."""
    nll_weight: float = 0.2
    """Weight of the likelihood of the chosen answer; 0: none."""
    validation_pairs: int = 512
    """Held-out pairs on which both models are compared; 0: none."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        super().__post_init__()
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta must be > 0 and finite, got {self.beta}")
        for name in ("nll_weight", "validation_pairs"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")


store("dpo_schema", Dpo)


def run(config: Dpo) -> None:
    """Train, or go on training, in ``config.out``, and publish the model at its root."""
    if not (config.out / "DONE.json").is_file():  # what is wrong with the input is said before anything is written
        check(config)
    with runs.start(config.out, "dpo", storage.plain(config), config.run, may_change=trainers.MAY_CHANGE) as this:
        if not this.done:
            train(config, this)


def check(config: Dpo) -> tuple[_aligning.Given, dict[str, preferences.Rows], dict[str, Any]]:
    """What is read, the pairs of both splits as ids, and what TRL is told.

    Raises:
        ValueError: settings, model and data do not go together.
    """
    given, rows = _aligning.open_pairs(config, held_out=config.validation_pairs)
    from trl.trainer.dpo_config import DPOConfig

    ours = {"beta": config.beta, "precompute_ref_log_probs": True, "pad_to_multiple_of": None}
    return given, rows, _aligning.told_of_pairs(config, DPOConfig, rows, **ours)


def train(config: Dpo, this: runs.Run) -> None:
    """The run itself: what the reference says, training, what the policy says, and the model."""
    from trl.trainer.dpo_config import DPOConfig

    from llamita.align.dpo_trainer import PairTrainer

    given, rows, told = check(config)
    stage = _aligning.Stage(config, given, this, trainers.arguments(DPOConfig, config.trainer, told))
    stage.hash_parents(model=config.model.path)
    model = preferences.with_fused_head(stage.load(config.model.path))
    collate = preferences.Collator(given.encoder.borders.pad_id, tuple(given.encoder.stop_ids))
    with stage.as_trained(model):
        reference = _reference(stage, model, rows, collate)
    before = _held_out(config, reference, reference.get("validation"))
    counts = _aligning.counts(rows)
    stage.log_start(counts | before)
    steps = told["max_steps"]
    order = trainers.order(len(rows["train"]), steps * config.global_batch_rows, config.run.seed)
    trainer = PairTrainer(
        model=stage.handed_over(model),
        args=stage.arguments,
        train_dataset=preferences.dataset(rows["train"], reference["train"]).select(order),
        data_collator=collate,
        processing_class=stage.tokenizer(model),
        peft_config=trainers.adapters(config.lora, model),
        nll_weight=config.nll_weight,
    )
    rows_of = _aligning.rows_of(order, rows["train"].ids, config.global_batch_rows)
    metrics: dict[str, Any] = watch.train(trainer, stage.watch("dpo", NAMES, rows_of, steps))
    if "validation" in rows:
        policy = stage.say_of_pairs(trainer.model_wrapped, rows["validation"], collate, preferences.log_probabilities)
        after = _held_out(config, reference, policy)
        this.log(after, step=steps)
        metrics |= after | {f"before/{name}": value for name, value in before.items()}
    stage.finish(trainer, metrics | counts)


def _held_out(config: Dpo, reference: dict[str, torch.Tensor], policy: torch.Tensor | None) -> dict[str, float]:
    return {} if policy is None else preferences.preferred(policy, reference["validation"], config.beta)


def _reference(
    stage: _aligning.Stage, model: Any, rows: dict[str, preferences.Rows], collate: preferences.Collator
) -> dict[str, torch.Tensor]:
    """What the model says before it is trained, by split: measured by the first start, and read by later ones."""
    found = {}
    for split, part in rows.items():
        file = stage.run.path / "reference" / f"{split}.safetensors"
        say = preferences.log_probabilities
        measure = functools.partial(stage.say_of_pairs, model, part, collate, say)
        found[split] = watch.measured_once(file, stage.about, measure)
    return found


main = command("dpo", Dpo, run)

if __name__ == "__main__":
    exit_with(main)
