"""The rows of a run's ``metrics.jsonl``: read without those that a later restart supersedes, mended after a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All of :func:`metric_rows`."""
    return list(metric_rows(path))


def metric_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a run's ``metrics.jsonl``, each step's metric once, one at a time: a long run has a million.

    A run that died after logging and before saving repeats steps after its restart: the rows that a later restart
    supersedes are left out. So is a last line that is still being written, or that a crash left half written.

    Raises:
        ValueError: a line is damaged.
    """
    earliest: dict[int, int] = {}
    for row in all_rows(path):
        earliest[row["restart"]] = min(earliest.get(row["restart"], row["step"]), row["step"])
    first = superseded_from(earliest)
    for row in all_rows(path):
        # A restart that began to write since the first pass supersedes what is read next time.
        if row["step"] < first.get(row["restart"], float("inf")):
            yield row


def superseded_from(earliest: Mapping[int, int]) -> dict[int, float]:
    """The first step of each restart's rows that a later restart supersedes, by the earliest step of each."""
    found: dict[int, float] = {}
    first = float("inf")
    for restart in sorted(earliest, reverse=True):
        found[restart] = first
        first = min(first, earliest[restart])
    return found


def all_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a run's ``metrics.jsonl``, those that a later restart supersedes included.

    Raises:
        ValueError: a line is damaged.
    """
    file = path / "metrics.jsonl"
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            yield parse_row(line, f"{file}, line {number},")


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """A line of ``metrics.jsonl``.

    Raises:
        ValueError: it is damaged; the message begins with ``where``.
    """
    try:
        row = json.loads(line)
        step, restart = row["step"], row["restart"]
        if not isinstance(step, int) or not isinstance(restart, int):
            raise TypeError("step and restart must be whole numbers")
        return {"step": step, "restart": restart, **row}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where} is not a row of metrics: {error!r}") from error


def mend_metrics(path: Path) -> None:
    """Cut off what a crash left after the last whole line: a part of one, or zeros where the power went."""
    if path.is_file():
        text = path.read_bytes()
        whole = text.partition(b"\0")[0]
        whole = whole[: whole.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with path.open("r+b") as file:
                file.truncate(len(whole))
