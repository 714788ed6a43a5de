"""Low-rank adapters: a student whose own weights rest while a small correction of each projection is learnt.

A projection W with an adapter computes W x + (alpha / rank) B A x, where A is ``[rank, in]``, and B ``[out, rank]``
begins at zero (Hu et al., 2022, arXiv:2106.09685, section 4.1). Beside weights that rest, of 2 bytes each on a GPU, an
adapter of rank r holds r (in + out) values with their gradients and moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llamita.shapes import LlamaShape

ADAPTER = "default"
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


class Projection(StrEnum):
    """A matrix of a decoder layer, by its name in transformers."""

    q_proj = "q_proj"
    k_proj = "k_proj"
    v_proj = "v_proj"
    o_proj = "o_proj"
    gate_proj = "gate_proj"
    up_proj = "up_proj"
    down_proj = "down_proj"


@dataclass(kw_only=True)
class LoraConfig:
    """Whether adapters are trained in the place of the student's weights, and how large they are."""

    rank: int = 0
    """0: no adapters; all weights are trained."""
    alpha: float | None = None
    """The correction is multiplied by alpha / rank; unset: twice the rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are set to zero in training."""
    targets: list[Projection] = field(default_factory=lambda: list(Projection))
    """The projections that get one; unset: all of attention and MLP."""
    embeddings: bool = False
    """Train embedding and output matrix too, whole: a base model has hardly seen the tokens around a turn, and adapters
    of its layers cannot teach it to say them."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be >= 0, got {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ValueError(f"lora.alpha must be > 0 and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in 0..1, 1 excluded, got {self.dropout}")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            allowed = ", ".join(Projection)
            raise ValueError(f"lora.targets must name each of {allowed} once at most, got {self.targets}")
        meant = self.alpha is not None or self.dropout or self.embeddings or set(self.targets) != set(Projection)
        if not self.rank and meant:
            raise ValueError("lora.alpha, dropout, targets and embeddings need lora.rank, got 0")

    def num_parameters(self, shape: LlamaShape) -> int:
        """Values that are trained of a student of that shape; 0 without adapters."""
        sizes = {name.split(".")[-2]: size for name, size in shape.layer_tensors().items() if "proj" in name}
        adapters = shape.num_hidden_layers * self.rank * sum(sum(sizes[target.value]) for target in self.targets)
        ends = [math.prod(size) for name, size in shape.tensors().items() if name in ENDS]
        return adapters + (sum(ends) if self.embeddings else 0)


def adapt(student: LlamaForCausalLM, config: LoraConfig, *, seed: int) -> None:
    """Let the student's weights rest and put float32 adapters drawn from ``seed`` beside its projections."""
    import peft

    torch.manual_seed(seed)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank if config.alpha is None else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=[target.value for target in config.targets],
        bias="none",
    )
    peft.inject_adapter_in_model(settings, student, adapter_name=ADAPTER)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_trained(name, config))
        if is_trained(name, config):
            parameter.data = parameter.data.float()
    for layer in student.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            # Autocast chooses the precision of the products; a float32 copy of every input would be kept for nothing.
            layer.cast_input_dtype_enabled = False


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_trained(name: str, config: LoraConfig) -> bool:
    """Whether a parameter of that name is trained beside the weights that rest."""
    return is_adapter(name) or (config.embeddings and name in ENDS)


def _together(_: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    return nullcontext()


class Merged:
    """A student with adapters as it is published: one matrix where an adapter corrects another."""

    def __init__(self, student: LlamaForCausalLM) -> None:
        self._student = student

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As the function of that name."""
        return tensors(self._student)


@torch.no_grad()
def tensors(
    student: LlamaForCausalLM, gathered: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = _together
) -> Iterator[tuple[str, Tensor]]:
    """The student's weights by their names in a Hugging Face file, adapters added to what they correct.

    W + (alpha / rank) B A is computed in float32 and returned so: whoever stores it rounds once. ``gathered`` makes
    parameters whole that are spread over ranks, as long as its context is open; every rank must iterate to the end.
    """
    for name, parameter in student.named_parameters():
        if is_adapter(name):
            continue
        owner, found, last = name.partition(".base_layer.")
        if not found:
            with gathered([parameter]):
                tensor = parameter.detach().clone()
            yield name, tensor
            continue
        layer: Any = student.get_submodule(owner)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        with gathered([parameter, a, b]):
            merged = torch.addmm(parameter.float(), b.float(), a.float(), alpha=layer.scaling[ADAPTER])
        yield f"{owner}.{last}", merged
