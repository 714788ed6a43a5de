"""Which layers can leave: by the angle over which a block turns the residual stream, or by the loss without them.

Shape letters: B = rows, S = positions, D = hidden size, L = layers, N = rows of all batches, M = longest block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamita.prune import stream
from llamita.prune.stream import Batch, Model, Runner, loss_sum, mean, summed

log = logging.getLogger(__name__)

Skip = tuple[int, int]
"""The places ``first .. behind - 1`` in a list of layers that are left out."""


def last_tokens(hidden: Iterable[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """The states [N, D] of the last token of each row that is not padding; a row of padding has none."""
    states = []
    for states_BSD, mask_BS in zip(hidden, masks, strict=True):
        mask_BS = mask_BS.to(states_BSD.device)
        place_B = torch.where(mask_BS, torch.arange(mask_BS.shape[1], device=mask_BS.device), -1).amax(1)
        rows = (place_B >= 0).nonzero()[:, 0]
        states.append(states_BSD[rows, place_B[rows]])
    return torch.cat(states)


def angular(states_LND: Sequence[Tensor], device: torch.device | str = "cpu") -> Tensor:
    """Angular distance [L, L] over the block of n layers from layer l on, at [l, n - 1]; 1 where there is none.

    d(l, n) = mean over rows of arccos(cos(x_l, x_{l+n})) / pi at the last token of each row, x_l the input of layer l
    (Gromov et al., 2024, arXiv:2403.17887, section 3; the last token is the only one that has seen the whole row).
    ``states_LND`` holds the inputs of all layers and the output of the last, L + 1 tensors, on the CPU; ``device`` is
    where processes meet.
    """
    num_layers = len(states_LND) - 1
    states = [functional.normalize(states_ND.double(), dim=-1) for states_ND in states_LND]
    num_rows = summed(torch.tensor(float(len(states[0])), dtype=torch.float64, device=device))
    table_LL = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    for first in range(num_layers):
        for behind in range(first + 1, num_layers + 1):
            cosine_N = (states[first] * states[behind]).sum(-1).clamp(-1, 1)
            table_LL[first, behind - first - 1] = cosine_N.arccos().sum() / math.pi
    table_LL = summed(table_LL.to(device)).cpu() / num_rows.cpu()
    place = torch.arange(num_layers)
    return torch.where(place[:, None] + place < num_layers, table_LL, 1.0)


@dataclass(frozen=True, kw_only=True)
class Removals:
    """How the loss without some layers is measured."""

    dtype: torch.dtype
    device: torch.device | str = "cpu"
    memory_gib: float = 4.0
    """Of host memory for hidden states: so many models without a layer go through the layers side by side; two and
    the whole model's at least."""
    watch: Callable[[], None] = lambda: None
    """Called behind each layer."""

    def at_once(self, model: Model, batches: Sequence[Batch]) -> int:
        """How many models go side by side beside the whole one: in all processes what that of most text can hold."""
        tokens = stream.greatest(sum(batch["input_ids"].numel() for batch in batches))
        size = max(1, tokens) * model.shape.hidden_size * self.dtype.itemsize
        return max(2, int(self.memory_gib * 2**30 / size) - 1)


@torch.no_grad()
def losses(
    model: Model, layers: Sequence[int], skips: Sequence[Skip], batches: Sequence[Batch], how: Removals
) -> list[float]:
    """Mean loss, in nats, of the model of ``layers`` without each of ``skips``, and, last, of all of ``layers``.

    All go through the layers side by side. Up to the block that one leaves out it is the whole model, whose states are
    computed once for all; where not all fit into ``how.memory_gib``, those whose blocks come first go first, and the
    next start where theirs begin: nothing is computed twice, only the weights behind are read once more.

    Raises:
        ValueError: nothing in ``batches`` has a label, or a loss is not finite.
    """
    runner, order = Runner(model.config, how.device), sorted(range(len(skips)), key=skips.__getitem__)
    batches = [{name: tensor.to(how.device) for name, tensor in batch.items()} for batch in batches]
    whole, found = stream.embedded(model, batches, how.dtype), [math.nan] * (len(skips) + 1)
    place, step = 0, how.at_once(model, batches)
    while True:
        group, order = order[:step], order[step:]
        next_place = skips[order[0]][0] if order else len(layers)
        states: dict[int, list[Tensor]] = {}
        for here in range(place, len(layers)):
            states |= {index: whole for index in group if skips[index][0] == here}
            layer = stream.decoder_layer(model, layers[here], runner.config, how.dtype, how.device)
            for index in states:
                if here >= skips[index][1]:
                    states[index] = _through(runner, layer, states[index], batches)
            if here < next_place:
                whole = _through(runner, layer, whole, batches)
            del layer
            how.watch()
        for index, hidden in states.items():
            found[index] = _mean(model, hidden, batches, how)
        if not order:
            found[-1] = _mean(model, whole, batches, how)
            return found
        place = next_place


