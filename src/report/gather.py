"""What run directories tell: models with their roles and quality, curves, what pruning kept, lineage.

Everything is read from ``config.yaml``, ``run.json``, ``metrics.jsonl``, ``DONE.json``, ``llamita.json``,
``evaluation.json`` and the tensors of plan and scores; whatever is not there is left out.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from llamita import checkpoints, runs
from llamita.shapes import LlamaShape

Array = NDArray[Any]
EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Estimate:
    """A measured value with its standard error, where that is known."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A directory that a stage read."""

    name: str
    sha256: str
    path: str | None = None

    @property
    def keys(self) -> set[str]:
        """As of :class:`Stage`."""
        return {self.sha256} | ({str(Path(self.path).resolve())} if self.path else set())


class Over(StrEnum):
    """What a curve is drawn over."""

    tokens = "tokens"
    steps = "steps"
    seconds = "seconds"
    """Of wall time since the run's first row, pauses between its starts included."""


class Metrics:
    """The numbers of ``metrics.jsonl`` that the page shows, by name, and the steps that were done twice.

    They are kept as columns: a million rows as dictionaries would take gigabytes.
    """

    SHOWN = (
        "data/tokens",
        "perf/",
        "prune/error/",
        "prune/divergence/",
        "prune/seconds/",
        "train/ce",
        "train/kd",
        "val/",
    )

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        steps, starts, times = array("q"), array("q"), array("d")
        found: dict[str, tuple[array[int], array[float]]] = {}
        for number, row in enumerate(rows):
            steps.append(row["step"])
            starts.append(row.get("restart", 0))
            times.append(_number(row.get("time")))
            for name, value in row.items():
                if name.startswith(self.SHOWN) and math.isfinite(_number(value)):
                    if name not in found:
                        found[name] = array("q"), array("d")
                    found[name][0].append(number)
                    found[name][1].append(value)
        all_steps, all_starts = np.array(steps, dtype=np.int64), np.array(starts, dtype=np.int64)
        all_times = np.array(times, dtype=np.float64)
        kept = _kept(all_steps, all_starts)
        self.lost_steps = _lost_steps(all_steps, all_starts, kept)
        """Steps that were done again after a restart, as far as they were logged."""
        self.last_time = float(np.nanmax(all_times)) if np.isfinite(all_times).any() else None
        """When the last row was written, in seconds since 1970."""
        self.steps: Array = all_steps[kept]
        self._starts: Array = all_starts[kept]
        self._seconds: Array = (
            (all_times - np.nanmin(all_times))[kept] if self.last_time is not None else all_times[kept]
        )
        place = np.cumsum(kept) - 1
        self._columns: dict[str, tuple[Array, Array]] = {}
        for name, (numbers, values) in found.items():
            at = np.array(numbers, dtype=np.int64)
            if kept[at].any():
                self._columns[name] = place[at[kept[at]]], np.array(values)[kept[at]]

    @property
    def names(self) -> list[str]:
        """All that was logged."""
        return list(self._columns)

    def values(self, name: str) -> Array:
        """What was logged under ``name``, in order."""
        return self._column(name)[1]

    def _column(self, name: str) -> tuple[Array, Array]:
        return self._columns.get(name, (np.empty(0, dtype=np.int64), np.empty(0)))

    def series(self, name: str, over: Over = Over.tokens) -> tuple[Array, Array]:
        """Values of one metric over what the run had done when it logged them; those of an unknown place are left out.

        Tokens may stand in another row of the same step.
        """
        rows, values = self._column(name)
        match over:
            case Over.tokens:
                at = self._tokens_at(rows)
            case Over.steps:
                at = self.steps[rows].astype(np.float64)
            case Over.seconds:
                at = self._seconds[rows]
        known = np.isfinite(at)
        return at[known], values[known]

    def _tokens_at(self, rows: Array) -> Array:
        token_rows, tokens = self._column("data/tokens")
        at = np.full(len(rows), math.nan)
        at[self.steps[rows] == 0] = 0.0
        # The last row of a step with tokens, and before all others the row itself.
        steps, last = np.unique(self.steps[token_rows][::-1], return_index=True)
        _look_up(at, self.steps[rows], steps, tokens[::-1][last])
        _look_up(at, rows, token_rows, tokens)
        return at

    def restarts(self, over: Over = Over.tokens) -> list[float]:
        """Where the run was started again: the tokens or steps that it went on from, or when its first row came."""
        before = np.flatnonzero(np.diff(self._starts))
        match over:
            case Over.tokens:
                token_rows, tokens = self._column("data/tokens")
                seen = np.searchsorted(token_rows, before, side="right")
                return [float(tokens[count - 1]) if count else 0.0 for count in seen]
            case Over.steps:
                return [float(step) for step in self.steps[before]]
            case Over.seconds:
                return [float(at) for at in self._seconds[before + 1] if math.isfinite(at)]

    @property
    def step_seconds(self) -> float:
        """Wall time in the optimiser steps that count: of each stretch between two logged ones, steps times mean."""
        rows, means = self._column("perf/step_s")
        return float((np.diff(self.steps[rows], prepend=0).clip(0) * means).sum())


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _kept(steps: Array, starts: Array) -> Array:
    """Which rows count: not those that a later start supersedes."""
    earliest = {int(start): int(steps[starts == start].min()) for start in np.unique(starts)}
    first = runs.superseded_from(earliest)
    kept = np.ones(len(steps), dtype=bool)
    for start, step in first.items():
        kept[(starts == start) & (steps >= step)] = False
    return kept


