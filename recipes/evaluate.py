"""Measure models on held-out rows, against a teacher, and on lm-eval tasks.

python recipes/evaluate.py models.pruned.path=pruned models.distilled.path=distilled teacher.path=llama data.path=data \
    tasks=[llamita_python_cloze] out=evaluation
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from omegaconf import MISSING
from transformers import LlamaForCausalLM

from llamita import checkpoints, checks, evaluate, harness, runs, storage
from llamita.data import loader, shards
from llamita.progress import Progress

FILE = "evaluation.json"


@dataclass(kw_only=True)
class ModelConfig:
    """A model directory."""

    path: Path | None = None


@dataclass(kw_only=True)
class DataConfig:
    """The held-out rows."""

    path: Path | None = None
    """A directory of ``recipes/prepare.py``; unset: tasks only."""
    split: str = "validation"
    batch_rows: int = 8
    max_rows: int | None = None
    """Unset: all."""

    def __post_init__(self) -> None:
        for name in ("batch_rows", "max_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")


@dataclass(kw_only=True)
class Evaluate:
    """Everything that this recipe can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """One model, which is then called ``model``; or else ``models``."""
    models: dict[str, ModelConfig] = field(default_factory=dict)
    """Several models by name; differences between all of them are paired by row."""
    teacher: ModelConfig = field(default_factory=ModelConfig)
    """Measured too; the others' KL and top-1 agreement are with it."""
    data: DataConfig = field(default_factory=DataConfig)
    tasks: list[str] = field(default_factory=list)
    """Names of lm-eval tasks."""
    task_path: Path | None = None
    """Folder of task files beside lm-eval's own; unset: ``tasks/`` of the repository."""
    task: harness.TaskConfig = field(default_factory=harness.TaskConfig)
    dtype: str | None = None
    """Of weights and forward pass; unset: as the weights are stored."""
    device: str = "auto"
    """``auto`` takes this process's GPU where there is one."""
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if bool(self.models) == (self.model.path is not None):
            raise ValueError("give either model.path= (one model) or models.NAME.path= (several)")
        if missing := [name for name, model in self.models.items() if model.path is None]:
            raise ValueError(f"models.{missing[0]}.path is not set")
        if "teacher" in self.models and self.teacher.path is not None:
            raise ValueError("models.teacher is the name of teacher.path: give it one of the two")
        if self.data.path is None and not self.tasks:
            raise ValueError("nothing to measure: set data.path=, tasks=, or both")
        if self.dtype is not None:
            checkpoints.dtype_named(self.dtype)
        checks.refuse(checks.device_name("device", self.device))

    def paths(self) -> dict[str, Path]:
        """Every model to measure by its name, the teacher first."""
        named = {"teacher": self.teacher, **(self.models or {"model": self.model})}
        return {name: model.path for name, model in named.items() if model.path is not None}


store("evaluate_schema", Evaluate)


class Rows:
    """The held-out rows, checked against the models before any of these is loaded."""

    def __init__(self, config: DataConfig, path: Path, models: Mapping[str, checkpoints.Weights]) -> None:
        self.data = shards.PackedData.open(path)
        self.batches = loader.Sequential(
            self.data.split(config.split),
            batch_rows=config.batch_rows,
            max_rows=config.max_rows,
            rank=PartialState().process_index,
            world_size=PartialState().num_processes,
        )
        self.token_bytes = evaluate.token_bytes(checkpoints.load_tokenizer(self.data.tokenizer_path))
        written = (f"data.path={path}", self.data.vocab_size, self.data.tokenizer_hash)
        for name, weights in models.items():
            model, most = f"{name}={weights.path}", weights.config.max_position_embeddings
            read = (model, weights.shape.vocab_size, checkpoints.tokenizer_of(weights.path))
            mistakes = checks.same_tokens(*read, *written)
            checks.refuse(mistakes + checks.positions(self.data.sequence_length, model, most))


