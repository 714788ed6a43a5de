"""The source files of the running interpreter's own library: text that every machine has."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


def root() -> Path:
    """The folder of the library."""
    return Path(sysconfig.get_paths()["stdlib"])


def files() -> list[Path]:
    """Source files of the library, its tests left out, sorted by their path inside it.

    Raises:
        ValueError: there are none.
    """
    found: list[Path] = []
    for folder, folders, names in os.walk(root()):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith("config-")]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise ValueError(f"kind=python_stdlib: {root()} holds no source files (is the library in a zip archive?)")
    return sorted(found, key=lambda file: file.relative_to(root()).as_posix())
