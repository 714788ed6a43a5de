"""The metrics of a run as columns: over tokens, steps or time, without the rows that a later start supersedes."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamita.metrics import superseded_from

Array = NDArray[Any]


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
        "prune/left/",
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
    first = superseded_from(earliest)
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


def held_out_set(metrics: Metrics) -> str | None:
    """The set that curves are drawn for: the first by name."""
    return min((n.split("/")[1] for n in metrics.names if n.startswith("val/") and n.count("/") == 2), default=None)
