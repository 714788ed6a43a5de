"""Data sets by name or from a disk, with the network only where it is allowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def is_saved(path: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` wrote this folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def load(name: str, *, subset: str | None, split: str, allow_network: bool) -> Any:
    """A split of a data set: a folder that ``save_to_disk`` wrote, or a name on the hub.

    Raises:
        ValueError: it has no such split, or is not on this machine and may not be fetched.
    """
    import datasets

    path = Path(name).expanduser()
    if is_saved(path):
        rows = datasets.load_from_disk(str(path))
        if isinstance(rows, datasets.DatasetDict):
            if split not in rows:
                raise ValueError(f"{path} has no split {split!r}; it has {', '.join(rows)}")
            rows = rows[split]
        return rows
    try:
        with _network(allow_network):
            return datasets.load_dataset(name, subset, split=split)
    except (OSError, datasets.exceptions.DatasetsError, ValueError) as error:
        hint = "" if allow_network else "; the network is not used unless allow_network=true"
        raise ValueError(
            f"data set {name!r} (subset {subset}, split {split}) cannot be loaded{hint}: {error}"
        ) from error


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Let ``datasets`` reach the hub in this block, or keep it from it, whatever the environment said at import."""
    import datasets
    import huggingface_hub.constants

    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    for switch in switches:
        switch.HF_HUB_OFFLINE = not allowed
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value
