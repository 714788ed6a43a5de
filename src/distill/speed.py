"""How fast a run is: operations that its models need per second and device, and their share of what the device can do.

Operations are counted from shapes, not measured: two per multiply-add of every projection, and of attention only what
documents and causality leave (position p of a document attends to p + 1/2 tokens on average over a row, so that a row
of one document of S tokens has S / 2). The head counts where a label is predicted. What activation checkpointing
computes again is no progress and is not counted (model FLOPs utilisation; Chowdhery et al., 2022, arXiv:2204.02311,
appendix B).
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llamita.shapes import LlamaShape

PEAKS = {
    "A100": 311.9,
    "H100 80GB HBM3": 989.4,
    "H100 PCIe": 756.5,
    "H100 NVL": 835.5,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "L40S": 362.1,
    "B200": 2250.0,
}
"""Dense bfloat16 TFLOP/s by a part of the name that CUDA gives a device (NVIDIA's data sheets, without sparsity)."""


def peak_tflops(device_name: str) -> float | None:
    """The peak of a device; ``None`` where it is not known, as of any CPU. The longest part that fits decides."""
    fitting = [part for part in PEAKS if part.lower() in device_name.lower()]
    return PEAKS[max(fitting, key=len)] if fitting else None


@dataclass(frozen=True)
class Tally:
    """What of a batch decides its operations; sums over rows, micro-batches and ranks."""

    tokens: float = 0.0
    context_tokens: float = 0.0
    """Over all tokens, how many each attends to."""
    supervised: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.tokens + other.tokens,
            self.context_tokens + other.context_tokens,
            self.supervised + other.supervised,
        )

    def forward_flops(self, shape: LlamaShape) -> float:
        """Operations of a model's forward pass, its head at the supervised tokens only."""
        if not self.tokens:
            return 0.0
        layers = self.tokens * shape.forward_flops_per_token(self.context_tokens / self.tokens, head=False)
        return layers + 2.0 * self.supervised * (shape.output_rows or shape.vocab_size) * shape.hidden_size


@dataclass(frozen=True, kw_only=True)
class Meter:
    """Whose operations are counted, and against what."""

    student: LlamaShape
    teachers: Sequence[LlamaShape] = ()
    """Those that run in this job; one that is read from a cache does not."""
    adapter_parameters: int = 0
    """Of a student whose own weights rest; 0: they are all trained."""
    peak_tflops: float | None = None
    """Of one device; ``None``: not known, and no share of it is told."""

    def student_flops(self, tally: Tally) -> float:
        """Forward and backward: three forward passes; two where weights get no gradient, and the adapters' six each."""
        forward = tally.forward_flops(self.student)
        if self.adapter_parameters:
            return 2 * forward + 6.0 * tally.tokens * self.adapter_parameters
        return 3 * forward

    def metrics(self, tally: Tally, seconds: float, devices: int) -> Mapping[str, float]:
        """Rates per device, by their published names."""
        student = self.student_flops(tally) / seconds / devices / 1e12
        teacher = sum(tally.forward_flops(shape) for shape in self.teachers) / seconds / devices / 1e12
        rates = {"perf/student_tflops_per_gpu": student, "perf/teacher_tflops_per_gpu": teacher}
        if self.peak_tflops is not None:
            rates["perf/student_mfu"] = student / self.peak_tflops
            rates["perf/total_mfu"] = (student + teacher) / self.peak_tflops
        return rates


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held: a GPU's allocated tensors, or the resident memory of a process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class DeviceTime:
    """Seconds that the device spent inside ``with`` blocks; a GPU's queue would make a clock of the CPU run ahead."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def _mark(self) -> None:
        if self._on_gpu:
            mark = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def __enter__(self) -> None:
        self._mark()

    def __exit__(self, *_: object) -> None:
        self._mark()

    def take(self) -> float:
        """The seconds since the last call, which must come after a synchronisation of the device."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        self._marks = []
        if self._on_gpu:
            return float(sum(start.elapsed_time(end) for start, end in pairs)) / 1000
        return float(sum(end - start for start, end in pairs))
