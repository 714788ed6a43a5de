"""Loss against tokens of a student that learns from the data, from a teacher beside it, and from caches of it.

python benchmarks/recovery.py --teacher teacher --student pruned --data data --out scratch/recovery --steps 400

Everything goes through ``recipes/cache.py`` and ``recipes/distill.py``. Top-k is given as many entries as the default
cache has, though each of its own takes two bytes more. ``--second`` adds another teacher, alone and mixed with the
first one, online and cached. Results are appended to ``results.jsonl``: what is there is not done again. At the end
``table.md`` and ``plot.png`` are drawn from it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from llamita import runs
from llamita.metrics import read_metrics

REPOSITORY = Path(__file__).resolve().parent.parent
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A cache of one of the teachers."""

    teacher: Path
    sampler: str
    samples: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.teacher.name}-{self.sampler}-{self.samples}"


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a student learns from: teachers by name, each run beside it or read from a cache; none is the data."""

    name: str
    online: tuple[Path, ...] = ()
    stored: tuple[Stored, ...] = ()


class Bench:
    """The recipes with the benchmark's settings."""

    def __init__(self, told: argparse.Namespace) -> None:
        self.told = told

    def recipe(self, name: str, out: Path, **settings: Any) -> Path:
        """Run a recipe into ``out``, which holds it already after an earlier start."""
        log = self.told.out / f"{out.name}.log"
        words = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        command = [sys.executable, str(REPOSITORY / "recipes" / f"{name}.py"), *words, f"out={out}"]
        with log.open("w") as file:
            if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
                raise SystemExit(f"recipes/{name}.py failed: {log}")
        return out

    def cache(self, stored: Stored) -> Path:
        """The directory of a cache, made where it is not there."""
        settings = {"teacher__path": stored.teacher, "data__path": self.told.data, "sampler": stored.sampler}
        return self.recipe(
            "cache", self.told.out / "caches" / stored.name, **settings, samples_per_token=stored.samples
        )

    def entries(self, stored: Stored) -> int:
        """Entries per token of a cache, rounded."""
        return round(runs.check_done(self.cache(stored))["summary"]["entries_per_token"])

    def train(self, method: Method, seed: int) -> Row:
        """One student."""
        told, out = self.told, self.told.out / "students" / f"{re.sub(r'[^a-z0-9]+', '-', method.name)}-{seed}"
        caches = [self.cache(one) for one in method.stored]
        teachers = {f"teachers__online{n}__path": path for n, path in enumerate(method.online)}
        teachers |= {f"teachers__stored{n}__cache": path for n, path in enumerate(caches)}
        self.recipe(
            "distill",
            out,
            student__path=told.student,
            data__path=told.data,
            steps=told.steps,
            global_batch_rows=told.batch_rows,
            micro_batch_rows=told.batch_rows,
            checkpoint_every=told.steps,
            keep_checkpoints=0,
            log_every=max(1, told.steps // 20),
            validation_every=max(1, told.steps // 10),
            validation_rows=told.held_out_rows,
            optim__learning_rate=told.learning_rate,
            optim__warmup_steps=max(1, told.steps // 10),
            run__seed=seed,
            **teachers,
        )
        rows = read_metrics(out)
        curve = [(row["step"], row["val/held_out/loss"]) for row in rows if "val/held_out/loss" in row]
        tokens = max(row["data/tokens"] for row in rows if "data/tokens" in row)
        held = [runs.check_done(cache)["summary"] for cache in caches]
        return {
            "method": method.name,
            "seed": seed,
            "steps": told.steps,
            "tokens": tokens,
            "curve": [(step * tokens / told.steps, loss) for step, loss in curve],
            "loss": curve[-1][1],
            "bits_per_byte": runs.check_done(out)["summary"].get("val/held_out/bits_per_byte"),
            "entries_per_token": sum(one["entries_per_token"] for one in held),
            "bytes_per_token": sum(one["bytes_per_token"] for one in held),
            "teacher_s": rows[-1].get("perf/teacher_s"),
            "settings": {name: str(getattr(told, name)) for name in ("teacher", "second", "student", "data")},
        }

    def methods(self) -> Iterator[Method]:
        """What is compared."""
        teacher, second, samples = self.told.teacher, self.told.second, self.told.samples
        yield Method(name="cross-entropy")
        yield Method(name="online", online=(teacher,))
        default = Stored(teacher=teacher, sampler="systematic", samples=samples[0])
        for number in samples:
            for sampler in ("systematic", "random", "threshold"):
                stored = Stored(teacher=teacher, sampler=sampler, samples=number)
                yield Method(name=f"{sampler}, N = {number}", stored=(stored,))
        kept = min(63, self.entries(default))
        yield Method(name=f"top-k, k = {kept}", stored=(Stored(teacher=teacher, sampler="top_k", samples=kept),))
        if second is not None:
            yield Method(name="second online", online=(second,))
            yield Method(name="both online", online=(teacher, second))
            other = Stored(teacher=second, sampler="systematic", samples=samples[0])
            yield Method(name="both cached", stored=(default, other))


def table(rows: list[Row]) -> str:
    """Mean over seeds of each method, and how far it is from the online teacher."""
    finals: dict[str, list[Row]] = {}
    for row in rows:
        finals.setdefault(row["method"], []).append(row)
    means = {name: statistics.fmean(row["loss"] for row in found) for name, found in finals.items()}
    lines = [
        "| learnt from | entries/token | bytes/token | loss | against online | bits per byte | seeds | tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in finals.items():
        first = found[0]
        against = f"{means[name] / means['online'] - 1:+.2%}" if "online" in means else ""
        bits = statistics.fmean(row["bits_per_byte"] or float("nan") for row in found)
        lines.append(
            f"| {name} | {first['entries_per_token']:.1f} | {first['bytes_per_token']:.1f} | {means[name]:.4f} | "
            f"{against} | {bits:.4f} | {len(found)} | {first['tokens']:,} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], file: Path) -> None:
    """Held-out loss against tokens, one line for each method, of the first seed."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row["method"] for row in rows):
        curve = next(row["curve"] for row in rows if row["method"] == name)
        axes.plot([tokens for tokens, _ in curve], [loss for _, loss in curve], label=name, linewidth=1.2)
    axes.set_xlabel("tokens")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Train what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--second", type=Path, help="another teacher of the same tokenizer")
    parser.add_argument("--samples", type=int, nargs="+", default=[50], help="N of the caches; top-k follows the first")
    parser.add_argument("--methods", nargs="+", default=[], help="default: all")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-rows", type=int, default=16)
    parser.add_argument("--held-out-rows", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=1)
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    results, bench = told.out / "results.jsonl", Bench(told)
    rows: list[Row] = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    for method in bench.methods():
        for seed in range(told.seeds):
            key = (method.name, seed, told.steps)
            wanted = not told.methods or method.name in told.methods
            if not wanted or key in {(row["method"], row["seed"], row["steps"]) for row in rows}:
                continue
            rows.append(bench.train(method, seed))
            print(method.name, seed, f"loss {rows[-1]['loss']:.4f}", flush=True)
            with results.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    (told.out / "table.md").write_text(table(rows))
    plot(rows, told.out / "plot.png")
    print(table(rows))


if __name__ == "__main__":
    main()
