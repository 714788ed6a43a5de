"""The toy problem with adapters or matched layers on each rank, under DDP and ZeRO, in one launch.

torchrun --nproc-per-node 2 tests/distill/processes/student_ranks.py FOLDER {lora,hidden}_{ddp,zeroN}[_resume|_again]...
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import ranks
import toy

from llamita import runs
from llamita.distill import saved


def kind_of(name: str) -> dict[str, Any]:
    """A student and what it is matched with, made anew: a run takes them over."""
    return {"student": toy.adapted()} if name == "lora" else toy.matched()


def phase(name: str, folder: Path) -> dict[str, Any]:
    kind, stage, *rest = name.split("_")
    arguments: dict[str, Any] = {"micro_batch_rows": 2, "activation_checkpointing": "again" in rest}
    if stage != "ddp":
        arguments["deepspeed"] = ranks.zero(int(stage[-1]))
    if "resume" in rest:
        source = toy.Interrupted(batch=8, micro=2, rank=ranks.RANK, world=2)
        with contextlib.suppress(runs.Stopped):
            toy.go(folder / name, source=source, **kind_of(kind), **arguments)
        ranks.forget_launch()
    result = ranks.curve(folder / name, **kind_of(kind), **arguments)
    stored = [name for name, _ in saved.Saved(folder / name / "checkpoints" / "step-6").tensors()]
    return result | {"stored": stored}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    results = {}
    for wanted in sys.argv[2:]:
        results[wanted] = phase(wanted, target)
        ranks.forget_launch()
    (target / f"rank-{ranks.RANK}.json").write_text(json.dumps(results))
