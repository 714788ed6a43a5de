"""Measure assistants on the same dialogues, pairs, tasks and prompts, each with its error, and against the first.

python recipes/assess.py models.sft.path=sft models.dpo.path=dpo data.path=dialogues reward.path=reward out=assessment
python recipes/assess.py models.sft.path=sft tasks=[gsm8k_cot_llama] out=assessment
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import _assessing
from llamita import checkpoints, checks, evaluate, harness, runs, storage
from llamita.align import assistants, choices, generation, reward_model
from llamita.align.assistants import Measures
from llamita.progress import Progress

log = logging.getLogger(__name__)

FILE = "results.json"


@dataclass(kw_only=True)
class ModelConfig:
    """A model directory."""

    path: Path | None = None


@dataclass(kw_only=True)
class DataConfig:
    """A directory that ``dialogues`` or ``sample`` wrote."""

    path: Path | None = None
    """Unset: lists and lm-eval's tasks only."""
    split: str = "validation"
    max_dialogues: int | None = None
    max_pairs: int | None = None
    max_tasks: int | None = None
    """Of each, evenly spaced; unset: all; 0: none."""


@dataclass(kw_only=True)
class RewardConfig:
    """The model that prefers one answer to another."""

    path: Path | None = None
    batch_rows: int = 16


@dataclass(kw_only=True)
class ListConfig:
    """Prompts in a local file."""

    path: Path | None = None
    column: str = "prompt"
    """Of the CSV file, or key of the JSON lines."""
    where: dict[str, str] = field(default_factory=dict)
    """Columns and the values that they must hold: one label of a labelled file. Empty: all rows."""
    max_rows: int | None = None


@dataclass(kw_only=True)
class Assess:
    """Everything that this recipe can be told."""

    models: dict[str, ModelConfig] = field(default_factory=dict)
    """By name; the first one is what the others are compared with."""
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    safety: dict[str, ListConfig] = field(default_factory=dict)
    """Prompts that ought to be refused (or ought not), by name; the share of refusals is told by phrases."""
    choices: dict[str, choices.ChoicesConfig] = field(default_factory=dict)
    """Questions with endings of which one is right, by name."""
    listed_words: Path | None = None
    """A file of words, one a line; the share of answers that hold one of them is counted."""
    sampling: generation.SamplingConfig = field(default_factory=lambda: generation.SamplingConfig(temperature=0.0))
    batch_rows: int = 16
    """Texts whose likelihood is measured at a time."""
    resamples: int = 10_000
    """Of the bootstrap."""
    tasks: list[str] = field(default_factory=list)
    """Names of lm-eval tasks."""
    task_path: Path | None = None
    """Folder of task files beside lm-eval's own; unset: ``tasks/`` of the repository."""
    task: harness.TaskConfig = field(
        default_factory=lambda: harness.TaskConfig(apply_chat_template=True, fewshot_as_multiturn=True)
    )
    dtype: str | None = None
    """Of weights and forward pass; unset: as the weights are stored."""
    device: str = "auto"
    """``auto`` takes this process's GPU where there is one."""
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if not self.models:
            raise ValueError("give the models to measure: models.NAME.path=")
        if taken := {"data", "reward", "listed_words"} & set(self.models):
            raise ValueError(f"models.{min(taken)}: a model must not have the name of another input")
        for group in ("models", "safety", "choices"):
            if missing := [name for name, one in getattr(self, group).items() if one.path is None]:
                raise ValueError(f"{group}.{missing[0]}.path is not set")
        if self.data.path is None and not (self.tasks or self.safety or self.choices):
            raise ValueError("nothing to measure: set data.path=, safety.NAME.path=, choices.NAME.path= or tasks=")
        if self.reward.path is not None and self.data.path is None:
            raise ValueError("reward.path= judges answers to the prompts of data.path=, which is not set")
        least = {
            "batch_rows": self.batch_rows,
            "resamples": self.resamples,
            "reward.batch_rows": self.reward.batch_rows,
        }
        for name, value in least.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("max_dialogues", "max_pairs", "max_tasks"):
            if (value := getattr(self.data, name)) is not None and value < 0:
                raise ValueError(f"data.{name} must be at least 0, got {value}")
        if self.dtype is not None:
            checkpoints.dtype_named(self.dtype)
        checks.refuse(checks.device_name("device", self.device))


