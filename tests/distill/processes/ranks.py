"""What the multi-process tests run on each rank: the toy problem under DDP and every ZeRO stage, in one launch.

torchrun --nproc-per-node 2 tests/distill/processes/ranks.py FOLDER PHASE...
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import toy
from accelerate.state import AcceleratorState, GradientState

from llamita import manifests, runs
from llamita.distill import sharded
from llamita.distill.launch import DeepSpeedConfig
from llamita.distill.losses import TeacherStates
from llamita.distill.sharded import ShardedTeacher
from llamita.distill.teachers import Attention, Batch, ResidentTeacher, document_mask
from llamita.metrics import read_metrics
from llamita.precision import Precision

torch.set_num_threads(1)
faulthandler.dump_traceback_later(float(os.environ.get("TOY_TIMEOUT", "500")), exit=True)


PLAIN = {"dtype": torch.float32, "device": torch.device("cpu"), "attention": Attention.sdpa}
AFTER = int(os.environ.get("TOY_AFTER", "2"))
"""Steps after which the phases that are done in parts stop."""
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
hashed: list[str] = []
"""Files that this rank has hashed for a manifest."""
sync_and_hash = manifests.sync_and_hash


def recorded(folder: Path, names: Any) -> Any:
    hashed.extend(f"{folder.name.split('-')[2]}/{name}" for name in names)
    return sync_and_hash(folder, names)


manifests.sync_and_hash = recorded


class Broken(ResidentTeacher):
    """Says NaN on rank 1 for the third step's micro-batches."""

    def __init__(self, source: toy.Source) -> None:
        super().__init__("big", toy.model(2, hidden=24, tied=False))
        self.source = source

    def states(self, batch: Batch, mask: torch.Tensor | None) -> TeacherStates:
        states = super().states(batch, mask)
        bad = RANK == 1 and self.source.consumed == 3 * self.source.batch
        return TeacherStates(states.hidden * float("nan"), states.head) if bad else states


class Hanging(Broken):
    """Never answers on rank 1 from the third step on."""

    def states(self, batch: Batch, mask: torch.Tensor | None) -> TeacherStates:
        if RANK == 1 and self.source.consumed == 3 * self.source.batch:
            time.sleep(1000)
        return ResidentTeacher.states(self, batch, mask)


def zero(stage: int, **more: Any) -> DeepSpeedConfig:
    """That stage; stage 3 spreads every tensor, which it would leave whole below a hundred thousand values."""
    whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return DeepSpeedConfig(stage=stage, config={"zero_optimization": {**whole, **more}} if stage else {})


def spread(folder: Path) -> ShardedTeacher:
    """The toy problem's teacher, from its directory, in pieces; an earlier phase has made the process group."""
    assert torch.distributed.is_initialized()
    return ShardedTeacher.load("big", folder / "teacher", 1.0, **PLAIN)


def compare(folder: Path) -> dict[str, Any]:
    """Hidden states in pieces and whole, on rows that differ between ranks, and the bytes of the pieces."""
    teacher = spread(folder)
    whole = ResidentTeacher.load("big", folder / "teacher", 1.0, **PLAIN)
    batch = toy.rows(3, seed=RANK)
    ours, theirs = (t.states(batch, document_mask(batch["position_ids"])) for t in (teacher, whole))
    same = torch.equal(ours.hidden, theirs.hidden) and torch.equal(ours.head, theirs.head)
    return {
        "same": same,
        "bytes": teacher.num_bytes,
        "trainable": any(p.requires_grad for p in teacher.model.parameters()),
    }


def uneven(folder: Path) -> dict[str, Any]:
    """Five batches on rank 0 against three; then three against one, after which rank 1 is stopped."""
    teacher = spread(folder)
    whole = ResidentTeacher.load("big", folder / "teacher", 1.0, **PLAIN)
    same, stopped = [], False

    def look(seed: int) -> None:
        batch = toy.rows(1 + seed % 3, seed=seed)
        mask = document_mask(batch["position_ids"])
        same.append(torch.equal(teacher.states(batch, mask).hidden, whole.states(batch, mask).hidden))

    for turn in range(2):
        try:
            with teacher.uneven():
                for seed in range(5 if turn == RANK else 3):
                    look(seed)
                    if turn == RANK == 1:
                        raise runs.Stopped("enough")
        except runs.Stopped:
            stopped = True
    return {"same": same, "stopped": stopped}


def damaged(folder: Path) -> dict[str, Any]:
    """What every rank says when one of them has read another piece than the file holds."""
    read = sharded.read_piece

    def swapped(weights: Any, unit: Any, into: torch.Tensor, first: int) -> None:
        read(weights, unit, into, first)
        if RANK == 1 and unit.label == "model.layers.1":
            into[:2] = into[:2].flip(0)

    sharded.read_piece = swapped
    try:
        spread(folder)
    except ValueError as error:
        return {"error": str(error)}
    finally:
        sharded.read_piece = read
    return {}


def half_frozen() -> Any:
    """A student whose first layer does not learn."""
    student = toy.model(1)
    student.model.layers[0].requires_grad_(False)
    return student


