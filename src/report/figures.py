"""The pictures of the report: each is drawn once for the page, where style sheets colour it, and once as PNG.

Colours are roles (:class:`Palette`). On the page a colour is a CSS variable, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llamita.report.gather import Array, Kept, Model, Over, Report, Role
from llamita.shapes import LlamaShape


@dataclass(frozen=True, kw_only=True)
class Palette:
    """What each colour is for."""

    ink: str
    muted: str
    grid: str
    card: str
    teacher: str
    pruned: str
    distilled: str
    cut: str
    others: tuple[str, ...]

    def of(self, model: Model, models: Sequence[Model] = ()) -> str:
        """The colour of a model: its role's for the first teacher, pruned and distilled one, else one of its own."""
        firsts = {role: next((m for m in models if m.role is role), model) for role in _ROLES_WITH_COLOURS}
        if firsts.get(model.role) is model:
            return str(getattr(self, model.role))
        rest = [m for m in models if firsts.get(m.role) is not m]
        index = next((i for i, other in enumerate(rest) if other is model), 0)
        return self.others[index % len(self.others)]


_ROLES_WITH_COLOURS = (Role.teacher, Role.pruned, Role.distilled)


LIGHT = Palette(
    ink="#1d2126",
    muted="#666c75",
    grid="#e5e2dc",
    card="#ffffff",
    teacher="#1d2126",
    pruned="#c4552f",
    distilled="#0e7c6b",
    cut="#d3cfc7",
    others=(
        "#7467b8",
        "#b3862b",
        "#4c86b5",
        "#a8577e",
        "#6a8f2f",
        "#8a5a3c",
        "#c23b6b",
        "#2f4f9e",
        "#5f7d8c",
        "#d06fc0",
    ),
)
DARK = Palette(
    ink="#ebe9e4",
    muted="#9ba1aa",
    grid="#2d3138",
    card="#1b1e23",
    teacher="#ebe9e4",
    pruned="#f08b66",
    distilled="#4ccab2",
    cut="#41464e",
    others=(
        "#aea2f2",
        "#dcb659",
        "#86b9e6",
        "#e091b7",
        "#a9cf6b",
        "#c99a78",
        "#f0648f",
        "#7f98f5",
        "#9fb6c2",
        "#ec9be0",
    ),
)
NAMES = ("ink", "muted", "grid", "card", "teacher", "pruned", "distilled", "cut")


def variables(palette: Palette) -> dict[str, str]:
    """CSS variables of a palette."""
    named = {f"--{name}": getattr(palette, name) for name in NAMES}
    return named | {f"--other-{index}": colour for index, colour in enumerate(palette.others)}


# Colours that stand for variables while a picture is drawn: no real picture uses them.
_STAND_IN = {name: f"#fe01{index:02x}" for index, name in enumerate(variables(LIGHT))}
_VARIABLE = Palette(
    **{name: _STAND_IN[f"--{name}"] for name in NAMES},
    others=tuple(_STAND_IN[f"--other-{index}"] for index in range(len(LIGHT.others))),
)

VARIABLES = Palette(
    **{name: f"--{name}" for name in NAMES},
    others=tuple(f"--other-{index}" for index in range(len(LIGHT.others))),
)
"""Names of the CSS variables themselves."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture for the page."""

    name: str
    title: str
    caption: str
    tab: str
    svg: str
    """Safe markup: all text in it is escaped."""


@dataclass(kw_only=True)
class Sketch:
    """A picture that is still to be drawn, in whatever colours."""

    name: str
    title: str
    caption: str
    draw: Callable[[Palette], Figure]
    tab: str = ""
    """What it is called among pictures of one place, of which the page shows one at a time."""


