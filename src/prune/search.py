"""Which uniform shapes are worth cutting out of a Llama under a budget, and what has been found out about each.

The arithmetic only: nothing here runs a model. Shape letters: L = layers, D = hidden size, F = MLP width, H = query
heads, K = KV heads, G = query heads of a KV head, E = head size.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llamita import storage
from llamita.prune.target import TargetConfig, target_shape
from llamita.shapes import SIZES, LlamaShape

FILE = "candidates.jsonl"


@dataclass(kw_only=True)
class AxisConfig:
    """The sizes to try along one axis: a list, or a range that includes both ends."""

    values: list[int] | None = None
    least: int | None = None
    """Unset: half the source's size."""
    most: int | None = None
    """Unset: the source's size."""
    step: int | None = None
    """Distance of neighbours, counted from 0; unset: see ``AxesConfig``."""

    def check(self, name: str) -> None:
        """Raise ``ValueError`` for what is no list and no range; ``name`` is the axis."""
        if self.values is not None and (self.least, self.most, self.step) != (None, None, None):
            raise ValueError(f"axes.{name}: give either values= or least=, most= and step=, not both")
        if self.values is not None and (not self.values or min(self.values) < 1):
            raise ValueError(f"axes.{name}.values must hold sizes of at least 1, got {self.values}")
        for part in ("least", "most", "step"):
            if (value := getattr(self, part)) is not None and value < 1:
                raise ValueError(f"axes.{name}.{part} must be at least 1, got {value}")


@dataclass(kw_only=True)
class AxesConfig:
    """The grid. Steps that are not set: a sixteenth of the source's size, rounded down to a power of two (256 of a
    hidden size of 4,096, 512 of an MLP width of 14,336), an eighth for query heads, and halves for KV heads and the
    head size."""

    num_hidden_layers: AxisConfig = field(default_factory=AxisConfig)
    hidden_size: AxisConfig = field(default_factory=AxisConfig)
    intermediate_size: AxisConfig = field(default_factory=AxisConfig)
    num_attention_heads: AxisConfig = field(default_factory=AxisConfig)
    num_key_value_heads: AxisConfig = field(default_factory=AxisConfig)
    head_dim: AxisConfig = field(default_factory=AxisConfig)

    def __post_init__(self) -> None:
        for name in SIZES:
            getattr(self, name).check(name)


