"""Which units a smaller Llama keeps: pure tensors of indices and factors, made from scores and a target.

Shape letters, for the model that is made: L = layers, D = hidden size, F = MLP width, H = query heads, K = KV heads,
E = head size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamita import checkpoints
from llamita.prune import depth
from llamita.prune.basis import Basis
from llamita.prune.further import Further
from llamita.prune.importance import HiddenScore, LayerScore, Scores, WidthScore, norm_gain
from llamita.shapes import LlamaShape

FILE = "plan.safetensors"
FORMAT = 2


class Rope(StrEnum):
    """The rotary scaling of the result."""

    parent = "parent"
    """As in the source: the kept weights were trained with it."""
    published = "published"
    """Factor 32, which Llama 3.2 publishes: changes 35 of 64 frequencies of a Llama 3.1 before any training."""


class Tie(StrEnum):
    """How an embedding E and an output matrix U become one matrix."""

    least_squares = "least_squares"
    """U where the head's input has energy, E elsewhere; see :func:`llamita.prune.tie.tied`. Needs text."""
    mean = "mean"
    embedding = "embedding"
    head = "head"


class Pairs(StrEnum):
    """Which rotary pairs a smaller head keeps; one of each run of r neighbours when the head size is divided by r."""

    first = "first"
    """Pairs 0, r, 2 r, ...: their frequencies are bit-exactly those of the smaller head."""
    strongest = "strongest"
    """The one of most energy E[q^2] E[k^2] in its KV group; it is then turned at the frequency of the first."""


@dataclass(kw_only=True)
class TargetConfig:
    """Sizes of the model to make; what is unset stays as in the source."""

    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None
    output_rows: list[int] | None = None
    """Token ids whose logits the model keeps, in this order; it is then a ``LlamaForTokenClassification``."""
    rope: Rope = Rope.parent
    keep_layers: list[int] | None = None
    """The source's layers to keep, instead of those of highest score."""
    tie: Tie | None = None
    """Unset: ``least_squares`` where there are statistics of text, else ``mean``."""
    pairs: Pairs = Pairs.first

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"target.{name} must be at least 1, got {value}")
        if self.output_rows is not None:
            if not self.output_rows:
                raise ValueError("target.output_rows must hold at least one token id, got []")
            if len(set(self.output_rows)) != len(self.output_rows):
                raise ValueError(f"target.output_rows must hold each token id once, got {self.output_rows}")
        if self.keep_layers is not None and sorted(set(self.keep_layers)) != self.keep_layers:
            raise ValueError(f"target.keep_layers must rise without repeats, got {self.keep_layers}")


SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


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
    """Of the calibration text, for ``taylor_unit`` and ``taylor_element``: a pass forward and one backward."""
    depth_tokens: int = 16384
    """Of the calibration text, for ``greedy`` and ``contiguous``: half a pass for each layer that could leave, each
    time that one does."""
    depth_gib: float = 4.0
    """Host memory for the hidden states of the models that ``greedy`` and ``contiguous`` compare side by side."""
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

    @property
    def second_order(self) -> bool:
        """Whether an axis is ranked by the covariance of all units of a layer."""
        return self.all or self.mlp.second_order or self.attention.second_order

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

    def further(self, source: LlamaShape, target: TargetConfig) -> Further:
        """The scores to measure that cost passes of their own: those of the axes that are cut, or all.

        Raises:
            ValueError: as :func:`target_shape` and :meth:`removed`.
        """
        shape = target_shape(source, target)
        cut, removed = _cut(source, shape, target), self.removed(source, shape)
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


def target_shape(source: LlamaShape, target: TargetConfig) -> LlamaShape:
    """The sizes of the model to make.

    Raises:
        ValueError: they cannot be cut out of ``source``, or no stock Llama can have them; names the nearest that can.
    """
    if source.output_rows is not None:
        raise ValueError("model.path has lost output rows already: prune the model that it was cut from")
    sizes = {name: getattr(target, name) for name in SIZES if getattr(target, name) is not None}
    if target.keep_layers is not None:
        sizes.setdefault("num_hidden_layers", len(target.keep_layers))
        _check_layers(source, target.keep_layers, sizes["num_hidden_layers"])
    for name, value in sizes.items():
        if value > getattr(source, name):
            raise ValueError(f"target.{name} must be at most the source's {getattr(source, name)}, got {value}")
    merged = {name: sizes.get(name, getattr(source, name)) for name in SIZES}
    _check_heads(source, merged)
    tied = source.tie_word_embeddings if target.tie_word_embeddings is None else target.tie_word_embeddings
    rows = None
    if target.output_rows is not None:
        if tied:
            raise ValueError(
                "target.output_rows needs target.tie_word_embeddings=false: a tied matrix also holds the inputs"
            )
        if outside := [row for row in target.output_rows if not 0 <= row < source.vocab_size]:
            raise ValueError(f"target.output_rows must be token ids in 0..{source.vocab_size - 1}, got {outside}")
        rows = len(target.output_rows)
    return dataclasses.replace(source, **merged, tie_word_embeddings=tied, output_rows=rows)


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
    if _tie(None, source, shape, target, rotated=rotated) is Tie.least_squares:
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
        saved[_tensor_of(kinds, axis)]
    if "layers" in cut:
        _leaving(saved, kinds, source.num_hidden_layers - shape.num_hidden_layers)


