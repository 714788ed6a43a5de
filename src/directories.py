"""Whose a directory is: what may be in it before a stage begins, and the settings that the work in it belongs to."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from llamita import faults, locks, sinks

BATCH_FILES = {"control", "slurm", "plan.json"}
"""What may be in a run directory before its run: the folders of a batch job, and a plan that was kept."""


@contextmanager
def owned(path: Path, *, marker: str) -> Iterator[None]:
    """Own a directory that is no stage's own: one that has the file ``marker``, or an empty or new one.

    Raises:
        ValueError: another live process owns it, or it is somebody else's.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"out={path} is a file; it must be a directory")
    names = {entry.name for entry in path.iterdir() if entry.name[0] != "."} if path.is_dir() else set()
    if names - BATCH_FILES and marker not in names:
        raise ValueError(f"out={path} holds files but no {marker}; choose an empty or new directory")
    path.mkdir(parents=True, exist_ok=True)
    lock = locks.Lock(path)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def refuse_foreign(path: Path) -> None:
    """Refuse what is no directory, or one whose files no run wrote."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"out={path} is a file; it must be a directory")
    names = {entry.name for entry in path.iterdir()} - BATCH_FILES if path.is_dir() else set()
    names = {name for name in names if not _is_half_made(name)}
    # A later rank may have made logs/ before rank 0 comes here, and told its error after rank 0 has left.
    if names - {"logs", faults.FILE} and not names & {"config.yaml", ".lock"}:
        raise ValueError(f"out={path} holds files that no run wrote; choose an empty or new directory")


def check_settings(path: Path, recipe: str, settings: Mapping[str, Any], *, may_change: Collection[str]) -> None:
    """Refuse a directory that holds the work of another recipe or of other settings.

    ``may_change`` names the dotted settings that may differ.
    """
    file = path / "config.yaml"
    if not file.is_file():
        return
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        saved = None
    if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
        raise ValueError(f"out={path} holds a config.yaml that no run wrote; choose an empty or new directory")
    if saved.get("recipe") != recipe:
        raise ValueError(f"out={path} belongs to a run of recipe {saved.get('recipe')!r}; choose another out")
    old, new = _flat(saved["settings"]), _flat(settings)
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in may_change
    ]
    if changed:
        raise ValueError(
            f"out={path} belongs to a run with other settings ({'; '.join(changed)}); "
            "choose another out, or remove that directory"
        )


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def forget(path: Path) -> None:
    """Remove what a first start wrote about itself when it failed before it did any work.

    Otherwise the corrected command would be refused, because the directory belongs to other settings.
    """
    written = {"config.yaml", "run.json", "logs", "wandb", sinks.TENSORBOARD, faults.FILE}
    names = {entry.name for entry in path.iterdir() if not _is_half_made(entry.name)}
    if names <= written | BATCH_FILES | {".lock"}:
        for name in written:
            shutil.rmtree(path / name, ignore_errors=True)
            if (path / name).is_file():
                (path / name).unlink()
        with contextlib.suppress(OSError):
            (path / "control").rmdir()  # stays where a batch job has put something into it


def _is_half_made(name: str) -> bool:
    """Whether a file is one that another process writes at this moment, or that one has left which was killed then.

    A lock that is being taken over from a dead owner, or a text under its temporary name.
    """
    return name.startswith(".lock-") or (name.startswith(".") and name.endswith(".tmp"))
