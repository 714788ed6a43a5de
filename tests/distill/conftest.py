"""Makes ``toy`` importable: the small problem that tests and their subprocesses share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "processes"))