def _tensor_of(kinds: ScoreConfig, axis: str) -> str:
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


def _check_layers(source: LlamaShape, keep: list[int], number: int) -> None:
    if len(keep) != number:
        raise ValueError(f"target.keep_layers must name target.num_hidden_layers={number} layers, got {keep}")
    if outside := [index for index in keep if not 0 <= index < source.num_hidden_layers]:
        raise ValueError(f"target.keep_layers must be in 0..{source.num_hidden_layers - 1}, got {outside}")


def _check_heads(source: LlamaShape, sizes: dict[str, int]) -> None:
    heads, keys = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    group = source.num_attention_heads // source.num_key_value_heads
    if heads % keys or heads // keys > group:
        allowed = [keys * size for size in range(1, group + 1)]
        raise ValueError(
            f"target.num_attention_heads must give each of the {keys} KV heads between 1 and {group} of the query "
            f"heads that read it in the source: {_nearest(heads, allowed)}; got {heads}"
        )
    if sizes["hidden_size"] % heads:
        allowed = list(range(heads, source.hidden_size + 1, heads))
        raise ValueError(
            f"target.hidden_size must be a multiple of num_attention_heads={heads} (LlamaConfig refuses others): "
            f"{_nearest(sizes['hidden_size'], allowed)}; got {sizes['hidden_size']}"
        )
    if source.head_dim % sizes["head_dim"] or sizes["head_dim"] % 2:
        allowed = [size for size in range(2, source.head_dim + 1, 2) if source.head_dim % size == 0]
        raise ValueError(
            f"target.head_dim must be even and divide the source's {source.head_dim}, so that rotary frequencies stay: "
            f"{_nearest(sizes['head_dim'], allowed)}; got {sizes['head_dim']}"
        )


