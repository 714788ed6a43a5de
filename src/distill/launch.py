"""The processes of a training run: what each of them holds and computes, and how they find each other."""

from __future__ import annotations

import copy
import importlib.util
import os
import socket
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs

from llamita import runs
from llamita.distill.teachers import Attention
from llamita.precision import Precision


@dataclass(kw_only=True)
class DeepSpeedConfig:
    """Which ZeRO stage spreads the student over ranks, if any."""

    stage: int = 0
    """0: no DeepSpeed; 1: optimiser states; 2: and gradients; 3: and weights (Rajbhandari et al., 2020,
    arXiv:1910.02054)."""
    config: dict[str, Any] = field(default_factory=dict)
    """More of DeepSpeed's own configuration, passed on as it is."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.stage must be 0, 1, 2 or 3, got {self.stage}")
        ours = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer"}
        ours |= {"scheduler", "gradient_clipping", "bf16", "fp16", "data_types", "zero_allow_untested_optimizer"}
        ours |= {"steps_per_print", "zero_optimization.stage", "zero_optimization.compute_grad_norm"}
        given = {*self.config, *(f"zero_optimization.{key}" for key in self.config.get("zero_optimization", {}))}
        if taken := sorted(ours & given):
            raise ValueError(f"deepspeed.config must not hold {', '.join(taken)}: other settings decide that")
        if self.config and self.stage == 0:
            raise ValueError(f"deepspeed.config={self.config} needs deepspeed=zero1, zero2 or zero3, got none")


@dataclass(kw_only=True)
class EngineConfig:
    """How much is held at a time, and how it is computed."""

    global_batch_rows: int = 8
    """Rows of one optimiser step, over all ranks."""
    micro_batch_rows: int = 8
    """Rows that one rank holds at a time; changes memory and speed, never the result."""
    precision: Precision = Precision.auto
    attention: Attention = Attention.sdpa
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer and compute the rest again in the backward pass."""
    compile: bool = False
    """Let torch compile the student's layers; not with DeepSpeed."""

    def __post_init__(self) -> None:
        for name in ("global_batch_rows", "micro_batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

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


def check_launch(config: EngineConfig, deepspeed: DeepSpeedConfig) -> None:
    """Find settings that do not go together, or not with this launch, before anything is read.

    Raises:
        ValueError: naming them.
    """
    if config.compile and deepspeed.stage:
        raise ValueError("compile=true does not go with deepspeed: its hooks break the graph; choose deepspeed=none")
    if config.compile and config.attention is Attention.documents:
        raise ValueError(
            "compile=true does not go with attention=documents: every layout of documents would be compiled anew; "
            "choose attention=sdpa or flash_attention_2"
        )
    for kind, allowed in (("DEEPSPEED", deepspeed.stage > 0), ("FSDP", False)):
        if not allowed and os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() in ("1", "true"):
            raise ValueError(
                f"accelerate was told to use {kind} (ACCELERATE_USE_{kind}), which this recipe does not take from "
                "there: launch without it and choose deepspeed=zero1, zero2 or zero3"
            )
    if config.attention is Attention.flash_attention_2:
        lacks = None
        if not torch.cuda.is_available():
            lacks = "a GPU"
        elif config.precision is Precision.float32:
            lacks = "precision=bfloat16, got float32"
        elif importlib.util.find_spec("flash_attn") is None:
            lacks = "the package flash-attn, which is not installed"
        if lacks:
            raise ValueError(f"attention=flash_attention_2 needs {lacks}; attention=sdpa runs everywhere")


def new_accelerator(config: EngineConfig, deepspeed: DeepSpeedConfig, *, clip_norm: float) -> Accelerator:
    """The processes of this launch; makes the process group, so every rank must come here."""
    on_cpu = not torch.cuda.is_available()
    # Not told the backend, accelerate lets every process of a launch on CPUs believe that it is alone.
    backend = None if "RANK" not in os.environ and deepspeed.stage == 0 else "gloo" if on_cpu else "nccl"
    handlers: list[Any] = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
        InitProcessGroupKwargs(backend=backend, timeout=runs.COLLECTIVE_TIMEOUT),
    ]
    # mixed_precision stays "no" whatever the launcher's file says: the student sets its own autocast.
    if deepspeed.stage == 0:
        return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
    prepare_for_deepspeed()
    micro_batches = config.micro_batches(world_size())
    spread = {"stage": deepspeed.stage, **deepspeed.config.get("zero_optimization", {})}
    half = config.precision.dtype(torch.device("cpu" if on_cpu else "cuda")) is torch.bfloat16
    settings = copy.deepcopy(deepspeed.config) | {
        "zero_optimization": spread,
        "train_micro_batch_size_per_gpu": config.micro_batch_rows,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    # Where states are offloaded, DeepSpeed would compile an AdamW of its own at the start, which takes minutes, a CUDA
    # toolkit, and leaves a lock behind when it is killed. torch's fused one runs on a CPU as well.
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    plugin = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
    return Accelerator(
        mixed_precision="bf16" if half else "no",
        deepspeed_plugin=plugin,
        gradient_accumulation_steps=micro_batches,
        kwargs_handlers=handlers,
    )


def prepare_for_deepspeed() -> None:
    """Set what DeepSpeed looks for in the environment, before anything of it is made."""
    os.environ.pop("ACCELERATE_USE_CPU", None)  # it would keep accelerate from DeepSpeed
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    # DeepSpeed's own calls, once per collective.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*_tensor. is deprecated", category=FutureWarning)
    if not torch.cuda.is_available():
        _use_gloo_alone()


def _use_gloo_alone() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives.

    On a CPU it runs a C++ compiler at every first start, and a start that was killed meanwhile leaves a lock on which
    all later ones wait for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def world_size() -> int:
    """How many processes this launch has, before they know each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
