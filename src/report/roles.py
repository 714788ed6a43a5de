"""What each model is in the story that the page tells, by which directory read which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from llamita.report.stages import Parent, Stage


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


def role_of(stage: Stage, stages: Sequence[Stage], teachers: set[str]) -> Role:
    """The role of a stage's model, among all stages and by the keys of the teachers."""
    if stage.keys & teachers:
        return Role.teacher
    if stage.recipe in ALIGNING:
        return Role.aligned
    match stage.recipe:
        case "prune":
            return Role.pruned
        case "distill":
            pruned = any(other.recipe == "prune" for other in stages)
            from_pruned = not pruned or origin_of(stage, stages) is not None
            if from_pruned and stage.settings.get("teachers"):
                return Role.distilled
            compared = pruned or any(other.settings.get("teachers") for other in stages)
            return Role.baseline if compared else Role.other
    return Role.other


def teacher_keys(stages: Sequence[Stage], evaluations: Sequence[Mapping[str, Any]]) -> set[str]:
    """Models that were pruned, taught, or were called the teacher of an evaluation."""
    keys = set()
    for evaluation in evaluations:
        if (name := evaluation.get("teacher")) is not None:
            keys |= entry_keys(evaluation["models"][name])
    for stage in stages:
        taught = set(stage.settings.get("teachers") or {}) if stage.recipe == "distill" else set()
        for parent in stage.parents:
            if (stage.recipe == "prune" and parent.name == "model") or parent.name in taught:
                keys |= parent.keys
    return keys


def entry_keys(entry: Mapping[str, Any]) -> set[str]:
    """By what an evaluation's entry calls its model: content hash and place."""
    return Parent(name="", sha256=entry["sha256"], path=entry.get("path")).keys


def origin_of(stage: Stage, stages: Sequence[Stage]) -> Stage | None:
    """The pruning that a training run began with, other training runs between them or not."""
    for _ in stages:
        keys = _student_keys(stage)
        parent = next((other for other in stages if other is not stage and other.keys & keys), None)
        if parent is None or parent.recipe == "prune":
            return parent
        stage = parent
    return None


def _student_keys(stage: Stage) -> set[str]:
    """Whose weights the student began with, by its record or, while it runs, by its settings."""
    student = stage.settings.get("student") or {}
    if student.get("init") == "random":
        return set()
    keys = {key for parent in stage.parents if parent.name == "student" for key in parent.keys}
    path = student.get("path")
    return keys | ({str(Path(path).resolve())} if path else set())