def part(out: Path, stage: int, precision: Precision, **more: Any) -> dict[str, Any]:
    """Go on in ``out`` with as many processes as there are, to the stop or to the end."""
    source = toy.Interrupted(batch=8, micro=2, rank=RANK, world=WORLD, after=AFTER)
    with contextlib.suppress(runs.Stopped):
        return curve(out, source=source, micro_batch_rows=2, precision=precision, deepspeed=zero(stage), **more)
    return {}


def curve(out: Path, **arguments: Any) -> dict[str, Any]:
    """Train, and report the losses, the final weights, and whether both ranks hold the same."""
    hashed.clear()
    job = toy.go(out, **arguments)
    final = toy.weights(job.engine)
    together = torch.cat([tensor.float().flatten() for tensor in final.values()])
    gathered = job.accelerator.gather(together[None].to(job.accelerator.device))
    rows = read_metrics(out) if job.accelerator.is_main_process else []
    return {
        "equal_ranks": bool((gathered == gathered[0]).all()),
        "digest": toy.digest(job.engine),
        "rows": rows,
        "hashed": list(hashed),
        "weights": together.tolist(),
        "rotary": str(job.engine.student.model.rotary_emb.inv_freq.dtype),
        "spread": all(p.numel() == 0 for p in job.engine.student.parameters()),
    }


def forget_launch() -> None:
    """Let the next phase make an accelerator of another kind in this process."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()


def phase(name: str, folder: Path) -> dict[str, Any]:
    out = folder / name
    match name:
        case "ddp":
            return curve(out)
        case "ddp_micro":
            return curve(out, micro_batch_rows=1)
        case "zero1" | "zero2" | "zero3":
            return curve(out, micro_batch_rows=2, deepspeed=zero(int(name[-1])))
        case "zero2_offload":
            return curve(out, micro_batch_rows=2, deepspeed=zero(2, offload_optimizer={"device": "cpu"}))
        case "zero3_offload":
            cpu = {"device": "cpu"}
            return curve(out, micro_batch_rows=2, deepspeed=zero(3, offload_optimizer=cpu, offload_param=cpu))
        case "zero0_spread" | "zero1_spread" | "zero2_spread" | "zero3_spread":
            return curve(out, micro_batch_rows=2, deepspeed=zero(int(name[4])), teachers=[spread(folder)])
        case "compare":
            return compare(folder)
        case "uneven":
            return uneven(folder)
        case "damaged":
            return damaged(folder)
        case "zero1_part" | "zero2_part" | "zero3_part" | "zero1_bfloat16_part":
            precision = Precision.bfloat16 if "bfloat16" in name else Precision.float32
            return part(out, int(name[4]), precision)
        case "zero2_frozen" | "zero3_frozen":
            return curve(out, student=half_frozen(), micro_batch_rows=2, deepspeed=zero(int(name[4])))
        case "zero2_frozen_part" | "zero3_frozen_part":
            return part(out, int(name[4]), Precision.float32, student=half_frozen())
        case "other_part":
            return part(out, {2: 2, 4: 0}.get(AFTER, 3), Precision.float32)
        case "zero3_bfloat16":
            return curve(
                out,
                micro_batch_rows=4,
                precision=Precision.bfloat16,
                activation_checkpointing=True,
                deepspeed=zero(3),
            )
        case "zero1_bfloat16":
            return curve(out, micro_batch_rows=4, precision=Precision.bfloat16, deepspeed=zero(1))
        case "ddp_nan" | "zero1_bfloat16_nan" | "zero2_nan" | "zero3_nan":
            source = toy.Source(batch=8, micro=2, rank=RANK, world=WORLD)
            return curve(
                out,
                source=source,
                teachers=[Broken(source)],
                micro_batch_rows=2,
                validation_every=0,
                precision=Precision.bfloat16 if "bfloat16" in name else Precision.float32,
                deepspeed=zero(int(name[4])) if name != "ddp_nan" else None,
            )
        case "hang":
            source = toy.Source(batch=8, micro=2, rank=RANK, world=WORLD)
            return curve(out, source=source, teachers=[Hanging(source)], micro_batch_rows=2, hang_seconds=4.0)
        case "zero2_resume" | "zero3_resume":
            arguments = {"micro_batch_rows": 2, "deepspeed": zero(int(name[4]))}
            with contextlib.suppress(runs.Stopped):
                toy.go(out, source=toy.Interrupted(batch=8, micro=2, rank=RANK, world=WORLD), **arguments)
            forget_launch()
            return curve(out, **arguments)
        case "stop":
            code = runs.EXIT_DONE
            try:
                toy.go(out, source=toy.Interrupted(batch=8, micro=8, rank=RANK, world=WORLD, only_rank=1))
            except runs.Stopped:
                code = runs.EXIT_REQUEUE
            (folder / f"code-{RANK}").write_text(str(code))
            sys.exit(code)
    raise ValueError(name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    results = {}
    for wanted in sys.argv[2:]:
        results[wanted] = phase(wanted, target)
        forget_launch()
    (target / f"rank-{RANK}.json").write_text(json.dumps(results))
