"""The pictures of what pruning did: where the parameters are, and which heads, units, channels and layers it kept."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from llamita.report.drawing import Sketch, legend, log_axis, new_figure
from llamita.report.kept import Kept
from llamita.report.labels import clip, percent, short, slug
from llamita.report.metrics import Array
from llamita.report.palettes import Palette
from llamita.shapes import LlamaShape

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


def of_plan(kept: Kept) -> list[Sketch]:
    """All pictures of what one pruning kept."""
    sketches = [heads(kept), mlp(kept), hidden(kept), layers(kept)]
    return [sketch for sketch in sketches if sketch is not None]


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


def _squares(axes: Axes, rows: Array, columns: Array, colour: str, alpha: float, size: float = 0.86) -> None:
    """Cells of one colour as one object: a map of thousands of cells stays a small file."""
    if len(rows) == 0:
        return
    corner = (1 - size) / 2 - 0.5
    x, y = columns + corner, rows + corner
    corners = np.stack([np.stack([x + dx, y + dy], -1) for dx, dy in ((0, 0), (size, 0), (size, size), (0, size))], 1)
    axes.add_collection(PolyCollection(list(corners), facecolors=colour, alpha=alpha, linewidths=0))


def _levels(scores: Array | None, shape: tuple[int, ...], steps: int = 6) -> Array:
    """Opacities in a few steps by rank, so that one outlier does not make all others pale."""
    if scores is None:
        return np.full(shape, 0.85)
    ranks = scores.flatten().argsort().argsort().reshape(scores.shape) / max(1, scores.size - 1)
    return np.round(0.3 + 0.7 * np.floor(ranks * (steps - 1e-9)) / (steps - 1), 3)


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
        log_axis(axes, f"importance ({kept.kinds.get('mlp', '')})")
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
        log_axis(axes, f"importance ({kept.kinds.get('hidden', '')})")
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
