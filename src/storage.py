"""Small files, written whole or not at all; what is read of them, and their hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

from llamita import faults


def plain(value: Any) -> Any:
    """Settings as mappings, lists and scalars: what YAML and JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_files(root: Path, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of each named file below ``root``; reads several files at a time."""
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: sha256(root / name), names)
        return {
            name: {"bytes": (root / name).stat().st_size, "sha256": digest}
            for name, digest in zip(names, digests, strict=True)
        }


def fsync(path: Path) -> None:
    """Force a file or a directory entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Replace ``path`` so that a reader, or a crash at any moment, sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        faults.crash_point("mid_write")
        temporary.replace(path)
    except OSError as error:  # of a full disk, which names no file
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Atomically write ``value`` as indented JSON."""
    write_atomically(path, json.dumps(plain(value), indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; ``ValueError`` names the file when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; ``ValueError`` names the file when it is damaged or holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(value).__name__}")
    return value
