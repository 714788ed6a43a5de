"""The pictures of how good the models are: bits per byte over their training, and accuracies on tasks."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from llamita.report.drawing import Sketch, count_axis, legend, new_figure, thinned
from llamita.report.gather import Report
from llamita.report.labels import clip
from llamita.report.palettes import Palette
from llamita.report.roles import Role


def teacher_level(report: Report) -> float | None:
    """Where the teacher lies on the rows of the curves, in bits per byte.

    The evaluation may have measured other rows than the runs did while they trained. The distance between two models
    hardly depends on the rows, so the teacher is placed at that distance from the end of the result's curve; on equal
    rows this is its value itself.
    """
    teacher, result = report.first(Role.teacher), report.result
    if teacher is None or "bits_per_byte" not in teacher.values:
        return None
    level = teacher.values["bits_per_byte"].value
    end = next((float(curve.values[-1]) for curve in report.curves if curve.model is result), None)
    if end is None or result is None or "bits_per_byte" not in result.values:
        return level
    return level + end - result.values["bits_per_byte"].value


def recovery(report: Report) -> Sketch | None:
    """Bits per byte over tokens, with the teacher as a line."""
    if not report.curves:
        return None
    teacher, floor = report.first(Role.teacher), teacher_level(report)
    main = [curve for curve in report.curves if curve.model is report.result]

    def draw(palette: Palette) -> Figure:
        figure, axes = new_figure(880, 380)
        final = [curve.values[-1] for curve in report.curves]
        levels = final if floor is None else [*final, floor]
        bottom = min(levels)
        reach = max(max(levels) - bottom, 0.02 * bottom)
        ends = []
        for curve in sorted(report.curves, key=lambda c: c.model is report.result):
            colour = palette.of(curve.model, report.models)
            width, order = (2.6, 3) if curve in main else (1.8, 2)
            axes.plot(*thinned(curve.tokens, curve.values), color=colour, linewidth=width, zorder=order)
            axes.plot(curve.tokens[-1:], curve.values[-1:], "o", color=colour, markersize=6, zorder=4)
            ends.append((curve.values[-1], f"{clip(curve.model.name)}  {curve.values[-1]:.3f}", colour))
        if floor is not None and teacher is not None:
            axes.axhline(floor, color=palette.teacher, linewidth=1.4, linestyle=(0, (5, 3)))
            ends.append((floor, f"{clip(teacher.name)}  {floor:.3f}", palette.teacher))
        # Most of each curve, and room between their ends: how they begin would take the whole height.
        top = max(float(np.interp(0.25 * curve.tokens[-1], curve.tokens, curve.values)) for curve in report.curves)
        top = max(top, bottom + 3.2 * reach)
        highest = max([*levels, *(float(curve.values.max()) for curve in report.curves)])
        top = min(top, highest + 0.05 * max(highest - bottom, reach))
        axes.set_ylim(bottom - 0.05 * (top - bottom), top)
        axes.set_xlim(left=0, right=max(curve.tokens[-1] for curve in report.curves) * 1.01)
        if main and main[0].tokens[0] == 0 and main[0].values[0] > top:
            text = f"↑ before training: {main[0].values[0]:.2f}"
            colour = palette.of(main[0].model, report.models)
            axes.annotate(text, (0.012, 0.955), xycoords="axes fraction", color=colour)
        _label_ends(axes, ends)
        axes.set_ylabel("bits per byte, held out")
        count_axis(axes, "training tokens")
        return figure

    caption = "Bits per byte on held-out text over training tokens, as each run measured it; lower is better."
    if floor is not None and teacher is not None:
        caption += " The dashed line is the teacher"
        moved = abs(floor - teacher.values["bits_per_byte"].value) > 0.0005
        caption += ", at its measured distance from the result on these rows." if moved else "."
    return Sketch(name="recovery", title="Recovery", caption=caption, draw=draw)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Names at the right of the curves, moved apart where they would overlap; ``ends`` are height, name, colour."""
    low, high = axes.get_ylim()
    gap = 15.5 / (axes.get_figure().get_figheight() * 72 * 0.8)  # type: ignore[union-attr]
    places: list[float] = []
    ordered = sorted(ends)
    for height, _, _ in ordered:
        wanted = min(1.0, max(0.0, (height - low) / (high - low)))
        places.append(max(wanted, places[-1] + gap) if places else wanted)
    overflow = max(0.0, (places[-1] if places else 0) - 1)
    for (_, name, colour), place in zip(ordered, places, strict=True):
        axes.annotate(name, (1.012, place - overflow), xycoords="axes fraction", va="center", color=colour, fontsize=10)


def tasks(report: Report) -> Sketch | None:
    """Accuracies of all models on all tasks, with standard errors."""
    models = [model for model in report.models if any("acc" in scores for scores in model.tasks.values())]
    names = list(dict.fromkeys(task for model in models for task, scores in model.tasks.items() if "acc" in scores))
    if not names:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = new_figure(880, 80 + len(names) * (18 + 15 * len(models)))
        spread = np.linspace(-0.32, 0.32, len(models)) if len(models) > 1 else [0.0]
        for model, offset in zip(models, spread, strict=True):
            colour = palette.of(model, report.models)
            for row, name in enumerate(names):
                if (score := model.tasks.get(name, {}).get("acc")) is None:
                    continue
                error = score.stderr or 0
                axes.plot([score.value - error, score.value + error], [row + offset] * 2, color=colour, linewidth=1.6)
                axes.plot([score.value], [row + offset], "o", color=colour, markersize=6)
        for row in range(1, len(names)):
            axes.axhline(row - 0.5, color=palette.grid, linewidth=0.8)
        axes.set_yticks(range(len(names)), [clip(name, 34) for name in names])
        axes.tick_params(axis="y", labelcolor=palette.ink)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlim(-0.012, 1.012)
        axes.set_xlabel("accuracy, ± one standard error")
        handles = [Line2D([], [], color=palette.of(m, report.models), marker="o", label=clip(m.name)) for m in models]
        legend(figure, handles)
        return figure

    return Sketch(name="tasks", title="Tasks", caption="Accuracy on lm-eval tasks; higher is better.", draw=draw)
