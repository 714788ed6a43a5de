"""What is trained of a model whose own weights rest: low-rank adapters, and perhaps embedding and output matrix.

A projection W with an adapter computes W x + (alpha / rank) B A x, where A is ``[rank, in]``, and B ``[out, rank]``
begins at zero (Hu et al., 2022, arXiv:2106.09685, section 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llamita.shapes import LlamaShape

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
    """Whether adapters are trained in the place of a model's weights, and how large they are."""

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
        if self.alpha is not None and not 0 < self.alpha < math.inf:
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
        """Values that are trained of a model of that shape; 0 without adapters."""
        sizes = {name.split(".")[-2]: size for name, size in shape.layer_tensors().items() if "proj" in name}
        adapters = shape.num_hidden_layers * self.rank * sum(sum(sizes[target.value]) for target in self.targets)
        ends = [math.prod(size) for name, size in shape.tensors().items() if name in ENDS]
        return adapters + (sum(ends) if self.embeddings else 0)

    def of_peft(self, **more: Any) -> Any:
        """The adapters as peft wants them described, with ``more`` of its own settings."""
        import peft

        return peft.LoraConfig(
            r=self.rank,
            lora_alpha=2 * self.rank if self.alpha is None else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=[target.value for target in self.targets],
            bias="none",
            **more,
        )