@contextmanager
def _style(palette: Palette) -> Iterator[None]:
    """Our look; names with dollar signs are names, not mathematics."""
    rc: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "text.parse_math": False,
        "text.color": palette.ink,
        "axes.edgecolor": palette.grid,
        "axes.labelcolor": palette.muted,
        "axes.labelsize": 10.5,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": palette.grid,
        "grid.linewidth": 0.8,
        "xtick.color": palette.grid,
        "ytick.color": palette.grid,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "xtick.minor.size": 0,
        "lines.linewidth": 2.0,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 10.5,
        "svg.fonttype": "none",
        "svg.hashsalt": "llamita",
        "figure.facecolor": "none",
        "figure.constrained_layout.w_pad": 0.06,
        "figure.constrained_layout.h_pad": 0.06,
        "savefig.facecolor": "auto",
    }
    with mpl.rc_context(rc), warnings.catch_warnings():
        # The page is drawn in the reader's fonts, which have more than the one that measures here.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        yield


def picture(sketch: Sketch) -> Picture:
    """Draw for the page: text stays text, colours become variables, identifiers do not clash with other pictures."""
    with _style(_VARIABLE):
        figure = sketch.draw(_VARIABLE)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = re.sub(r"^.*?(?=<svg)", "", file.getvalue(), flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    view = re.search(r'(?<=viewBox=")[^ ]+ [^ ]+ ([^ ]+) [^"]+', head)
    assert view is not None
    # Of elements only: what stands between them are names, which may look like anything.
    body = re.sub(r"<[^>]*>", lambda element: _for_page(element[0], sketch.name), body)
    # Wider than drawn, its text would be larger than the page's.
    width = round(1.12 * float(view.group(1)))
    svg = f'<svg viewBox="{view.group(0)}" style="max-width:{width}px" role="img" aria-label="{sketch.title}">{body}'
    return Picture(name=sketch.name, title=sketch.title, caption=sketch.caption, tab=sketch.tab, svg=svg)


def _for_page(element: str, picture: str) -> str:
    element = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{picture}-", element).replace("xlink:href", "href")
    element = re.sub(r"(font: (?:\d+ )?[\d.]+px |font-family: )[^;\"]+", r"\1var(--sans)", element)
    for name, colour in _STAND_IN.items():
        element = element.replace(colour, f"var({name})")
    return element


def save_png(sketch: Sketch, folder: Path) -> Path:
    """Draw the same picture in light colours, with its title, for slides and papers."""
    path = folder / f"{sketch.name}.png"
    with _style(LIGHT):
        figure = sketch.draw(LIGHT)
        figure.set_facecolor(LIGHT.card)
        figure.suptitle(sketch.title, x=0.02, ha="left", fontsize=13, fontweight="bold")
        figure.savefig(path, dpi=200, metadata={"Software": None})
    return path


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of so many CSS pixels."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def short(number: float) -> str:
    """A count in three digits: 1.24B, 768k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled)) + 1e-4))}f}{unit}"
    return f"{number:.3g}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage that no line break tears apart."""
    return f"{100 * share:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def _tick(value: float, _: Any = None) -> str:
    return "0" if value == 0 else re.sub(r"\.0+(?=\D|$)|(?<=\.\d)0+(?=\D|$)", "", short(value))


def count_axis(axes: Axes, label: str) -> None:
    """A horizontal axis of large numbers."""
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label)


