"""What run directories tell: models with their roles and quality, curves, what pruning kept, lineage.

Everything is read from ``config.yaml``, ``run.json``, ``metrics.jsonl``, ``DONE.json``, ``llamita.json``,
``evaluation.json`` and the tensors of plan and scores; whatever is not there is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamita import storage
from llamita.report.kept import Kept, read_kept
from llamita.report.metrics import Array, held_out_set
from llamita.report.models import Model, headline_of, join_models, set_recovered
from llamita.report.roles import Role
from llamita.report.stages import Stage, read_stage

EVALUATION = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A held-out value of one model over the tokens that it was trained on."""

    model: Model
    tokens: Array
    values: Array


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the page shows."""

    stages: list[Stage]
    models: list[Model]
    curves: list[Curve]
    curve_set: str | None
    """Name of the held-out set of the curves."""
    kept: list[Kept]
    differences: list[dict[str, Any]]
    """Paired differences between models, as ``evaluation.json`` has them."""
    data: dict[str, Any]
    """The held-out rows of the evaluation."""

    def first(self, role: Role) -> Model | None:
        """The first model of that role."""
        return next((model for model in self.models if model.role is role), None)

    @property
    def result(self) -> Model | None:
        """The model that the page is about: the best distilled one whose run is finished, else a pruned one."""
        return headline_of(self.models)


def gather(paths: Mapping[str, Path]) -> Report:
    """Read all directories and find out how they belong together.

    Raises:
        ValueError: as :func:`read_stage`, or there is no directory.
    """
    if not paths:
        raise ValueError("runs must name at least one directory: runs.NAME=PATH")
    stages = [read_stage(name, path) for name, path in paths.items()]
    evaluations = [storage.read_json(s.path / EVALUATION) for s in stages if (s.path / EVALUATION).is_file()]
    models = join_models(stages, evaluations)
    set_recovered(models)
    curve_set, curves = _curves(models)
    return Report(
        stages=stages,
        models=models,
        curves=curves,
        curve_set=curve_set,
        kept=[kept for stage in stages if (kept := read_kept(stage)) is not None],
        differences=[entry for evaluation in evaluations for entry in evaluation.get("differences", [])],
        data=_rows_measured(evaluations),
    )


def _rows_measured(evaluations: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The held-out rows that every evaluation measured; evaluations of tasks alone have none.

    Raises:
        ValueError: they measured different rows, whose values must not stand in one table.
    """
    measured: list[dict[str, Any]] = [evaluation["data"] for evaluation in evaluations if evaluation.get("data")]
    for data in measured[1:]:
        if {**data, "path": None} != {**measured[0], "path": None}:
            told = " and ".join(
                f"{d.get('rows')} rows of {d.get('path')} ({d.get('split')})" for d in (measured[0], data)
            )
            raise ValueError(f"runs has evaluations of different held-out rows, {told}: make a report of each")
    return measured[0] if measured else {}


def _curves(models: Sequence[Model]) -> tuple[str | None, list[Curve]]:
    curves = []
    used = None
    for model in models:
        if model.stage is None or model.role in (Role.teacher, Role.aligned):
            continue
        name = held_out_set(model.stage.metrics)
        tokens, values = model.stage.metrics.series(f"val/{name}/bits_per_byte")
        if len(values) > 1:
            curves.append(Curve(model=model, tokens=tokens, values=values))
            used = name
    return used, curves
