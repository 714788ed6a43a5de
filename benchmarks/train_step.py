"""Training steps of real shapes with random weights: tokens per second, MFU and memory, with and without the teacher.

python benchmarks/train_step.py                   # one GPU: 1B and 3B students, an 8B teacher, rows of 8,192 tokens
python benchmarks/train_step.py --small           # any machine, in a minute: shows that the program works

Everything goes through the Trainer and the engine that recipes/distill.py uses. ``online`` runs the teacher in the
step; ``cached`` trains on the data's own tokens, which is what reading a cache leaves to do but for the few sparse
entries; ``adapters`` trains adapters of rank 16 online. Peak memory is the process's, so each way has one of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llamita import runs
from llamita.adapters import LoraConfig
from llamita.distill import engines, launch, loop, lora, losses, optim, speed
from llamita.distill.teachers import Attention, Batch, ResidentTeacher
from llamita.shapes import PUBLISHED, LlamaShape

WAYS = ("online", "cached", "adapters")
RANK = 16
SMALL = LlamaShape(
    num_hidden_layers=4,
    hidden_size=128,
    intermediate_size=384,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=4096,
    tie_word_embeddings=True,
)
SHAPES = {
    "1B": PUBLISHED["meta-llama/Llama-3.2-1B"],
    "3B": PUBLISHED["meta-llama/Llama-3.2-3B"],
    "8B": PUBLISHED["meta-llama/Llama-3.1-8B"],
    "small": SMALL,
    "small teacher": dataclasses.replace(SMALL, hidden_size=256, num_attention_heads=8, num_hidden_layers=8),
}


class Rows:
    """Random rows cut into documents of the same length."""

    def __init__(self, rows: int, length: int, vocabulary: int, document: int) -> None:
        self.rows, self.length, self.vocabulary, self.document = rows, length, vocabulary, document
        self.step = 0

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        self.step += 1
        ids = torch.randint(self.vocabulary, (self.rows, self.length))
        positions = torch.arange(self.length).remainder(self.document).repeat(self.rows, 1)
        labels = torch.where(positions == 0, losses.IGNORE, ids)
        return [{"input_ids": ids, "labels": labels, "position_ids": positions}]

    def state_dict(self) -> dict[str, Any]:
        return {"samples_consumed": self.step * self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("a benchmark is not gone on with")


def model(shape: LlamaShape, attention: Attention, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Random weights, made on the device."""
    config = LlamaConfig(**shape.config_fields(), max_position_embeddings=131072)
    config._attn_implementation = attention.value
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One way: a few steps that are not looked at, then the others."""
    student, teacher = SHAPES[options.student], SHAPES[options.teacher]
    config = loop.LoopConfig(
        steps=options.warmup + options.steps,
        global_batch_rows=options.rows,
        micro_batch_rows=options.rows,
        log_every=options.warmup + options.steps,
        attention=Attention(options.attention),
        activation_checkpointing=options.recompute,
        validation_rows=0,
        peak_tflops=options.peak_tflops,
    )
    accelerator = launch.new_accelerator(config, launch.DeepSpeedConfig(), clip_norm=1.0)
    device, with_adapters = accelerator.device, options.way == "adapters"
    dtype = config.precision.dtype(device)
    made = model(student, config.attention, dtype if with_adapters else torch.float32, device)
    adapters = LoraConfig(rank=RANK if with_adapters else 0)
    if with_adapters:
        lora.adapt(made, adapters, seed=0)
    teachers = []
    if options.way != "cached":
        teachers = [ResidentTeacher("big", model(teacher, config.attention, dtype, device))]
    engine = engines.build(accelerator, made, losses.LossConfig(), optim.OptimConfig(), config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    with tempfile.TemporaryDirectory() as folder, runs.start(Path(folder) / "run", "step", {}, runs.RunConfig()) as run:
        job = loop.Trainer(
            accelerator=accelerator,
            engine=engine,
            teachers=teachers,
            source=Rows(options.rows, options.length, student.vocab_size, options.document or options.length),
            config=config,
            optim=optim.OptimConfig(),
            run=run,
            meter=speed.Meter(
                student=student,
                teachers=[teacher] * len(teachers),
                adapter_parameters=adapters.num_parameters(student),
                peak_tflops=config.peak_tflops or speed.peak_tflops(name),
            ),
        )
        last = timed(job, options.warmup)
    return {"way": options.way, "student": options.student, "teacher": options.teacher, "device": name, **last}


def timed(job: loop.Trainer, warmup: int) -> dict[str, float]:
    """The metrics of the steps behind the first ``warmup``."""
    batches = iter(job.source)
    while job.counters.step < job.config.steps:
        job.step_and_log(batches)
        if job.counters.step == warmup:
            job.forget_interval()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
    return {name: value for name, value in job.last.items() if name.startswith("perf/")}


def table(results: list[dict[str, Any]]) -> str:
    """Rows of Markdown; a dash where a figure does not exist."""
    columns = {
        "perf/tokens_per_s_per_gpu": ("tokens/s", "{:,.0f}"),
        "perf/student_mfu": ("student MFU", "{:.1%}"),
        "perf/total_mfu": ("total MFU", "{:.1%}"),
        "perf/student_tflops_per_gpu": ("student TFLOP/s", "{:.2f}"),
        "perf/teacher_tflops_per_gpu": ("teacher TFLOP/s", "{:.2f}"),
        "perf/memory_gib": ("peak memory, GiB", "{:.2f}"),
    }
    lines = [f"| student | teacher | way | {' | '.join(title for title, _ in columns.values())} |"]
    lines.append("|---" * 3 + "|---:" * len(columns) + "|")
    for row in results:
        cells = [form.format(row[name]) if name in row else "–" for name, (_, form) in columns.items()]
        lines.append(f"| {row['student']} | {row['teacher']} | {row['way']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--small", action="store_true", help="small shapes, for a machine without a GPU")
    parser.add_argument("--students", nargs="+", default=["1B", "3B"], choices=SHAPES)
    parser.add_argument("--teacher", default="8B", choices=SHAPES)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--document", type=int, default=0, help="tokens of each document; 0: one document a row")
    parser.add_argument("--attention", default="sdpa", choices=list(Attention))
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float, help="of the device, where its name does not say")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--student", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small:
        options.students, options.teacher, options.length = ["small"], "small teacher", min(options.length, 256)
        options.steps, options.warmup = 3, 1
    return options


def main() -> None:
    """Measure each way in a process of its own, and print the table."""
    options = parsed()
    if options.way:
        print(json.dumps(measure(options)))
        return
    results = []
    for student in options.students:
        for way in options.ways:
            command = [sys.executable, __file__, *sys.argv[1:], f"--way={way}", f"--student={student}"]
            done = subprocess.run(command, text=True, capture_output=True)
            if done.returncode:
                print(f"{student}, {way}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                continue
            results.append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(f"{results[0]['device'] if results else 'nothing was measured'}, rows of {options.length} tokens\n")
    print(table(results))
    if not results:
        sys.exit(1)


if __name__ == "__main__":
    main()
