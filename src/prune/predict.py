"""Which shapes are likely to lose least, from scores and a handful of measured cuts: an order, not a measurement.

Thousands of shapes fit a budget of an 8B, and each that is cut and measured is a pass over the whole model.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import HiddenScore, LayerScore, Scores, WidthScore
from llamita.prune.search import sized, units
from llamita.prune.target import TargetConfig, target_shape
from llamita.shapes import SIZES, LlamaShape

AXES = ("layers", "hidden", "mlp", "attention")


class Removed:
    """Shares of importance that a shape loses along each axis, from one set of scores.

    A share is one minus the kept part of the sum over units of the squared score (of layers, the score itself): for
    ``norm_product`` it is the share of the block's squared output that goes if units are uncorrelated. Each axis is
    looked at for itself, layers alike, so that a grid of thousands of shapes costs a few sums. Larger shapes never
    lose more, to the last bit.
    """

    def __init__(self, scores: Scores, source: LlamaShape, kinds: ScoreConfig) -> None:
        layers = scores[f"layers.{_layers(kinds.layers)}"].double().clamp(min=0)
        if kinds.hidden is HiddenScore.pca:
            hidden = scores["directions.energy"].double()
        else:
            hidden = scores[f"hidden.{kinds.hidden}"].double().sum((0, 1)).square()
        heads = scores[f"attention.{_width(kinds.attention)}"].double().square()
        self._layers = _kept(layers[None])
        self._hidden = _kept(hidden[None])
        self._mlp = _kept(scores[f"mlp.{_width(kinds.mlp)}"].double().square())
        self._groups = heads.view(len(heads), source.num_key_value_heads, -1, source.head_dim)

    def shares(self, shape: LlamaShape) -> dict[str, float]:
        """By axis, from 0 (nothing goes) to 1."""
        return {
            "layers": 1 - self._layers[shape.num_hidden_layers - 1],
            "hidden": 1 - self._hidden[shape.hidden_size - 1],
            "mlp": 1 - self._mlp[shape.intermediate_size - 1],
            "attention": 1 - self._attention(shape.num_key_value_heads, units(shape)[4], shape.head_dim),
        }

    def _attention(self, keys: int, group: int, size: int) -> float:
        """Kept part of the heads' energy times that of the channels': the best heads of each group, then groups."""
        whole = self._groups.sum((1, 2, 3)).clamp(min=1e-300)
        best = self._groups.sum(3).sort(descending=True).values[:, :, :group].sum(2)
        heads = best.sort(descending=True).values[:, :keys].sum(1) / whole
        channels = self._groups.sum(2).sort(descending=True).values[:, :, :size].sum((1, 2)) / whole
        return min(1.0, float(heads.mean())) * min(1.0, float(channels.mean()))


def _width(kind: WidthScore) -> WidthScore:
    """The score whose squares add up in the place of one that is an order."""
    return WidthScore.norm_product if kind is WidthScore.obs else kind


def _layers(kind: LayerScore) -> LayerScore:
    return kind if kind is LayerScore.magnitude else LayerScore.block_influence


def _kept(energies: Tensor) -> list[float]:
    """Entry n - 1: the share of the sum over the last axis that its n largest entries hold, mean over the rows."""
    sums = energies.sort(descending=True).values.cumsum(-1)
    means = (sums / sums[:, -1:].clamp(min=1e-300)).mean(0)
    return [min(1.0, value) for value in means.tolist()]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The loss of a shape as a sum over axes: loss of the whole + sum_axis weight_axis * removed share_axis.

    The weights come from one cut for each axis (:func:`alone`): its measured loss increase over its removed share.
    """

    whole: float
    weights: dict[str, float]

    @classmethod
    def fitted(cls, whole: float, increases: Mapping[str, tuple[float, float]]) -> Prediction:
        """From the loss increase and the removed share of one cut for each axis.

        An axis that could not be cut alone is taken to cost what the others do on average; none is taken to gain.
        """
        weights = {axis: max(rise, 0.0) / share for axis, (rise, share) in increases.items() if share > 0}
        mean = sum(weights.values()) / len(weights) if weights else 1.0
        return cls(whole=whole, weights={axis: weights.get(axis, mean) for axis in AXES})

    def loss(self, shares: Mapping[str, float]) -> float:
        """In nats per token; good for an order among shapes, not as a value."""
        return self.whole + sum(self.weights[axis] * shares[axis] for axis in AXES)


def alone(source: LlamaShape, grid: Mapping[str, Sequence[int]], target: TargetConfig) -> dict[str, LlamaShape]:
    """For each axis the smallest shape of the grid that is cut along it only, where there is one."""
    fields = {
        "layers": SIZES[:1],
        "hidden": SIZES[1:2],
        "mlp": SIZES[2:3],
        "attention": SIZES[3:],
    }
    found: dict[str, LlamaShape] = {}
    for axis, names in fields.items():
        for values in itertools.product(*(grid[name] for name in names)):
            try:
                shape = target_shape(source, sized(target, dict(zip(names, values, strict=True))))
            except ValueError:
                continue
            if units(shape) != units(source):
                found[axis] = shape
                break
    return found