def _lost_steps(steps: Array, starts: Array, kept: Array) -> int:
    """Of each start, the steps between the last of its that count, or that it went on from, and its last one."""
    lost = 0
    for start in np.unique(starts[~kept]):
        reached = steps[(starts == start) & ~kept].max()
        lost += int(reached - steps[(starts <= start) & kept].max(initial=0))
    return lost


def _look_up(into: Array, wanted: Array, keys: Array, values: Array) -> None:
    """Put the value of each wanted key, where there is one, into its place; ``keys`` ascend."""
    if keys.size:
        places = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
        found = keys[places] == wanted
        into[found] = values[places][found]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One directory that was given, under its display name."""

    name: str
    path: Path
    recipe: str | None
    """``None`` for a model directory that no recipe wrote."""
    settings: dict[str, Any]
    metrics: Metrics
    done: dict[str, Any] | None
    """``None`` while the stage is not finished."""
    identity: dict[str, Any]
    provenance: dict[str, Any]
    shape: LlamaShape | None
    sha256: str | None
    """Content hash of its model, where a run wrote one."""

    @property
    def keys(self) -> set[str]:
        """By what other directories may call its model: content hash and place."""
        return {str(self.path.resolve())} | ({self.sha256} if self.sha256 else set())

    @property
    def parents(self) -> list[Parent]:
        """What the stage read, by ``llamita.json`` where there is one, else by ``DONE.json``."""
        listed = self.provenance.get("parents") or (self.done or {}).get("parents") or {}
        parents = []
        for name, entry in listed.items():
            if isinstance(entry, Mapping):
                parents.append(Parent(name=name, sha256=str(entry.get("sha256")), path=entry.get("path")))
            else:
                parents.append(Parent(name=name, sha256=str(entry)))
        return parents

    @property
    def tokens(self) -> int | None:
        """Tokens that it was trained on."""
        seen = self.metrics.values("data/tokens")
        return int(seen.max()) if seen.size else None

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return int(self.identity.get("restarts", 0))

    @property
    def is_unfinished(self) -> bool:
        """Whether a run goes on, or ended early; a foreign model directory is as it is."""
        return self.recipe is not None and self.done is None

    @property
    def seconds(self) -> float | None:
        """Wall time from the first start to the end, or to the last row; pauses between starts are included."""
        created = self.identity.get("created")
        ends = [] if self.metrics.last_time is None else [self.metrics.last_time]
        if self.done is not None and "finished" in self.done:  # told in whole seconds
            ends.append(datetime.datetime.fromisoformat(self.done["finished"]).timestamp())
        return None if created is None or not ends else max(0.0, max(ends) - float(created))

    @property
    def goodput(self) -> float | None:
        """Share of the wall time that went into optimiser steps which count towards the result.

        Starting, validating, saving, pauses between starts, and steps that were done again do not count.
        """
        counting = self.metrics.step_seconds
        return min(1.0, counting / self.seconds) if self.seconds and counting else None


def read_stage(name: str, path: Path) -> Stage:
    """Read one directory.

    Raises:
        ValueError: it is neither a run directory nor a model directory, or a file in it is damaged.
    """
    if not path.is_dir():
        raise ValueError(f"runs.{name}={path} is not a directory")
    config, model = path / "config.yaml", path / "config.json"
    if not config.is_file() and not model.is_file():
        raise ValueError(f"runs.{name}={path} is neither a run directory (config.yaml) nor a model (config.json)")
    saved = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    done = runs.read_json(path / "DONE.json") if (path / "DONE.json").is_file() else None
    whole = model.is_file() and (done is not None or not config.is_file())
    return Stage(
        name=name,
        path=path,
        recipe=saved.get("recipe"),
        settings=saved.get("settings") or {},
        metrics=Metrics(runs.all_rows(path) if (path / "metrics.jsonl").is_file() else ()),
        done=done,
        identity=runs.read_json(path / "run.json") if (path / "run.json").is_file() else {},
        provenance=_optional_json(path / checkpoints.PROVENANCE),
        shape=LlamaShape.from_config(runs.read_json(model)) if whole else None,
        # Of a run's directory DONE.json knows the hashes; a foreign one would have to be read whole.
        sha256=checkpoints.content_hash(path) if model.is_file() and done is not None else None,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(runs.read_json(path)) if path.is_file() else {}


class Role(StrEnum):
    """What a model is in the story that the page tells."""

    teacher = "teacher"
    pruned = "pruned"
    distilled = "distilled"
    baseline = "baseline"
    aligned = "aligned"
    other = "model"


ALIGNING = ("sft", "dpo", "rl", "average")
"""Recipes whose models go on from a language model, and whose own held-out rows are dialogues."""


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


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A held-out value of one model over the tokens that it was trained on."""

    model: Model
    tokens: Array
    values: Array


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
        return _headline(self.models)


