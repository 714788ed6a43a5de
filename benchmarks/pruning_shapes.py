"""The sizes at which pruning methods are compared: chosen by a rule that knows nothing of any method.

All methods of a family are given exactly the same shape. Shares are of the parameters outside the embeddings, except
where a family says otherwise.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from llamita.prune.target import TargetConfig, target_shape
from llamita.shapes import PUBLISHED, SIZES, LlamaShape

BUDGETS = (0.8, 0.7, 0.6, 0.5)
MLP_SHARES = (0.75, 0.5)
PARENT = PUBLISHED["meta-llama/Llama-3.1-8B"]
CHILDREN = {name: PUBLISHED[f"meta-llama/Llama-3.2-{name}"] for name in ("3B", "1B")}


class Family(StrEnum):
    """The axes over which a budget is spread."""

    mlp = "mlp"
    """MLP width alone; the share is of the width."""
    width = "width"
    """MLP width and heads: what LLM-Pruner, FLAP and OSSCAR cut."""
    axes = "axes"
    """Hidden size and MLP width: what Minitron's width pruning and SliceGPT cut."""
    depth = "depth"
    """Whole layers."""
    llama = "llama"
    """Every axis in the proportions of Llama 3.2 to Llama 3.1 8B, tied as they are."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One shape to cut to."""

    family: Family
    label: str
    shape: LlamaShape

    def config(self) -> TargetConfig:
        """What asks the pruner for it."""
        sizes = {name: getattr(self.shape, name) for name in SIZES}
        return TargetConfig(**sizes, tie_word_embeddings=self.shape.tie_word_embeddings)


def backbone(shape: LlamaShape) -> int:
    """Parameters outside the embeddings."""
    return shape.num_parameters - shape.embedding_parameters


def targets(source: LlamaShape, family: Family) -> Iterator[Target]:
    """The shapes of a family, largest first; one that equals an earlier one, or the source, is left out."""
    seen = {source}
    for label, shape in _shapes(source, family):
        target = Target(family=family, label=label, shape=shape)
        if shape not in seen:
            seen.add(shape)
            target_shape(source, target.config())  # holds that it can be cut out of the source
            yield target


def _shapes(source: LlamaShape, family: Family) -> Iterator[tuple[str, LlamaShape]]:
    match family:
        case Family.mlp:
            for share in MLP_SHARES:
                width = max(1, _round(share * source.intermediate_size))
                yield f"{share:.0%}", dataclasses.replace(source, intermediate_size=width)
        case Family.width:
            for share in BUDGETS:
                yield f"{share:.0%}", _width(source, share)
        case Family.axes:
            for share in BUDGETS:
                yield f"{share:.0%}", _axes(source, share)
        case Family.depth:
            for share in BUDGETS:
                layers = max(1, _round(share * source.num_hidden_layers))
                yield f"{share:.0%}", dataclasses.replace(source, num_hidden_layers=layers)
        case Family.llama:
            for name, child in CHILDREN.items():
                yield name, _like(source, child)


def _round(value: float) -> int:
    """The nearest whole number, halves upwards."""
    return math.floor(value + 0.5)


def _nearest(values: Iterator[int], wanted: float) -> int:
    """The value nearest to what is wanted; the larger of two that are as near."""
    return min(values, key=lambda value: (abs(value - wanted), -value))


def _heads(source: LlamaShape) -> Iterator[LlamaShape]:
    """The source with every number of KV heads, and of query heads on each, that a stock Llama can have."""
    group = source.num_attention_heads // source.num_key_value_heads
    for keys, each in itertools.product(range(1, source.num_key_value_heads + 1), range(1, group + 1)):
        if source.hidden_size % (keys * each) == 0:
            yield dataclasses.replace(source, num_attention_heads=keys * each, num_key_value_heads=keys)


def _with_budget(shape: LlamaShape, wanted: float, widest: int) -> LlamaShape:
    """The shape with the MLP width that brings the parameters outside the embeddings nearest to ``wanted``."""
    rest = backbone(dataclasses.replace(shape, intermediate_size=1)) - shape.num_hidden_layers * 3 * shape.hidden_size
    width = _round((wanted - rest) / (shape.num_hidden_layers * 3 * shape.hidden_size))
    return dataclasses.replace(shape, intermediate_size=min(max(1, width), widest))


def _width(source: LlamaShape, share: float) -> LlamaShape:
    """Attention cut as near to the share as its heads allow (more heads where two are as near), the MLP the rest."""

    def distance(shape: LlamaShape) -> tuple[float, int, int]:
        gap = abs(shape.attention_parameters / source.attention_parameters - share)
        return gap, -shape.attention_parameters, -shape.num_key_value_heads

    attention = min(_heads(source), key=distance)
    return _with_budget(attention, share * backbone(source), source.intermediate_size)


def _axes(source: LlamaShape, share: float) -> LlamaShape:
    """Hidden size the multiple of the heads nearest to sqrt(share) of the source's, MLP width the rest; heads stay."""
    heads = source.num_attention_heads
    hidden = _nearest(iter(range(heads, source.hidden_size + 1, heads)), math.sqrt(share) * source.hidden_size)
    narrow = dataclasses.replace(source, hidden_size=hidden)
    return _with_budget(narrow, share * backbone(source), source.intermediate_size)


def _like(source: LlamaShape, child: LlamaShape) -> LlamaShape:
    """Every size scaled as the child's to Llama 3.1 8B's, to the nearest that can be cut; tied, as the child is."""
    ratio = {name: getattr(child, name) / getattr(PARENT, name) for name in SIZES}
    keys = _nearest(
        iter(range(1, source.num_key_value_heads + 1)), ratio["num_key_value_heads"] * source.num_key_value_heads
    )
    group = source.num_attention_heads // source.num_key_value_heads
    each = ratio["num_attention_heads"] / ratio["num_key_value_heads"] * group
    heads = keys * _nearest(iter(range(1, group + 1)), each)
    wanted = ratio["head_dim"] * source.head_dim
    sizes = (size for size in range(2, source.head_dim + 1, 2) if source.head_dim % size == 0)
    return dataclasses.replace(
        source,
        num_hidden_layers=max(1, _round(ratio["num_hidden_layers"] * source.num_hidden_layers)),
        hidden_size=_nearest(
            iter(range(heads, source.hidden_size + 1, heads)), ratio["hidden_size"] * source.hidden_size
        ),
        intermediate_size=max(1, _round(ratio["intermediate_size"] * source.intermediate_size)),
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=_nearest(sizes, wanted),
        tie_word_embeddings=child.tie_word_embeddings,
    )
