"""What each way of pruning loses at equal shapes: the peers' criteria, this project's, and a random start.

python benchmarks/pruning.py --model stories=scratch/stories260k/model:scratch/stories260k/data --out scratch/pruning

``benchmarks/llama2c.py`` makes such models. Calibration rows come from the training documents, evaluation rows from the
held-out ones. ``--distill`` trains the students of the named methods on a share of the teacher's training tokens with
``recipes/distill.py``. Results are appended to ``results.jsonl``: what is there is not done again. At the end
``markdown.md`` (every row), ``summary.md``, ``ablation.md`` and ``plot.png`` are drawn from it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM

import pruning_methods
import pruning_peers
import pruning_table
from llamita import chat, checkpoints, checks
from llamita.data import loader, shards
from llamita.prune import stream
from llamita.prune.scores import Scores
from pruning_methods import Case, Loaded, Method
from pruning_shapes import Family, Target, backbone, targets

REPOSITORY = Path(__file__).resolve().parent.parent
BATCH_ROWS = 16
RESULTS = "results.jsonl"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to prune, and its data."""

    name: str
    model: Path
    data: Path
    trained_tokens: int | None = None
    """On which the model was trained; ``None``: what its ``llamita.json`` says, else as many as its data has."""

    @classmethod
    def parse(cls, text: str) -> Subject:
        """Read ``NAME=MODEL:DATA`` or ``NAME=MODEL:DATA:TOKENS``.

        Raises:
            ValueError: it is neither.
        """
        name, _, rest = text.partition("=")
        parts = rest.split(":")
        if not name or len(parts) not in (2, 3) or not all(parts) or not (parts[2:] or ["1"])[0].isdigit():
            raise ValueError(f"--model must be NAME=MODEL:DATA or NAME=MODEL:DATA:TOKENS, got {text!r}")
        number = int(parts[2]) if parts[2:] else None
        return cls(name=name, model=Path(parts[0]), data=Path(parts[1]), trained_tokens=number)


class Results:
    """Rows in a file that only grows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.is_file() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def has(self, **key: Any) -> bool:
        """Whether a row with these values is there."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, and show it."""
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        names = ("model", "family", "target", "method", "seed", "distilled")
        print(*(row[name] for name in names), f"loss {row['loss']:.4f}", f"{row['seconds']:.1f} s", flush=True)


