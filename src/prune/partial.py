"""What was measured so far, in a file: a killed pass over the layers goes on behind its last layer, a greedy removal of
layers behind the last that left."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamita import checkpoints, faults, runs
from llamita.prune.stream import summed


@dataclass(kw_only=True)
class Partial:
    """Scores of the layers that are done, and ``stream`` [D, D], the sum of what their norms saw."""

    stream: Tensor
    file: Path | None = None
    """Replaced after each layer by the first process, read by all; ``None``: nothing is kept."""
    key: str = ""
    """Of model, text and settings: a file of another key is not used."""
    layers: list[dict[str, Tensor]] = field(default_factory=list)
    rounds: Tensor | None = None
    """Losses [rounds, L] of :func:`llamita.prune.depth.greedy`."""
    text: str = ""
    """The digest of the rows that ``rounds`` were measured on."""

    def read(self) -> int:
        """Take over what the file holds; returns how many layers that are, for all processes the same.

        Raises:
            ValueError: the file is damaged.
        """
        usable = False
        if self.file is not None and runs.is_main_process() and self.file.is_file():
            usable = checkpoints.read_tensors(self.file)[1].get("key") == self.key
        if not summed(torch.tensor(float(usable), device=self.stream.device)):
            return 0
        assert self.file is not None
        tensors, metadata = checkpoints.read_tensors(self.file)
        self.stream.copy_(tensors["stream"])
        for index in range(int(metadata["layers"])):
            prefix = f"{index}."
            names = [name for name in tensors if name.startswith(prefix)]
            self.layers.append({name.removeprefix(prefix): tensors[name] for name in names})
        self.rounds, self.text = tensors.get("rounds"), metadata.get("text", "")
        return len(self.layers)

    def rounds_on(self, text: str) -> dict[str, Any]:
        """Arguments of a greedy pass over the rows of that digest: what is known of it, and who keeps the rest."""
        if self.text != text:
            self.rounds, self.text = None, text

        def keep(losses_RL: Tensor) -> None:
            self.rounds = losses_RL.clone()
            self._write()
            faults.crash_point("after_removal")

        return {"known": self.rounds, "keep": keep}

    def remove(self) -> None:
        """Leave nothing: what was measured is of no use."""
        if self.file is not None and runs.is_main_process():
            self.file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.file.parent.rmdir()

    def add(self, scores: dict[str, Tensor], stream_DD: Tensor) -> None:
        """Take the next layer, and write it down."""
        self.stream.add_(stream_DD)
        self.layers.append({name: tensor.cpu().contiguous() for name, tensor in scores.items()})
        self._write()

    def _write(self) -> None:
        if self.file is None or not runs.is_main_process():
            return
        tensors = {f"{i}.{name}": tensor for i, layer in enumerate(self.layers) for name, tensor in layer.items()}
        tensors["stream"] = self.stream.cpu()
        tensors |= {} if self.rounds is None else {"rounds": self.rounds}
        metadata = {"key": self.key, "layers": str(len(self.layers)), "text": self.text}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_tensors(self.file, tensors, metadata)