def _log_axis(axes: Axes, label: str) -> None:
    """An axis, logarithmic where values span much, with plain numbers: matplotlib writes powers as mathematics."""
    axes.set_ylabel(label.replace("_", " "))
    low, high = axes.get_ylim()
    if high < 30 * max(low, 1e-300):
        axes.set_ylim(bottom=0)
        return
    axes.set_yscale("log")
    # Three ticks a decade crowd where there are many decades.
    subs = (1.0, 2.0, 5.0) if high < 1e3 * low else (1.0, 3.0) if high < 1e4 * low else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """A legend above the axes, in as many columns as there is room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, int(figure.get_figwidth() * 72 / (60 + 8 * longest))))
    by_column = [handle for column in range(columns) for handle in handles[column::columns]]  # as it fills them
    figure.legend(handles=by_column, loc="outside upper left", ncols=columns)


def printable(text: str) -> str:
    """Text without the characters by which a terminal is commanded, and which no picture can show."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def clip(text: str, length: int = 28) -> str:
    """A name short enough for a picture."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


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


LOSSES = {"train/ce": "cross-entropy", "train/kd": "divergence"}
TABS = {Over.tokens: "tokens", Over.steps: "steps", Over.seconds: "wall time"}


def losses(report: Report) -> list[Sketch]:
    """Training losses over tokens, steps and wall time: with the text, and from the teacher where there is one."""
    return [sketch for over in Over if (sketch := _losses_over(report, over)) is not None]


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


def thinned(x: Array, values: Array, stretches: int = 800) -> tuple[Array, Array]:
    """The ends and the extremes of each stretch: a million points look no different, and weigh megabytes."""
    if len(values) <= 4 * stretches:
        return x, values
    edges = np.linspace(0, len(values), stretches + 1).astype(int)
    places = [(a, a + values[a:b].argmin(), a + values[a:b].argmax(), b - 1) for a, b in itertools.pairwise(edges)]
    kept = np.unique(places)
    return x[kept], values[kept]


def smoothed(values: Array) -> Array:
    """Mean over a twentieth of the points around each; it does not lag behind."""
    reach = max(1, len(values) // 40)
    total = np.cumsum(np.r_[0.0, values])
    first = np.maximum(np.arange(len(values)) - reach, 0)
    last = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    mean: Array = (total[last] - total[first]) / (last - first)
    return mean


COMPONENTS = ("embedding", "output head", "attention", "MLP", "norms")


def components(shape: LlamaShape) -> dict[str, int]:
    """Parameters of each kind; they add up to all."""
    embedding = shape.vocab_size * shape.hidden_size
    layers = shape.num_hidden_layers
    return {
        "embedding": embedding,
        "output head": shape.embedding_parameters - embedding,
        "attention": layers * shape.attention_parameters,
        "MLP": layers * shape.mlp_parameters,
        "norms": (2 * layers + 1) * shape.hidden_size,
    }


def parameters(before: LlamaShape, after: LlamaShape, names: tuple[str, str]) -> Sketch:
    """Where the parameters are, before and after: two stacked bars on one scale."""

    def draw(palette: Palette) -> Figure:
        figure, axes = new_figure(880, 190)
        tints = {"embedding": 0.35, "output head": 0.55, "attention": 0.75, "MLP": 1.0, "norms": 0.15}
        total = before.num_parameters
        for row, (shape, colour) in enumerate(((before, palette.muted), (after, palette.distilled))):
            left = 0
            for component, size in components(shape).items():
                axes.barh(row, size, left=left, height=0.56, color=colour, alpha=tints[component], linewidth=0)
                if left:
                    axes.plot([left, left], [row - 0.28, row + 0.28], color=palette.card, linewidth=1.5)
                if size > 0.062 * total:
                    ink = palette.card if tints[component] > 0.7 else palette.ink
                    text = "\n".join([*component.split(), short(size)])
                    axes.text(left + size / 2, row, text, ha="center", va="center", color=ink, fontsize=8)
                left += size
            axes.text(left + 0.008 * total, row, short(left), va="center", fontweight="bold", color=palette.ink)
        axes.set_yticks([0, 1], [clip(name, 18) for name in names])
        axes.tick_params(axis="y", labelcolor=palette.ink)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_xticks([])
        axes.set_xlim(0, 1.09 * total)
        return figure

    return Sketch(
        name="parameters",
        title="Where the parameters are",
        caption="Stored parameters of each kind, before and after, on one scale. A tied head is stored once.",
        draw=draw,
    )


def _squares(axes: Axes, rows: Array, columns: Array, colour: str, alpha: float, size: float = 0.86) -> None:
    """Cells of one colour as one object: a map of thousands of cells stays a small file."""
    if len(rows) == 0:
        return
    corner = (1 - size) / 2 - 0.5
    x, y = columns + corner, rows + corner
    corners = np.stack([np.stack([x + dx, y + dy], -1) for dx, dy in ((0, 0), (size, 0), (size, size), (0, size))], 1)
    axes.add_collection(PolyCollection(list(corners), facecolors=colour, alpha=alpha, linewidths=0))


def heads(kept: Kept) -> Sketch:
    """Layer × head: kept ones in colour, stronger where more important."""
    num_layers, num_heads = kept.heads.shape
    cell = min(28.0, 840 / num_heads, max(6.0, 620 / num_layers))

    def draw(palette: Palette) -> Figure:
        figure, axes = new_figure(max(340, 90 + cell * num_heads * 1.06), 90 + cell * num_layers)
        strength = _levels(kept.head_scores, kept.heads.shape)
        group = kept.source.num_attention_heads // kept.source.num_key_value_heads
        for level in np.unique(strength):
            here = strength == level
            rows, columns = np.nonzero(here & kept.heads)
            _squares(axes, rows, columns + 0.25 * (columns // group), palette.distilled, float(level))
        rows, columns = np.nonzero(~kept.heads)
        _squares(axes, rows, columns + 0.25 * (columns // group), palette.cut, 0.55, size=0.42)
        axes.set_xlim(-0.7, num_heads - 0.3 + 0.25 * (kept.source.num_key_value_heads - 1))
        axes.set_ylim(num_layers - 0.4, -0.6)
        axes.set_aspect("equal")
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        ticks = np.arange(0, num_heads, max(group, group * math.ceil(num_heads / group / 8)))
        axes.set_xticks(ticks + 0.25 * (ticks // group), ticks.astype(str))
        axes.yaxis.set_major_locator(MaxNLocator(min(12, num_layers), integer=True))
        axes.tick_params(length=0)
        axes.set_xlabel("query head, in groups that share keys and values")
        axes.set_ylabel("layer of the source")
        return figure

    cut_layers, share = int((~kept.layers).sum()), int(kept.heads.sum())
    return Sketch(
        name=f"heads-{slug(kept.name)}",
        title="Attention heads",
        caption=f"{share:,} of {kept.heads.size:,} query heads are kept; {cut_layers} of {num_layers} layers were cut "
        + "whole. "
        + ("Stronger colour: more important. " if kept.head_scores is not None else "")
        + "Small grey squares were cut.",
        draw=draw,
    )


def _levels(scores: Array | None, shape: tuple[int, ...], steps: int = 6) -> Array:
    """Opacities in a few steps by rank, so that one outlier does not make all others pale."""
    if scores is None:
        return np.full(shape, 0.85)
    ranks = scores.flatten().argsort().argsort().reshape(scores.shape) / max(1, scores.size - 1)
    return np.round(0.3 + 0.7 * np.floor(ranks * (steps - 1e-9)) / (steps - 1), 3)


def slug(name: str) -> str:
    """A name as part of a file name and of an identifier: hostile characters go."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "run"


