"""What a trainer of TRL does for our run directory: metrics, stops, whole checkpoints, and finite weights alone.

``checkpoints/checkpoint-N/`` is written by transformers, where it lies. It counts only once its ``MANIFEST.json`` is
there, which is written last and names every file with its hash; whatever has none is removed by the next start. An
older one is removed only after that.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from llamita import checkpoints, faults, manifests, runs, storage
from llamita.progress import TrainingProgress

log = logging.getLogger(__name__)

STATE = "llamita_state.json"
FEWEST = 2
"""As many checkpoints are kept while the run goes on, whatever is asked for."""
ROWS_NAMED = 8
SHOWN = {
    "train/loss": ("loss", ".4f"),
    "rl/reward": ("reward", ".4f"),
    "rl/kl": ("KL", ".4f"),
    "dpo/margin": ("margin", ".4f"),
    "dpo/accuracy": ("accuracy", ".3f"),
    "reward/margin": ("margin", ".4f"),
    "reward/accuracy": ("accuracy", ".3f"),
    "optim/lr": ("lr", ".2e"),
}
"""What a person who watches is told of a step, where its trainer logs it."""


def agree_sum(value: float) -> float:
    """The sum of ``value`` over ranks."""
    state = PartialState()
    tensor = torch.tensor([value], dtype=torch.float64, device=state.device)
    return float(reduce(tensor, reduction="sum").item())


def rank() -> int:
    """Of this process, once the processes have met."""
    return int(PartialState().process_index)


def raise_if_stopped(run: runs.Run) -> None:
    """Raise ``Stopped`` on every rank where any was asked to stop; for work beside the steps, which is done again."""
    if agree_sum(run.stop.is_set()):
        raise runs.Stopped(f"stopped in {run.path}; start it again to go on")


def measured_once(file: Path, about: Mapping[str, str], measure: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What ``measure`` gives, kept in ``file`` for later starts; ``about``, on the main process: what it depends on.

    Every rank calls this and gets the same.
    """
    found: list[Any] = [None]
    if runs.is_main_process() and file.is_file():
        tensors, metadata = checkpoints.read_tensors(file)
        found = [tensors["sums"] if metadata == dict(about) else None]
    broadcast_object_list(found)
    if found[0] is None:
        found = [measure()]
        if runs.is_main_process():
            file.parent.mkdir(exist_ok=True)
            checkpoints.write_tensors(file, {"sums": found[0]}, about)
    table: torch.Tensor = found[0]
    return table


