"""How a picture of the report is drawn: once for the page, where style sheets colour it, and once as PNG.

On the page a colour is a CSS variable, so that one picture serves light and dark.
"""

from __future__ import annotations

import io
import itertools
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
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from llamita.report.labels import tick
from llamita.report.metrics import Array
from llamita.report.palettes import LIGHT, NAMES, Palette, variables

# Colours that stand for variables while a picture is drawn: no real picture uses them.
_STAND_IN = {name: f"#fe01{index:02x}" for index, name in enumerate(variables(LIGHT))}
_VARIABLE = Palette(
    **{name: _STAND_IN[f"--{name}"] for name in NAMES},
    others=tuple(_STAND_IN[f"--other-{index}"] for index in range(len(LIGHT.others))),
)


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


def count_axis(axes: Axes, label: str) -> None:
    """A horizontal axis of large numbers."""
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel(label)


def log_axis(axes: Axes, label: str) -> None:
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
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    axes.yaxis.set_minor_locator(NullLocator())


def legend(figure: Figure, handles: Sequence[Line2D | Patch]) -> None:
    """A legend above the axes, in as many columns as there is room for."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(len(handles), max(1, int(figure.get_figwidth() * 72 / (60 + 8 * longest))))
    by_column = [handle for column in range(columns) for handle in handles[column::columns]]  # as it fills them
    figure.legend(handles=by_column, loc="outside upper left", ncols=columns)


def thinned(x: Array, values: Array, stretches: int = 800) -> tuple[Array, Array]:
    """The ends and the extremes of each stretch: a million points look no different, and weigh megabytes."""
    if len(values) <= 4 * stretches:
        return x, values
    edges = np.linspace(0, len(values), stretches + 1).astype(int)
    places = [(a, a + values[a:b].argmin(), a + values[a:b].argmax(), b - 1) for a, b in itertools.pairwise(edges)]
    kept = np.unique(places)
    return x[kept], values[kept]