def default_step(name: str, size: int) -> int:
    """Distance of neighbours on an axis of which the source has ``size``."""
    match name:
        case "num_attention_heads":
            return max(1, size // 8)
        case "num_key_value_heads" | "head_dim":
            return max(1, size // 2)
        case _:
            return 1 << max(0, int(math.log2(max(1, size / 16))))


def sizes(source: LlamaShape, axes: AxesConfig, target: TargetConfig) -> dict[str, list[int]]:
    """Rising sizes to try along each axis; one that ``target`` names is the only one.

    Raises:
        ValueError: an axis has a size above the source's, or none at all.
    """
    return {name: _axis(name, getattr(source, name), getattr(axes, name), getattr(target, name)) for name in SIZES}


def _axis(name: str, most: int, axis: AxisConfig, pinned: int | None) -> list[int]:
    if pinned is not None:
        if axis != AxisConfig():
            raise ValueError(f"target.{name}={pinned} leaves no choice: unset it, or axes.{name}")
        return [pinned]
    if axis.values is not None:
        found = sorted(set(axis.values))
    else:
        first, last = axis.least or max(1, most // 2), axis.most or most
        step = axis.step or default_step(name, most)
        inner = range(-(-first // step) * step, last + 1, step)
        # Where neither ends nor step are given, the source's own size is a choice, a multiple of the step or not.
        found = sorted({*inner, *([most] if axis.most is None and first <= most else [])})
        if not found:
            raise ValueError(f"axes.{name} has no multiple of step={step} in {first}..{last}")
    if found[-1] > most:
        raise ValueError(f"axes.{name} must stay within the source's {most}, got {found[-1]}")
    return found


def shapes(source: LlamaShape, axes: AxesConfig, target: TargetConfig) -> list[LlamaShape]:
    """Every shape of the grid that can be cut out of ``source`` and that a stock Llama can have; not the source.

    Raises:
        ValueError: there is none; as the judge said of the last one.
    """
    grid = sizes(source, axes, target)
    found, refused = [], ""
    for values in itertools.product(*grid.values()):
        try:
            found.append(target_shape(source, sized(target, dict(zip(grid, values, strict=True)))))
        except ValueError as error:
            refused = str(error)
    found = [shape for shape in found if shape != source]
    if not found:
        raise ValueError(f"no shape of axes can be cut out of the model{': ' + refused if refused else ''}")
    return found


def sized(target: TargetConfig, sizes: Mapping[str, int]) -> TargetConfig:
    """``target`` with these sizes, the others as in the source."""
    fields: dict[str, Any] = {**dict.fromkeys(SIZES), **sizes}
    return dataclasses.replace(target, **fields)


def sizes_of(shape: LlamaShape) -> dict[str, int]:
    """The sizes that a search chooses."""
    return {name: getattr(shape, name) for name in SIZES}


@dataclass(kw_only=True)
class BudgetConfig:
    """What a shape may cost, each limit inclusive; at least one is given, and all that are given hold."""

    parameters: float | None = None
    bytes: float | None = None
    """Of the weights, at ``bits`` each."""
    bits: float = 16
    kv_bytes_per_token: float | None = None
    """Of keys and values that generation keeps for each token, at ``kv_bits`` each."""
    kv_bits: float = 16
    latency_ms: float | None = None
    """Of one batch of answers (``latency``), measured on this machine."""
    slack: float = 0.05
    """A shape is close to the budget when it uses at least 1 - ``slack`` of one of the limits."""

    def __post_init__(self) -> None:
        for name in (*LIMITS, "bits", "kv_bits"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"budget.{name} must be > 0 and finite, got {value}")
        if not 0 <= self.slack < 1:
            raise ValueError(f"budget.slack must be in 0..1, 1 excluded, got {self.slack}")

    def check_given(self) -> None:
        """Raise ``ValueError`` where there is no limit at all."""
        if not self.limits:
            raise ValueError(f"a search needs a budget: set at least one of {', '.join('budget.' + n for n in LIMITS)}")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are given."""
        return {name: getattr(self, name) for name in LIMITS if getattr(self, name) is not None}

    def costs(self, shape: LlamaShape) -> dict[str, float]:
        """What ``shape`` costs, latency apart."""
        return {
            "parameters": shape.num_parameters,
            "bytes": shape.num_parameters * self.bits / 8,
            "kv_bytes_per_token": shape.kv_cache_values_per_token * self.kv_bits / 8,
        }

    def used(self, costs: Mapping[str, float]) -> float:
        """The largest share of a limit that ``costs`` use; limits that these say nothing of are left out."""
        return max((costs[name] / limit for name, limit in self.limits.items() if name in costs), default=0.0)


LIMITS = ("parameters", "bytes", "kv_bytes_per_token", "latency_ms")


def within(source: LlamaShape, found: Sequence[LlamaShape], budget: BudgetConfig) -> list[LlamaShape]:
    """The shapes whose costs, latency apart, are within ``budget``.

    Raises:
        ValueError: none is, or all of ``source`` is.
    """
    if "latency_ms" not in budget.limits and budget.used(budget.costs(source)) <= 1:
        raise ValueError(f"the whole model is within the budget: it costs {_told(budget.costs(source), budget)}")
    fitting = [shape for shape in found if budget.used(budget.costs(shape)) <= 1]
    if not fitting:
        least = min(found, key=lambda shape: budget.used(budget.costs(shape)))
        raise ValueError(
            f"no shape of axes is within the budget: the nearest, {name_of(least)}, costs "
            f"{_told(budget.costs(least), budget)}; lower axes.<axis>.least"
        )
    return fitting


def _told(costs: Mapping[str, float], budget: BudgetConfig) -> str:
    parts = [
        f"{costs[name]:,.0f} of budget.{name}={limit:,.0f}" for name, limit in budget.limits.items() if name in costs
    ]
    return ", ".join(parts)


def name_of(shape: LlamaShape) -> str:
    """A shape in a word that a file can have."""
    letters = zip("ldfhke", SIZES, strict=True)
    return "-".join(f"{letter}{getattr(shape, size)}" for letter, size in letters)


def units(shape: LlamaShape) -> tuple[int, ...]:
    """L, D, F, K, G, E. Of two shapes of one source, one holds all units of the other where none of these is less.

    Query heads are counted by KV head: twice the KV heads with half the query heads each is other heads, not more.
    """
    group = shape.num_attention_heads // shape.num_key_value_heads
    return (
        shape.num_hidden_layers,
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_key_value_heads,
        group,
        shape.head_dim,
    )


def frontier(found: Sequence[LlamaShape], passes: Callable[[LlamaShape], bool]) -> Iterator[LlamaShape]:
    """Those that pass and that no other one that passes contains, in their order; the others are dominated.

    A shape must come behind all that contain it. ``passes`` may be expensive: it is not asked of a shape that one that
    passed contains, nor of one that contains a shape that failed, which is taken to fail as well.
    """
    passed, failed = [torch.empty((0, 6), dtype=torch.long) for _ in range(2)]
    for shape in found:
        row = torch.tensor(units(shape))
        if bool((passed >= row).all(1).any()) or bool((failed <= row).all(1).any()):
            continue
        if passes(shape):
            passed = torch.cat([passed, row[None]])
            yield shape
        else:
            failed = torch.cat([failed, row[None]])


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape, and what is known of it so far."""

    shape: LlamaShape
    costs: dict[str, float]
    predicted: float | None = None
    loss: float | None = None
    """Mean over held-out tokens behind the cut, in nats."""
    recovered: float | None = None
    """The same behind the short distillation."""

    @property
    def name(self) -> str:
        """As :func:`name_of`."""
        return name_of(self.shape)

    def row(self) -> dict[str, Any]:
        """A line of ``candidates.jsonl``."""
        values = {"predicted": self.predicted, "loss": self.loss, "recovered": self.recovered}
        return {"name": self.name, "costs": self.costs, **values, "shape": dataclasses.asdict(self.shape)}


def pick(
    losses: Mapping[LlamaShape, float],
    budget: BudgetConfig,
    costs: Callable[[LlamaShape], dict[str, float]],
    most: int,
) -> list[Candidate]:
    """Of the shapes with their predicted losses the ``most`` best that no other dominates and that are close to budget.

    ``costs`` may be expensive, and is asked of no shape more than once.

    Raises:
        ValueError: no shape is close to the budget.
    """
    told: dict[LlamaShape, dict[str, float]] = {}

    def passes(shape: LlamaShape) -> bool:
        told[shape] = costs(shape)
        return budget.used(told[shape]) <= 1

    order = sorted(losses, key=lambda shape: (losses[shape], -shape.num_parameters))
    close = (shape for shape in frontier(order, passes) if budget.used(told[shape]) >= 1 - budget.slack)
    kept = list(itertools.islice(close, most))
    if not kept:
        nearest = max((used for used in map(budget.used, told.values()) if used <= 1), default=0.0)
        raise ValueError(
            f"no shape uses {1 - budget.slack:.1%} of the budget, the nearest {nearest:.1%}: raise budget.slack, or "
            "lower a step or an end of axes"
        )
    return [Candidate(shape=shape, costs=told[shape], predicted=losses[shape]) for shape in kept]


def save(candidates: Sequence[Candidate], folder: Path) -> None:
    """Write ``candidates.jsonl``, whole or not at all."""
    storage.write_atomically(folder / FILE, "".join(json.dumps(candidate.row()) + "\n" for candidate in candidates))


def load(folder: Path) -> list[Candidate]:
    """What an earlier start found out; nothing where there was none.

    Raises:
        ValueError: the file is damaged.
    """
    if not (folder / FILE).is_file():
        return []
    try:
        rows = [json.loads(line) for line in (folder / FILE).read_text(encoding="utf-8").splitlines()]
        for row in rows:
            del row["name"]
            row["shape"] = LlamaShape(**row["shape"])
        return [Candidate(**row) for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / FILE} is damaged: {error}") from error


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The distilled ones by their recovered loss, then the others by their loss: the best before distillation is not
    always the best after (Muralidharan et al., 2024, arXiv:2407.14679, section 4.2)."""
    far = math.inf
    return sorted(
        candidates,
        key=lambda c: (
            far if c.recovered is None else c.recovered,
            far if c.loss is None else c.loss,
            c.shape.num_parameters,
        ),
    )
