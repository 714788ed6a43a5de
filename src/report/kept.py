"""What a pruning kept: its plan, with the scores that it was made by."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from llamita.report.metrics import Array
from llamita.report.stages import Stage
from llamita.shapes import LlamaShape


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which units of the source a pruned model has, and how important each was; importance may be unknown."""

    name: str
    source: LlamaShape
    target: LlamaShape
    layers: Array
    """[layers of the source], whether kept."""
    heads: Array
    """[layers, query heads]"""
    mlp: Array
    """[layers, intermediate size]"""
    hidden: Array
    """[hidden size]"""
    layer_scores: Array | None
    head_scores: Array | None
    mlp_scores: Array | None
    hidden_scores: Array | None
    kinds: dict[str, str]
    """By what each axis was ranked."""

    @property
    def hidden_share(self) -> float | None:
        """Share of the channels' summed importance that was kept."""
        if self.hidden_scores is None or not self.hidden_scores.sum():
            return None
        return float(self.hidden_scores[self.hidden].sum() / self.hidden_scores.sum())


def read_kept(stage: Stage) -> Kept | None:
    """The plan of a pruning stage with the scores that it was made by; ``None`` where there is no plan.

    Raises:
        ValueError: a file is damaged.
    """
    file = stage.path / "pruning" / "plan.safetensors"
    if not file.is_file():
        return None
    plan, metadata = _tensors(file)
    rest = json.loads(metadata["plan"])
    source, target = (_from_dict(rest[name]) for name in ("source", "target"))
    kinds = dict(rest.get("scores") or {})
    layers = plan["layers"]
    scores = _scores(stage)

    def mask(name: str, width: int) -> Array:
        kept = np.zeros((source.num_hidden_layers, width), dtype=bool)
        np.put_along_axis(wanted := np.zeros((len(layers), width), dtype=bool), plan[name], True, axis=1)
        kept[layers] = wanted
        return kept

    attention = scores.get(f"attention.{kinds.get('attention')}")
    heads = scores.get("heads.obs") if kinds.get("attention") == "obs" else None
    if attention is not None:
        heads = np.sqrt(np.square(attention).sum(-1))
    return Kept(
        name=stage.name,
        source=source,
        target=target,
        layers=np.isin(np.arange(source.num_hidden_layers), layers),
        heads=mask("heads", source.num_attention_heads),
        mlp=mask("mlp", source.intermediate_size),
        hidden=np.isin(np.arange(source.hidden_size), plan["hidden"]),
        layer_scores=scores.get(f"layers.{kinds.get('layers')}"),
        head_scores=heads,
        mlp_scores=scores.get(f"mlp.{kinds.get('mlp')}"),
        hidden_scores=_hidden_scores(scores, kinds.get("hidden"), layers),
        kinds=kinds,
    )


def _hidden_scores(scores: Mapping[str, Array], kind: str | None, layers: Array) -> Array | None:
    """Of channels, or the energies of directions where those were kept."""
    if kind == "pca":
        return scores.get("directions.energy")
    channels = scores.get(f"hidden.{kind}")
    return None if channels is None else channels[layers].sum((0, 1))


def _from_dict(fields: Mapping[str, Any]) -> LlamaShape:
    known = {field.name for field in dataclasses.fields(LlamaShape)}
    return LlamaShape(**{name: value for name, value in fields.items() if name in known})


def _scores(stage: Stage) -> dict[str, Array]:
    """Scores beside the plan, or of the run that the settings name."""
    folders = [stage.path / "pruning"]
    if path := (stage.settings.get("scores") or {}).get("path"):
        folders += [Path(path), Path(path) / "pruning"]
    for folder in folders:
        if (file := folder / "scores.safetensors").is_file():
            return _tensors(file, but=("head.covariance", "norm.energy", "directions.vectors"))[0]
    return {}


def _tensors(file: Path, but: Sequence[str] = ()) -> tuple[dict[str, Array], dict[str, str]]:
    try:
        with safe_open(file, framework="numpy") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys() if name not in but}  # noqa: SIM118
            return tensors, opened.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from error