def steps_in(folder: Path) -> list[int]:
    """The steps of all folders that look like checkpoints, oldest first."""
    names = [path.name.rpartition("-")[2] for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints."""
    for step in steps_in(folder)[: -keep or None]:
        shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, the same on every rank; those that are not whole are removed."""
    found: list[Any] = [None]
    if runs.is_main_process():
        for step in reversed(steps_in(folder)):
            path = folder / f"checkpoint-{step}"
            if (reason := manifests.check_manifest(path, hashes=found[0] is None)) is not None:
                log.warning("%s is not whole and is removed: %s", path, reason)
                shutil.rmtree(path)
            elif found[0] is None:
                found[0] = str(path)
    broadcast_object_list(found)
    return None if found[0] is None else Path(found[0])


def check_parents(checkpoint: Path, parents: Mapping[str, str], paths: Mapping[str, Path]) -> None:
    """Hold a checkpoint against ``parents``, on the main process the hashes of what is at ``paths``; all ranks call.

    Raises:
        ValueError: it was trained from another one, which is named.
    """
    trained_from = storage.read_mapping(checkpoint / STATE)["parents"]
    changed = [sorted(name for name, sha256 in parents.items() if trained_from.get(name) != sha256)]
    broadcast_object_list(changed)
    if changed[0]:
        named = ", ".join(f"{name} ({paths[name]})" for name in changed[0])
        raise ValueError(
            f"{checkpoint} was trained from another {named} than is there now: put it back as it was, or choose "
            "another out"
        )


class Watch(TrainerCallback):
    """Listens to a trainer for one run; every rank has one.

    ``names`` maps TRL's metrics to ours; others are logged as ``FAMILY/NAME``. ``rows_of`` names the rows of a step;
    ``found`` is the checkpoint to go on from.
    """

    def __init__(
        self,
        run: runs.Run,
        *,
        steps: int,
        family: str,
        names: Mapping[str, str],
        parents: Mapping[str, str],
        keep: int,
        max_skipped_in_a_row: int,
        rows_of: Callable[[int], Sequence[str]],
        found: Path | None = None,
    ) -> None:
        self.run = run
        self.steps = steps
        self.last: dict[str, float] = {}
        self.stopped = False
        self.skipped, self.skipped_in_a_row = 0, 0
        self._family = family
        self._names = {"loss": "train/loss", "grad_norm": "optim/grad_norm", "learning_rate": "optim/lr", **names}
        self._parents = dict(parents)
        self._keep = max(FEWEST, keep)
        self._limit = min(max_skipped_in_a_row, steps)
        self._rows_of = rows_of
        self._found = found
        self._progress: TrainingProgress | None = None
        self._began = time.perf_counter()
        self._tokens: float | None = None
        self._saved = "-" if found is None else found.name.rpartition("-")[2]

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return self.run.path / "checkpoints"

    def resume_from(self) -> Path | None:
        """The checkpoint to go on from."""
        found = self._found
        if found is None:
            return None
        state = storage.read_mapping(found / STATE)
        self.last = dict(state["last"])
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        log.info("going on from %s", found)
        return found

    def judge(self, step: int, *, finite: bool, spoilt: bool) -> None:
        """Count a step that was left out because its loss or gradient is not finite on some rank.

        ``spoilt``: the optimiser has used the gradient already, so that the weights are lost.

        Raises:
            ValueError: there were too many in a row, or one has spoilt the weights.
        """
        if finite:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        ids = list(dict.fromkeys(self._rows_of(step)))
        rows = ", ".join(ids[:ROWS_NAMED]) + (", …" if len(ids) > ROWS_NAMED else "")
        log.warning("step %d is skipped: no finite loss and gradient; its rows are %s", step, rows)
        if spoilt or self.skipped_in_a_row >= self._limit:
            raise ValueError(
                f"{self.skipped_in_a_row} steps in a row had no finite loss and gradient, the last was step {step} "
                f"with the rows {rows}; look at them and at the weights, or lower learning_rate; checkpoints from "
                "before are as they were"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show where the run stands."""
        self._progress = TrainingProgress(self.run.path.name, self.steps, completed=state.global_step)
        self._progress.__enter__()
        self._began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop showing it."""
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        if self._progress is not None:
            self._progress.__exit__()
            self._progress = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say that this process lives."""
        self.run.watchdog.beat()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask all ranks whether to stop: what was done is saved then."""
        self.run.watchdog.beat()
        if self._progress is not None:
            loss = self.last.get("train/loss")
            self._progress.update(state.global_step, "" if loss is None else f"loss {loss:.4f}")
        if agree_sum(self.run.stop.is_set()):
            control.should_save = True
            control.should_training_stop = True
            self.stopped = state.global_step < self.steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Log what is finite, by our names; what a skipped step gave is not."""
        if not logs or "train_runtime" in logs:
            return
        found = {self._named(name): value for name, value in logs.items() if name not in ("epoch", "total_flos")}
        values = {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        now = time.perf_counter()
        values |= {"optim/skipped_steps": self.skipped, "perf/interval_s": now - self._began}
        self._began = now
        self.last |= values
        self.run.log(values, step=state.global_step)
        facts = self._facts(values)
        if self._progress is not None:
            self._progress.tell(facts)

    def _facts(self, values: Mapping[str, float]) -> dict[str, str]:
        """What a person who watches wants to know of a step that was logged."""
        facts = {label: format(values[name], form) for name, (label, form) in SHOWN.items() if name in values}
        # A sum since some start of the run: only what came since the last line was read in a known time.
        tokens = values.get(f"{self._family}/num_tokens")
        if tokens is not None and self._tokens is not None:
            facts["tokens/s"] = f"{(tokens - self._tokens) / max(values['perf/interval_s'], 1e-9):,.0f}"
        self._tokens = tokens
        facts["checkpoint"] = self._saved
        if self.skipped:
            facts["skipped"] = str(self.skipped)
        return facts

    def _named(self, name: str) -> str:
        return self._names.get(name, f"{self._family}/{name.replace('/', '_')}")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the newest checkpoint count, and only then remove older ones."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            if (metrics := self.run.path / "metrics.jsonl").is_file():
                storage.fsync(metrics)
            path = self.folder / f"checkpoint-{state.global_step}"
            told = {"parents": self._parents, "last": self.last, "skipped": self.skipped}
            storage.write_json(path / STATE, {**told, "skipped_in_a_row": self.skipped_in_a_row})
            faults.crash_point("after_shards")
            manifests.write_manifest(path)
            storage.fsync(self.folder)
            faults.crash_point("after_rename")
            prune(self.folder, self._keep)
        processes.wait_for_everyone()
        self._saved = str(state.global_step)
        self.run.watchdog.beat()


class Watched:
    """Mixed into a trainer of TRL, before it: a gradient that is not finite never reaches the weights.

    Without DeepSpeed the step is left out on every rank. DeepSpeed takes the step within the backward pass, so there
    the run ends at once, and goes on from the checkpoint before when it is started again.
    """

    watch: Watch
    _is_bad: torch.Tensor | None = None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the trainer's; remembers whether the loss was finite."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        bad = ~torch.isfinite(loss)
        self._is_bad = bad if self._is_bad is None else self._is_bad | bad
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As the trainer's; every rank comes here once a step, after the backward pass."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        bad = bool(self._is_bad) or not math.isfinite(float(norm))
        self._is_bad = None
        is_bad = agree_sum(bad) > 0
        deepspeed: bool = self.is_deepspeed_enabled  # type: ignore[attr-defined]
        step: int = self.state.global_step + 1  # type: ignore[attr-defined]
        self.watch.judge(step, finite=not is_bad, spoilt=is_bad and deepspeed)
        if is_bad:
            for parameter in model.parameters():
                parameter.grad = None  # AdamW leaves out what has none, its moments included
        return norm

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: ``llamita.json`` says what was done."""

    def _send_telemetry(self) -> None:
        """None: a run tells nobody."""


def train(trainer: Any, watch: Watch) -> dict[str, float]:
    """Train to the last step, from the newest whole checkpoint where there is one; returns the newest metrics.

    Raises:
        Stopped: the run was asked to stop; a checkpoint of the last step is whole.
        ValueError: the losses or gradients stay not finite.
    """
    trainer.watch = watch
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            # peft copies a matrix as it rests; small steps would be lost in bfloat16.
            parameter.data = parameter.data.float()
    resume = watch.resume_from()
    try:
        with watch.run.watchdog:
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finally:
        watch.close()
    if watch.stopped:
        step = trainer.state.global_step
        raise runs.Stopped(f"stopped after step {step} of {watch.steps}; start it again to go on")
    return dict(watch.last)
