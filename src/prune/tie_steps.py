"""A matrix that is both input and output, fitted by steps through all of the cut model.

Shape letters: B = rows, S = positions, d = hidden size of the cut model, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch.nn.functional as functional
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from llamita import faults
from llamita.prune.compensation import CompensationConfig
from llamita.prune.head import Divergence, Final
from llamita.prune.stream import Batch, layer_of
from llamita.prune.streams import Streams
from llamita.prune.tune import Objective, tune


@faults.phase("the steps on a tied matrix", memory="a smaller calibration.batch_rows, or compensation.tied_steps=0")
def fit(
    streams: Streams,
    batches: Sequence[Batch],
    layers: Iterable[Mapping[str, Tensor]],
    final: Final,
    config: CompensationConfig,
    *,
    seed: int,
) -> None:
    """Steps of the shared matrix and the final norm on KL(whole || cut); ``final`` changes.

    ``layers`` are the finished ones, which stay as they are; ``streams`` are behind the last of them.
    """
    tuned = tune(
        {"matrix": final.matrix, "norm": final.norm.weight},
        _objective(streams, batches, layers, final),
        batches=len(batches),
        steps=config.tied_steps,
        learning_rate=config.learning_rate,
        seed=seed,
    )
    final.divergences |= {"start": final.divergences.get("start", tuned.before), "tied": min(tuned.before, tuned.after)}


def _objective(
    streams: Streams, batches: Sequence[Batch], layers: Iterable[Mapping[str, Tensor]], final: Final
) -> Objective:
    """Sum over tokens of KL(whole || cut), from the ids on: the matrix has the gradients of both of its uses.

    Layers lie on the device in the dtype in which they are stored; one at a time is cast to that of the cut pass, and
    backward runs each again (Chen et al., 2016, arXiv:1604.06174).
    """
    divergence, runner = Divergence(streams), streams.cut_runner
    held = [{name: t.to(streams.device) for name, t in tensors.items()} for tensors in layers]  # one at a time

    def run(states_BSd: Tensor, index: int, batch: int) -> Tensor:
        layer = layer_of(held[index], runner.config, streams.cut_dtype, streams.device)
        return runner.layer(layer, states_BSd, streams.positions[batch])

    def objective(batch: int, learn: bool) -> tuple[Tensor, int]:
        states_BSd = functional.embedding(batches[batch]["input_ids"].to(streams.device), final.matrix)
        for index in range(len(held)):
            states_BSd = checkpoint(run, states_BSd, index, batch, use_reentrant=False)
        return divergence(batch, states_BSd, final, learn)

    return objective
