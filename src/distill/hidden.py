"""Matching of hidden states: some layers of the student are pulled towards the layers of the teacher that they were.

A learned linear projection P for each matched layer carries a student's state to the teacher's width (Muralidharan et
al., 2024, arXiv:2407.14679, the loss on intermediate states). Both states are divided by their root mean square
first, as the norm in front of the next layer would: otherwise a few channels, hundreds of times larger than the rest,
are all that is matched.

Shape letters: B = rows, S = positions, N = supervised positions, H = hidden size of the student, E = of the teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

CHUNK_POSITIONS = 2048
"""Whose projected states exist at a time: 64 MiB in float32 at 8,192 channels."""


class Distance(StrEnum):
    """Of a projected state P s and the teacher's t, both divided by their root mean square, per position."""

    mse = "mse"
    """The mean over channels of (P s - t) squared."""
    cosine = "cosine"
    """1 - cos(P s, t)."""


@dataclass(kw_only=True)
class HiddenConfig:
    """How much hidden states count, and which."""

    weight: float = 0.0
    """Weight h in loss + h times the mean distance over the matched layers; 0: hidden states are not looked at."""
    distance: Distance = Distance.mse
    layers: list[int] = field(default_factory=list)
    """Layers of the student, counted from 0; each is matched with the teacher's layer that it was."""
    teacher: str | None = None
    """Whose states; unset: the only teacher's."""
    plan: Path | None = None
    """The pruned model whose plan says which layer was which; unset: the student's own directory."""

    def __post_init__(self) -> None:
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"loss.hidden.weight must be >= 0 and finite, got {self.weight}")
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0:
            raise ValueError(f"loss.hidden.layers must be different layers of the student from 0, got {self.layers}")
        if self.weight and not self.layers:
            raise ValueError(f"loss.hidden.weight={self.weight} needs loss.hidden.layers, got none")
        if not self.weight and (self.layers or self.teacher or self.plan):
            raise ValueError("loss.hidden.layers, teacher and plan need loss.hidden.weight above 0, got 0")

    def pairs(self, layer_map: Sequence[int]) -> dict[int, int]:
        """The matched layers, student's to teacher's; ``layer_map`` has the teacher's layer for each of the student's.

        Raises:
            ValueError: the student has no such layer.
        """
        if beyond := [layer for layer in self.layers if layer >= len(layer_map)]:
            raise ValueError(f"loss.hidden.layers: the student has layers 0..{len(layer_map) - 1}, got {beyond}")
        return {layer: layer_map[layer] for layer in self.layers}


@contextmanager
def captured(model: LlamaForCausalLM, layers: Sequence[int]) -> Iterator[list[Tensor]]:
    """A list that, behind the model's forward pass, holds what each of these layers gave.

    The hooks are gone before the backward pass, where activation checkpointing runs the layers again.
    """
    states: list[Tensor] = []
    with ExitStack() as hooks:
        found: dict[int, Tensor] = {}
        for layer in layers:
            hooks.enter_context(model.model.layers[layer].register_forward_hook(_keep(found, layer)))
        yield states
        states += [found[layer] for layer in layers]


def _keep(found: dict[int, Tensor], layer: int) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> None:
        found[layer] = output

    return hook


class Matching(nn.Module):
    """The projections, and the distance that they leave; trained with the student and not published."""

    def __init__(
        self, config: HiddenConfig, layers: Sequence[int], student_size: int, teacher_size: int, *, index: int = 0
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        self.index = index
        """Which of the teachers gives the states."""
        self.weight = config.weight
        self.distance = config.distance
        self.projections = nn.ModuleList(nn.Linear(student_size, teacher_size, bias=False) for _ in layers)
        for projection in self.projections:
            assert isinstance(projection, nn.Linear)
            nn.init.orthogonal_(projection.weight)
            if student_size == teacher_size:
                nn.init.eye_(projection.weight)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], picked_BS: Tensor) -> Tensor:
        """The mean distance over layers, summed over the positions in ``picked_BS`` ``[B, S - 1]``."""
        if len(teacher) != len(self.layers):
            raise ValueError(f"the teacher gives the states of {len(teacher)} layers, {len(self.layers)} are matched")
        total = torch.zeros((), dtype=torch.float32, device=picked_BS.device)
        for projection, mine, theirs in zip(self.projections, student, teacher, strict=True):
            mine_NH, theirs_NE = (_picked(states, picked_BS) for states in (mine, theirs))
            # A micro-batch without labels has one empty chunk: every parameter gets a gradient on every rank.
            for start in range(0, max(1, len(mine_NH)), CHUNK_POSITIONS):
                part = slice(start, start + CHUNK_POSITIONS)
                total = total + checkpoint(
                    self._distance, projection, mine_NH[part], theirs_NE[part], use_reentrant=False
                )
        return total / len(self.layers)

    def _distance(self, projection: nn.Linear, mine_NH: Tensor, theirs_NE: Tensor) -> Tensor:
        projected: Tensor = projection(_normed(mine_NH).to(projection.weight.dtype)).float()
        goal = _normed(theirs_NE)
        match self.distance:
            case Distance.mse:
                return (projected - goal).square().mean(-1).sum()
            case Distance.cosine:
                return (1 - functional.cosine_similarity(projected, goal, dim=-1)).sum()


def _picked(states: Tensor, picked_BS: Tensor) -> Tensor:
    """States of the positions that predict a label; FlashAttention's rows are joined to one."""
    rows, length = picked_BS.shape
    return states.reshape(rows, length + 1, -1)[:, :-1][picked_BS]


def _normed(states: Tensor) -> Tensor:
    states = states.float()
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


def layer_map(num_student_layers: int, num_teacher_layers: int, plan: Mapping[str, Tensor] | None) -> list[int]:
    """The teacher's layer for each of the student's, from the tensors of the plan that cut it.

    Raises:
        ValueError: there is no plan and the numbers of layers differ, or it is of other numbers.
    """
    if plan is None:
        if num_student_layers != num_teacher_layers:
            raise ValueError(
                f"loss.hidden needs to know which of the teacher's {num_teacher_layers} layers the student's "
                f"{num_student_layers} were, and its directory has no pruning plan: set loss.hidden.plan"
            )
        return list(range(num_student_layers))
    layers: list[int] = plan["layers"].tolist()
    if len(layers) != num_student_layers or max(layers) >= num_teacher_layers:
        raise ValueError(
            f"loss.hidden.plan keeps layers {layers}, the student has {num_student_layers} and the teacher "
            f"{num_teacher_layers}: it is the plan of others"
        )
    return layers
