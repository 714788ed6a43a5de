"""Settings of an alignment stage, and what they are called by TRL's trainers.

What this project decides has a name of its own here. Everything else that a trainer of TRL can be told passes through
the mapping ``trainer`` as it is, where :mod:`llamita.align.trainer_keys` lets it.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from llamita import runs
from llamita.adapters import LoraConfig
from llamita.align import trainer_keys
from llamita.precision import Precision

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class TrainingConfig:
    """How long to train, on how much at a time, and when to save and log."""

    learning_rate: float = 1e-5
    warmup_steps: int = 0
    epochs: int = 1
    """Passes over the data; a pass has as many steps as it has whole batches."""
    steps: int | None = None
    """Optimiser steps, in the place of ``epochs``."""
    global_batch_rows: int = 64
    """Rows of one optimiser step, over all ranks."""
    micro_batch_rows: int = 1
    """Rows that one rank holds at a time; changes memory and speed, never the result."""
    max_length: int = 4096
    """Tokens of a prompt with its answer; a longer row is left out and counted."""
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    """Newest checkpoints that stay; while the run goes on, at least 2."""
    log_every: int = 1
    max_skipped_in_a_row: int = 5
    """Steps in a row without a finite loss and gradient that end the run."""
    precision: Precision = Precision.auto
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer and compute the rest again in the backward pass."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    """More of TRL's own settings, passed on as they are."""

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be > 0 and finite, got {self.learning_rate}")
        positive = ("epochs", "global_batch_rows", "micro_batch_rows", "checkpoint_every", "log_every")
        for name in (*positive, "max_skipped_in_a_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "keep_checkpoints"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, got {self.max_length}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches of one rank in one step.

        Raises:
            ValueError: the rows cannot be divided so.
        """
        if self.global_batch_rows % (self.micro_batch_rows * world_size):
            raise ValueError(
                f"global_batch_rows must be a multiple of micro_batch_rows * processes = {self.micro_batch_rows} * "
                f"{world_size}, got {self.global_batch_rows}"
            )
        return self.global_batch_rows // (self.micro_batch_rows * world_size)

    def num_steps(self, rows: int, each: int = 1) -> int:
        """Optimiser steps on so many rows, of which each fills ``each`` places of a batch.

        Raises:
            ValueError: there are too few for one step.
        """
        a_pass = rows * each // self.global_batch_rows
        if self.steps is not None and rows:
            return self.steps
        if not a_pass:
            raise ValueError(
                f"global_batch_rows={self.global_batch_rows} is more than the data has: {rows} rows to train on"
                + (f", {each} places each" if each > 1 else "")
            )
        return self.epochs * a_pass


MAY_CHANGE = (
    "micro_batch_rows",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "max_skipped_in_a_row",
    "activation_checkpointing",
)
"""Settings that a restart may change: they move speed, memory and bookkeeping, not what is learnt."""


def order(rows: int, wanted: int, seed: int) -> list[int]:
    """Which row stands at each of ``wanted`` places of a whole run: pass after pass, each in an order of its own.

    A pure function of its arguments, so that a restart, on however many processes, goes on where the run was.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[int] = []
    while len(found) < wanted:
        found += torch.randperm(rows, generator=generator).tolist()
    return found[:wanted]


def adapters(lora: LoraConfig, model: Any) -> Any:
    """As peft wants them for a trainer of ``model``; ``None`` without any.

    What is trained whole is a copy beside the original, so that a model with its adapters switched off, which a trainer
    takes as its reference, is the one that training began with. The two copies of a tied matrix are one again. The head
    of a reward model is new and always trained.
    """
    if not lora.rank:
        return None
    if hasattr(model, "score"):
        whole = ["score", "embed_tokens"] if lora.embeddings else ["score"]
        return lora.of_peft(modules_to_save=whole, task_type="SEQ_CLS")
    if not lora.embeddings:
        return lora.of_peft(task_type="CAUSAL_LM")
    is_tied = model.config.tie_word_embeddings
    whole = ["embed_tokens"] if is_tied else ["embed_tokens", "lm_head"]
    return lora.of_peft(modules_to_save=whole, ensure_weight_tying=is_tied, task_type="CAUSAL_LM")


def check_installed() -> None:
    """Raise ``ValueError`` where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        raise ValueError("this recipe needs TRL, which is not installed: pip install 'llamita[align]'")


def settings_of(
    config: TrainingConfig,
    folder: Path,
    *,
    steps: int,
    seed: int,
    world_size: int,
    deepspeed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What TRL is told by our settings, whichever the trainer."""
    on_cpu = not torch.cuda.is_available()
    half = config.precision.dtype(torch.device("cpu" if on_cpu else "cuda")) is torch.bfloat16
    told: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": config.learning_rate,
        "warmup_steps": config.warmup_steps,
        "max_steps": steps,
        "per_device_train_batch_size": config.micro_batch_rows,
        "per_device_eval_batch_size": config.micro_batch_rows,
        "gradient_accumulation_steps": config.micro_batches(world_size),
        "gradient_checkpointing": config.activation_checkpointing,
        "bf16": half,
        "fp16": False,
        "seed": seed,
        "data_seed": seed,
        "logging_strategy": "steps",
        "logging_steps": config.log_every,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every,
        "save_total_limit": None,  # ours are removed only once the next is whole
        "eval_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": int(runs.COLLECTIVE_TIMEOUT.total_seconds()),
        "dataloader_pin_memory": not on_cpu,
        "use_cpu": on_cpu,
        "disable_dropout": not config.lora.dropout,  # no other layer of a Llama drops anything
    }
    if deepspeed is not None:
        told |= {"deepspeed": dict(deepspeed), "accelerator_config": {"use_configured_state": True}}
    elif on_cpu and "RANK" in os.environ:
        told["ddp_backend"] = "gloo"  # not told, every process of a launch on CPUs believes that it is alone
    return told


