"""By what the units of each axis are ranked, and whether what is known of the model is enough for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llamita.prune import depth
from llamita.prune.further import Further
from llamita.prune.scores import HiddenScore, LayerScore, Scores, WidthScore
from llamita.prune.target import Pairs, Rope, TargetConfig, Tie, target_shape
from llamita.shapes import LlamaShape


@dataclass(kw_only=True)
class ScoreConfig:
    """By what units are ranked, and where the scores come from."""

    path: Path | None = None
    """Directory of an earlier run of this recipe on the same model: its scores are used, nothing is measured."""
    mlp: WidthScore = WidthScore.obs
    attention: WidthScore = WidthScore.obs
    hidden: HiddenScore = HiddenScore.pca
    layers: LayerScore = LayerScore.greedy
    all: bool = False
    """Measure every score, also those that no axis is ranked by, so that other runs can use them (``path``)."""
    removed_layers: int | None = None
    """How many layers the scores ``greedy`` and ``contiguous`` can remove; unset: as many as the target does."""
    gradient_tokens: int = 32768
    """The first of the calibration text, for ``taylor_unit`` and ``taylor_element``: a pass forward and one
    backward."""
    depth_tokens: int = 16384
    """The first of the calibration text, for ``greedy`` and ``contiguous``: half a pass for each layer that could
    leave, each time that one does."""
    depth_gib: float = 4.0
    """Host memory of each process for the hidden states of the models that ``greedy`` and ``contiguous`` compare side
    by side."""
    spill_path: Path | None = None
    """An existing folder on a fast disk, where the inputs of all layers lie while gradients are measured; unset: they
    are held in memory, ``gradient_tokens`` times the hidden size for each layer."""

    def __post_init__(self) -> None:
        for name in ("removed_layers", "gradient_tokens", "depth_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"scores.{name} must be at least 1, got {value}")
        if not self.depth_gib > 0:
            raise ValueError(f"scores.depth_gib must be > 0, got {self.depth_gib}")
        if self.spill_path is not None and not self.spill_path.is_dir():
            raise ValueError(f"scores.spill_path must be an existing folder, got {self.spill_path}")

    def eliminates(self, source: LlamaShape, target: TargetConfig, shapes: Sequence[LlamaShape] = ()) -> bool:
        """Whether an axis that is cut is ranked by the covariance of all units of a layer, or every score is measured.

        ``shapes``, and what is raised: as for :meth:`further`.
        """
        cut = _cut_by_any(source, target, shapes)
        return self.all or any(getattr(self, a).second_order for a in ("mlp", "attention") if a in cut)

    def removed(self, source: LlamaShape, shape: LlamaShape) -> int:
        """How many layers the scores must be able to remove.

        Raises:
            ValueError: ``removed_layers`` leaves no layer, or more than the target does.
        """
        fewer = source.num_hidden_layers - shape.num_hidden_layers
        removed = fewer if self.removed_layers is None else self.removed_layers
        if not fewer <= removed < source.num_hidden_layers:
            raise ValueError(
                f"scores.removed_layers must be in {fewer}..{source.num_hidden_layers - 1}, because the target removes "
                f"{fewer} of {source.num_hidden_layers} layers, got {removed}"
            )
        return removed

    def further(self, source: LlamaShape, target: TargetConfig, shapes: Sequence[LlamaShape] = ()) -> Further:
        """The scores to measure that cost passes of their own: those of the axes that are cut, or all.

        ``shapes`` are those that the scores are to serve, which differ in sizes only; none: that of ``target``.

        Raises:
            ValueError: as :func:`target_shape` and :meth:`removed`.
        """
        shapes = shapes or [target_shape(source, target)]
        cut = _cut_by_any(source, target, shapes)
        removed = self.removed(source, min(shapes, key=lambda shape: shape.num_hidden_layers))
        layers = self.layers if "layers" in cut else None
        return Further(
            by_gradient=self.all or any(getattr(self, a).by_gradient for a in ("mlp", "attention") if a in cut),
            greedy_rounds=removed if self.all or layers is LayerScore.greedy else 0,
            longest_block=removed if self.all or layers is LayerScore.contiguous else 0,
            gradient_tokens=self.gradient_tokens,
            depth_tokens=self.depth_tokens,
            depth_gib=self.depth_gib,
            spill_path=self.spill_path,
        )

    def have_text(self, *, calibrated: bool) -> bool:
        """Whether the scores will be of text: those of ``path`` where it is set, else measured if ``calibrated``.

        Raises:
            ValueError: ``path`` holds no scores.
        """
        return Scores.load(self.path).has_text if self.path is not None else calibrated


def check_wanted(
    source: LlamaShape,
    shape: LlamaShape,
    target: TargetConfig,
    kinds: ScoreConfig,
    *,
    has_text: bool,
    rope_type: str | None,
) -> None:
    """Hold, before anything is read, that the plan can be made: from scores of text, or from the weights alone.

    ``shape`` is what :func:`target_shape` said. ``rope_type`` is the source's; ``None``: not known. Where scores were
    saved already, they must hold what the axes that are cut are ranked by.

    Raises:
        ValueError: text is needed and there is none, a score is needed that was not measured, the settings of scores
            do not fit the model, or the rotary scaling is not one that Llama 3.2 publishes.
    """
    if target.rope is Rope.published and rope_type not in (None, "llama3"):
        raise ValueError(f"target.rope=published needs a model with rope_type 'llama3', got {rope_type!r}")
    if has_text:
        if kinds.path is None:
            kinds.removed(source, shape)
        else:
            _check_saved(Scores.load(kinds.path), source, shape, target, kinds)
        return
    instead = {
        f"scores.{axis}={getattr(kinds, axis)}": f"scores.{axis}=magnitude"
        for axis in _cut(source, shape, target)
        if getattr(kinds, axis) != "magnitude"
    }
    if target.pairs is Pairs.strongest and shape.head_dim != source.head_dim:
        instead["target.pairs=strongest"] = "target.pairs=first"
    rotated = kinds.hidden is HiddenScore.pca and shape.hidden_size != source.hidden_size
    if tie_of(None, source, shape, target, rotated=rotated) is Tie.least_squares:
        instead["target.tie=least_squares"] = "target.tie=mean"
    if instead:
        measured = f"{', '.join(instead)} {'is' if len(instead) == 1 else 'are'} measured on text"
        raise ValueError(f"{measured}: set calibration.path, or {' '.join(instead.values())}")


def _check_saved(
    saved: Scores, source: LlamaShape, shape: LlamaShape, target: TargetConfig, kinds: ScoreConfig
) -> None:
    """Hold that saved scores can rank every axis that is cut."""
    cut = _cut(source, shape, target)
    for axis in cut:
        saved[tensor_of(kinds, axis)]
    if "layers" in cut:
        leaving(saved, kinds, source.num_hidden_layers - shape.num_hidden_layers)


def top(scores: Tensor, number: int) -> Tensor:
    """Rising indices of the ``number`` highest entries of the last axis; equals go to the lowest index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :number].sort(dim=-1).values


