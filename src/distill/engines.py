"""How one optimiser step is taken: by one process, by several with gradients averaged, or by DeepSpeed ZeRO.

The loss is computed inside the forward of one module, which is called through its wrapper: only so are gradients
reduced, and weights that ZeRO-3 spreads over ranks gathered.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llamita.distill import hidden, lora, optim, saved, zero
from llamita.distill.losses import LossConfig, Targets, TeacherStates, distillation_loss, supervised
from llamita.distill.state import COLLECTIVE_TIMEOUT
from llamita.distill.teachers import Attention, Batch, last_hidden


class Precision(StrEnum):
    """The arithmetic of the student's layers; weights of the optimiser are float32 always."""

    auto = "auto"
    """bfloat16 on a GPU, float32 on a CPU."""
    float32 = "float32"
    bfloat16 = "bfloat16"

    def dtype(self, device: torch.device) -> torch.dtype:
        """The torch dtype that it means on ``device``."""
        if self is Precision.auto:
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return cast(torch.dtype, getattr(torch, self.value))


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
        InitProcessGroupKwargs(backend=backend, timeout=COLLECTIVE_TIMEOUT),
    ]
    # mixed_precision stays "no" whatever the launcher's file says: the student sets its own autocast.
    if deepspeed.stage == 0:
        return Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=handlers)
    os.environ.pop("ACCELERATE_USE_CPU", None)  # it would keep accelerate from DeepSpeed
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(_free_port())
    # DeepSpeed's own calls, once per collective.
    warnings.filterwarnings("ignore", message=".*torch.distributed.*_tensor. is deprecated", category=FutureWarning)
    if on_cpu:
        _use_gloo_alone()
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


@dataclass(frozen=True)
class MicroBatch:
    """What one forward needs, on the device."""

    batch: Batch
    mask: Tensor | None
    teachers: list[Targets]


class LossHead(nn.Linear):
    """The student's output matrix, with the loss in its forward, where ZeRO-3 has gathered it."""

    @classmethod
    def replace(cls, student: LlamaForCausalLM) -> None:
        """Put the loss in the place of ``student.lm_head``, on the same parameter."""
        weight = student.lm_head.weight
        with torch.device("meta"):
            head = cls(weight.shape[1], weight.shape[0], bias=False)
        head.weight = weight
        student.lm_head = head

    def forward(self, input: Tensor, *loss: Any, **settings: Any) -> Any:  # noqa: A002  (the parent's name)
        """Logits of hidden states; with the loss's other arguments, what :func:`distillation_loss` returns."""
        if not loss:
            return super().forward(input)
        return distillation_loss(input, self.weight, *loss, **settings)


class Student(nn.Module):
    """The student with its loss: one forward gives the summed loss and the summed statistics of a micro-batch."""

    def __init__(
        self,
        student: LlamaForCausalLM,
        loss: LossConfig,
        dtype: torch.dtype,
        *,
        autocast: bool,
        vocabulary: int | None = None,
        matching: hidden.Matching | None = None,
    ) -> None:
        super().__init__()
        LossHead.replace(student)
        self.student = student
        self.matching = matching
        self.loss = loss
        self.dtype = dtype
        self.autocast = autocast
        self.vocabulary = vocabulary

    def forward(self, work: MicroBatch, measure: bool) -> tuple[Tensor, Tensor]:
        labels, matching = work.batch["labels"], self.matching
        with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            with hidden.captured(self.student, matching.layers if matching else ()) as layers:
                last = last_hidden(self.student, work.batch, work.mask)
            if matching is not None:
                teacher = work.teachers[matching.index]
                assert isinstance(teacher, TeacherStates)
                distance = matching(layers, teacher.layers, supervised(labels))
        loss, sums = self.student.lm_head(
            last,
            labels,
            work.teachers,
            self.loss,
            compute_dtype=self.dtype,
            measure=measure,
            vocabulary=self.vocabulary,
        )
        if matching is not None:
            loss = loss + matching.weight * distance
            sums = torch.cat([sums, distance.detach().to(sums.dtype)[None]])
        return loss, sums


class Engine(Protocol):
    """Takes optimiser steps on the student, and can save and load what they depend on."""

    checkpoint_bytes: int
    """What all ranks together write into a checkpoint, at most, without the names."""
    extras: list[str]
    """Names of the sums that follow those of the divergence."""

    def accumulate(self, work: MicroBatch, *, scale: float, last: bool, measure: bool) -> Tensor:
        """Add the gradient of ``scale`` times the summed loss; returns loss and statistics, unscaled."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clip and apply the gradient, unless its norm is not finite; returns the norm before clipping."""
        ...

    def measure(self, work: MicroBatch) -> Tensor:
        """Loss and statistics without gradient."""
        ...

    def save(self, folder: Path) -> list[str]:
        """Write weights and moments into ``folder``; every rank calls this, and gets the names of what it wrote."""
        ...

    def load(self, folder: Path) -> None:
        """Continue from what :meth:`save` wrote."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights by their names in a Hugging Face file; every rank must iterate to the end."""
        ...


