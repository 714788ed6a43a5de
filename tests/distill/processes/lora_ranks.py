"""The toy problem with adapters on each rank, under DDP and ZeRO, in one launch.

torchrun --nproc-per-node 2 tests/distill/processes/lora_ranks.py FOLDER PHASE...
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import ranks
import torch
import toy

from llamita import runs


def phase(name: str, folder: Path) -> dict[str, Any]:
    stage, _, rest = name.partition("_")
    arguments: dict[str, Any] = {"micro_batch_rows": 2, "activation_checkpointing": rest == "again"}
    if stage != "ddp":
        arguments["deepspeed"] = ranks.zero(int(stage[-1]))
    if rest == "resume":
        source = toy.Interrupted(batch=8, micro=2, rank=ranks.RANK, world=2)
        with contextlib.suppress(runs.Stopped):
            toy.go(folder / name, student=toy.adapted(), source=source, **arguments)
        ranks.forget_launch()
    result = ranks.curve(folder / name, student=toy.adapted(), **arguments)
    stored = [torch.load(file, weights_only=False)["module"] for file in (folder / name).rglob("step-6/**/*model_st*")]
    return result | {"stored": [key for module in stored[:1] for key in module if "rotary" not in key]}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    results = {}
    for wanted in sys.argv[2:]:
        results[wanted] = phase(wanted, target)
        ranks.forget_launch()
    (target / f"rank-{ranks.RANK}.json").write_text(json.dumps(results))