def tensor_of(kinds: ScoreConfig, axis: str) -> str:
    """The tensor of the scores by which an axis is ranked."""
    kind = getattr(kinds, axis)
    if kind is WidthScore.obs and axis == "attention":
        return "heads.obs"
    if kind is HiddenScore.pca:
        return "directions.vectors"
    return f"depth.{kind}" if isinstance(kind, LayerScore) and kind.block else f"{axis}.{kind}"


def _cut(source: LlamaShape, shape: LlamaShape, target: TargetConfig) -> list[str]:
    """The axes of which units are chosen by score, by their names in ``ScoreConfig``."""
    sizes = {
        "mlp": ("intermediate_size",),
        "attention": ("num_attention_heads", "num_key_value_heads", "head_dim"),
        "hidden": ("hidden_size",),
        "layers": ("num_hidden_layers",) if target.keep_layers is None else (),
    }
    return [axis for axis, names in sizes.items() if any(getattr(shape, n) != getattr(source, n) for n in names)]


def _cut_by_any(source: LlamaShape, target: TargetConfig, shapes: Sequence[LlamaShape]) -> set[str]:
    """The axes that any of the shapes cuts; of none, that of ``target``."""
    return {axis for shape in shapes or [target_shape(source, target)] for axis in _cut(source, shape, target)}


def leaving(scores: Scores, kinds: ScoreConfig, number: int) -> Tensor:
    """The ``number`` layers that are worth least."""
    score = scores[tensor_of(kinds, "layers")]
    if kinds.layers.block:
        return depth.least_block(score, number)
    if kinds.layers is LayerScore.greedy:
        return depth.first_to_leave(score, number)
    stay = top(score, len(score) - number)
    return torch.tensor([layer for layer in range(len(score)) if layer not in stay.tolist()])


def tie_of(
    scores: Scores | None, source: LlamaShape, shape: LlamaShape, target: TargetConfig, *, rotated: bool
) -> Tie | None:
    if not shape.tie_word_embeddings or (source.tie_word_embeddings and not rotated):
        return None
    if target.tie is not None:
        return target.tie
    return Tie.least_squares if scores is not None and "head.covariance" in scores.tensors else Tie.mean
