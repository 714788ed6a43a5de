"""What a logit cache takes and how true it is: every sampler at the bytes of the default one, on a real teacher.

python benchmarks/cache.py --model teacher --data data --out scratch/cache

Each cache is written and read by the project's own code; ``squared error`` is the mean over positions of the sum of
(t - p)^2, measured against the teacher's whole distributions, and holds variance and bias together. Top-k is counted
with three bytes an entry, as if its values could be stored in seven bits without loss: the project itself takes five.
Results are appended to ``results.jsonl``; ``table.md`` is made of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamita import checkpoints, runs
from llamita.data.shards import PackedData
from llamita.distill import cache_format, capture, losses, samplers
from llamita.distill.cache import Cache, Identity, Rows
from llamita.distill.samplers import Sampler
from llamita.distill.teachers import Attention, Batch, ResidentTeacher

SAMPLES = 50
"""Of the default sampler, whose bytes the others are given."""


class FirstRows:
    """The first rows of a split, which are a fair sample of it."""

    def __init__(self, rows: Rows, number: int) -> None:
        self._rows = rows
        self._number = min(number, len(rows))

    def __len__(self) -> int:
        return self._number

    def rows(self, indices: np.ndarray, /) -> Batch:
        """As the split gives them."""
        return self._rows.rows(indices)


class Bench:
    """One teacher with its rows."""

    def __init__(self, told: argparse.Namespace) -> None:
        self.told, self.device = told, torch.device(told.device)
        self.data = PackedData.open(told.data)
        self.rows = FirstRows(self.data.split("train"), told.rows)
        self.teacher_hash = checkpoints.content_hash(told.model)
        self.vocab_size = self.data.vocab_size
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def worker(self, sampler: Sampler, samples: int) -> capture.Capture:
        """The teacher, ready to be captured."""
        identity = Identity(
            teacher=self.teacher_hash,
            tokenizer=self.data.tokenizer_hash,
            data=self.data.content_hash,
            vocab_size=self.vocab_size,
            dtype=str(self.dtype).removeprefix("torch."),
            temperature=1.0,
            sampler=sampler,
            samples_per_token=samples,
            seed=0,
            rows_per_shard=len(self.rows),
        )
        given = {"dtype": self.dtype, "device": self.device, "attention": Attention.sdpa}
        teacher = ResidentTeacher.load("teacher", self.told.model, 1.0, **given)
        return capture.Capture(teacher, identity, self.device, Attention.sdpa, None)

    def measure(self, sampler: Sampler, samples: int) -> dict[str, Any]:
        """Write a cache, read all of it, and hold it against the teacher."""
        out, worker = self.told.out / "cache", self.worker(sampler, samples)
        shutil.rmtree(out, ignore_errors=True)
        planned = capture.shards({"train": len(self.rows)}, len(self.rows))
        with runs.start(out, "cache", {}, runs.RunConfig()) as run:
            capture.claim(out, worker.identity)
            begin = time.perf_counter()
            capture.capture_all(worker, planned, {"train": self.rows}, run, out, batch_rows=self.told.batch_rows)
            seconds = time.perf_counter() - begin
            run.finish(capture.finish(out, worker.identity, planned))
        cache = Cache.open(out)
        summary = cache.summary()
        batches = list(planned[0].batches(self.rows, self.told.batch_rows))
        begin = time.perf_counter()
        found = [cache.lookup(batch) for batch in batches]
        read_seconds = time.perf_counter() - begin
        error = sum(self.squared_error(worker, b, t) for b, t in zip(batches, found, strict=True))
        shutil.rmtree(out)
        counted = 3 * summary["entries_per_token"] + 1 if sampler is Sampler.top_k else summary["bytes_per_token"]
        return {
            "model": str(self.told.model),
            "sampler": sampler.value,
            "samples": samples,
            "vocab_size": self.vocab_size,
            "device": str(self.device),
            "tokens": summary["tokens"],
            "entries_per_token": summary["entries_per_token"],
            "bytes_per_token": counted,
            "squared_error": error / summary["predicted"],
            "capture_tokens_per_s": summary["tokens"] / seconds,
            "read_tokens_per_s": summary["tokens"] / read_seconds,
        }

    @torch.no_grad()
    def squared_error(self, worker: capture.Capture, batch: Batch, found: dict[str, Tensor]) -> float:
        """Sum over positions of sum p^2 - 2 sum t p + sum t^2."""
        picked = losses.supervised(batch["labels"])
        states = worker.states(batch, picked)
        lengths = found["lengths"][:, :-1][picked]
        total = float(found["values"].double().square().sum())
        begin = 0
        for hidden, part in zip(states.hidden.split(512), lengths.split(512), strict=True):
            p = samplers.logits(hidden, states.head).softmax(-1).double().cpu()
            end = begin + int(part.sum())
            rows = torch.arange(len(part)).repeat_interleave(part)
            at = p[rows, found["ids"][begin:end]]
            total += float(p.square().sum() - 2 * (at * found["values"][begin:end].double()).sum())
            begin = end
        return total

    def samples_for(self, sampler: Sampler, wanted: float) -> int:
        """The fewest samples whose entries take ``wanted`` bytes per token on the first rows, or the most."""
        if sampler is Sampler.top_k:
            return min(cache_format.MOST_SAMPLES, max(1, round((wanted - 1) / 3)))
        worker, batch = self.worker(sampler, 1), self.rows.rows(np.arange(min(8, len(self.rows))))
        low, high = 1, cache_format.MOST_SAMPLES
        while low < high:
            middle = (low + high) // 2
            identity = Identity(**{**vars(worker.identity), "samples_per_token": middle})
            records = [record for _, record in dataclasses.replace(worker, identity=identity).records(batch)]
            size = sum(part.nbytes for record in records for part in record)
            low, high = (low, middle) if size >= wanted * sum(map(predicted, records)) else (middle + 1, high)
        return low


def predicted(record: cache_format.Record) -> int:
    """Positions of a slice that have a target."""
    return int(np.count_nonzero(record[0]))


COLUMNS = {
    "sampler": "{}",
    "samples": "{}",
    "entries_per_token": "{:.1f}",
    "bytes_per_token": "{:.1f}",
    "squared_error": "{:.5f}",
    "capture_tokens_per_s": "{:,.0f}",
    "read_tokens_per_s": "{:,.0f}",
}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| model | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for row in rows:
        cells = [text.format(row[name]) for name, text in COLUMNS.items()]
        lines.append(f"| {Path(row['model']).name}, V = {row['vocab_size']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure every sampler and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    told = parser.parse_args()
    torch.set_num_threads(told.threads)
    told.out.mkdir(parents=True, exist_ok=True)
    results, bench = told.out / "results.jsonl", Bench(told)
    default = bench.measure(Sampler.systematic, SAMPLES)
    wanted = default["bytes_per_token"]
    found = [default, bench.measure(Sampler.random, SAMPLES)]
    for sampler in (Sampler.random, Sampler.threshold, Sampler.top_k):
        found.append(bench.measure(sampler, bench.samples_for(sampler, wanted)))
    with results.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in found)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    (told.out / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