def mlp(kept: Kept) -> Sketch | None:
    """Layer × MLP: where the importance of kept and of cut units lies in each layer."""
    if kept.mlp_scores is None or kept.mlp.all():
        return None
    scores = kept.mlp_scores

    def draw(palette: Palette) -> Figure:
        figure, axes = new_figure(880, 300)
        step = 0.19
        for layer, row in enumerate(scores):
            positive = np.maximum(row, row[row > 0].min(initial=1e-12))
            if not kept.layers[layer]:
                _range(axes, layer, positive, palette.cut)
                continue
            mask = kept.mlp[layer]
            _range(axes, layer - step, positive[~mask], palette.pruned)
            _range(axes, layer + step, positive[mask], palette.distilled)
        axes.set_ylim(positive_floor(scores) * 0.8, scores.max() * 1.25)
        _log_axis(axes, f"importance ({kept.kinds.get('mlp', '')})")
        axes.set_xlim(-0.6, len(scores) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(min(16, len(scores)), integer=True))
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("layer of the source")
        names = [("kept", palette.distilled), ("cut", palette.pruned), ("layer cut", palette.cut)]
        if kept.layers.all():
            names.pop()
        handles = [Line2D([], [], color=colour, linewidth=4, label=name) for name, colour in names]
        legend(figure, handles)
        return figure

    share = f"{kept.target.intermediate_size:,} of {kept.source.intermediate_size:,} units stay in each kept layer. "
    return Sketch(
        name=f"mlp-{slug(kept.name)}",
        title="MLP units",
        caption=share
        + "Thin lines span the 5th to 95th percentile of importance, thick ones the middle half; dots are "
        "medians.",
        draw=draw,
    )


