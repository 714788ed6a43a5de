"""What a search for a shape tells: its candidates with their losses, the front among them, and its picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llamita import storage
from llamita.report import drawing, labels
from llamita.report.drawing import Sketch
from llamita.report.palettes import Palette
from llamita.report.stages import Stage

FILE = "candidates.jsonl"
COSTS = {
    "parameters": "parameters",
    "bytes": "bytes of weights",
    "kv_bytes_per_token": "bytes of keys and values per token",
    "latency_ms": "milliseconds per batch of answers",
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One shape of a search."""

    name: str
    costs: dict[str, float]
    predicted: float | None
    loss: float | None
    recovered: float | None


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search, its candidates the best first."""

    name: str
    candidates: list[Candidate]
    whole: float | None
    """Loss of the model that was cut."""
    limits: dict[str, float]
    """The budget: limits by cost."""

    @property
    def axes(self) -> list[str]:
        """The costs to draw: parameters, and whatever else has a limit and is not the parameters in other units."""
        others = [name for name in COSTS if name in self.limits and name not in ("parameters", "bytes")]
        return ["parameters", *others]


def read(stage: Stage) -> Search | None:
    """The search of a stage; ``None`` where it made none, or has measured nothing yet.

    Raises:
        ValueError: its file is damaged.
    """
    file = stage.path / FILE
    if stage.recipe != "search" or not file.is_file():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        fields = ("name", "costs", "predicted", "loss", "recovered")
        found = [Candidate(**{field: row[field] for field in fields}) for row in rows]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    measured = [candidate for candidate in found if candidate.loss is not None]
    whole = stage.path / "whole.json"
    budget: dict[str, Any] = stage.settings.get("budget") or {}
    return Search(
        name=stage.name,
        candidates=sorted(measured, key=_quality),
        whole=storage.read_json(whole)["loss"] if whole.is_file() else None,
        limits={name: budget[name] for name in COSTS if budget.get(name) is not None},
    )


def _quality(candidate: Candidate) -> tuple[float, float]:
    """The distilled ones by their recovered loss, then the others by their loss."""
    recovered, loss = (math.inf if value is None else value for value in (candidate.recovered, candidate.loss))
    return recovered, loss


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of which no other has as little of both, by rising first value."""
    kept: list[tuple[float, float]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def pareto(search: Search) -> Sketch | None:
    """Loss over what a shape costs, behind the cut and behind the short distillation, with the front of each."""
    if not search.candidates:
        return None

    def draw(palette: Palette) -> Figure:
        figure, grid = drawing.new_figure(880, 330, 1, len(search.axes), squeeze=False)
        for axes, cost in zip(grid[0], search.axes, strict=True):
            _panel(axes, search, cost, palette)
        grid[0][0].set_ylabel("held-out loss, nats per token")
        handles = [
            _marker(palette.pruned, "o", "cut"),
            _marker(palette.distilled, "o", "distilled for a short while"),
            _marker(palette.ink, "*", "winner"),
            Line2D([], [], color=palette.muted, linewidth=1.2, label="front"),
        ]
        drawing.legend(figure, [handle for handle in handles if _is_there(search, handle)])
        return figure

    caption = "Held-out loss of each candidate over what it costs; lower and further left is better."
    if search.whole is not None:
        caption += f" The whole model has {search.whole:.3f}."
    if search.limits:
        caption += " Dotted lines are limits of the budget."
    name = f"search-{labels.slug(search.name)}"
    return Sketch(name=name, title="Shapes under the budget", caption=caption, draw=draw)


def _is_there(search: Search, handle: Line2D) -> bool:
    return handle.get_label() != "distilled for a short while" or search.candidates[0].recovered is not None


def _marker(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, linestyle="none", markersize=8, label=label)


def _panel(axes: Axes, search: Search, cost: str, palette: Palette) -> None:
    here = [candidate for candidate in search.candidates if cost in candidate.costs]
    for kind, colour in (("loss", palette.pruned), ("recovered", palette.distilled)):
        values: list[tuple[float, float | None]] = [(c.costs[cost], getattr(c, kind)) for c in here]
        points = [(x, y) for x, y in values if y is not None]
        if not points:
            continue
        axes.plot(*zip(*front(points), strict=True), color=colour, linewidth=1.2, drawstyle="steps-post", alpha=0.7)
        axes.plot(*zip(*points, strict=True), "o", color=colour, markersize=5.5)
    best = search.candidates[0]
    level = best.loss if best.recovered is None else best.recovered
    if cost in best.costs and level is not None:
        axes.plot([best.costs[cost]], [level], "*", color=palette.ink, markersize=13, zorder=5)
    if cost in search.limits:
        axes.axvline(search.limits[cost], color=palette.muted, linewidth=1.2, linestyle=(0, (2, 2)))
    drawing.count_axis(axes, COSTS[cost])
