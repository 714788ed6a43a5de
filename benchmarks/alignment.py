"""The demo's round of alignment with several seeds, and adapters beside whole weights: what each step brings.

python benchmarks/alignment.py --demo outputs/demo --out scratch/alignment --seeds 0 1 2

The stages ``sft``, ``sample``, ``dpo``, ``rl``, ``held_out`` and ``assistants`` are those of configs/pipeline/demo.yaml
but for the seed; ``lora`` is ``sft`` with adapters. They read the dialogues and the distilled model of a demo that has
run. What is finished is not done again. Prints one table: mean over seeds, and the standard deviation between seeds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llamita import runs, storage

REPOSITORY = Path(__file__).resolve().parent.parent
ORDER = ("sft", "lora", "sample", "dpo", "rl", "held_out", "assistants")
LORA = ("lora.rank=16", "lora.embeddings=true", "optim.learning_rate=5e-3")
MODELS = ("distilled", "sft", "lora", "dpo", "rl")


def stages(lora: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The demo's stages of alignment, with ``lora`` among them."""
    text = (REPOSITORY / "configs" / "pipeline" / "demo.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["stages"]
    found["lora"] = {"recipe": "sft", "overrides": [*found["sft"]["overrides"], *lora]}
    found["assistants"]["overrides"].append("models.lora.path=${out}/lora")
    return {name: found[name] for name in ORDER}


def words(stage: Mapping[str, Any], demo: Path, out: Path, seed: int) -> list[str]:
    """The overrides of a stage for one seed."""
    told = []
    for word in stage["overrides"]:
        for shared in ("distilled", "dialogues"):
            word = word.replace(f"${{out}}/{shared}", str(demo / shared))
        told.append(word.replace("${out}", str(out)))
    return [*told, f"run.seed={seed}"]


def run(name: str, stage: Mapping[str, Any], demo: Path, out: Path, seed: int) -> dict[str, Any]:
    """Run a stage unless it is finished; its ``DONE.json``."""
    folder = out / name
    log = out / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(REPOSITORY / "recipes" / f"{stage['recipe']}.py"), *words(stage, demo, out, seed)]
    with log.open("a") as file:
        if subprocess.run([*command, f"out={folder}"], stdout=file, stderr=subprocess.STDOUT, check=False).returncode:
            raise SystemExit(f"{name} failed: {log}")
    return runs.check_done(folder)


def figures(out: Path) -> dict[str, dict[str, float]]:
    """Of one seed: each model's figures by name, and what the stages report of themselves."""
    told = storage.read_mapping(out / "assistants" / "results.json")["models"]
    found = {name: {key: one["value"] for key, one in told[name]["values"].items()} for name in MODELS}
    for name in ("dpo", "rl"):
        summary = runs.check_done(out / name)["summary"]
        found[name] |= {key: v for key, v in summary.items() if "val/held_out/" in key}
    sampled = runs.check_done(out / "sample")["summary"]["train"]
    found["sample"] = {key: value for key, value in sampled.items() if key.startswith("best_of_")}
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and spread of one figure."""
    mean = statistics.fmean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def table(by_seed: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """A table of every figure of every model."""
    lines = []
    for name in by_seed[0]:
        for key in by_seed[0][name]:
            lines.append(f"| {name} | {key} | {spread([one[name][key] for one in by_seed])} |")
    return "\n".join(["| model | figure | mean ± spread |", "|---|---|---|", *lines])


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="the directory of a demo that has run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lora", nargs="+", default=LORA, help="of adapters")
    told = parser.parse_args()
    by_seed = []
    for seed in told.seeds:
        out = told.out.absolute() / f"seed-{seed}"
        for name, stage in stages(told.lora).items():
            run(name, stage, told.demo.absolute(), out, seed)
        by_seed.append(figures(out))
        print(f"seed {seed} is done", flush=True)
    print(table(by_seed))


if __name__ == "__main__":
    main()