class Bench:
    """One model with its rows, its loss and its scores."""

    def __init__(self, subject: Subject, told: argparse.Namespace) -> None:
        self.subject, self.device = subject, told.device
        self.weights, self.data = checkpoints.Weights(subject.model), shards.PackedData.open(subject.data)
        read = (str(subject.model), self.weights.shape.vocab_size, checkpoints.tokenizer_of(subject.model))
        written = (str(subject.data), self.data.vocab_size, self.data.tokenizer_hash)
        checks.refuse(checks.same_tokens(*read, *written))
        self.calibration = self.rows("train", told.calibration_rows)
        self.held_out = self.rows("validation", told.held_out_rows)
        self.pad_id = chat.borders(checkpoints.load_tokenizer(self.data.tokenizer_path)).pad_id
        self.loss = self.evaluate(self.weights)
        self._scores: Scores | None = None
        self._folder: Path = told.out / "scores" / subject.name

    def rows(self, split: str, number: int) -> list[stream.Batch]:
        """The first rows of a split."""
        return list(loader.Sequential(self.data.split(split), batch_rows=BATCH_ROWS, max_rows=number))

    def evaluate(self, model: stream.Model) -> float:
        """Loss on the held-out rows, in nats per token."""
        loss = stream.mean_loss(model, self.held_out, dtype=torch.float32, device=self.device)
        assert loss is not None
        return loss

    @property
    def trained_tokens(self) -> int:
        """Tokens on which the model was trained, as far as is known."""
        note, given = self.subject.model / "llamita.json", self.subject.trained_tokens
        metrics = json.loads(note.read_text()).get("metrics", {}) if note.is_file() else {}
        return int(given or metrics.get("data/tokens") or self.data.manifest["splits"]["train"]["tokens"])

    def case(self, target: Target, seed: int) -> Case:
        """What a method is given; the scores are measured when they are first wanted."""
        if self._scores is None:
            info = {
                "model": checkpoints.content_hash(self.subject.model),
                "calibration": self.data.content_hash,
                "calibration_rows": sum(len(batch["input_ids"]) for batch in self.calibration),
            }
            self._scores = pruning_methods.measured(
                self._folder, self.weights, self.calibration, self.pad_id, self.device, info
            )
        return Case(
            weights=self.weights,
            scores=self._scores,
            calibration=self.calibration,
            target=target,
            seed=seed,
            device=self.device,
        )

    def row(self, target: Target, method: str, *, ours: bool, seed: int) -> dict[str, Any]:
        """What is true of a result before it is measured."""
        return {
            "model": self.subject.name,
            "family": target.family,
            "target": target.label,
            "method": method,
            "ours": ours,
            "seed": seed,
            "distilled": 0.0,
            "share": backbone(target.shape) / backbone(self.weights.shape),
            "shape": asdict(target.shape),
            "whole": self.loss,
            "calibration_rows": sum(len(batch["input_ids"]) for batch in self.calibration),
            "held_out_rows": sum(len(batch["input_ids"]) for batch in self.held_out),
            "device": self.device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


KEY = ("model", "family", "target", "method", "seed", "distilled", "shape", "calibration_rows", "held_out_rows")
"""What makes two results the same one."""


def key(row: dict[str, Any]) -> dict[str, Any]:
    """The values of ``KEY``."""
    return {name: row[name] for name in KEY}


def seeds(method: Method, told: argparse.Namespace, *, distilled: bool = False) -> range:
    """The seeds of a method; one where nothing is left to chance."""
    return range(told.seeds if method.seeded or distilled else 1)


def cut(bench: Bench, method: Method, target: Target, seed: int) -> tuple[Loaded, float]:
    """The smaller model, every tensor of it computed, and how long that took; scores are measured before."""
    case = bench.case(target, seed)
    started = time.monotonic()
    made = pruning_methods.loaded(method.cut(case))
    assert made.shape == target.shape, f"{method.name} gave {made.shape} instead of {target.shape}"
    return made, time.monotonic() - started


def distill(bench: Bench, student: LlamaForCausalLM, share: float, seed: int, told: argparse.Namespace) -> float:
    """Held-out loss of the student after ``share`` of the teacher's tokens."""
    steps = max(1, math.ceil(share * bench.trained_tokens / (told.batch_rows * bench.data.sequence_length)))
    folder = told.out / "student"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints.save_model(student, folder / "start", source=bench.subject.model, provenance={"recipe": "benchmark"})
    overrides = {
        "student.path": folder / "start",
        "teachers.whole.path": bench.subject.model,
        "data.path": bench.subject.data,
        "steps": steps,
        "global_batch_rows": told.batch_rows,
        "micro_batch_rows": told.batch_rows,
        "checkpoint_every": steps,
        "validation_every": 0,
        "validation_rows": 0,
        "optim.learning_rate": told.learning_rate,
        "optim.warmup_steps": max(1, steps // 10),
        "run.seed": seed,
        "out": folder / "trained",
    }
    words = [f"{name}={value}" for name, value in overrides.items()]
    log = told.out / "distill.log"
    with log.open("w") as file:
        command = [sys.executable, str(REPOSITORY / "recipes" / "distill.py"), *words]
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"recipes/distill.py failed: {log}")
    loss = bench.evaluate(checkpoints.Weights(folder / "trained"))
    shutil.rmtree(folder)
    return loss


def measure(bench: Bench, told: argparse.Namespace, results: Results) -> None:
    """Every method at every target of the families that are wanted."""
    wanted = [Family(name) for name in told.families]
    if told.peers and (gap := pruning_peers.minitron_gap(bench.weights, bench.calibration, bench.pad_id)) is not None:
        print(f"{bench.subject.name}: our Minitron scores are within {gap:.1e} of NVIDIA's hook", flush=True)
    for target in (target for family in wanted for target in targets(bench.weights.shape, family)):
        if told.targets and target.label not in told.targets:
            continue
        for method in chosen(told.methods):
            if target.family in method.families:
                measure_one(bench, method, target, told, results)
        if told.peers:
            for name, made in pruning_peers.models(bench.weights, bench.calibration, target):
                row = bench.row(target, name, ours=False, seed=0)
                if not results.has(**key(row)):
                    started = time.monotonic()
                    model = made()
                    seconds = time.monotonic() - started
                    results.add(row | {"loss": bench.evaluate(model), "seconds": seconds})


def measure_one(bench: Bench, method: Method, target: Target, told: argparse.Namespace, results: Results) -> None:
    """One method at one target: after the cut, and after distillation where it is named."""
    trained = told.distill_shares if method.name in told.distill else []
    made: tuple[Loaded, float] | None = None
    for share in (0.0, *trained):
        for seed in seeds(method, told, distilled=share > 0):
            row = bench.row(target, method.name, ours=method.ours, seed=seed) | {"distilled": share}
            if results.has(**key(row)):
                continue
            if made is None or method.seeded:
                made = cut(bench, method, target, seed)
            model, seconds = made
            loss = distill(bench, model.model, share, seed, told) if share else bench.evaluate(model)
            results.add(row | {"loss": loss, "seconds": seconds})


def chosen(names: list[str]) -> Iterator[Method]:
    """The methods of these names; all where there are none."""
    for method in pruning_methods.methods():
        if not names or method.name in names:
            yield method


def parse() -> argparse.Namespace:
    """The command line.

    Raises:
        ValueError: a name is none of a model, a family or a method, or a number cannot be meant.
    """
    known = [method.name for method in pruning_methods.methods()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], metavar="NAME=MODEL:DATA[:TRAINED_TOKENS]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="+", default=list(Family), choices=list(Family))
    parser.add_argument("--targets", nargs="+", default=[], help="labels such as 50%% or 1B; default: all")
    parser.add_argument("--methods", nargs="+", default=[], help=f"default: all of {', '.join(known)}")
    parser.add_argument("--distill", nargs="+", default=[], help="methods whose students are trained")
    parser.add_argument("--distill-shares", nargs="+", type=float, default=[0.01, 0.05])
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the distillation")
    parser.add_argument("--batch-rows", type=int, default=16, help="of the distillation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--held-out-rows", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peers", action="store_true", help="also the packages of peers that are installed")
    told = parser.parse_args()
    for option in ("methods", "distill"):
        if unknown := [name for name in getattr(told, option) if name not in known]:
            raise ValueError(f"--{option} must be among {known}, got {unknown}")
    for option in ("batch_rows", "seeds", "calibration_rows", "held_out_rows", "threads"):
        if getattr(told, option) < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(told, option)}")
    told.model = [Subject.parse(text) for text in told.model]
    return told


def main() -> None:
    """Measure what is missing, then write the table and the plot."""
    try:
        told = parse()
    except ValueError as error:
        raise SystemExit(str(error)) from error
    torch.set_num_threads(told.threads)
    told.out.mkdir(parents=True, exist_ok=True)
    results = Results(told.out / RESULTS)
    for subject in told.model:
        measure(Bench(subject, told), told, results)
    for table in (pruning_table.markdown, pruning_table.summary, pruning_table.ablation):
        (told.out / f"{table.__name__}.md").write_text(table(results.rows))
    pruning_table.plot(results.rows, told.out / "plot.png")


if __name__ == "__main__":
    main()
