"""The tensors of a training checkpoint: weights and moments by parameter names, whole, in float32.

``weights*.safetensors`` hold ``NAME``, ``optimizer*.safetensors`` hold ``NAME/step``, ``NAME/exp_avg`` and
``NAME/exp_avg_sq``. Each process may write files of its own with whichever parameters it likes; a reader takes all
files for one. So a checkpoint says nothing of how many processes wrote it, nor of what had been spread over them, and
any number of them, with another ZeRO stage or without, can read it. It holds no pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import LlamaForCausalLM

from llamita import checkpoints, faults

MATCHING = "matching."
"""Before the names of what is trained beside a student and not published with it."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def write(
    folder: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], *, part: int | None = None
) -> list[str]:
    """Write parameters with their moments, as ``part`` of those that several processes write; returns the file names.

    A process without parameters writes nothing: there may be more processes than parameters.

    Raises:
        OSError: the system refused.
    """
    if not weights:
        return []
    end = "" if part is None else f"-{part:05d}"
    names = [f"weights{end}.safetensors", f"optimizer{end}.safetensors"]
    checkpoints.save_tensors(weights, folder / names[0], {})
    faults.crash_point("mid_checkpoint")
    flat = {f"{name}/{key}": value for name, state in moments.items() for key, value in state.items()}
    checkpoints.save_tensors(flat, folder / names[1], {})
    return names


def owners(sizes: Mapping[str, int], world: int) -> dict[str, int]:
    """Which of ``world`` processes writes each parameter: the one that has least so far, the largest first."""
    loads = [0] * world
    found = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = loads.index(min(loads))
        loads[found[name]] += sizes[name]
    return found


class Saved:
    """The tensors in a checkpoint's files, mapped and read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Open every file.

        Raises:
            ValueError: there is none, or one is damaged.
        """
        self.folder = folder
        self._weights = self._open("weights")
        self._moments = self._open("optimizer")

    def _open(self, kind: str) -> dict[str, Any]:
        files = sorted(self.folder.glob(f"{kind}*.safetensors"))
        if not files:
            raise ValueError(f"{self.folder} is no checkpoint of a training run: it has no {kind}.safetensors")
        found: dict[str, Any] = {}
        for file in files:
            try:
                handle: Any = safe_open(file, "pt")
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or cut short: {error}") from error
            found |= dict.fromkeys(handle.keys(), handle)
        return found

    def check(self, names: Sequence[str], *, beside: bool = True) -> None:
        """Refuse a checkpoint of other parameters; ``beside``: what was trained beside the student counts.

        Raises:
            ValueError: naming some that are missing or too many.
        """
        here = {name for name in self._weights if beside or not name.startswith(MATCHING)}
        if wrong := sorted(here ^ set(names)):
            raise ValueError(f"{self.folder} and the student differ in {len(wrong)} parameters: {', '.join(wrong[:3])}")

    def weight(self, name: str) -> Tensor:
        """A parameter, float32, on the CPU."""
        tensor: Tensor = self._weights[name].get_tensor(name)
        return tensor

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the student by its name, one at a time."""
        for name in self._weights:
            if not name.startswith(MATCHING):
                yield name, self.weight(name)

    def restore(self, student: LlamaForCausalLM) -> None:
        """Put what was trained of a student into it, on the CPU; what is not here rested, and stays."""
        parameters = dict(student.named_parameters())
        for name, tensor in self.tensors():
            parameters[name].data.copy_(tensor)

    def moments(self, name: str) -> dict[str, Tensor]:
        """A parameter's moments; none where no step has been taken on it."""
        keys = {key: f"{name}/{key}" for key in MOMENTS}
        return {key: self._moments[full].get_tensor(full) for key, full in keys.items() if full in self._moments}
