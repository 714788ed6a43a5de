"""Which units a smaller Llama keeps: pure tensors of indices and factors, made from scores and a target.

Shape letters, for the model that is made: L = layers, D = hidden size, F = MLP width, H = query heads, K = KV heads,
E = head size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamita import checkpoints
from llamita.prune import stream
from llamita.prune.basis import Basis
from llamita.prune.importance import norm_gain
from llamita.prune.ranking import ScoreConfig, leaving, tie_of, top
from llamita.prune.scores import HiddenScore, Scores, WidthScore
from llamita.prune.target import Pairs, Rope, TargetConfig, Tie, target_shape
from llamita.shapes import SIZES, LlamaShape

FILE = "plan.safetensors"
FORMAT = 2


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

    def shared(self) -> Plan:
        """The same for all processes: the first one's."""
        tensors: dict[str, Any] = {**stream.of_first(self.tensors())}
        return dataclasses.replace(self, **tensors)

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
    tie = tie_of(scores, source, shape, target, rotated=rotation is not None)
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


def _layers(
    scores: Scores | None, source: LlamaShape, shape: LlamaShape, target: TargetConfig, kinds: ScoreConfig
) -> Tensor:
    if target.keep_layers is not None:
        return torch.tensor(target.keep_layers)
    if shape.num_hidden_layers == source.num_hidden_layers:
        return torch.arange(source.num_hidden_layers)
    gone = leaving(_measured(scores), kinds, source.num_hidden_layers - shape.num_hidden_layers)
    return torch.tensor(sorted(set(range(source.num_hidden_layers)) - set(gone.tolist())))


def _hidden(scores: Scores | None, source: LlamaShape, shape: LlamaShape, layers: Tensor, kinds: ScoreConfig) -> Tensor:
    """Channels by their score summed over both norms of the layers that stay; of directions, which fall, the first."""
    if shape.hidden_size == source.hidden_size or kinds.hidden is HiddenScore.pca:
        return torch.arange(shape.hidden_size)
    score = _measured(scores)[f"hidden.{kinds.hidden}"][layers].sum((0, 1))
    return top(score, shape.hidden_size)


def _rotation(scores: Scores | None, source: LlamaShape, shape: LlamaShape, kinds: ScoreConfig) -> Tensor | None:
    if kinds.hidden is not HiddenScore.pca or shape.hidden_size == source.hidden_size:
        return None
    return _measured(scores)["directions.vectors"][:, : shape.hidden_size].contiguous()


def _mlp(scores: Scores | None, source: LlamaShape, shape: LlamaShape, layers: Tensor, kinds: ScoreConfig) -> Tensor:
    if shape.intermediate_size == source.intermediate_size:
        return torch.arange(source.intermediate_size).expand(len(layers), -1).contiguous()
    return top(_measured(scores)[f"mlp.{kinds.mlp}"][layers], shape.intermediate_size)


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
    inside = top(score_LKG, keep)
    if kinds.attention is WidthScore.obs:
        best = _measured(scores)["groups.obs"][layers]
    else:
        best = score_LKG.gather(2, inside).sum(-1)
    kv_heads = top(best, shape.num_key_value_heads)
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
    return top(score_LKE, shape.head_dim)


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