def _headline(models: Sequence[Model]) -> Model | None:
    distilled = [model for model in models if model.role is Role.distilled and not model.is_unfinished]
    pruned = [model for model in models if model.role is Role.pruned]
    return min(distilled, key=_bits) if distilled else pruned[0] if pruned else None


def _bits(model: Model) -> float:
    return model.values["bits_per_byte"].value if "bits_per_byte" in model.values else math.inf


def gather(paths: Mapping[str, Path]) -> Report:
    """Read all directories and find out how they belong together.

    Raises:
        ValueError: as :func:`read_stage`, or there is no directory.
    """
    if not paths:
        raise ValueError("runs must name at least one directory: runs.NAME=PATH")
    stages = [read_stage(name, path) for name, path in paths.items()]
    evaluations = [runs.read_json(s.path / EVALUATION) for s in stages if (s.path / EVALUATION).is_file()]
    models = _models(stages, evaluations)
    _set_recovered(models)
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


def _models(stages: Sequence[Stage], evaluations: Sequence[Mapping[str, Any]]) -> list[Model]:
    """Models of the stages and of the evaluations, joined by content hash, place or name; the teacher comes first."""
    teachers = _teacher_keys(stages, evaluations)
    models: list[Model] = []
    for stage in stages:
        if (stage.shape is not None and stage.recipe != "reward") or stage.recipe in ("distill", *ALIGNING):
            model = Model(name=stage.name, role=_role(stage, stages, teachers), shape=stage.shape, stage=stage)
            model.values = {} if model.role is Role.aligned else _last_values(stage)
            models.append(model)
    measured: list[Model] = []
    for evaluation in evaluations:
        for name, entry in evaluation["models"].items():
            found = _measured_model(models, name, entry)
            if found is None:
                taken = any(model.name == name for model in models)
                found = Model(name=f"{name} (as evaluated)" if taken else name, role=Role.other, shape=_shape(entry))
                found.role = Role.teacher if _entry_keys(entry) & teachers else Role.other
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
    order, headline = list(Role), _headline(models)
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
        origin = _origin(model.stage, stages)
        own = [p for p in pruned if p.stage is origin] if origin else [p for p in pruned if p.shape == model.shape]
        model.start = own[0] if own else pruned[0] if len(pruned) == 1 else None


