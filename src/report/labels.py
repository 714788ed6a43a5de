"""Numbers and names as the page and its pictures write them."""

from __future__ import annotations

import math
import re
from typing import Any


def short(number: float) -> str:
    """A count in three digits: 1.24B, 768k."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled)) + 1e-4))}f}{unit}"
    return f"{number:.3g}"


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage that no line break tears apart."""
    return f"{100 * share:.{digits}f}\N{NARROW NO-BREAK SPACE}%"


def tick(value: float, _: Any = None) -> str:
    """A count at an axis, without zeros at its end."""
    return "0" if value == 0 else re.sub(r"\.0+(?=\D|$)|(?<=\.\d)0+(?=\D|$)", "", short(value))


def printable(text: str) -> str:
    """Text without the characters by which a terminal is commanded, and which no picture can show."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def clip(text: str, length: int = 28) -> str:
    """A name short enough for a picture."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def slug(name: str) -> str:
    """A name as part of a file name and of an identifier: hostile characters go."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40] or "run"