def build(
    accelerator: Accelerator,
    student: LlamaForCausalLM,
    loss: LossConfig,
    optim_config: optim.OptimConfig,
    config: EngineConfig,
    *,
    vocabulary: int | None = None,
    matching: hidden.Matching | None = None,
) -> Engine:
    """The engine for this launch. ``student``, float32, is taken over: moved to the device, its head replaced.

    Rows of heads beyond ``vocabulary``, where it is given, are padding and no ids.
    """
    sharded = accelerator.deepspeed_plugin is not None
    dtype = config.precision.dtype(accelerator.device)
    if config.activation_checkpointing:
        with warnings.catch_warnings():
            # transformers 5.23 has another name for it, which 5.17 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            student.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
    if config.compile:
        student.model.compile()
    student.train()
    autocast = dtype is torch.bfloat16 and not sharded
    module = Student(student, loss, dtype, autocast=autocast, vocabulary=vocabulary, matching=matching)
    if sharded:
        return Sharded(accelerator, module, optim_config)
    return Replicated(accelerator, module, optim_config)


def _with_loss(loss: Tensor, sums: Tensor) -> Tensor:
    return torch.cat([loss.detach().to(sums.dtype)[None], sums])


def _poisoned(loss: Tensor, scale: float) -> Tensor:
    """The loss to differentiate.

    A loss that is not finite makes the whole gradient so: then the one global norm decides for every rank.
    """
    return loss * (scale + 0 * loss.detach())


class Replicated:
    """Every rank holds the whole student; gradients are averaged by ``DistributedDataParallel``."""

    def __init__(self, accelerator: Accelerator, module: Student, config: optim.OptimConfig) -> None:
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers, 2.11 does not know the new name.
            warnings.simplefilter("ignore", FutureWarning)
            self.module: nn.Module = accelerator.prepare_model(module.to(accelerator.device))
        self.student = module.student
        self.extras = _extras(module)
        self.checkpoint_bytes = 3 * 4 * _numel(_trained(module))
        self.optimizer = optim.adamw(module, config)
        self.trained = _trained(module)
        self.config = config
        self.main = accelerator.is_main_process

    def accumulate(self, work: MicroBatch, *, scale: float, last: bool, measure: bool) -> Tensor:
        parallel = isinstance(self.module, nn.parallel.DistributedDataParallel)
        with self.module.no_sync() if parallel and not last else nullcontext():  # type: ignore[operator, unused-ignore]
            loss, sums = self.module(work, measure)
            torch.autograd.backward(_poisoned(loss, scale))
        return _with_loss(loss, sums)

    def step(self, learning_rate: float) -> float:
        norm = optim.clip(self.trained.values(), self.config.clip_norm)
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def measure(self, work: MicroBatch) -> Tensor:
        with _evaluating(self.student):
            return _with_loss(*self.module(work, True))

    def save(self, folder: Path) -> list[str]:
        if not self.main:
            return []
        return saved.write(folder, self.trained, {name: self.optimizer.state[p] for name, p in self.trained.items()})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        found = saved.Saved(folder)
        found.check(list(self.trained))
        for name, parameter in self.trained.items():
            parameter.copy_(found.weight(name))
            # Copies: a mapped file can be neither written to nor removed on every system.
            moments = {key: value.to(parameter.device, copy=True) for key, value in found.moments(name).items()}
            self.optimizer.state[parameter] = moments

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from lora.tensors(self.student)


class Sharded:
    """DeepSpeed ZeRO: optimiser states, gradients and weights are spread over ranks as its stage says."""

    def __init__(self, accelerator: Accelerator, module: Student, config: optim.OptimConfig) -> None:
        self.student = module.student
        self.extras = _extras(module)
        self.rank = accelerator.process_index
        self.world = accelerator.num_processes
        self.trained = _trained(module)
        self.checkpoint_bytes = 3 * 4 * _numel(self.trained)
        self.engine, _ = accelerator.prepare(module, optim.adamw(module, config))
        # The engine casts every buffer too, and rotary frequencies in bfloat16 are wrong from the third digit on.
        rotary = type(self.student.model.rotary_emb)(self.student.config)
        self.student.model.rotary_emb = rotary.to(accelerator.device)

    def accumulate(self, work: MicroBatch, *, scale: float, last: bool, measure: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        loss, sums = self.engine(work, measure)
        # DeepSpeed's own division by the number of micro-batches would be a second one.
        self.engine.backward(_poisoned(loss, scale), scale_wrt_gas=False)
        return _with_loss(loss, sums)

    def step(self, learning_rate: float) -> float:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    @torch.no_grad()
    def measure(self, work: MicroBatch) -> Tensor:
        with _evaluating(self.student):
            return _with_loss(*self.engine(work, True))

    def save(self, folder: Path) -> list[str]:
        # Every rank gathers every parameter, and keeps those that it writes: no rank fails before the last gather.
        weights, moments = zero.read(self.engine, self.trained, self.rank, self.world)
        return saved.write(folder, weights, moments, part=self.rank)

    def load(self, folder: Path) -> None:
        zero.write(self.engine, self.trained, saved.Saved(folder))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        yield from lora.tensors(self.student, deepspeed.zero.GatheredParameters)


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What the optimiser moves and a checkpoint holds, by name; the rest is as the student's directory has it."""
    named = module.named_parameters()
    return {name.removeprefix("student."): parameter for name, parameter in named if parameter.requires_grad}


def _extras(module: Student) -> list[str]:
    return [] if module.matching is None else ["hidden"]


def _numel(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, which would also draw from the random states that training goes on with."""
    module.train(False)
    try:
        yield
    finally:
        module.train()
