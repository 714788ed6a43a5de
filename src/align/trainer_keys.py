"""Which of a TRL trainer's own settings may be passed through the mapping ``trainer``.

A trainer accepts many that would do nothing in these recipes, or spoil what they promise: a resumed run that is that of
one without a stop, data that TRL does not read itself, checkpoints that are whole. Each of them is refused with what to
use in its place.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

_HELD_OUT = (
    "nothing is evaluated between steps: validation_pairs and validation_tasks measure held-out rows at both ends"
)
_PUBLISHED = "nothing is uploaded while it trains: recipes/publish.py writes what a hub takes"
_METRICS = "metrics go where run.wandb, run.project and run.tensorboard say"
_GIVEN = "model, tokenizer and template are those of model.path, already read when the trainer gets them"
_ORDER = "the order of rows is that of run.seed"
_TEACHER = "use teacher.path="
_SPREAD = "use deepspeed=zero1, zero2 or zero3"
_REFERENCE = "the reference is the model that training starts from, and does not move: a checkpoint would not hold it"
_RESUME = "start the recipe again with the same out: it goes on from the newest whole checkpoint"
_DRAWN = (
    "without DeepSpeed it casts the weights that are trained to bfloat16, where small steps are lost: leave it out, or "
    "use trainer.use_vllm=true"
)

INSTEAD = {
    "num_train_epochs": "use epochs=",
    "truncation_mode": "no row is cut: one of more than max_length tokens is left out and counted",
    "resume_from_checkpoint": _RESUME,
    "ignore_data_skip": f"a resumed run would train on the first rows again. {_RESUME}",
    "save_only_model": f"without its moments and its place no run can go on. {_RESUME}",
    "restore_callback_states_from_checkpoint": f"a stopped run would stop at once again. {_RESUME}",
    "enable_jit_checkpoint": "a signal is heard already: it saves a checkpoint and ends with 75",
    "save_on_each_node": "checkpoints lie in out, which every node sees",
    "auto_find_batch_size": "use micro_batch_rows=, which leaves the global batch as it is",
    "precompute_ref_batch_size": "the reference is measured in batches of micro_batch_rows",
    "padding_free": "TRL pads all the same",
    "use_transformers_continuous_batching": _DRAWN,
    "use_transformers_paged": _DRAWN,
    "transformers_continuous_batching_config": _DRAWN,
    "activation_checkpointing": "use activation_checkpointing=",
    "accelerator_config": "batches are divided by micro_batch_rows and the number of processes",
    "dataloader_drop_last": "every step has global_batch_rows rows",
    "label_smoothing_factor": "no trainer of TRL reads it",
    "local_rank": "the launcher tells each process its rank",
    "deepspeed": _SPREAD,
    "fsdp": _SPREAD,
    "fsdp_config": _SPREAD,
    "parallelism_config": _SPREAD,
    "max_tool_calling_iterations": "tasks have no tools",
    "teacher_model_name_or_path": _TEACHER,
    "teacher_model_revision": _TEACHER,
    "teacher_model_init_kwargs": _TEACHER,
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), _ORDER),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), _REFERENCE),
    **dict.fromkeys(
        (
            "model_init_kwargs",
            "trust_remote_code",
            "router_aux_loss_coef",
            "chat_template_path",
            "chat_template_kwargs",
            "eos_token",
            "pad_token",
        ),
        _GIVEN,
    ),
    "dataset_num_proc": "rows come as ids, of which nothing is left to be made",
    "log_multimodal": "rows are text alone",
    **dict.fromkeys(
        (
            "do_train",
            "do_eval",
            "do_predict",
            "eval_accumulation_steps",
            "eval_delay",
            "eval_do_concat_batches",
            "eval_on_start",
            "eval_steps",
            "eval_use_gather_object",
            "batch_eval_metrics",
            "prediction_loss_only",
            "bf16_full_eval",
            "fp16_full_eval",
            "include_for_metrics",
            "label_names",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "num_generations_eval",
        ),
        _HELD_OUT,
    ),
    **dict.fromkeys(
        (
            "hub_always_push",
            "hub_model_id",
            "hub_private_repo",
            "hub_revision",
            "hub_strategy",
            "hub_token",
            "log_completions_hub_repo",
        ),
        _PUBLISHED,
    ),
    **dict.fromkeys(
        ("run_name", "project", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"), _METRICS
    ),
}
"""What to use in the place of a setting that is refused whatever its value, or why it is of no use."""


def check(kind: type[Any], given: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse settings of ``trainer`` that this trainer does not have, that are decided elsewhere, or of no use here.

    Raises:
        ValueError: naming the first of them, and what is near it or what to use in its place.
    """
    known = {f.name for f in dataclasses.fields(kind) if f.init}
    for key in sorted(given):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"trainer.{key}={given[key]}: {kind.__name__} of TRL has no such setting{hint}")
        if key in INSTEAD:
            raise ValueError(f"trainer.{key}={_shown(key, given[key])} cannot be passed: {INSTEAD[key]}")
        if key in ours:
            raise ValueError(f"trainer.{key}={given[key]} is decided by this recipe's own settings; remove it")
    _check_values(given)


def _check_values(given: Mapping[str, Any]) -> None:
    """Refuse values of settings that may be passed otherwise."""
    if (schedule := given.get("lr_scheduler_type")) in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(f"trainer.lr_scheduler_type={schedule} would never be told a loss: {_HELD_OUT}")
    decided = {"max_new_tokens": "max_answer_tokens", "temperature": "temperature"}
    for key in sorted(given.get("generation_kwargs") or {}):
        if key in decided:
            raise ValueError(f"trainer.generation_kwargs.{key} cannot be passed: use {decided[key]}=")


def _shown(key: str, value: Any) -> Any:
    return "…" if "token" in key and key.startswith("hub") else value
