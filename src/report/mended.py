"""What mending a cut bought and cost: the error of each layer before it, its halves fitted, and after the steps."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from llamita.report import drawing, labels
from llamita.report.drawing import Sketch
from llamita.report.metrics import Array
from llamita.report.palettes import Palette
from llamita.report.stages import Stage

PARTS = {"start": "as cut", "refit": "each half fitted", "tuned": "and steps on the layer"}


LEFT = {"readers": "readers", "attention_steps": "steps on attention", "writers": "writers"}
"""Parts of which it is known what share of their own error they leave."""
SECONDS = {
    "closed_forms": "the closed forms",
    "gains": "gains",
    "readers": "readers",
    "values": "values",
    "attention_steps": "steps on attention",
    "writers": "writers",
    "steps": "the steps on layers",
    "head": "those behind the last layer",
    "tied": "those on the shared matrix",
    "passes": "running both models through the layers",
}
"""``closed_forms`` is in older records alone: all that reads and writes in one, steps on attention included."""


def errors(stage: Stage) -> Sketch | None:
    """Squared error of the stream behind each layer, relative to its square, from one and the same input.

    ``None`` where nothing was mended.
    """
    found = {part: stage.metrics.values(f"prune/error/{part}") for part in PARTS}
    shown: dict[str, Array] = {part: values for part, values in found.items() if len(values)}
    if not shown:
        return None

    def draw(palette: Palette) -> Figure:
        figure, axes = drawing.new_figure(880, 300)
        colours = dict(zip(PARTS, (palette.pruned, palette.muted, palette.distilled), strict=True))
        for part, values in shown.items():
            axes.plot(range(len(values)), values, "o-", color=colours[part], linewidth=1.6, markersize=5)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(min(16, len(shown["start"])), integer=True))
        axes.set_xlabel("layer of the smaller model")
        axes.set_ylabel("relative squared error")
        handles = [Line2D([], [], color=colours[part], marker="o", label=PARTS[part]) for part in shown]
        axes.legend(handles=handles, loc="upper right")
        return figure

    return Sketch(
        name=f"mended-{labels.slug(stage.name)}",
        title="Mended layers",
        caption="What each layer adds to the error of the stream, by what was mended. " + _bought(stage),
        draw=draw,
    )


def _bought(stage: Stage) -> str:
    """The losses and the seconds, as far as they are known."""
    summary = (stage.done or {}).get("summary") or {}
    losses = [
        f"{label} {summary[name]:.3f}"
        for name, label in (("loss_before", "whole"), ("loss_cut", "cut"), ("loss_after", "mended"))
        if isinstance(summary.get(name), float)
    ]
    parts = SECONDS
    places = {"start": "as mended by layers", "head": parts["head"], "tied": parts["tied"]}
    gaps = {place: stage.metrics.values(f"prune/divergence/{name}") for name, place in places.items()}
    told = [f"{place} {values[-1]:.3f}" for place, values in gaps.items() if len(values)]
    seconds = {label: stage.metrics.values(f"prune/seconds/{name}") for name, label in parts.items()}
    took = [f"{label} {sum(values):.0f} s" for label, values in seconds.items() if len(values)]
    sentences = [f"Loss on the calibration text: {', '.join(losses)}." if losses else ""]
    sentences.append(f"Divergence from the whole model behind the last layer: {', '.join(told)}." if told else "")
    shares = {label: stage.metrics.values(f"prune/left/{name}") for name, label in LEFT.items()}
    left = [f"{label} {sum(values) / len(values):.0%}" for label, values in shares.items() if len(values)]
    sentences.append(f"Left of what each part fits, mean over layers: {', '.join(left)}." if left else "")
    sentences.append(f"Time: {', '.join(took)}." if took else "")
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences if sentence)
