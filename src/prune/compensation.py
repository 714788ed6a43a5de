"""Which parts of a cut model are mended, and how."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Prefix(StrEnum):
    """What a layer reads while it is fitted."""

    cut = "cut"
    """What the layers before it, cut and mended, write: their errors are seen and made up for."""
    whole = "whole"
    """What the whole model's layers write."""


@dataclass(kw_only=True)
class CompensationConfig:
    """Which parts of a cut model are fitted to the whole one on the calibration text."""

    gains: bool = True
    """One factor for each norm, so that the cut stream leaves it as large as the whole one did."""
    readers: bool = True
    """Least squares: one map from the cut norm's output to the whole one's, folded into all that reads it."""
    values: bool = True
    """Where heads narrow, their values by singular value decomposition instead of a choice of channels."""
    attention_steps: int = 200
    """Where heads narrow: steps of queries and keys on the divergence of each head's attention."""
    writers: bool = True
    """Least squares: o_proj and down_proj write what the stream lacks."""
    layer_steps: int = 200
    """Steps of all of a layer's weights on the squared error of its output."""
    head_steps: int = 200
    """Steps of the last layer, the final norm and an untied head on the divergence of the next-token distributions."""
    tied_steps: int = 200
    """Where input and output matrix are one: steps of it and the final norm on the same, through all layers."""
    prefix: Prefix = Prefix.cut
    ridge: float = 1e-4
    """Damping of least squares, in means of the inputs' second moments."""
    learning_rate: float = 0.02
    """Of all steps: how far a tensor moves at the peak, in units of its own root mean square."""

    def __post_init__(self) -> None:
        for name in ("attention_steps", "layer_steps", "head_steps", "tied_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"compensation.{name} must be at least 0, got {getattr(self, name)}")
        for name in ("ridge", "learning_rate"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"compensation.{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def wanted(self) -> bool:
        """Whether anything is mended."""
        switches = (self.gains, self.readers, self.values, self.writers)
        return any(switches) or any((self.attention_steps, self.layer_steps, self.head_steps, self.tied_steps))