def greedy(
    model: Model,
    batches: Sequence[Batch],
    rounds: int,
    how: Removals,
    *,
    known: Tensor | None = None,
    keep: Callable[[Tensor], None] = lambda losses: None,
) -> tuple[Tensor, Tensor]:
    """Remove ``rounds`` times the layer without which the loss is least, each time of what is then left.

    The one-layer removal loss is that of Kim et al., 2024, arXiv:2402.02834 (Shortened LLaMA), there in one
    shot; measuring anew after each removal is that of Song et al., 2024, arXiv:2402.09025 (SLEB).

    ``known`` are the losses [rounds, L] of an interrupted pass over the same text, which are not measured again;
    ``keep`` is given those of all rounds so far after each that is.

    Returns:
        rank [L]: the round in which a layer leaves, and ``rounds`` for those that stay; the losses [rounds, L] without
        each layer, in nats: of a layer that has left already, that of the model without it.

    Raises:
        ValueError: ``rounds`` would leave no layer, nothing has a label, or a loss is not finite.
    """
    num_layers = model.shape.num_hidden_layers
    _check_number(rounds, num_layers)
    left, table_RL = list(range(num_layers)), torch.zeros(rounds, num_layers, dtype=torch.float64)
    rank_L = torch.full((num_layers,), rounds, dtype=torch.float64)
    finished = 0 if known is None else min(len(known), rounds)
    if known is not None and finished:
        table_RL[:finished] = known[:finished]
        log.info("%d of %d removals were decided before", finished, rounds)
    for number in range(rounds):
        if number >= finished:
            found = losses(model, left, [(place, place + 1) for place in range(len(left))], batches, how)
            table_RL[number] = found.pop()
            table_RL[number, left] = torch.tensor(found, dtype=torch.float64)
            keep(table_RL[: number + 1])
        found = table_RL[number, left].tolist()
        layer = left.pop(found.index(min(found)))
        rank_L[layer] = number
        log.info("removal %d of %d: layer %d, loss %.4f", number + 1, rounds, layer, min(found))
    return rank_L, table_RL


def contiguous(model: Model, batches: Sequence[Batch], longest: int, how: Removals) -> Tensor:
    """Mean loss [L, M], in nats, without the block of n layers from layer l on, at [l, n - 1]; 0 where there is none.

    For every n up to ``longest``. The block test of Sreenivas et al., 2024, arXiv:2408.11796 (Minitron's
    depth pruning); the criterion is that of Kim et al., 2024, arXiv:2402.02834.

    Raises:
        ValueError: as :func:`greedy`.
    """
    num_layers = model.shape.num_hidden_layers
    _check_number(longest, num_layers)
    skips = [(a, a + n) for a in range(num_layers) for n in range(1, longest + 1) if a + n <= num_layers]
    found = losses(model, range(num_layers), skips, batches, how)
    table_LM = torch.zeros(num_layers, longest, dtype=torch.float64)
    for (first, behind), loss in zip(skips, found, strict=False):
        table_LM[first, behind - first - 1] = loss
    return table_LM


def least_block(table_LM: Tensor, number: int) -> Tensor:
    """The ``number`` neighbouring layers without which the table is least; of equals the first.

    Raises:
        ValueError: blocks of that length were not measured.
    """
    if number > table_LM.shape[1]:
        raise ValueError(_too_few(table_LM.shape[1], number))
    first = int(table_LM[: len(table_LM) - number + 1, number - 1].argmin())
    return torch.arange(first, first + number)


def first_to_leave(rank_L: Tensor, number: int) -> Tensor:
    """The ``number`` layers of the greedy order that leave first.

    Raises:
        ValueError: so many rounds were not run.
    """
    if number > (rounds := int((rank_L < rank_L.max()).sum())):
        raise ValueError(_too_few(rounds, number))
    return rank_L.argsort()[:number].sort().values


def _too_few(measured: int, number: int) -> str:
    return (
        f"these scores tell which layers leave when at most {measured} do, and target.num_hidden_layers removes "
        f"{number}: measure them again, with scores.removed_layers={number} or this target"
    )


def _check_number(number: int, num_layers: int) -> None:
    if not 1 <= number < num_layers:
        raise ValueError(f"scores.removed_layers must be in 1..{num_layers - 1}, so that a layer is left, got {number}")


def _through(runner: Runner, layer: LlamaDecoderLayer, hidden: list[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    positions = [batch["position_ids"] for batch in batches]
    return [runner.layer(layer, h.to(p.device), p).cpu() for h, p in zip(hidden, positions, strict=True)]


def _mean(model: Model, hidden: list[Tensor], batches: Sequence[Batch], how: Removals) -> float:
    loss = mean(loss_sum(model, hidden, batches, how.device), how.device)
    if loss is None:
        raise ValueError("the calibration set holds no label: the loss without a layer needs text")
    if not math.isfinite(loss):
        raise ValueError("the loss without a layer is not finite: set calibration.dtype=float32, or check the weights")
    return loss
