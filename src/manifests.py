"""Folders that are whole or not there: synced, listed with sizes and hashes, and renamed to their names at the end."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamita import faults, storage


@contextmanager
def publishing(final: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> Iterator[Path]:
    """A new folder beside ``final`` that takes its name when the block ends well, and vanishes when it does not.

    Every file is synced and listed with size and hash in ``MANIFEST.json`` before the rename, so that a folder under
    its final name is always whole. One process of a launch does this; the others write into the folder it made, and
    what they say of their files stands in ``known`` when the block ends, see :func:`write_manifest`.
    """
    temporary = final.with_name(f".tmp-{final.name}-{secrets.token_hex(4)}")
    faults.crash_point("before_tmp")
    temporary.mkdir(parents=True)
    storage.fsync(final.parent.parent)  # the parent's own name may be new
    try:
        yield temporary
        faults.crash_point("after_shards")
        write_manifest(temporary, known)
        faults.crash_point("before_rename")
        os.rename(temporary, final)
        storage.fsync(final.parent)
        faults.crash_point("after_rename")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync_and_hash(folder: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Sync files below ``folder`` and give the size and hash of each, as a manifest holds them."""
    for name in names:
        storage.fsync(folder / name)
    return storage.sha256_of_files(folder, names)


def write_manifest(folder: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Sync every file and folder below ``folder`` and list the files in ``MANIFEST.json``.

    ``known`` holds the files that were synced and hashed by the processes that wrote them, perhaps on other machines.

    Raises:
        OSError: this process does not see what another one wrote.
    """
    known = known or {}
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    for name, entry in known.items():
        seen = (folder / name).stat().st_size if name in files else None
        if seen != entry["bytes"]:
            text = f"a process wrote {entry['bytes']} bytes, the one that publishes them sees {seen}"
            raise OSError(errno.EIO, text, str(folder / name))
    entries = {**known, **sync_and_hash(folder, [name for name in files if name not in known])}
    for path in folder.rglob("*"):
        if path.is_dir():
            storage.fsync(path)
    faults.crash_point("before_manifest")
    storage.write_json(folder / "MANIFEST.json", {"files": entries})


def check_manifest(folder: Path, *, hashes: bool = False) -> str | None:
    """Why ``folder`` is not whole, or ``None`` if it is: sizes always, content with ``hashes``.

    Raises:
        OSError: the file system does not answer; whether the folder is whole is not known.
    """
    try:
        files = storage.read_mapping(folder / "MANIFEST.json")["files"]
        entries = [(name, entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its MANIFEST.json cannot be read ({error})"
    if not entries:
        return "its MANIFEST.json lists no files"
    for name, size, digest in entries:
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"its MANIFEST.json names a file outside: {name!r}"
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if hashes and storage.sha256(file) != digest:
            return f"{name} has another content than was written"
    return None
