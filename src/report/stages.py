"""One directory that was given: what the recipe that wrote it recorded, and what it read."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamita import checkpoints, storage
from llamita.metrics import all_rows
from llamita.report.metrics import Metrics
from llamita.shapes import LlamaShape


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
    done = storage.read_json(path / "DONE.json") if (path / "DONE.json").is_file() else None
    whole = model.is_file() and (done is not None or not config.is_file())
    return Stage(
        name=name,
        path=path,
        recipe=saved.get("recipe"),
        settings=saved.get("settings") or {},
        metrics=Metrics(all_rows(path) if (path / "metrics.jsonl").is_file() else ()),
        done=done,
        identity=storage.read_json(path / "run.json") if (path / "run.json").is_file() else {},
        provenance=_optional_json(path / checkpoints.PROVENANCE),
        shape=LlamaShape.from_config(storage.read_json(model)) if whole else None,
        # Of a run's directory DONE.json knows the hashes; a foreign one would have to be read whole.
        sha256=checkpoints.content_hash(path) if model.is_file() and done is not None else None,
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return dict(storage.read_json(path)) if path.is_file() else {}