def _meet_for_deepspeed() -> None:
    """Make the process group: transformers does not tell DeepSpeed the backend, without which CPUs never meet."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="nccl" if torch.cuda.is_available() else "gloo", timeout=runs.COLLECTIVE_TIMEOUT)
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


@contextmanager
def not_yet_spread(arguments: Any) -> Iterator[None]:
    """Let a model be used that is still whole on every rank, though the trainer will spread its weights."""
    deepspeed = getattr(arguments, "hf_deepspeed_config", None)
    if deepspeed is None:
        yield
        return
    unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        set_hf_deepspeed_config(deepspeed)  # type: ignore[no-untyped-call]


@contextmanager
def weights_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Let a model have its weights in ``dtype`` for a while; what they were waits in the memory of the host."""
    kept = []
    for parameter in model.parameters():
        if parameter.dtype is not dtype:
            kept.append((parameter, parameter.device, parameter.data.cpu()))
            parameter.data = parameter.data.to(dtype)
    try:
        yield
    finally:
        for parameter, device, data in kept:
            parameter.data = data.to(device)


def arguments(kind: type[Any], given: Mapping[str, Any], ours: Mapping[str, Any]) -> Any:
    """TRL's own object of settings; makes the process group, so every rank must come here.

    Raises:
        ValueError: as :func:`trainer_keys.check`, or TRL refuses a value.
    """
    trainer_keys.check(kind, given, ours)
    if "deepspeed" in ours:
        _meet_for_deepspeed()
    # TRL's and transformers' own calls of what they are about to rename.
    for name in ("is_gradient_checkpointing", "gradient_checkpointing"):
        warnings.filterwarnings("ignore", message=f".*`{name}.*deprecated", category=FutureWarning)
    try:
        made = kind(**ours, **given)
    except TypeError as error:
        raise ValueError(f"{kind.__name__} of TRL refuses trainer={dict(given)}: {error}") from error
    return made