def _origin(stage: Stage, stages: Sequence[Stage]) -> Stage | None:
    """The pruning that a training run began with, other training runs between them or not."""
    for _ in stages:
        keys = _student_keys(stage)
        parent = next((other for other in stages if other is not stage and other.keys & keys), None)
        if parent is None or parent.recipe == "prune":
            return parent
        stage = parent
    return None


def _entry_keys(entry: Mapping[str, Any]) -> set[str]:
    return Parent(name="", sha256=entry["sha256"], path=entry.get("path")).keys


def _shape(entry: Mapping[str, Any]) -> LlamaShape | None:
    return LlamaShape(**entry["shape"]) if entry.get("shape") else None


def _teacher_keys(stages: Sequence[Stage], evaluations: Sequence[Mapping[str, Any]]) -> set[str]:
    """Models that were pruned, taught, or were called the teacher of an evaluation."""
    keys = set()
    for evaluation in evaluations:
        if (name := evaluation.get("teacher")) is not None:
            keys |= _entry_keys(evaluation["models"][name])
    for stage in stages:
        taught = set(stage.settings.get("teachers") or {}) if stage.recipe == "distill" else set()
        for parent in stage.parents:
            if (stage.recipe == "prune" and parent.name == "model") or parent.name in taught:
                keys |= parent.keys
    return keys


def _role(stage: Stage, stages: Sequence[Stage], teachers: set[str]) -> Role:
    if stage.keys & teachers:
        return Role.teacher
    if stage.recipe in ALIGNING:
        return Role.aligned
    match stage.recipe:
        case "prune":
            return Role.pruned
        case "distill":
            pruned = any(other.recipe == "prune" for other in stages)
            from_pruned = not pruned or _origin(stage, stages) is not None
            if from_pruned and stage.settings.get("teachers"):
                return Role.distilled
            compared = pruned or any(other.settings.get("teachers") for other in stages)
            return Role.baseline if compared else Role.other
    return Role.other


def _student_keys(stage: Stage) -> set[str]:
    """Whose weights the student began with, by its record or, while it runs, by its settings."""
    student = stage.settings.get("student") or {}
    if student.get("init") == "random":
        return set()
    keys = {key for parent in stage.parents if parent.name == "student" for key in parent.keys}
    path = student.get("path")
    return keys | ({str(Path(path).resolve())} if path else set())


def _last_values(stage: Stage) -> dict[str, Estimate]:
    """The last held-out values that a run logged itself."""
    name = _held_out_set(stage.metrics)
    values: dict[str, Estimate] = {}
    for ours, theirs in (("bits_per_byte", "bits_per_byte"), ("loss", "loss"), ("kl", "kd")):
        logged = stage.metrics.values(f"val/{name}/{theirs}")
        if logged.size:
            values[ours] = Estimate(float(logged[-1]))
    if "loss" in values:
        values["perplexity"] = Estimate(math.exp(values["loss"].value))
    return values


def _held_out_set(metrics: Metrics) -> str | None:
    """The set that curves are drawn for: the first by name."""
    return min((n.split("/")[1] for n in metrics.names if n.startswith("val/") and n.count("/") == 2), default=None)


def _set_recovered(models: Sequence[Model]) -> None:
    """Recovered share of the loss: (pruned - model) / (pruned - teacher) in bits per byte."""
    floor = next((_bits(model) for model in models if model.role is Role.teacher), math.inf)
    for model in models:
        if model.start is not None and math.isfinite(_bits(model)) and floor < _bits(model.start) < math.inf:
            model.recovered = (_bits(model.start) - _bits(model)) / (_bits(model.start) - floor)


def _curves(models: Sequence[Model]) -> tuple[str | None, list[Curve]]:
    curves = []
    used = None
    for model in models:
        if model.stage is None or model.role in (Role.teacher, Role.aligned):
            continue
        name = _held_out_set(model.stage.metrics)
        tokens, values = model.stage.metrics.series(f"val/{name}/bits_per_byte")
        if len(values) > 1:
            curves.append(Curve(model=model, tokens=tokens, values=values))
            used = name
    return used, curves


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
