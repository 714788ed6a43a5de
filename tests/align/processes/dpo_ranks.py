"""The recipe on two processes: data parallel, then with DeepSpeed, stopped on one rank and gone on with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from accelerate import Accelerator

import dpo
from llamita import runs
from llamita.align import watch
from llamita.distill import launch

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
listen = watch.Watch.on_step_end
Accelerator.end_training = lambda _: None  # the next run needs the same processes


def go(name: str, stage: int, *, stop_at: int | None = None) -> None:
    config = dpo.Dpo(
        model=dpo._aligning.ModelConfig(path=folder / "model"),
        data=dpo._aligning.DataConfig(path=folder / "data"),
        deepspeed=launch.DeepSpeedConfig(stage=stage),
        max_length=128,
        global_batch_rows=10,
        micro_batch_rows=5 if stage == 0 else 1,
        steps=8,
        checkpoint_every=4,
        learning_rate=3e-3,
        out=folder / name,
    )

    def on_step_end(self: watch.Watch, args: object, state: object, control: object, **more: object) -> None:
        if stop_at is not None and rank == 1 and state.global_step == stop_at:  # type: ignore[attr-defined]
            self.run.stop._flag.set()
        listen(self, args, state, control, **more)

    watch.Watch.on_step_end = on_step_end  # type: ignore[method-assign]
    dpo.run(config)


go("ddp", 0)
try:
    go("zero2", 2, stop_at=3)
except runs.Stopped:
    go("zero2", 2)
else:
    raise AssertionError("the stop was not heard")
if len(sys.argv) > 2:
    go("zero3", 3)
