"""The rows of ``benchmarks/pruning.py`` as one Markdown table and one picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
MARKERS = "osD^v<>PX"  # nine, so that with ten colours no two of ninety methods look alike


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


def plot(rows: list[Row], file: Path) -> None:
    """Excess loss after the cut over the share that is kept: a panel for each model and family."""
    rows = [row for row in rows if row["distilled"] == 0]
    panels = groups(rows, "model", "family")
    if not panels:
        return
    models, families = (list(dict.fromkeys(key[axis] for key in panels)) for axis in (0, 1))
    style = {name: number for number, (name,) in enumerate(groups(rows, "method"))}
    figure = Figure(figsize=(4 * len(families) + 2.5, 3.2 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), len(families), squeeze=False)
    for line, model in enumerate(models):
        for column, family in enumerate(families):
            axis = axes[line][column]
            axis.set_title(f"{model}, {family}", fontsize=9)
            if all(row["loss"] > row["whole"] for row in panels.get((model, family), [])):
                axis.set_yscale("log")
                for part in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    part("{x:g}")
            axis.set_xlabel("share of parameters kept")
            axis.set_ylabel("excess loss, nats per token")
            for (method,), part in groups(panels.get((model, family), []), "method").items():
                points = sorted(
                    (share, statistics.fmean(row["loss"] - row["whole"] for row in same))
                    for (share,), same in groups(part, "share").items()
                )
                number, ours = style[method], part[0]["ours"]
                axis.plot(
                    *zip(*points, strict=True),
                    color=f"C{number % 10}",
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4,
                    linewidth=2.2 if ours else 1.0,
                    linestyle="-" if ours else "--",
                    label=method,
                )
    lines = {str(line.get_label()): line for axis in axes.flat for line in axis.get_lines()}
    figure.legend(list(lines.values()), list(lines), loc="outside right upper", fontsize=8)
    figure.savefig(file, dpi=120)
