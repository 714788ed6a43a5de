"""What watching and saving take from training: metrics, dashboards and checkpoints, as shares of a step's time.

python benchmarks/overhead.py                     # the distillation of configs/pipeline/demo.yaml, five minutes
python benchmarks/overhead.py --rounds 2 --block 10

One process and one Trainer take blocks of steps in turns: with nothing; with the statistics of the loss that a row of
metrics holds (entropies, agreement, the KL to each teacher), which are computed in steps that are logged only; with the
rows too; with the rows in both sinks too (wandb offline, TensorBoard); and with a checkpoint at the end, of whose cost
a step has its share of as many as lie between two checkpoints. Each block is compared with the block of nothing of the
same round, and the order turns from round to round, so that a drift of the machine cancels. Told are the median over
rounds and the quartiles: of wall time, which others on the machine disturb; of this process's CPU time, threads
included, which they disturb less, and which does not see what a disk is waited for; and of the wall time inside the
very calls that log or save, which is what the training thread itself gives.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llamita import runs, sinks
from llamita.distill import engines, launch, loop, losses, optim, speed
from llamita.distill.teachers import Attention, ResidentTeacher
from llamita.shapes import LlamaShape
from train_step import Rows, model

TEACHER = LlamaShape(
    num_hidden_layers=4,
    hidden_size=128,
    intermediate_size=448,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=2048,
    tie_word_embeddings=False,
)
STUDENT = LlamaShape(
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=256,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=2048,
    tie_word_embeddings=True,
)
LENGTH, ROWS = 256, 8
NOTHING, STATISTICS, CHECKPOINTS = "nothing", "statistics of the loss", "checkpoints"
ROWS_TOO, SINKS_TOO = "the same, and rows", "the same, and sinks"
WAYS = (NOTHING, STATISTICS, ROWS_TOO, SINKS_TOO, CHECKPOINTS)
LIMITS = {SINKS_TOO: 0.01, CHECKPOINTS: 0.02}
"""What is aimed at."""


@dataclass(frozen=True)
class Cost:
    """Of one block, in seconds."""

    wall: float
    cpu: float
    inside: float


class Clock:
    """Wall time inside calls that are made through it; a call inside another counts once."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self._depth += 1
            begun = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - begun

        return timed


class Bench:
    """A distillation that can take a block of steps in every way."""

    def __init__(self, job: loop.Trainer, log_every: int, feeds: sinks.Sinks) -> None:
        self.job, self.log_every, self.feeds = job, log_every, feeds
        self.batches = iter(job.source)
        self.clock = Clock()
        self.log_step = self.clock.around(job._log_step)
        self.save = self.clock.around(job.save)

    def block(self, way: str, steps: int) -> Cost:
        """So many steps, each as in the loop of the Trainer."""
        job = self.job
        job.config.log_every = job.config.steps if way in (NOTHING, CHECKPOINTS) else self.log_every
        job.run._sinks = self.feeds if way == SINKS_TOO else sinks.Sinks({})
        setattr(job, "_log_step", self.log_step if way in (ROWS_TOO, SINKS_TOO) else lambda: None)  # noqa: B010
        job.forget_interval()
        _wait(job)
        self.clock.seconds = 0.0
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            job.step_and_log(self.batches)
        if way == CHECKPOINTS:
            self.save()
        _wait(job)
        while any(not feed._queue.empty() for feed in self.feeds._feeds):  # what waits would burden the next block
            time.sleep(0.0005)
        return Cost(time.perf_counter() - wall, time.process_time() - cpu, self.clock.seconds)


