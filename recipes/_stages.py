"""What a pipeline is made of: stages, the points of a sweep, their order, and what each depends on."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import _local
from _local import Job, LocalConfig
from _slurm import Launcher, LauncherConfig

SHARED = frozenset({"cache"})
"""Recipes whose work several jobs divide among themselves in one directory."""


@dataclass(kw_only=True)
class Stage:
    """One recipe with its overrides; its ``out`` is the folder of the stage's name in the pipeline's ``out``."""

    recipe: str = MISSING
    overrides: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    """Stages whose directories this one reads."""
    processes: int = 1
    """Processes on this machine, each with a GPU of its own where there are as many. On Slurm too, with
    launcher.gpus_per_node at most, but a stage that trains, or caches, has one per GPU of all its nodes there. Recipes
    whose work cannot be shared are one process on Slurm."""
    workers: int = 1
    """Jobs of a Slurm array that divide the stage among themselves, as ``cache`` can; this machine takes one."""
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    """Values of overrides: a run in a folder of its own for every combination of them."""
    show: bool = False
    """Print what the stage printed when everything is done."""

    def check(self, name: str, stages: Mapping[str, Stage]) -> None:
        """Raise ``ValueError`` where this stage could never run."""
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise ValueError(f"stages: a name has 1 to 64 letters, digits, '.', '_' or '-', got {name!r}")
        if not (_local.RECIPES / f"{self.recipe}.py").is_file():
            raise ValueError(f"stages.{name}.recipe: there is no recipes/{self.recipe}.py")
        if unknown := set(self.after) - set(stages):
            raise ValueError(f"stages.{name}.after names {sorted(unknown)}, which are no stages")
        for count in ("processes", "workers"):
            if getattr(self, count) < 1:
                raise ValueError(f"stages.{name}.{count} must be at least 1, got {getattr(self, count)}")
        if self.workers > 1 and (self.recipe not in SHARED or self.sweep):
            raise ValueError(
                f"stages.{name}.workers={self.workers} needs recipe {' or '.join(sorted(SHARED))} and no sweep"
            )
        if empty := [key for key, values in self.sweep.items() if not values]:
            raise ValueError(f"stages.{name}.sweep.{empty[0]} has no values")

    def points(self) -> dict[str, list[str]]:
        """Overrides of each combination of the sweep, by the name of its folder; one of no name without a sweep.

        A name tells the values, so that more values leave the names of the others as they are.
        """
        if not self.sweep:
            return {"": []}
        found = {}
        for values in itertools.product(*self.sweep.values()):
            words = [f"{key}={_word(value)}" for key, value in zip(self.sweep, values, strict=True)]
            found[_folder(words)] = words
        return found


def _word(value: Any) -> str:
    """A value as an override says it."""
    return value if isinstance(value, str) else json.dumps(value)


def _folder(words: Sequence[str]) -> str:
    told = "-".join(word.partition("=")[0].rpartition(".")[2] + "_" + word.partition("=")[2] for word in words)
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", told)[:40]
    return safe if safe == told else f"{safe}-{hashlib.sha256(json.dumps(words).encode()).hexdigest()[:8]}"


@dataclass(kw_only=True)
class Pipeline:
    """The stages and who runs them."""

    stages: dict[str, Stage] = field(default_factory=dict)
    rounds: int = 1
    """How many rounds there are. The first is among ``stages``."""
    round: dict[str, Stage] = field(default_factory=dict)
    """The stages of every round from the second on; ``sft`` becomes the stages ``sft_2``, ``sft_3`` and so on. In their
    overrides and parents ``{n}`` is the number of the round, and ``{last}`` that of the one before it."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Paths that the overrides name as ``${inputs.NAME}``; an empty one must be set."""
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a stage that could never run."""
        if missing := sorted(name for name, path in self.inputs.items() if not path):
            raise ValueError(
                f"inputs.{missing[0]}= is not set: this pipeline needs inputs.{', inputs.'.join(self.inputs)}"
            )
        self._expand()
        if not self.stages:
            raise ValueError("there are no stages: choose a pipeline of configs/pipeline, as in pipeline=demo")
        for name, stage in self.stages.items():
            stage.check(name, self.stages)
        in_order(self.stages)

    def _expand(self) -> None:
        """Put the stages of later rounds among the others."""
        if self.rounds < 1 or (self.rounds > 1 and not self.round):
            allowed = "at least 1" if self.round else "1: this pipeline has no rounds"
            raise ValueError(f"rounds must be {allowed}, got {self.rounds}")
        for n in range(2, self.rounds + 1):
            for name, stage in self.round.items():
                self.stages[f"{name}_{n}"] = numbered(stage, n)


def numbered(stage: Stage, n: int) -> Stage:
    """A stage of round ``n``."""

    def told(text: str) -> str:
        return text.replace("{n}", str(n)).replace("{last}", str(n - 1))

    return replace(stage, overrides=[*map(told, stage.overrides)], after=[*map(told, stage.after)])


def in_order(stages: Mapping[str, Stage]) -> list[str]:
    """Names so that every stage comes after those it reads; ``ValueError`` where they wait for each other."""
    order: list[str] = []
    while len(order) < len(stages):
        ready = [name for name in stages if name not in order and set(stages[name].after) <= set(order)]
        if not ready:
            raise ValueError(f"stages {sorted(set(stages) - set(order))} wait for each other")
        order.append(ready[0])
    return order


def fingerprint(recipe: str, overrides: Sequence[str], parents: Sequence[str]) -> str:
    """What a finished run depends on: its recipe, its overrides, and what its parents depend on."""
    text = json.dumps([recipe, list(overrides), list(parents)])
    return hashlib.sha256(text.encode()).hexdigest()


def planned(config: Pipeline, record: Mapping[str, str]) -> tuple[dict[str, str], dict[str, list[Job]]]:
    """What each run depends on, and the runs of each stage, in order.

    A stage is one run, a sweep one for each of its points. ``record`` tells what the runs that are finished, or were
    submitted, were made from.

    Raises:
        ValueError: a finished run is of other settings, or two have one name.
    """
    prints: dict[str, str] = {}
    by_stage: dict[str, list[Job]] = {}
    stale: list[Path] = []
    for name in in_order(config.stages):
        stage = config.stages[name]
        parents = [job for parent in stage.after for job in by_stage[parent]]
        by_stage[name] = []
        for point, words in stage.points().items():
            label = f"{name}.{point}" if point else name
            if label in prints or (point and label in config.stages):
                raise ValueError(f"stages.{name}.sweep: {label} is the name of another stage too")
            overrides = [*stage.overrides, *words]
            prints[label] = fingerprint(stage.recipe, overrides, [prints[job.name] for job in parents])
            root = config.out.absolute() if config.launcher.kind == Launcher.slurm else config.out
            out = root / name / point
            finished = (out / "DONE.json").is_file()
            done = finished and record.get(label) == prints[label] and all(job.done for job in parents)
            if finished and label in record and not done:
                stale.append(out)
            arguments = [*overrides, f"out={out}"]
            after = [job.name for job in parents]
            by_stage[name].append(
                Job(label, stage.recipe, arguments, out, after, stage.processes, done, spares_others=bool(point))
            )
    if stale:
        raise ValueError(
            f"these stages are finished, but with other settings or from inputs that are not there any more: remove "
            f"{', '.join(map(str, stale))}, or choose another out"
        )
    return prints, by_stage