store("assess_schema", Assess)


def check(config: Assess) -> _assessing.Questions:
    """Open everything, and find every mistake that can be found without running a model."""
    config.sampling.check()
    checks.refuse(checks.device_here("device", config.device))
    if config.tasks:
        harness.check_tasks(config.tasks, config.task_path)
    if config.reward.path is not None:
        reward_model.load_config(config.reward.path)
    readers = {name: _assessing.Reader.of(name, model.path) for name, model in config.models.items() if model.path}
    asked = _assessing.questions(config, list(readers.values()))
    for reader in readers.values():
        prompts = [generation.Prompt(row, reader.prompt(row, said)) for row, said in asked.prompts().items()]
        generation.check_lengths(prompts, config.sampling, reader.positions, reader.owner)
    return asked


def run(config: Assess) -> None:
    """Measure every model, those that a former start has finished left alone, and compare them."""
    state = evaluate.join_launch()
    if config.sampling.backend is generation.Backend.vllm and state.num_processes > 1:
        raise ValueError(f"sampling.backend=vllm runs in one process, got {state.num_processes}")
    finished = (config.out / "DONE.json").is_file()
    asked = None if finished else check(config)  # mistakes are found before anything is written
    with runs.start(config.out, "assess", storage.plain(config), config.run) as this:
        if this.done or asked is None:
            return
        files = {name: config.out / "measured" / f"{name}.json" for name in config.models}
        hashes = _assessing.hashes(config) if state.is_main_process else {}
        made = {name: _assessing.made_from(name, config, asked, hashes) if hashes else None for name in files}
        with Progress("assess", len(files)) as progress:
            for name in this.until_stopped(progress.count(files)):
                if not _assessing.agreed(_assessing.is_measured(files[name], made[name])):
                    _assessing.assess(name, config, asked, files[name], made[name])
        if state.is_main_process:
            told = {name: storage.read_mapping(file) for name, file in files.items()}
            publish(config, this, told, hashes, asked.left_out)


def publish(config: Assess, this: runs.Run, told: dict[str, Any], parents: dict[str, str], left_out: int) -> None:
    """Write ``results.json`` and the table, and finish."""
    found: dict[str, Measures] = {name: assistants.read(one["measures"]) for name, one in told.items()}
    found = _assessing.with_wins(found)
    values = {name: {key: _assessing.estimate(one) for key, one in rows.items()} for name, rows in found.items()}
    gaps = _assessing.differences(found, seed=config.run.seed, resamples=config.resamples)
    models = dict[str, Any]()
    for step, (name, one) in enumerate(told.items()):
        rows = {key: len(measure.rows) for key, measure in found[name].items()}
        models[name] = {"path": config.models[name].path, "sha256": parents[name], "values": values[name]}
        models[name] |= {"rows": rows, "tasks": one["tasks"]}
        logged = {f"assess/{key}": value.value for key, value in values[name].items()}
        logged |= {f"eval/{t}/{m}": v["value"] for t, scores in one["tasks"].items() for m, v in scores.items()}
        this.log({"model": name, **logged}, step=step)
    log.info("\n%s", _assessing.table({n: values[n] | _assessing.scores(one["tasks"]) for n, one in told.items()}))
    storage.write_json(
        config.out / FILE, {"models": models, "differences": gaps, "first": next(iter(told)), "left_out": left_out}
    )
    names = [str(file.relative_to(config.out)) for file in sorted((config.out / "measured").iterdir())]
    this.finish([FILE, *names], parents=parents, summary={name: one["values"] for name, one in models.items()})


main = command("assess", Assess, run)

if __name__ == "__main__":
    exit_with(main)
