"""How one optimiser step is taken: by one process, by several with gradients averaged, or by DeepSpeed ZeRO.

The loss is computed inside the forward of one module, which is called through its wrapper: only so are gradients
reduced, and weights that ZeRO-3 spreads over ranks gathered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llamita.distill import hidden, lora, optim, saved, zero
from llamita.distill.launch import EngineConfig
from llamita.distill.losses import LossConfig, Targets, TeacherStates, distillation_loss, supervised
from llamita.distill.teachers import Batch, last_hidden


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
