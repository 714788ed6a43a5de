"""The toy problem with matched layers on each rank, under DDP and ZeRO, in one launch.

torchrun --nproc-per-node 2 tests/distill/processes/hidden_ranks.py FOLDER PHASE...
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


def phase(name: str, folder: Path) -> dict[str, Any]:
    arguments: dict[str, Any] = {"micro_batch_rows": 2, "activation_checkpointing": name != "ddp"}
    if name != "ddp":
        arguments["deepspeed"] = ranks.zero(int(name[4]))
        source = toy.Interrupted(batch=8, micro=2, rank=ranks.RANK, world=2)
        with contextlib.suppress(runs.Stopped):
            toy.go(folder / name, source=source, **toy.matched(), **arguments)
        ranks.forget_launch()
    return ranks.curve(folder / name, **toy.matched(), **arguments)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    results = {}
    for wanted in sys.argv[2:]:
        results[wanted] = phase(wanted, target)
        ranks.forget_launch()
    (target / f"rank-{ranks.RANK}.json").write_text(json.dumps(results))
