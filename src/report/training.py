"""The pictures of how training went: its losses, and its throughput, with the places where a run was started again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from llamita.report.drawing import Sketch, count_axis, legend, new_figure, thinned
from llamita.report.gather import Report
from llamita.report.labels import clip, slug, tick
from llamita.report.metrics import Array, Over
from llamita.report.models import Model
from llamita.report.palettes import Palette
from llamita.report.roles import Role

LOSSES = {"train/ce": "cross-entropy", "train/kd": "divergence"}
TABS = {Over.tokens: "tokens", Over.steps: "steps", Over.seconds: "wall time"}


def losses(report: Report) -> list[Sketch]:
    """Training losses over tokens, steps and wall time: with the text, and from the teacher where there is one."""
    return [sketch for over in Over if (sketch := _losses_over(report, over)) is not None]


def _losses_over(report: Report, over: Over) -> Sketch | None:
    """Each panel is one loss."""
    data = {name: _lines(report, name, over) for name in LOSSES}
    apart = (Role.teacher, Role.aligned)  # an aligned model's losses are those of answers, not of the text
    data = {name: [line for line in lines if line.model.role not in apart] for name, lines in data.items()}
    data = {name: lines for name, lines in data.items() if lines}
    if not data:
        return None
    scale, label = _axis_of(over, max(float(line.at[-1]) for lines in data.values() for line in lines))

    def draw(palette: Palette) -> Figure:
        figure, grid = new_figure(880, 280, 1, len(data), squeeze=False)
        shown: dict[int, _Line] = {}
        for axes, (name, lines) in zip(grid[0], data.items(), strict=True):
            tails = []
            for line in lines:
                colour = palette.of(line.model, report.models)
                shown.setdefault(id(line.model), line)
                _mark_restarts(axes, [place / scale for place in line.restarts], colour)
                smooth = _noisy(axes, line.at / scale, line.values, colour, stretches=400)
                tails += smooth[len(smooth) // 8 :].tolist()
            low, high = min(tails), max(tails)
            margin = 0.06 * max(high - low, 0.01 * abs(high), 1e-6)
            axes.set_ylim(low - margin, high + margin)
            axes.set_xlim(left=0)
            axes.set_ylabel(f"{LOSSES[name]}, nats per token")
            count_axis(axes, label)
        _legend_of(figure, list(shown.values()), palette, report)
        return figure

    return Sketch(
        name="losses" if over is Over.tokens else f"losses-{slug(TABS[over])}",
        title="Training losses",
        caption="Cross-entropy with the text, and divergence from the teacher: each logged step and the mean around "
        f"it, over {'wall time' if over is Over.seconds else label}.",
        draw=draw,
        tab=TABS[over],
    )


def _axis_of(over: Over, longest: float) -> tuple[float, str]:
    """By how much to divide what a curve is drawn over, and what it is called then."""
    match over:
        case Over.tokens:
            return 1.0, "training tokens"
        case Over.steps:
            return 1.0, "steps"
        case Over.seconds:
            units = ((4 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (300, 60, "minutes"), (0, 1, "seconds"))
            size, unit = next((size, unit) for least, size, unit in units if longest >= least)
            return float(size), f"{unit} since the first row"


def throughput(report: Report) -> Sketch | None:
    """Tokens per second over training, with restarts."""
    lines = _lines(report, "perf/tokens_per_s_per_gpu", Over.tokens)
    if not lines:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = new_figure(880, 250)
        for line in lines:
            colour = palette.of(line.model, report.models)
            _noisy(axes, line.at, line.values, colour)
            _mark_restarts(axes, line.restarts, colour)
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.yaxis.set_major_formatter(FuncFormatter(tick))
        axes.set_ylabel("tokens per second and device")
        count_axis(axes, "training tokens")
        _legend_of(figure, lines, palette, report)
        return figure

    return Sketch(
        name="throughput",
        title="Throughput",
        caption="Each logged step, and the mean around it, over training tokens.",
        draw=draw,
    )


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A metric of one run, and where the run was started again."""

    model: Model
    at: Array
    values: Array
    restarts: list[float]


def _lines(report: Report, name: str, over: Over) -> list[_Line]:
    found = []
    for model in report.models:
        if model.stage is not None:
            metrics = model.stage.metrics
            at, values = metrics.series(name, over)
            if len(values) > 1:
                found.append(_Line(model=model, at=at, values=values, restarts=metrics.restarts(over)))
    return found


def _mark_restarts(axes: Axes, places: Sequence[float], colour: str) -> None:
    for place in places:
        axes.axvline(place, color=colour, linewidth=1.2, linestyle=(0, (2, 2)))


def _legend_of(figure: Figure, lines: Sequence[_Line], palette: Palette, report: Report) -> None:
    """The runs by colour, and what a dashed line is where there is one."""
    handles = [
        Line2D([], [], color=palette.of(line.model, report.models), label=clip(line.model.name)) for line in lines
    ]
    if any(line.restarts for line in lines):
        handles.append(Line2D([], [], color=palette.muted, linewidth=1.2, linestyle=(0, (2, 2)), label="restart"))
    legend(figure, handles)


def _noisy(axes: Axes, x: Array, values: Array, colour: str, *, stretches: int = 800) -> Array:
    """A faint line and the mean around it, which is returned."""
    smooth = smoothed(values)
    axes.plot(*thinned(x, values, stretches), color=colour, linewidth=0.8, alpha=0.3)
    axes.plot(*thinned(x, smooth, stretches // 2), color=colour, linewidth=1.8)
    return smooth


def smoothed(values: Array) -> Array:
    """Mean over a twentieth of the points around each; it does not lag behind."""
    reach = max(1, len(values) // 40)
    total = np.cumsum(np.r_[0.0, values])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    mean: Array = (total[last] - total[first]) / (last - first)
    return mean
