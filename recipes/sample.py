"""Draw many answers to each prompt, and keep the best ones to learn from: rejection sampling.

python recipes/sample.py model.path=sft data.path=dialogues samples_per_prompt=10 out=samples
torchrun --nproc-per-node 8 recipes/sample.py model.path=sft data.path=dialogues reward.path=reward out=samples
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import dataclasses
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import _sampling
from llamita import chat, checkpoints, checks, evaluate, preflight, runs, storage
from llamita.align import dialogues, generation, rejection, reward_model
from llamita.align.dialogues import SPLITS, DialogueData

log = logging.getLogger(__name__)

MAY_CHANGE = tuple(f"selection.{one.name}" for one in dataclasses.fields(rejection.SelectionConfig))
"""Until it is finished: what is chosen from the same answers."""


@dataclass(kw_only=True)
class ModelConfig:
    """The model that answers."""

    path: Path = MISSING


@dataclass(kw_only=True)
class DataConfig:
    """A directory that ``dialogues`` or ``sample`` wrote."""

    path: Path = MISSING
    splits: list[str] = field(default_factory=lambda: list(SPLITS))

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a split that there is not."""
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise ValueError(f"data.splits must be some of {', '.join(SPLITS)}, got {self.splits}")


@dataclass(kw_only=True)
class RewardConfig:
    """Who ranks answers."""

    path: Path | None = None
    """A directory of the recipe ``reward``; unset: each task's own verifier. With both, the verifier decides which
    answers may be chosen, and the model which of these is."""
    batch_rows: int = 16

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if self.batch_rows < 1:
            raise ValueError(f"reward.batch_rows must be at least 1, got {self.batch_rows}")


@dataclass(kw_only=True)
class Sample:
    """Everything that this recipe can be told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prompts: rejection.Prompts = rejection.Prompts.tasks
    max_prompts: int | None = None
    """Of each split, evenly spaced; unset: all."""
    samples_per_prompt: int = 10
    """Llama 3.1 drew 10 to 30."""
    round: int = 0
    """Another round draws other answers to the same prompts."""
    block_prompts: int = 16
    """Prompts that are answered between two savings; a kill loses at most that much of each process."""
    sampling: generation.SamplingConfig = field(default_factory=generation.SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    selection: rejection.SelectionConfig = field(default_factory=rejection.SelectionConfig)
    dtype: str | None = None
    """Of weights and forward pass; unset: as the weights are stored."""
    device: str = "auto"
    """``auto`` takes this process's GPU where there is one."""
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        for name in ("samples_per_prompt", "block_prompts", "max_prompts"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.round < 0:
            raise ValueError(f"round must be at least 0, got {self.round}")
        if self.prompts is not rejection.Prompts.tasks and self.reward.path is None:
            raise ValueError(f"prompts={self.prompts} needs reward.path=: a dialogue has no verifier")
        if self.sampling.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError(
                f"sampling.temperature=0 gives {self.samples_per_prompt} equal answers: set samples_per_prompt=1"
            )
        if self.dtype is not None:
            checkpoints.dtype_named(self.dtype)
        checks.refuse(checks.device_name("device", self.device))


store("sample_schema", Sample)


def check(config: Sample) -> tuple[DialogueData, dict[str, list[rejection.Asked]], chat.Encoder]:
    """Open everything and find what can be found without running a model."""
    config.sampling.check()
    checks.refuse(checks.device_here("device", config.device))
    weights = checkpoints.Weights(config.model.path)
    encoder = chat.Encoder(checkpoints.load_tokenizer(config.model.path))
    if config.reward.path is not None:
        reward_model.load_config(config.reward.path)
    data = DialogueData.open(config.data.path)
    asked = _sampling.answerable(_sampling.prompts_of(config, data), encoder)
    _sampling.check_lengths(config, asked, encoder, weights.config.max_position_embeddings)
    return data, asked, encoder


def run(config: Sample) -> None:
    """Answer, judge, choose, in ``config.out``; a restart goes on behind the last block."""
    state = evaluate.join_launch()
    if config.sampling.backend is generation.Backend.vllm and state.num_processes > 1:
        raise ValueError(f"sampling.backend=vllm runs in one process, got {state.num_processes}")
    if (config.out / "DONE.json").is_file():
        with runs.start(config.out, "sample", storage.plain(config), config.run):
            return
    data, asked, encoder = check(config)  # mistakes are found before anything is written
    floor = config.run.min_allreduce_gb_per_s
    preflight.check(config.out, state.device, storage.plain(config), min_allreduce_gb_per_s=floor)
    with runs.start(config.out, "sample", storage.plain(config), config.run, may_change=MAY_CHANGE) as this:
        hashes = _sampling.hashes_of(config, data, state)
        work = _sampling.plan(config, data, asked, hashes)
        _sampling.answer_all(config, work, state, this, encoder)
        _sampling.score_all(config, work, state, this)
        if state.is_main_process:
            publish(config, this, work, hashes)
        # The launchers of other nodes would end the main process's soon after their own are done.
        while not state.is_main_process and (config.out / ".lock").exists() and not this.stop.is_set():
            time.sleep(0.2)


def publish(config: Sample, this: runs.Run, work: _sampling.Work, hashes: dict[str, str]) -> None:
    """Choose, and write dialogues, pairs, every answer, and the figures."""
    rows: dict[str, Any] = {}
    lines: list[str] = []
    summary: dict[str, Any] = {}
    for split in work.asked:
        samples = _sampling.samples_of(config, work, split)
        found = rejection.select(samples, config.selection)
        _sampling.tell_unusable(split, samples, config.out)
        rows[split] = {"dialogues": found.dialogues, "pairs": found.pairs}
        lines += [json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows(split)]
        summary[split] = rejection.summary(found, config.selection)
        numbers = {f"{split}/{k}": v for k, v in summary[split].items() if isinstance(v, int | float)}
        log.info("%s: %s", split, numbers)
        this.log(numbers, step=len(work.blocks))
    if not any(kinds["dialogues"] for kinds in rows.values()):
        raise ValueError(f"no answer is good enough to be chosen (selection.*): {json.dumps(summary)[:2000]}")
    storage.write_atomically(config.out / "samples.jsonl", "".join(lines))
    extra = {"recipe": "sample", "parents": hashes, "summary": summary}
    files = dialogues.write_all(config.out, rows, extra)
    this.finish([*files, "samples.jsonl"], parents=hashes, summary=summary)


main = command("sample", Sample, run)

if __name__ == "__main__":
    exit_with(main)
