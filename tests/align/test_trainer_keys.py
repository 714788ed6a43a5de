"""Which settings of TRL's trainers may be passed on, and what is said of the others."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest

from llamita.align import trainer_keys

KINDS = {
    "dpo_config": "DPOConfig",
    "reward_config": "RewardConfig",
    "grpo_config": "GRPOConfig",
    "rloo_config": "RLOOConfig",
    "distillation_config": "DistillationConfig",
}


@dataclass
class Foreign:
    learning_rate: float = 0.0
    weight_decay: float = 0.0
    inner: int = dataclasses.field(default=0, init=False)


@cache
def kinds() -> list[type[Any]]:
    found = [getattr(importlib.import_module(f"trl.trainer.{module}"), name) for module, name in KINDS.items()]
    assert len(found) == 5
    return found


def test_a_key_that_the_trainer_does_not_have_is_named_with_what_is_near_it() -> None:
    with pytest.raises(ValueError, match=r"trainer\.weight_deacy=1: Foreign of TRL has no such.*mean weight_decay"):
        trainer_keys.check(Foreign, {"weight_deacy": 1}, {})
    with pytest.raises(ValueError, match=r"trainer\.inner"):
        trainer_keys.check(Foreign, {"inner": 1}, {})


def test_a_key_that_our_settings_decide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.learning_rate=1 is decided by this recipe's own settings"):
        trainer_keys.check(Foreign, {"learning_rate": 1}, {"learning_rate": 2})


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("num_train_epochs", 2, "use epochs="),
        ("resume_from_checkpoint", "there", "start the recipe again with the same out"),
        ("save_only_model", True, "no run can go on"),
        ("ignore_data_skip", True, "train on the first rows again"),
        ("truncation_mode", "keep_end", "no row is cut"),
        ("precompute_ref_batch_size", 8, "micro_batch_rows"),
        ("padding_free", True, "TRL pads all the same"),
        ("model_init_kwargs", {"dtype": "bfloat16"}, "those of model.path"),
        ("eval_steps", 10, "validation_pairs and validation_tasks"),
        ("use_transformers_continuous_batching", True, "casts the weights that are trained to bfloat16"),
        ("use_transformers_paged", True, "casts the weights that are trained to bfloat16"),
        ("auto_find_batch_size", True, "use micro_batch_rows="),
        ("activation_checkpointing", True, "use activation_checkpointing="),
        ("deepspeed", "ds.json", "use deepspeed=zero1"),
        ("teacher_model_name_or_path", "there", "use teacher.path="),
        ("sync_ref_model", True, "a checkpoint would not hold it"),
        ("hub_token", "secret", "recipes/publish.py"),
    ],
)
def test_a_key_of_no_use_is_refused_with_what_to_use(key: str, value: Any, instead: str) -> None:
    having = [kind for kind in kinds() if key in {field.name for field in dataclasses.fields(kind)}]
    assert having
    for kind in having:
        with pytest.raises(ValueError, match=rf"^trainer\.{key}=.* cannot be passed: ") as told:
            trainer_keys.check(kind, {key: value}, {})
        assert instead in str(told.value)
        assert "secret" not in str(told.value)


def test_every_key_that_is_refused_is_one_of_a_trainer() -> None:
    """So that the list is looked at again when TRL drops one."""
    known = {field.name for kind in kinds() for field in dataclasses.fields(kind) if field.init}
    assert not trainer_keys.INSTEAD.keys() - known


def test_values_that_undo_our_settings_are_refused() -> None:
    grpo = kinds()[2]
    with pytest.raises(ValueError, match=r"generation_kwargs\.temperature cannot be passed: use temperature="):
        trainer_keys.check(grpo, {"generation_kwargs": {"temperature": 0.5}}, {})
    trainer_keys.check(grpo, {"generation_kwargs": {"typical_p": 0.5}}, {})
    for schedule in ("reduce_lr_on_plateau", "greedy"):
        with pytest.raises(ValueError, match=f"lr_scheduler_type={schedule} would never be told a loss"):
            trainer_keys.check(grpo, {"lr_scheduler_type": schedule}, {})


def test_what_changes_the_training_is_passed() -> None:
    given = {"weight_decay": 0.1, "lr_scheduler_type": "cosine", "adam_beta2": 0.95, "max_grad_norm": 0.5}
    for kind in kinds():
        trainer_keys.check(kind, given, {})