def _nearest(value: int, allowed: Sequence[int]) -> str:
    """The closest allowed value below and above ``value``."""
    below, above = [v for v in allowed if v <= value][-1:], [v for v in allowed if v > value][:1]
    return "nearest are " + " and ".join(map(str, below + above)) if below + above else "there is none"


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Indices into the source's tensors, in the order in which the result holds them."""

    source: LlamaShape
    target: LlamaShape
    layers: Tensor
    """[L]"""
    hidden: Tensor
    """[D], one set for the whole residual stream; where it is rotated, the first principal directions."""
    mlp: Tensor
    """[L, F]"""
    heads: Tensor
    """[L, H], KV group by KV group."""
    kv_heads: Tensor
    """[L, K]"""
    pairs: Tensor
    """[L, K, E / 2], rotary pairs of queries and keys: pair j is channels j and j + head_dim / 2."""
    values: Tensor
    """[L, K, E], channels of values and of o_proj's input."""
    norm_gain: Tensor
    """[2 L + 1], factors of the RMSNorm weights: layer by layer, the final norm last."""
    output_rows: Tensor | None = None
    """Rows of the output matrix; ``None``: all."""
    rope: Rope = Rope.parent
    tie: Tie | None = None
    """How two matrices become one; ``None`` where the result has as many as the source, or two copies of one."""
    rotation: Tensor | None = None
    """[hidden size of the source, D], orthonormal columns: the directions that stay, instead of channels."""
    head_covariance: Tensor | None = None
    """[hidden size of the source, the same] of the final norm's output before its gain, for ``tie=least_squares``."""
    scores: dict[str, str] = field(default_factory=dict)
    """By what each axis was ranked."""

    @property
    def basis(self) -> Basis:
        """The axes of the residual stream that stay."""
        return Basis(self.hidden, self.rotation)

    @property
    def query_scale(self) -> float:
        """Factor of q_proj: the kernel divides logits by sqrt(head size), which is now another."""
        return float((self.target.head_dim / self.source.head_dim) ** 0.5)

    @property
    def cuts(self) -> bool:
        """Whether anything of the source is lost."""
        return self.source != self.target

    @property
    def content_hash(self) -> str:
        """Hash of everything that the plan says."""
        digest = hashlib.sha256(json.dumps(self.summary(), sort_keys=True).encode())
        for name, tensor in sorted(self.tensors().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """The plan's tensors by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def summary(self) -> dict[str, Any]:
        """The plan without its long index lists, for ``llamita.json``."""
        return {
            "source": dataclasses.asdict(self.source),
            "target": dataclasses.asdict(self.target),
            "parameters_before": self.source.num_parameters,
            "parameters_after": self.target.num_parameters,
            "layers": self.layers.tolist(),
            "heads": self.heads.tolist(),
            "kv_heads": self.kv_heads.tolist(),
            "output_rows": None if self.output_rows is None else self.output_rows.tolist(),
            "rope": self.rope,
            "tie": self.tie,
            "scores": self.scores,
        }

    def __str__(self) -> str:
        """What is kept, axis by axis."""
        lines = [f"{self.source.num_parameters:,} -> {self.target.num_parameters:,} parameters"]
        for name in SIZES:
            before, after = getattr(self.source, name), getattr(self.target, name)
            lines.append(f"  {name:<22} {before:>7}" + (f" -> {after}" if after != before else ""))
        lines.append(f"  layers kept            {self.layers.tolist()}")
        if self.tie is not None:
            lines.append(f"  embedding and head     tied by {self.tie}")
        if self.output_rows is not None:
            lines.append(f"  output rows            {len(self.output_rows)} of {self.source.vocab_size}")
        return "\n".join(lines)

    def diff(self, other: Plan) -> dict[str, float]:
        """For each set of indices, the share of entries of ``self`` that ``other`` keeps as well.

        Sets are compared layer by layer of the source; a layer that only one plan keeps shares nothing. Pairs and
        values are those of the same KV head.

        Raises:
            ValueError: the plans are of different sources.
        """
        if self.source != other.source:
            raise ValueError(f"plans of different sources have nothing in common: {self.source} and {other.source}")
        shares: dict[str, float] = {}
        theirs = {layer: row for row, layer in enumerate(other.layers.tolist())}
        shares["layers"] = _share(self.layers, other.layers)
        shares["hidden"] = self.basis.share(other.basis, self.source.hidden_size)
        mine, others = self._by_layer(), other._by_layer()
        for name, rows in mine.items():
            parts = [
                _share(rows[row], others[name][theirs[layer]]) if layer in theirs else 0.0
                for row, layer in enumerate(self.layers.tolist())
            ]
            shares[name] = sum(parts) / len(parts)
        return shares

    def _by_layer(self) -> dict[str, Tensor]:
        """The units of each kept layer, numbered as in the source's layer."""
        size, first = self.source.head_dim, self.kv_heads[..., None]
        pairs, values = first * (size // 2) + self.pairs, first * size + self.values
        rows = {"mlp": self.mlp, "heads": self.heads, "kv_heads": self.kv_heads, "pairs": pairs, "values": values}
        return {name: tensor.flatten(1) for name, tensor in rows.items()}

    def save(self, folder: Path) -> None:
        """Write ``plan.safetensors`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        rest = {
            "format": FORMAT,
            "source": dataclasses.asdict(self.source),
            "target": dataclasses.asdict(self.target),
            "rope": self.rope,
            "tie": self.tie,
            "scores": self.scores,
        }
        checkpoints.write_tensors(folder / FILE, self.tensors(), {"plan": json.dumps(rest, sort_keys=True)})

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read the plan in ``folder``.

        Raises:
            ValueError: there is none, or it is of another format.
        """
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder} holds no {FILE}")
        tensors, metadata = checkpoints.read_tensors(folder / FILE)
        rest = json.loads(metadata.get("plan", "{}"))
        if rest.get("format") != FORMAT:
            raise ValueError(f"{folder / FILE} has format {rest.get('format')}, this program reads {FORMAT}")
        return cls(
            source=LlamaShape(**rest["source"]),
            target=LlamaShape(**rest["target"]),
            rope=Rope(rest["rope"]),
            tie=Tie(rest["tie"]) if rest["tie"] else None,
            scores=rest["scores"],
            **tensors,
        )


def _share(mine: Tensor, theirs: Tensor) -> float:
    return float(torch.isin(mine, theirs).double().mean())


def make(scores: Scores | None, source: LlamaShape, target: TargetConfig, kinds: ScoreConfig) -> Plan:
    """The units of highest score that fit ``target``; an axis that is not cut needs no scores.

    Raises:
        ValueError: as :func:`target_shape`, or a score that is needed was not measured.
    """
    shape = target_shape(source, target)
    layers = _layers(scores, source, shape, target, kinds)
    hidden = _hidden(scores, source, shape, layers, kinds)
    mlp = _mlp(scores, source, shape, layers, kinds)
    kv_heads, heads = _heads(scores, source, shape, layers, kinds)
    rotation = _rotation(scores, source, shape, kinds)
    tie = _tie(scores, source, shape, target, rotated=rotation is not None)
    covariance = _measured(scores)["head.covariance"] if tie is Tie.least_squares else None
    rows = None if target.output_rows is None else torch.tensor(target.output_rows)
    return Plan(
        source=source,
        target=shape,
        layers=layers,
        hidden=hidden,
        mlp=mlp,
        heads=heads,
        kv_heads=kv_heads,
        pairs=_pairs(scores, source, shape, layers, heads, kv_heads, target.pairs),
        values=_values(scores, source, shape, layers, heads, kv_heads, kinds),
        norm_gain=_gains(scores, source, layers, hidden, rotated=rotation is not None),
        output_rows=rows,
        rope=target.rope,
        tie=tie,
        rotation=rotation,
        head_covariance=covariance,
        scores={name: str(getattr(kinds, name)) for name in ("mlp", "attention", "hidden", "layers")},
    )


def _measured(scores: Scores | None) -> Scores:
    if scores is None:
        raise ValueError("this target needs scores: set calibration.path or scores.path")
    return scores


def _top(scores: Tensor, number: int) -> Tensor:
    """Rising indices of the ``number`` highest entries of the last axis; equals go to the lowest index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :number].sort(dim=-1).values


def _layers(
    scores: Scores | None, source: LlamaShape, shape: LlamaShape, target: TargetConfig, kinds: ScoreConfig
) -> Tensor:
    if target.keep_layers is not None:
        return torch.tensor(target.keep_layers)
    if shape.num_hidden_layers == source.num_hidden_layers:
        return torch.arange(source.num_hidden_layers)
    leaving = _leaving(_measured(scores), kinds, source.num_hidden_layers - shape.num_hidden_layers)
    return torch.tensor(sorted(set(range(source.num_hidden_layers)) - set(leaving.tolist())))


def _leaving(scores: Scores, kinds: ScoreConfig, number: int) -> Tensor:
    """The ``number`` layers that are worth least."""
    score = scores[_tensor_of(kinds, "layers")]
    if kinds.layers.block:
        return depth.least_block(score, number)
    if kinds.layers is LayerScore.greedy:
        return depth.first_to_leave(score, number)
    stay = _top(score, len(score) - number)
    return torch.tensor([layer for layer in range(len(score)) if layer not in stay.tolist()])


def _hidden(scores: Scores | None, source: LlamaShape, shape: LlamaShape, layers: Tensor, kinds: ScoreConfig) -> Tensor:
    """Channels by their score summed over both norms of the layers that stay; of directions, which fall, the first."""
    if shape.hidden_size == source.hidden_size or kinds.hidden is HiddenScore.pca:
        return torch.arange(shape.hidden_size)
    score = _measured(scores)[f"hidden.{kinds.hidden}"][layers].sum((0, 1))
    return _top(score, shape.hidden_size)


def _rotation(scores: Scores | None, source: LlamaShape, shape: LlamaShape, kinds: ScoreConfig) -> Tensor | None:
    if kinds.hidden is not HiddenScore.pca or shape.hidden_size == source.hidden_size:
        return None
    return _measured(scores)["directions.vectors"][:, : shape.hidden_size].contiguous()


def _mlp(scores: Scores | None, source: LlamaShape, shape: LlamaShape, layers: Tensor, kinds: ScoreConfig) -> Tensor:
    if shape.intermediate_size == source.intermediate_size:
        return torch.arange(source.intermediate_size).expand(len(layers), -1).contiguous()
    return _top(_measured(scores)[f"mlp.{kinds.mlp}"][layers], shape.intermediate_size)


def _heads(
    scores: Scores | None, source: LlamaShape, shape: LlamaShape, layers: Tensor, kinds: ScoreConfig
) -> tuple[Tensor, Tensor]:
    """KV heads by the norm of their best query heads' scores, and those query heads: each keeps its own KV head."""
    number, keys = len(layers), source.num_key_value_heads
    group = source.num_attention_heads // keys
    keep = shape.num_attention_heads // shape.num_key_value_heads
    all_heads = torch.arange(source.num_attention_heads).view(1, keys, group).expand(number, -1, -1)
    if keep == group and shape.num_key_value_heads == keys:
        return torch.arange(keys).expand(number, -1).contiguous(), all_heads.flatten(1).contiguous()
    score_LKG = _head_scores(scores, layers, kinds).view(number, keys, group)
    inside = _top(score_LKG, keep)
    if kinds.attention is WidthScore.obs:
        best = _measured(scores)["groups.obs"][layers]
    else:
        best = score_LKG.gather(2, inside).sum(-1)
    kv_heads = _top(best, shape.num_key_value_heads)
    heads = all_heads.gather(2, inside).gather(1, kv_heads[..., None].expand(-1, -1, keep))
    return kv_heads, heads.flatten(1).contiguous()


def _head_scores(scores: Scores | None, layers: Tensor, kinds: ScoreConfig) -> Tensor:
    """[L, H]"""
    if kinds.attention is WidthScore.obs:
        return _measured(scores)["heads.obs"][layers]
    return _measured(scores)[f"attention.{kinds.attention}"][layers].square().sum(-1)


def _pairs(
    scores: Scores | None,
    source: LlamaShape,
    shape: LlamaShape,
    layers: Tensor,
    heads: Tensor,
    kv_heads: Tensor,
    kind: Pairs,
) -> Tensor:
    ratio, pairs = source.head_dim // shape.head_dim, shape.head_dim // 2
    first = torch.arange(0, source.head_dim // 2, ratio).expand(*kv_heads.shape, -1).contiguous()
    if ratio == 1 or kind is Pairs.first:
        return first
    measured = _measured(scores)
    query, key = measured["rotary.query"][layers], measured["rotary.key"][layers]
    query_LKP = _by_group(_rows(query, heads), kv_heads).sum(2)
    energy = (query_LKP * _rows(key, kv_heads)).view(*kv_heads.shape, pairs, ratio)
    strongest: Tensor = first + energy.argmax(-1)
    return strongest


def _values(
    scores: Scores | None,
    source: LlamaShape,
    shape: LlamaShape,
    layers: Tensor,
    heads: Tensor,
    kv_heads: Tensor,
    kinds: ScoreConfig,
) -> Tensor:
    """Value channels of each KV head by the norm of their scores over the query heads that are kept."""
    if shape.head_dim == source.head_dim:
        return torch.arange(source.head_dim).expand(*kv_heads.shape, -1).contiguous()
    # Elimination removes whole heads; what one of its channels is worth it does not say.
    kind = WidthScore.norm_product if kinds.attention is WidthScore.obs else kinds.attention
    score_LHE = _rows(_measured(scores)[f"attention.{kind}"][layers], heads)
    score_LKE = _by_group(score_LHE.square(), kv_heads).sum(2)
    return _top(score_LKE, shape.head_dim)


def _rows(tensor_LHE: Tensor, index_LH: Tensor) -> Tensor:
    """For each layer its rows of that index."""
    return tensor_LHE.gather(1, index_LH[..., None].expand(-1, -1, tensor_LHE.shape[-1]))


def _by_group(tensor_LHE: Tensor, kv_heads: Tensor) -> Tensor:
    """[L, K, query heads of the group, E]"""
    return tensor_LHE.view(*kv_heads.shape, -1, tensor_LHE.shape[-1])


def _gains(scores: Scores | None, source: LlamaShape, layers: Tensor, hidden: Tensor, *, rotated: bool) -> Tensor:
    norms = torch.cat([torch.stack([2 * layers, 2 * layers + 1], 1).flatten(), torch.tensor([-1])])
    if len(hidden) == source.hidden_size:
        return torch.ones(len(norms), dtype=torch.float64)
    measured = _measured(scores)
    energies, epsilons = measured["norm.energy"], measured["norm.epsilon"]
    if rotated:
        # What the directions hold is known on average over the norms, not at each of them.
        energies = measured["directions.energy"].expand(len(energies), -1)
    return torch.stack([norm_gain(energies[norm], epsilons[norm], hidden) for norm in norms.tolist()])


def _tie(
    scores: Scores | None, source: LlamaShape, shape: LlamaShape, target: TargetConfig, *, rotated: bool
) -> Tie | None:
    if not shape.tie_word_embeddings or (source.tie_word_embeddings and not rotated):
        return None
    if target.tie is not None:
        return target.tie
    return Tie.least_squares if scores is not None and "head.covariance" in scores.tensors else Tie.mean
