"""Kills a training run at each named point of the saver, starts it again, and reports what became of it.

Children are forked from one process that has imported everything, before it computes anything.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import toy

from llamita.metrics import read_metrics

torch.set_num_threads(1)


def child(out: Path, crash_at: str | None) -> int:
    """Train in a child process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        if crash_at:
            os.environ["LLAMITA_CRASH_AT"] = crash_at
        job = toy.go(out)
        (out / "digest").write_text(toy.digest(job.engine))
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def outcome(out: Path) -> tuple[str, Any]:
    curve = [[row["step"], row["train/loss"]] for row in read_metrics(out) if "train/loss" in row]
    return (out / "digest").read_text(), curve


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    child(folder / "whole", None)
    expected, expected_curve = outcome(folder / "whole")
    reports = []
    for point in sys.argv[2:]:
        out = folder / point.replace(":", "-")
        status = child(out, point)
        second = child(out, None)
        assert second == 0, f"{point}: the second start ended with {second}"
        digest, curve = outcome(out)
        reports.append(
            {
                "point": point,
                "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                "digest": digest,
                "expected": expected,
                "curve": curve,
                "expected_curve": expected_curve,
                "leftovers": [p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")],
            }
        )
    (folder / "report.json").write_text(json.dumps(reports))
