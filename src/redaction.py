"""Keys and passwords among settings, which would end in files, logs and dashboards.

Imports nothing that takes time: every recipe asks before it does anything else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{16,}",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "an AWS key": r"\b(AKIA|ASIA)[A-Z0-9]{16}\b",
    "an OpenAI-like key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a wandb key": r"\bwandb_v1_[A-Za-z0-9_]{20,}|(?<![A-Za-z0-9/])[0-9a-f]{40}(?![A-Za-z0-9/])",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "a password in an address": r"[a-z]+://[^/\s:@]+:[^/\s@]+@",
}

VARIABLE = re.compile(
    r"^[^#\n]*?(?<![${\w])([A-Z0-9_]*(?:API_?KEY|ACCESS_KEY|TOKEN|SECRET|PASSWORD))"
    r"""["']?[ ]*[=:][ ]*["']?(?=[^\s"'$`]|\$')"""
)
"""An environment variable that is named like a key, and that a line gives a value, not what a command or file holds."""


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every scalar in nested mappings and lists."""
    match value:
        case Mapping():
            for key, item in value.items():
                yield from flat(item, f"{prefix}.{key}" if prefix else str(key))
        case list() | tuple():
            for index, item in enumerate(value):
                yield from flat(item, f"{prefix}[{index}]")
        case _:
            yield prefix, value


def secrets_in(settings: Mapping[str, Any]) -> list[str]:
    """Settings that look like keys: they end in files, logs and dashboards. The value is not repeated."""
    return [
        f"{name} looks like {kind}: settings are written into files and dashboards; use the environment instead"
        for name, value in flat(settings)
        for kind, pattern in SECRETS.items()
        if isinstance(value, str) and re.search(pattern, value)
    ]


def secrets_in_lines(text: str) -> list[str]:
    """Lines of a script or settings file that hold a key, or give one to an environment variable; not the value."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        found += [f"line {number} holds {kind}" for kind, pattern in SECRETS.items() if re.search(pattern, line)]
        if match := VARIABLE.search(line):
            found.append(f"line {number} sets {match[1]}")
    return found


def redacted(text: str) -> str:
    """``text`` without whatever looks like a key."""
    for pattern in SECRETS.values():
        text = re.sub(pattern, "(hidden)", text)
    return text


class Formatter(logging.Formatter):
    """Writes a record as another formatter does, without keys: a library may name the proxy with its password."""

    def __init__(self, inner: logging.Formatter | None) -> None:
        super().__init__()
        self._inner = inner or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        """The redacted text of a record, its traceback included."""
        return redacted(self._inner.format(record))
