"""The models that the page shows: joined from stages and evaluations, with their quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamita.report.metrics import held_out_set
from llamita.report.roles import ALIGNING, Role, entry_keys, origin_of, role_of, teacher_keys
from llamita.report.stages import Stage
from llamita.shapes import LlamaShape


@dataclass(frozen=True)
class Estimate:
    """A measured value with its standard error, where that is known."""

    value: float
    stderr: float | None = None


@dataclass(kw_only=True)
class Model:
    """A model with all that is known about it."""

    name: str
    role: Role
    shape: LlamaShape | None = None
    stage: Stage | None = None
    values: dict[str, Estimate] = field(default_factory=dict)
    """``bits_per_byte``, ``perplexity``, ``kl``, ``top1_agree``, ``loss``."""
    tasks: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    start: Model | None = None
    """The pruned model that it began as; for other weights of that shape, the one it competes with."""
    recovered: float | None = None
    """Share of the bits per byte lost by pruning that were won back."""

    @property
    def tokens(self) -> int | None:
        """Tokens that it was trained on, as far as a run tells."""
        return 0 if self.role is Role.pruned else self.stage.tokens if self.stage else None

    @property
    def is_unfinished(self) -> bool:
        """Whether its run is, so that all its values are those of a model on its way."""
        return self.stage is not None and self.stage.is_unfinished


def join_models(stages: Sequence[Stage], evaluations: Sequence[Mapping[str, Any]]) -> list[Model]:
    """Models of the stages and of the evaluations, joined by content hash, place or name; the teacher comes first."""
    teachers = teacher_keys(stages, evaluations)
    models: list[Model] = []
    for stage in stages:
        if (stage.shape is not None and stage.recipe != "reward") or stage.recipe in ("distill", *ALIGNING):
            model = Model(name=stage.name, role=role_of(stage, stages, teachers), shape=stage.shape, stage=stage)
            model.values = {} if model.role is Role.aligned else _last_values(stage)
            models.append(model)
    measured: list[Model] = []
    for evaluation in evaluations:
        for name, entry in evaluation["models"].items():
            found = _measured_model(models, name, entry)
            if found is None:
                taken = any(model.name == name for model in models)
                found = Model(name=f"{name} (as evaluated)" if taken else name, role=Role.other, shape=_shape(entry))
                found.role = Role.teacher if entry_keys(entry) & teachers else Role.other
                models.append(found)
            if entry["values"]:
                found.values = {key: Estimate(**value) for key, value in entry["values"].items()}
                measured.append(found)
            found.tasks |= {
                task: {metric: Estimate(**value) for metric, value in scores.items()}
                for task, scores in entry.get("tasks", {}).items()
            }
    for model in models:
        # What a run logged of rows of its own must not stand beside values of the evaluation's rows.
        if measured and not any(model is other for other in measured):
            model.values = {}
    _set_starts(models, stages)
    order, headline = list(Role), headline_of(models)
    return sorted(models, key=lambda model: (order.index(model.role), model is not headline))


def _measured_model(models: Sequence[Model], name: str, entry: Mapping[str, Any]) -> Model | None:
    """Which model an evaluation means: by content; only where a model's content is unknown, by place or name."""
    same = [m for m in models if m.stage and m.stage.sha256 == entry["sha256"]]
    if not same:
        unknown = [m for m in models if m.stage is None or m.stage.sha256 is None]
        place = {str(Path(entry["path"]).resolve())} if entry.get("path") else set()
        same = [m for m in unknown if (m.stage and m.stage.keys & place)] or [m for m in unknown if m.name == name]
    return next((m for m in same if m.name == name), same[0] if same else None)


def _set_starts(models: Sequence[Model], stages: Sequence[Stage]) -> None:
    pruned = [model for model in models if model.role is Role.pruned]
    for model in models:
        if model.role not in (Role.distilled, Role.baseline) or model.stage is None:
            continue
        origin = origin_of(model.stage, stages)
        own = [p for p in pruned if p.stage is origin] if origin else [p for p in pruned if p.shape == model.shape]
        model.start = own[0] if own else pruned[0] if len(pruned) == 1 else None


def _shape(entry: Mapping[str, Any]) -> LlamaShape | None:
    return LlamaShape(**entry["shape"]) if entry.get("shape") else None


def _last_values(stage: Stage) -> dict[str, Estimate]:
    """The last held-out values that a run logged itself."""
    name = held_out_set(stage.metrics)
    values: dict[str, Estimate] = {}
    for ours, theirs in (("bits_per_byte", "bits_per_byte"), ("loss", "loss"), ("kl", "kd")):
        logged = stage.metrics.values(f"val/{name}/{theirs}")
        if logged.size:
            values[ours] = Estimate(float(logged[-1]))
    if "loss" in values:
        values["perplexity"] = Estimate(math.exp(values["loss"].value))
    return values


def set_recovered(models: Sequence[Model]) -> None:
    """Recovered share of the loss: (pruned - model) / (pruned - teacher) in bits per byte."""
    floor = next((_bits(model) for model in models if model.role is Role.teacher), math.inf)
    for model in models:
        if model.start is not None and math.isfinite(_bits(model)) and floor < _bits(model.start) < math.inf:
            model.recovered = (_bits(model.start) - _bits(model)) / (_bits(model.start) - floor)


def headline_of(models: Sequence[Model]) -> Model | None:
    """The model that the page is about: the best distilled one whose run is finished, else a pruned one."""
    distilled = [model for model in models if model.role is Role.distilled and not model.is_unfinished]
    pruned = [model for model in models if model.role is Role.pruned]
    return min(distilled, key=_bits) if distilled else pruned[0] if pruned else None


def _bits(model: Model) -> float:
    return model.values["bits_per_byte"].value if "bits_per_byte" in model.values else math.inf
