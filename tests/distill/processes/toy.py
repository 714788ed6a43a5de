"""A small distillation problem: random rows, a random teacher, a random student, and the loop around them."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llamita import runs
from llamita.adapters import LoraConfig
from llamita.distill import engines, hidden, launch, loop, lora, optim
from llamita.distill.losses import IGNORE, LossConfig
from llamita.distill.teachers import ResidentTeacher
from llamita.precision import Precision

VOCABULARY = 48


def model(seed: int, *, hidden: int = 16, tied: bool = True, **overrides: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {
        "num_hidden_layers": 2,
        "hidden_size": hidden,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "max_position_embeddings": 131072,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**fields))


def adapted(seed: int = 1, **changes: Any) -> LlamaForCausalLM:
    """A model whose weights rest, with adapters."""
    student = model(seed)
    lora.adapt(student, LoraConfig(**{"rank": 4, **changes}), seed=3)
    return student


def matched(**changes: Any) -> dict[str, Any]:
    """Arguments of a run in which both layers are matched with the first and third of a wider teacher."""
    fields = {"weight": 0.5, "layers": [0, 1], **changes}
    teacher = ResidentTeacher("big", model(2, hidden=24, tied=False, num_hidden_layers=3))
    teacher.layers = (0, 2)
    torch.manual_seed(5)
    config = hidden.HiddenConfig(**fields)
    return {"teachers": [teacher], "matching": hidden.Matching(config, [0, 1], 16, 24)}


def rows(count: int, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Packed rows of two documents each, with very different numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (count, length), generator=generator)
    cuts = torch.randint(1, length, (count, 1), generator=generator)
    places = torch.arange(length)[None]
    positions = torch.where(places < cuts, places, places - cuts)
    labels = torch.where(positions == 0, IGNORE, ids)
    labels[torch.rand(count, length, generator=generator) < torch.rand(count, 1, generator=generator)] = IGNORE
    labels[::5] = IGNORE
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


class Source:
    """The loader's contract on rows in memory."""

    def __init__(self, *, batch: int, micro: int, rank: int = 0, world: int = 1, count: int = 40) -> None:
        self.data = rows(count)
        self.count, self.batch, self.micro, self.rank, self.world = count, batch, micro, rank, world
        self.consumed = 0

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        return self

    def __next__(self) -> list[dict[str, Tensor]]:
        share = self.batch // self.world
        first = self.consumed + self.rank * share
        self.consumed += self.batch
        mine = torch.arange(first, first + share) % self.count
        return [{key: value[part] for key, value in self.data.items()} for part in mine.split(self.micro)]

    def state_dict(self) -> dict[str, Any]:
        return {"seed": 0, "samples_consumed": self.consumed, "data_hash": "toy"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["samples_consumed"]

    def row_ids(self, first: int, stop: int) -> list[int]:
        return [sample % self.count for sample in range(first, stop)]


class Interrupted(Source):
    """Sends this process a stop signal during the step after ``after`` steps."""

    def __init__(self, *, only_rank: int | None = None, after: int = 2, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.after = after
        self.sends = only_rank is None or only_rank == self.rank

    def __next__(self) -> list[dict[str, Tensor]]:
        if self.consumed == self.after * self.batch and self.sends:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()


def settings(**overrides: Any) -> loop.LoopConfig:
    fields: dict[str, Any] = {
        "steps": 6,
        "global_batch_rows": 8,
        "micro_batch_rows": 8,
        "checkpoint_every": 2,
        "validation_every": 3,
        "precision": Precision.float32,
    }
    return loop.LoopConfig(**{**fields, **overrides})


def trainer(
    run: runs.Run,
    *,
    student: LlamaForCausalLM | None = None,
    teachers: list[Any] | None = None,
    loss: LossConfig | None = None,
    deepspeed: launch.DeepSpeedConfig | None = None,
    accelerator: Accelerator | None = None,
    source: Any = None,
    matching: hidden.Matching | None = None,
    **overrides: Any,
) -> loop.Trainer:
    config = settings(**overrides)
    rule = optim.OptimConfig(learning_rate=1e-2, warmup_steps=2, clip_norm=0.5)
    accelerator = accelerator or launch.new_accelerator(
        config, deepspeed or launch.DeepSpeedConfig(), clip_norm=rule.clip_norm
    )
    world, rank = accelerator.num_processes, accelerator.process_index
    engine = engines.build(
        accelerator,
        student or model(1),
        loss or LossConfig(ce_weight=0.25, temperature=2.0),
        rule,
        config,
        matching=matching,
    )
    if teachers is None:
        teachers = [ResidentTeacher("big", model(2, hidden=24, tied=False))]
    return loop.Trainer(
        accelerator=accelerator,
        engine=engine,
        teachers=teachers,
        source=source or Source(batch=config.global_batch_rows, micro=config.micro_batch_rows, rank=rank, world=world),
        config=config,
        optim=rule,
        run=run,
        validation=loop.Validation(
            sets={"held": [rows(2, seed=7), rows(3, seed=8), rows(1, seed=9)]},
            token_bytes=torch.arange(VOCABULARY) % 5,
        ),
        rows_per_epoch=40,
        parents={"teacher": "abc"},
    )


def weights(engine: engines.Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.tensors()}


def digest(engine: engines.Engine) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(weights(engine).items()):
        total.update(name.encode() + tensor.float().numpy().tobytes())
    return total.hexdigest()


def go(out: Path, *, hang_seconds: float = 300.0, **arguments: Any) -> loop.Trainer:
    """Train in ``out`` and return the trainer; the run is left unfinished, as a crash after the last step would."""
    with runs.start(out, "toy", {}, runs.RunConfig(hang_seconds=hang_seconds)) as run:
        job = trainer(run, **arguments)
        job.train()
        return job


def two_ranks(script: str, folder: Path, *phases: str) -> list[dict[str, Any]]:
    """Run a script of this directory on two processes, and return what each rank says of every phase."""
    here = Path(__file__).resolve().parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env["PYTHONPATH"] = f"{here.parents[2] / 'typings'}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(here / script), str(folder), *phases]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
