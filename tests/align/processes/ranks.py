"""The recipes on two processes: data parallel and with DeepSpeed, stopped on one rank, and with a bad loss on one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

import dpo
import reward
import rl
from llamita import runs
from llamita.adapters import LoraConfig
from llamita.align import verifiers, watch
from llamita.align.dpo_trainer import PairTrainer
from llamita.distill import launch
from llamita.precision import Precision

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
Accelerator.end_training = lambda _: None  # the next run needs the same processes
listen, loss_of = watch.Watch.on_step_end, PairTrainer._compute_loss
verifiers.validate = lambda check: None
verifiers.check = lambda check, answer: sum(c.isascii() and c.isalpha() for c in answer) / max(1, len(answer))


def settings(name: str, stage: int, **more: Any) -> dict[str, Any]:
    return {
        "model": dpo._aligning.ModelConfig(path=folder / "model"),
        "data": dpo._aligning.DataConfig(path=folder / "data"),
        "deepspeed": launch.DeepSpeedConfig(stage=stage),
        "max_length": 128,
        "checkpoint_every": 2,
        "learning_rate": 3e-3,
        "out": folder / name,
        **more,
    }


def prefer(name: str, stage: int, *, stop_at: int | None = None, bad_at: int | None = None, **more: Any) -> None:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
        if rank == 1 and state.global_step == stop_at:
            self.run.stop._flag.set()
        listen(self, args, state, control, **more)

    def compute(self: Any, *rest: Any) -> Any:
        loss = loss_of(self, *rest)
        return loss * float("nan") if rank == 1 and self.state.global_step == bad_at else loss

    watch.Watch.on_step_end = on_step_end  # type: ignore[method-assign]
    PairTrainer._compute_loss = compute  # type: ignore[method-assign]
    rows = {"global_batch_rows": 10, "micro_batch_rows": 5 if stage == 0 else 1, "steps": 4, "max_skipped_in_a_row": 1}
    dpo.run(dpo.Dpo(**settings(name, stage, **rows, **more)))


def must_end(kind: type[Exception], name: str, stage: int, **more: Any) -> None:
    try:
        prefer(name, stage, **more)
    except kind as error:
        (folder / f"{name}-{rank}.txt").write_text(str(error))
    else:
        raise AssertionError(f"{name} went on")


def reinforce(name: str, stage: int, **more: Any) -> None:
    rows: dict[str, Any] = {
        "global_batch_rows": 16,
        "micro_batch_rows": 4,
        "num_generations": 4,
        "max_answer_tokens": 6,
        "steps": 2,
    }
    watch.Watch.on_step_end = listen  # type: ignore[method-assign]
    rl.run(rl.Rl(**settings(name, stage, **{**rows, **more})))


def score(name: str, stage: int, **more: Any) -> None:
    watch.Watch.on_step_end = listen  # type: ignore[method-assign]
    rows = {"global_batch_rows": 10, "micro_batch_rows": 1, "steps": 2}
    reward.run(reward.Reward(**settings(name, stage, **rows, **more)))


lora: dict[str, Any] = {"lora": LoraConfig(rank=2, embeddings=True)}
judged: dict[str, Any] = {"reward": rl.OtherModel(path=folder / "judge"), "steps": 1}
half: dict[str, Any] = {"precision": Precision.bfloat16}
# Those without DeepSpeed first: accelerate keeps it once it was there.
prefer("ddp", 0)
must_end(ValueError, "ddp_nan", 0, bad_at=3)
prefer("lora_ddp", 0, **lora)
reinforce("rl_ddp", 0)
reinforce("judged_ddp", 0, **judged)
must_end(runs.Stopped, "zero2", 2, stop_at=3)
prefer("zero2", 2)
must_end(ValueError, "zero2_nan", 2, bad_at=3)
must_end(runs.Stopped, "lora_zero2", 2, stop_at=3, **lora)
prefer("lora_zero2", 2, **lora)
prefer("half_zero1_whole", 1, **half)
must_end(runs.Stopped, "half_zero1", 1, stop_at=3, **half)
prefer("half_zero1", 1, **half)
score("half_reward_zero1", 1, **half)
reinforce("half_rl_zero1", 1, **half)
reinforce("rl_zero3", 3)
reinforce("judged_zero3", 3, **judged)