def _wait(job: loop.Trainer) -> None:
    if job.accelerator.device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def bench(folder: Path, options: argparse.Namespace) -> Iterator[Bench]:
    """The demo's distillation on random weights and rows, which take as long as others."""
    config = loop.LoopConfig(
        steps=10**9, global_batch_rows=ROWS, micro_batch_rows=ROWS, validation_rows=0, log_every=1, peak_tflops=1.0
    )
    accelerator = launch.new_accelerator(config, launch.DeepSpeedConfig(), clip_norm=1.0)
    made = {
        name: model(shape, Attention.sdpa, torch.float32, accelerator.device)
        for name, shape in (("student", STUDENT), ("teacher", TEACHER))
    }
    settings = runs.RunConfig(wandb=runs.WandbMode.offline, tensorboard=True)
    with runs.start(folder, "overhead", {}, settings) as run:
        job = loop.Trainer(
            accelerator=accelerator,
            engine=engines.build(accelerator, made["student"], losses.LossConfig(), optim.OptimConfig(), config),
            teachers=[ResidentTeacher("teacher", made["teacher"].eval())],
            source=Rows(ROWS, LENGTH, STUDENT.vocab_size, LENGTH // 2),
            config=config,
            optim=optim.OptimConfig(),
            run=run,
            meter=speed.Meter(student=STUDENT, teachers=[TEACHER], peak_tflops=1.0),
        )
        opened = run._sinks
        try:
            yield Bench(job, options.log_every, opened)
        finally:
            run._sinks = opened


def measure(it: Bench, options: argparse.Namespace) -> dict[str, list[Cost]]:
    """All rounds but a first one, in which dashboards and memory come up."""
    found: dict[str, list[Cost]] = {way: [] for way in WAYS}
    for number in range(options.rounds + 1):
        turn = number % len(WAYS)
        for way in (*WAYS[turn:], *WAYS[:turn]):
            cost = it.block(way, options.block)
            if number:
                found[way].append(cost)
    return found


def share(costs: Sequence[Cost], plain: Sequence[Cost], kind: str, weight: float = 1.0) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of what each block takes more than its round's block of nothing.

    ``weight`` is how often the thing happens in training, for each time that it does in a block.
    """
    if kind == "inside":
        values = [cost.inside / base.wall for cost, base in zip(costs, plain, strict=True)]
    else:
        values = [getattr(cost, kind) / getattr(base, kind) - 1 for cost, base in zip(costs, plain, strict=True)]
    low, middle, high = (weight * value for value in statistics.quantiles(values, n=4, method="inclusive"))
    return low, middle, high


def table(found: dict[str, list[Cost]], options: argparse.Namespace) -> str:
    """Rows of Markdown."""
    step = statistics.median(cost.wall for cost in found[NOTHING]) / options.block
    often = {CHECKPOINTS: options.checkpoint_every}
    lines = [
        f"a step: {1000 * step:.1f} ms",
        "",
        "| what | how often | wall time | CPU time | inside the calls | aim |",
    ]
    lines.append("|---" * 6 + "|")
    for way in WAYS[1:]:
        cells = []
        for kind in ("wall", "cpu", "inside"):
            weight = options.block / options.checkpoint_every if way == CHECKPOINTS else 1.0
            low, middle, high = share(found[way], found[NOTHING], kind, weight)
            cells.append(f"{middle:.2%} ({low:.2%} to {high:.2%})")
        aim = f"< {LIMITS[way]:.0%}" if way in LIMITS else "–"
        lines.append(f"| {way} | each {often.get(way, options.log_every)} steps | {' | '.join(cells)} | {aim} |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--block", type=int, default=20, help="steps of a block")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints in training")
    parser.add_argument("--log-every", type=int, default=10, help="steps between rows of metrics")
    parser.add_argument("--scratch", type=Path, help="an existing folder on the disk that is asked about")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2 to have a spread, got {options.rounds}")
    return options


def main() -> None:
    """Measure and print."""
    options = parsed()
    os.environ["WANDB_MODE"] = "offline"
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder, bench(Path(folder) / "run", options) as it:
        found = measure(it, options)
        blocks = f"{options.rounds} rounds of {len(WAYS)} blocks of {options.block} steps"
        print(f"{it.job.accelerator.device}, {torch.get_num_threads()} threads, {blocks}")
    print(table(found, options))


if __name__ == "__main__":
    main()
