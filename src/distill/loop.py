"""The training loop: micro-batches in, one optimiser step out, and nothing lost when it is stopped.

The loss of a step is the sum over the supervised tokens of all its micro-batches and ranks, divided once by their
number. So it is the same for any split into micro-batches, ranks and rows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from llamita import faults, runs
from llamita.distill import losses, optim, speed
from llamita.distill.engines import Engine, MicroBatch
from llamita.distill.launch import EngineConfig
from llamita.distill.state import Checkpoints, agree_sum
from llamita.distill.teachers import Batch, Teacher, mask_for
from llamita.progress import TrainingProgress

log = logging.getLogger(__name__)

STEP_MEMORY = "a smaller micro_batch_rows, activation_checkpointing=true, deepspeed=zero2 or zero3, teachers.NAME.cache"
ROWS_NAMED = 16
"""Rows of a skipped step that are told by number."""


@dataclass(kw_only=True)
class LoopConfig(EngineConfig):
    """How long to train, and when to save, log and validate."""

    fewest_steps: ClassVar[int] = 1
    """0 where a recipe has another way to say how long."""
    steps: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    """Newest checkpoints that stay when the run is done; while it goes on, at least 2."""
    log_every: int = 1
    validation_every: int = 100
    """0: only before the first and after the last step."""
    validation_rows: int = 64
    """Held-out rows that each validation measures; 0: no validation."""
    max_skipped_in_a_row: int = 5
    """Steps in a row without a finite gradient that end the run."""
    peak_tflops: float | None = None
    """Dense TFLOP/s of one device, of which MFU is told the share; unset: by the GPU's name, and no MFU on a CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "checkpoint_every", "log_every", "max_skipped_in_a_row"):
            fewest = self.fewest_steps if name == "steps" else 1
            if getattr(self, name) < fewest:
                raise ValueError(f"{name} must be at least {fewest}, got {getattr(self, name)}")
        for name in ("keep_checkpoints", "validation_every", "validation_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise ValueError(f"peak_tflops must be > 0 and finite, got {self.peak_tflops}")


MAY_CHANGE = (
    "micro_batch_rows",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "validation_every",
    "max_skipped_in_a_row",
    "peak_tflops",
    "activation_checkpointing",
    "compile",
    "loss.chunk_mebibytes",
    "deepspeed.stage",
    "deepspeed.config",
    "deepspeed.config.zero_optimization.offload_optimizer.device",
    "deepspeed.config.zero_optimization.offload_param.device",
)
"""Settings that a restart may change: they move speed, memory and bookkeeping, not what is learnt. ``steps`` is not
among them, because the learning rate depends on it."""


class Source(Protocol):
    """Gives the micro-batches of this rank, step after step, and knows where it is."""

    def __iter__(self) -> Iterator[list[Any]]:
        """Micro-batches of the steps from here on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values; the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; refuses one of other data."""
        ...

    def row_ids(self, first: int, stop: int) -> list[int]:
        """Rows of the data that samples ``first`` to ``stop`` of the order are."""
        ...


@dataclass(kw_only=True)
class Counters:
    """How far the run is."""

    step: int = 0
    tokens: int = 0
    """Positions seen, padding included, over all ranks."""
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(kw_only=True)
class Validation:
    """Held-out batches by name of the set, the same on every rank."""

    sets: Mapping[str, Sequence[Batch]] = field(default_factory=dict)
    token_bytes: Tensor | None = None
    """UTF-8 bytes of each token id, for bits per byte."""


@dataclass(kw_only=True)
class Trainer:
    """Everything that a training run works with."""

    accelerator: Accelerator
    engine: Engine
    teachers: Sequence[Teacher]
    source: Source
    config: LoopConfig
    optim: optim.OptimConfig
    run: runs.Run
    validation: Validation = field(default_factory=Validation)
    rows_per_epoch: int | None = None
    parents: Mapping[str, str] = field(default_factory=dict)
    """Content hashes of student and teachers, on the main process: a restart with others is refused."""
    shares: Mapping[str, Callable[[int, int], float]] = field(default_factory=dict)
    """Weights that teachers have at a step of so many steps, by their names; the others' stay."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """What was found out about teachers or data beforehand, to be logged before the first step."""
    meter: speed.Meter | None = None
    """Counts operations, for what is told about the speed."""
    counters: Counters = field(default_factory=Counters)
    last: dict[str, float] = field(default_factory=dict)
    """The newest value of every metric that this start has logged."""

    def __post_init__(self) -> None:
        self.checkpoints = Checkpoints(
            self.run.path / "checkpoints", self.accelerator, keep=self.config.keep_checkpoints
        )
        sparse = [teacher.name for teacher in self.teachers if teacher.is_sparse]
        kinds = losses.statistics([teacher.name for teacher in self.teachers], sparse=sparse)
        self._names = ["loss", *kinds, *self.engine.extras]
        self._saved = -1
        self._interval: dict[str, float] = {}
        self._tally = speed.Tally()
        self._teacher_time = speed.DeviceTime(self.accelerator.device)

    def train(self) -> dict[str, float]:
        """Train to the last step and return the newest metrics.

        Raises:
            Stopped: the run was asked to stop; a checkpoint of the last step is published.
            ValueError: the run cannot go on from its directory, or its gradients stay not finite.
        """
        self.resume()
        steps, counters = self.config.steps, self.counters
        self._set_shares()
        if counters.step == 0:
            if self.costs:
                self.run.log(self.costs, step=0)
            self.validate()
        batches = iter(self.source)
        with self.run.watchdog, TrainingProgress(self.run.path.name, steps, completed=counters.step) as progress:
            while counters.step < steps:
                stop = self.step_and_log(batches)
                progress.update(counters.step, self._note())
                if stop:  # first of all: the time of grace may end within a validation
                    self.save()
                if self._is_due(self.config.validation_every):
                    self.validate()
                if self._is_due(self.config.checkpoint_every):
                    self.save()
                if self._is_due(self.config.log_every):
                    progress.tell(self._facts())
                if stop and counters.step < steps:
                    raise runs.Stopped(f"stopped after step {counters.step} of {steps}; start it again to go on")
        return _finite(self.last)

    def step_and_log(self, batches: Iterator[Sequence[Batch]]) -> bool:
        """Take a step on the next micro-batches and log it where that is due; returns whether to stop."""
        started = time.perf_counter()
        micro_batches = next(batches)
        self._add("perf/data_s", time.perf_counter() - started)
        with faults.phase(f"step {self.counters.step + 1}", memory=STEP_MEMORY):
            stop = self.take_step(micro_batches)
        self._add("perf/step_s", time.perf_counter() - started)
        self._log_step()
        return stop

    def forget_interval(self) -> None:
        """Begin to measure times and speed anew, as after a logged step."""
        self._interval, self._tally = {}, speed.Tally()

    def _is_due(self, every: int) -> bool:
        return self.counters.step == self.config.steps or (every > 0 and self.counters.step % every == 0)

    def take_step(self, micro_batches: Sequence[Batch]) -> bool:
        """One optimiser step; returns whether any rank was asked to stop."""
        counters, device = self.counters, self.accelerator.device
        world = self.accelerator.num_processes
        counters.step += 1
        self._set_shares()
        count = agree_sum(self.accelerator, sum(int(losses.supervised(b["labels"]).sum()) for b in micro_batches))
        batches = [{key: value.to(device, non_blocking=True) for key, value in b.items()} for b in micro_batches]
        measure = self._is_due(self.config.log_every)
        sums_of_each: list[Tensor] = []
        for index, batch in enumerate(batches):
            sums_of_each.append(
                self.engine.accumulate(
                    self._prepare(batch),
                    # The one division: by the tokens of the whole step. Averaging over ranks divides by their number.
                    scale=world / max(count, 1),
                    last=index == len(batches) - 1,
                    measure=measure,
                )
            )
            self.run.watchdog.beat()
        total = torch.stack(sums_of_each).sum(0)
        rate = optim.learning_rate(counters.step, self.config.steps, self.optim)
        norm = self.engine.step(rate)
        seen = sum(batch["input_ids"].numel() for batch in batches)
        context = sum(int(batch["position_ids"].sum()) for batch in micro_batches) + seen / 2
        extra = torch.tensor([seen, context, self.run.stop.is_set()], dtype=torch.float64, device=device)
        *sums, seen_by_all, context_of_all, stops = self.accelerator.reduce(
            torch.cat([total, extra]), reduction="sum"
        ).tolist()
        self._add("perf/teacher_s", self._teacher_time.take())
        counters.tokens += int(seen_by_all)
        self._add("tokens", seen_by_all)
        self._tally += speed.Tally(seen_by_all, context_of_all, count)
        self._add("steps", 1)
        if math.isfinite(norm):
            counters.skipped_in_a_row = 0
        else:
            self._skip(torch.stack([sums[0] for sums in sums_of_each]))
        averages = self._named([value / max(count, 1) for value in sums], "train/")
        self.last |= {name: value for name, value in averages.items() if measure or name.startswith("train/")}
        self.last |= {"optim/lr": rate, "optim/grad_norm": norm, "optim/skipped_steps": counters.skipped}
        return bool(stops > 0)

    def _set_shares(self) -> None:
        for teacher in self.teachers:
            if teacher.name in self.shares:
                teacher.weight = self.shares[teacher.name](self.counters.step, self.config.steps)
        if len(self.teachers) > 1:
            total = sum(teacher.weight for teacher in self.teachers)
            self.last |= {f"kd/share_{teacher.name}": teacher.weight / total for teacher in self.teachers}

    def _prepare(self, batch: Batch) -> MicroBatch:
        """A micro-batch with its mask and what the teachers say to it."""
        mask = mask_for(self.config.attention, batch["position_ids"])
        with self._teacher_time:
            states = [teacher.states(batch, mask) for teacher in self.teachers]
        self.run.watchdog.beat()
        return MicroBatch(batch, mask, states)

    def _skip(self, loss_of_each: Tensor) -> None:
        """Count a step that every rank leaves out because the gradient of all together is not finite.

        Raises:
            ValueError: there were too many in a row.
        """
        counters = self.counters
        counters.skipped += 1
        counters.skipped_in_a_row += 1
        rows = self._rows_at_fault(loss_of_each)
        log.warning("step %d is skipped: no finite gradient; %s", counters.step, rows)
        if counters.skipped_in_a_row >= min(self.config.max_skipped_in_a_row, self.config.steps):
            raise ValueError(
                f"{counters.skipped_in_a_row} steps in a row had no finite gradient, the last was step "
                f"{counters.step}; {rows}; look at them and at the teachers' weights, or lower optim.learning_rate"
            )

    def _rows_at_fault(self, loss_of_each: Tensor) -> str:
        """Which rows of this step had a loss that is not finite, over all ranks; every rank calls this."""
        config, world, rank = self.config, self.accelerator.num_processes, self.accelerator.process_index
        flags = torch.zeros(world, len(loss_of_each), device=loss_of_each.device)
        flags[rank] = (~torch.isfinite(loss_of_each)).to(flags.dtype)
        flags = self.accelerator.reduce(flags, reduction="sum").flatten().tolist()
        stop = self.source.state_dict()["samples_consumed"]
        first = stop - config.global_batch_rows
        each = config.global_batch_rows // len(flags)
        bad = [place for place, flag in enumerate(flags) if flag]
        samples = [range(first + place * each, first + (place + 1) * each) for place in bad]
        ids = [row for part in samples for row in self.source.row_ids(part.start, part.stop)]
        if not ids:
            return f"every loss was finite, the gradient of samples {first} to {stop - 1} was not"
        ranks = sorted({place // len(loss_of_each) for place in bad})
        some = f"{', '.join(map(str, ids[:ROWS_NAMED]))}{', …' if len(ids) > ROWS_NAMED else ''}"
        return f"the loss of rows {some} of the training data was not, on rank {', '.join(map(str, ranks))}"

    def _named(self, values: Sequence[float], prefix: str) -> dict[str, float]:
        """Averages per token by their published names: the loss's own below ``prefix``, the others below ``kd/``."""
        named: dict[str, float] = {}
        for name, value in zip(self._names, values, strict=True):
            named[f"{prefix}{name}" if name in ("loss", "ce", "kd") else f"kd/{name}"] = value
        return named

    def _add(self, name: str, value: float) -> None:
        self._interval[name] = self._interval.get(name, 0.0) + value

    def _note(self) -> str:
        return f"loss {self.last['train/loss']:.4f}"

    def _facts(self) -> dict[str, str]:
        """What a person who watches wants to know of a step that was logged."""
        last = self.last
        facts = {"loss": f"{last['train/loss']:.4f}"}
        for name in self.validation.sets:
            if (loss := last.get(f"val/{name}/loss")) is not None:
                facts[f"{name.replace('_', ' ')} loss"] = f"{loss:.4f}"
        tokens = last["perf/tokens_per_s_per_gpu"] * self.accelerator.num_processes
        facts |= {"lr": f"{last['optim/lr']:.2e}", "tokens/s": f"{tokens:,.0f}"}
        facts |= {
            "memory": f"{last['perf/memory_gib']:.2f} GiB",
            "checkpoint": f"{self._saved if self._saved > 0 else '-'}",
        }
        if self.counters.skipped:
            facts["skipped"] = str(self.counters.skipped)
        return facts

    def _log_step(self) -> None:
        """Log this step's averages, and times and speed since the last line."""
        if not self._is_due(self.config.log_every):
            return
        counters, interval, devices = self.counters, self._interval, self.accelerator.num_processes
        rows = self.source.state_dict().get("samples_consumed", counters.step * self.config.global_batch_rows)
        seconds = interval["perf/step_s"]
        if self.meter is not None:
            self.last |= self.meter.metrics(self._tally, seconds, devices)
        tokens = interval.pop("tokens")
        steps = interval.pop("steps")
        self.last |= {name: value / steps for name, value in interval.items()}
        memory = torch.tensor([speed.peak_memory_gib(self.accelerator.device)], device=self.accelerator.device)
        self.last["perf/memory_gib"] = float(self.accelerator.gather(memory).max())
        self.last |= {
            "perf/tokens_per_s_per_gpu": tokens / seconds / devices,
            "data/tokens": counters.tokens,
            "data/samples": rows,
        }
        if self.rows_per_epoch:
            self.last["data/epoch"] = rows / self.rows_per_epoch
        self.forget_interval()
        self.run.log(_finite({k: v for k, v in self.last.items() if not k.startswith("val/")}), step=counters.step)

    def validate(self) -> None:
        """Measure the held-out sets and log the averages."""
        values: dict[str, float] = {}
        for name, batches in self.validation.sets.items():
            with faults.phase(f"the validation after step {self.counters.step}", memory="a smaller micro_batch_rows"):
                values |= self._measure_set(name, batches)
        self._teacher_time.take()  # none of the steps'
        if values:
            self.last |= values
            self.run.log(_finite(values), step=self.counters.step)

    def _measure_set(self, name: str, batches: Sequence[Batch]) -> dict[str, float]:
        """Averages over one set. Each rank measures every world-th batch, and all of them equally many."""
        world, rank, device = self.accelerator.num_processes, self.accelerator.process_index, self.accelerator.device
        total = torch.zeros(len(self._names) + 2, dtype=torch.float64, device=device)
        for start in range(0, len(batches), world):
            here = start + rank < len(batches)
            batch = {key: value.to(device) for key, value in batches[start + rank if here else 0].items()}
            if not here:
                batch["labels"] = torch.full_like(batch["labels"], losses.IGNORE)
            sums = self.engine.measure(self._prepare(batch))
            predicted = batch["labels"][:, 1:][losses.supervised(batch["labels"])]
            table = self.validation.token_bytes
            num_bytes = 0 if table is None else int(table.to(device)[predicted].sum())
            total += torch.cat([sums, sums.new_tensor([len(predicted), num_bytes])])
        *sums_of_all, count, num_bytes_of_all = self.accelerator.reduce(total, reduction="sum").tolist()
        averages = dict(zip(self._names, (value / max(count, 1) for value in sums_of_all), strict=True))
        values = {f"val/{name}/{key}": value for key, value in averages.items() if key not in ("loss", "ce")}
        values[f"val/{name}/loss"] = averages["ce"]
        if num_bytes_of_all:
            values[f"val/{name}/bits_per_byte"] = averages["ce"] * count / (math.log(2) * num_bytes_of_all)
        return values

    def save(self) -> None:
        """Publish a checkpoint of this step."""
        if self._saved == self.counters.step:
            return
        started = time.perf_counter()
        state = {
            "step": self.counters.step,
            "counters": asdict(self.counters),
            "data": self.source.state_dict(),
            "world_size": self.accelerator.num_processes,
            "dtype": str(self.config.precision.dtype(self.accelerator.device)).removeprefix("torch."),
            "parents": dict(self.parents),
            "last": _finite(self.last),
        }
        self.run.watchdog.beat()
        with faults.phase(f"saving step {self.counters.step}", memory="deepspeed=zero2 or zero3"):
            self.checkpoints.save(self.counters.step, state, self.engine.save, size=self.engine.checkpoint_bytes)
        self.run.watchdog.beat()
        self._saved = self.counters.step
        self.run.log({"perf/save_s": time.perf_counter() - started}, step=self.counters.step)

    def resume(self) -> None:
        """Go on from the newest good checkpoint, if there is one.

        Raises:
            ValueError: it is of other parents, other parameters or other data.
        """
        found = self.checkpoints.newest()
        if found is None:
            return
        folder, state = found
        other = self.accelerator.is_main_process and state["parents"] != dict(self.parents)
        if agree_sum(self.accelerator, other):
            raise ValueError(f"{folder} was trained from other weights than those that are there now: {self.parents}")
        self.engine.load(folder)
        self.source.load_state_dict(state["data"])
        self.counters = Counters(**state["counters"])
        self.last = dict(state["last"])
        self._saved = self.counters.step
        log.info("going on from %s", folder)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """What JSON can hold; a skipped step has no loss to log."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