def positive_floor(scores: Array) -> float:
    """A low quantile of the scores that are not zero, for the foot of an axis."""
    positive = scores[scores > 0]
    return float(np.quantile(positive, 0.005)) if positive.size else 1e-12


def _range(axes: Axes, x: float, values: Array, colour: str) -> None:
    if len(values) == 0:
        return
    low, quarter, middle, upper, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
    axes.plot([x, x], [low, high], color=colour, linewidth=1.2)
    axes.plot([x, x], [quarter, upper], color=colour, linewidth=4)
    axes.plot([x], [middle], "o", color=colour, markersize=4.5)


def hidden(kept: Kept) -> Sketch | None:
    """Channels or directions of the residual stream by falling importance, with the cut."""
    if kept.hidden_scores is None or kept.hidden.all():
        return None
    order = np.argsort(-kept.hidden_scores, kind="stable")
    values, mask = kept.hidden_scores[order], kept.hidden[order]
    values = np.maximum(values, values[values > 0].min(initial=1e-12))
    unit = "direction" if kept.kinds.get("hidden") == "pca" else "channel"

    def draw(palette: Palette) -> Figure:
        figure, axes = new_figure(450, 250)
        axes.set_ylim(values.min() * 0.8, values.max() * 1.1)
        axes.set_xlim(0, len(values) - 1)
        _log_axis(axes, f"importance ({kept.kinds.get('hidden', '')})")
        bottom = axes.get_ylim()[0]
        places = np.unique(np.linspace(0, len(values) - 1, 400).astype(int))
        for chosen, colour in ((mask, palette.distilled), (~mask, palette.pruned)):
            borders = np.flatnonzero(np.diff(np.r_[0, chosen.astype(int), 0]))
            for first, last in zip(borders[::2], borders[1::2], strict=True):
                end = min(last, len(values) - 1)
                inside = np.unique(np.r_[first, places[(places >= first) & (places < end)], end])
                axes.fill_between(inside, bottom, values[inside], color=colour, alpha=0.3, linewidth=0)
                axes.plot(inside, values[inside], color=colour, linewidth=1.8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"{unit}, by falling importance")
        handles = [Patch(color=palette.distilled, label="kept"), Patch(color=palette.pruned, label="cut")]
        axes.legend(handles=handles, loc="upper right")
        return figure

    share = f"{kept.target.hidden_size:,} of {kept.source.hidden_size:,} {unit}s of the residual stream are kept"
    part = f", with {percent(kept.hidden_share)} of the importance." if kept.hidden_share is not None else "."
    return Sketch(name=f"hidden-{slug(kept.name)}", title=f"Hidden {unit}s", caption=share + part, draw=draw)


def layers(kept: Kept) -> Sketch | None:
    """How much each layer does, kept or not."""
    if kept.layer_scores is None:
        return None
    scores = kept.layer_scores

    def draw(palette: Palette) -> Figure:
        figure, axes = new_figure(450, 250)
        colours = [palette.distilled if stays else palette.cut for stays in kept.layers]
        axes.bar(np.arange(len(scores)), scores, color=colours, width=0.72)
        axes.xaxis.set_major_locator(MaxNLocator(min(16, len(scores)), integer=True))
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(scores) - 0.4)
        axes.set_xlabel("layer of the source")
        axes.set_ylabel(kept.kinds.get("layers", "").replace("_", " "))
        if not kept.layers.all():
            handles = [Patch(color=palette.distilled, label="kept"), Patch(color=palette.cut, label="cut")]
            legend(figure, handles)
        return figure

    caption = f"{int(kept.layers.sum())} of {len(scores)} layers are kept: those that change the residual stream most."
    if kept.kinds.get("layers") != "block_influence":
        caption = f"{int(kept.layers.sum())} of {len(scores)} layers are kept."
    return Sketch(name=f"layers-{slug(kept.name)}", title="Layers", caption=caption, draw=draw)


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
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
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


def of_plan(kept: Kept) -> list[Sketch]:
    """All pictures of what one pruning kept."""
    sketches = [heads(kept), mlp(kept), hidden(kept), layers(kept)]
    return [sketch for sketch in sketches if sketch is not None]
