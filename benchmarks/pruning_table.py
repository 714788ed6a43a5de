"""The rows of ``benchmarks/pruning.py`` as Markdown tables and one picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

Row = dict[str, Any]
DEFAULT = "Llamita"
CLOSED_FORMS = "Llamita, closed forms"
WITHOUT = "Llamita without "
COMPENSATED = frozenset({"OSSCAR: elimination + least squares", "ReplaceMe: angular + least squares"})
FAMILIES = {
    "mlp": "MLP width",
    "width": "MLP and heads",
    "axes": "hidden and MLP",
    "depth": "layers",
    "llama": "as Llama 3.2",
}


def groups(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by their values under these names, in the order in which they came."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def markdown(rows: list[Row]) -> str:
    """Loss after the cut and after each distillation, by model, shape and method; the lowest of a column is bold."""
    if not rows:
        return ""
    shares = sorted({row["distilled"] for row in rows})
    columns = ["after the cut" if share == 0 else f"{share:.0%} distilled" for share in shares]
    lines = [
        "| model (whole) | family | target | share kept | method | " + " | ".join(columns) + " | seconds |",
        "|---|---|---|---|---|" + "---|" * (len(columns) + 1),
    ]
    for (model, family, target), same in groups(rows, "model", "family", "target").items():
        means = {
            k: statistics.fmean(r["loss"] for r in part) for k, part in groups(same, "method", "distilled").items()
        }
        best = {share: min((v for (_, s), v in means.items() if s == share), default=math.nan) for share in shares}
        for (method,), part in groups(same, "method").items():
            cells = []
            for share in shares:
                losses = [row["loss"] for row in part if row["distilled"] == share]
                text = spread(losses) if losses else ""
                cells.append(f"**{text}**" if losses and means[method, share] == best[share] else text)
            first = part[0]
            name = f"*{method}*" if first["ours"] else method
            where = f"{model} ({first['whole']:.3f}) | {family} | {target} | {first['share']:.1%}"
            seconds = statistics.median(row["seconds"] for row in part)
            lines.append(f"| {where} | {name} | {' | '.join(cells)} | {seconds:.2f} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Shape:
    """What became of one shape of one model, straight after the cut: mean losses by method, and what stands out."""

    model: str
    family: str
    target: str
    whole: float
    loss: dict[str, float]
    """Of each method, on average over its seeds."""
    ours: frozenset[str]

    @classmethod
    def of(cls, key: tuple[Any, ...], rows: list[Row]) -> Shape:
        """The rows of one model and target, of which only those before distillation count."""
        rows = [row for row in rows if row["distilled"] == 0]
        loss = {name: statistics.fmean(r["loss"] for r in part) for (name,), part in groups(rows, "method").items()}
        return cls(*key, rows[0]["whole"], loss, frozenset(row["method"] for row in rows if row["ours"]))

    @property
    def label(self) -> str:
        """The shape in words."""
        return f"{FAMILIES[self.family]}, {self.target.replace('%', ' %')}"

    @property
    def alone(self) -> dict[str, float]:
        """Losses of the published criteria without compensation."""
        chance = {name for name in self.loss if name.startswith("random")}
        return {name: v for name, v in self.loss.items() if name not in self.ours | chance | COMPENSATED}

    @property
    def compensated(self) -> dict[str, float]:
        """Losses of the published compensations."""
        return {name: v for name, v in self.loss.items() if name in COMPENSATED}

    def excess(self, loss: float) -> float:
        """What is lost against the whole model."""
        return loss - self.whole


def shapes(rows: list[Row]) -> list[Shape]:
    """The shapes at which both the default and a peer were measured, in the order in which they came."""
    made = [
        Shape.of(key, same)
        for key, same in groups((r for r in rows if r["distilled"] == 0), "model", "family", "target").items()
    ]
    return [shape for shape in made if DEFAULT in shape.loss and shape.alone]


def summary(rows: list[Row]) -> str:
    """One line for each shape: a random start, the peers at their best, the default, and the quotient of excesses."""
    lines = [
        "| model (whole) | cut | random start | best criterion alone | compensated peer | closed forms | default | "
        "excess, default / best alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in shapes(rows):
        best = min(shape.alone, key=shape.alone.__getitem__)
        columns = [
            f"{shape.model} ({shape.whole:.3f})",
            shape.label,
            _cell(shape.loss.get("random start")),
            f"{shape.alone[best]:.3f} ({best.split(',')[0]})",
            _cell(min(shape.compensated.values(), default=None)),
            _cell(shape.loss.get(CLOSED_FORMS)),
            _cell(shape.loss[DEFAULT]),
            f"{shape.excess(shape.loss[DEFAULT]) / shape.excess(shape.alone[best]):.2f}",
        ]
        lines.append("| " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def _cell(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def ablation(rows: list[Row]) -> str:
    """What is lost when one part of mending is left out: a line for each part, a column for each shape."""
    parts = {row["method"] for row in rows if row["method"].startswith(WITHOUT)}
    measured = [shape for shape in shapes(rows) if parts & shape.loss.keys()]
    if not measured:
        return ""
    heads = [f"{shape.model}, {shape.target}" for shape in measured]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for method in (DEFAULT, *dict.fromkeys(row["method"] for row in rows if row["method"] in parts), CLOSED_FORMS):
        cells = [_cell(shape.loss.get(method)) for shape in measured]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], file: Path) -> None:
    """Excess loss straight after the cut, a line for each shape: each criterion alone, the compensated peers, ours."""
    found = shapes(rows)
    if not found:
        return
    figure = Figure(figsize=(9, 1.6 + 0.27 * len(found)), layout="constrained")
    axis = figure.subplots()
    places = range(len(found))
    for name, marker, color, size, losses in (
        ("published criteria alone", "o", "0.6", 18, [list(shape.alone.values()) for shape in found]),
        ("compensated peer", "D", "C1", 30, [list(shape.compensated.values()) for shape in found]),
        ("random start", "x", "0.2", 24, [_present(shape.loss.get("random start")) for shape in found]),
        ("closed forms", "o", "C9", 34, [_present(shape.loss.get(CLOSED_FORMS)) for shape in found]),
        ("default", "o", "C0", 48, [[shape.loss[DEFAULT]] for shape in found]),
    ):
        points = [(found[place].excess(loss), place) for place in places for loss in losses[place]]
        if points:
            axis.scatter(*zip(*points, strict=True), s=size, marker=marker, color=color, label=name, zorder=2)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_yticks(list(places), [f"{shape.model}: {shape.label}" for shape in found], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="y", linewidth=0.4, zorder=0)
    axis.set_xlabel("excess loss straight after the cut, nats per token")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(file, dpi=130)


def _present(loss: float | None) -> list[float]:
    return [] if loss is None else [loss]