def check(config: Evaluate) -> tuple[dict[str, checkpoints.Weights], Rows | None]:
    """Open models and rows, and find every mistake that can be found without running a model."""
    checks.refuse(checks.device_here("device", config.device))
    models = {name: checkpoints.Weights(path) for name, path in config.paths().items()}
    sizes = {name: weights.shape.vocab_size for name, weights in models.items()}
    if config.data.path is not None and "teacher" in models and len(set(sizes.values())) > 1:
        raise ValueError(f"KL to the teacher needs one vocabulary, got sizes {sizes}")
    for name, weights in models.items():
        if checkpoints.is_classifier(weights.config):
            raise ValueError(f"{name}={weights.path} is a token classifier, not a language model")
    if config.tasks:
        harness.check_tasks(config.tasks, config.task_path)
        if without := [name for name, w in models.items() if not (w.path / "tokenizer.json").is_file()]:
            raise ValueError(f"tasks need the tokenizer of {without[0]}, whose directory has no tokenizer.json")
    return models, None if config.data.path is None else Rows(config.data, config.data.path, models)


def load(path: Path, config: Evaluate) -> LlamaForCausalLM:
    """A model on this process's device, ready to be measured."""
    dtype = checkpoints.dtype_named(config.dtype) if config.dtype else None
    device = PartialState().device if config.device == "auto" else torch.device(config.device)
    model = checkpoints.load_model(path, dtype=dtype, device=device)
    model.train(False)
    return model


def run(config: Evaluate) -> None:
    """Measure every model and the differences between them, and write ``evaluation.json``."""
    state = evaluate.join_launch()
    finished = (config.out / "DONE.json").is_file()
    weights, rows = ({}, None) if finished else check(config)  # mistakes are found before anything is written
    with runs.start(config.out, "evaluate", storage.plain(config), config.run) as run:
        if run.done:
            return
        teacher = load(weights["teacher"].path, config) if "teacher" in weights else None
        sums, models = dict[str, evaluate.RowSums](), dict[str, Any]()
        steps = len(rows.batches) if rows is not None else 1
        with Progress("evaluate", steps * len(weights)) as progress:
            for index, (name, stored) in enumerate(weights.items()):
                progress.update(index * steps, name)
                itself = teacher if name == "teacher" else None
                model = itself or load(stored.path, config)
                values: dict[str, evaluate.Estimate] = {}
                tasks: dict[str, dict[str, evaluate.Estimate]] = {}
                if rows is not None:
                    batches = run.until_stopped(progress.count(rows.batches, note=name))
                    other = None if itself else teacher
                    sums[name] = evaluate.measure(model, batches, rows.token_bytes, teacher=other)
                    values = evaluate.summary(sums[name])
                if config.tasks:
                    tokenizer, seed = checkpoints.load_tokenizer(stored.path), config.run.seed
                    tasks = harness.run_tasks(model, tokenizer, config.tasks, config.task_path, config.task, seed=seed)
                sha256 = checkpoints.content_hash(stored.path) if state.is_main_process else ""
                models[name] = {"path": stored.path, "sha256": sha256, "shape": stored.shape, "values": values}
                models[name]["tasks"] = tasks
                run.log({"model": name, **evaluate.metrics(config.data.split, values, tasks)}, step=index)
                del model  # before the next one is loaded: beside the teacher there is room for one
        if runs.is_main_process():
            publish(config, run, rows, models, sums)


def publish(
    config: Evaluate, run: runs.Run, rows: Rows | None, models: dict[str, Any], sums: dict[str, evaluate.RowSums]
) -> None:
    """Write ``evaluation.json`` and finish."""
    parents = {name: str(entry["sha256"]) for name, entry in models.items()}
    data: dict[str, Any] = {}
    if rows is not None:
        parents["data"] = rows.data.content_hash
        data = {"path": config.data.path, "content_hash": rows.data.content_hash, "split": config.data.split}
        data |= evaluate.sizes(next(iter(sums.values())))
    teacher = "teacher" if config.teacher.path is not None else None
    found = {"data": data, "teacher": teacher, "models": models, "differences": evaluate.differences(sums)}
    storage.write_json(config.out / FILE, found)
    run.finish([FILE], parents=parents, summary={name: entry["values"] for name, entry in models.items()})


main = command("evaluate", Evaluate, run)

if __name__ == "__main__":
    exit_with(main)
