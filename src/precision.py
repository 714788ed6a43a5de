"""In which arithmetic layers are computed."""

from __future__ import annotations

from enum import StrEnum
from typing import cast

import torch


class Precision(StrEnum):
    """The arithmetic of the layers; trained weights and the optimiser's states are float32 always."""

    auto = "auto"
    """bfloat16 on a GPU, float32 on a CPU."""
    float32 = "float32"
    bfloat16 = "bfloat16"

    def dtype(self, device: torch.device) -> torch.dtype:
        """The torch dtype that it means on ``device``."""
        if self is Precision.auto:
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        return cast(torch.dtype, getattr(torch, self.value))
