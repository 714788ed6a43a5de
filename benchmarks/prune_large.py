"""Time and memory of pruning a Llama of 8B: a directory of its very shape, with random weights, through the recipe.

    python benchmarks/prune_large.py /path/to/scratch
    python benchmarks/prune_large.py /path/to/scratch --layers 2 --set compensation.layer_steps=0 …

With ``--layers`` the model has so many layers of the same shapes, and the targets half as many or the same share as
Llama 3.2 has: what a layer takes can then be measured where all of them would take too long.

The scratch folder is a new or empty one, or one that --keep left, with 32 GB free; what is made there is removed at the
end. Memory is what the process holds itself, sampled from /proc (RssAnon + RssShmem); pages of the mapped weight files,
which the kernel takes back when it wants them, are apart.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, LlamaConfig

from llamita import checkpoints
from llamita.shapes import PUBLISHED, LlamaShape

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = PUBLISHED["meta-llama/Llama-3.1-8B"]
TARGETS = {
    "llama3.2_1b": PUBLISHED["meta-llama/Llama-3.2-1B"],
    "llama3.2_3b": PUBLISHED["meta-llama/Llama-3.2-3B"],
}
CALIBRATION_TOKENS = 2048
SHARD_BYTES = 4_900_000_000
GIB = 2**30
RECIPE = "random weights"
MADE = ("model", "data", *TARGETS, "again")


def is_ours(model: Path) -> bool:
    """Whether :func:`make_model` made and finished it."""
    note = model / "llamita.json"
    return note.is_file() and json.loads(note.read_text()).get("recipe") == RECIPE


def check_scratch(scratch: Path) -> None:
    """Hold that nothing of anyone else's is in the folder, whose content will be removed."""
    if scratch.exists() and (not scratch.is_dir() or any(scratch.iterdir())) and not is_ours(scratch / "model"):
        raise SystemExit(f"{scratch} is not empty, and holds no model of this benchmark: name a new folder")


def remove(scratch: Path) -> None:
    """Remove what the benchmark made, and the folder if nothing else is in it."""
    for name in MADE:
        shutil.rmtree(scratch / name, ignore_errors=True)
    with contextlib.suppress(OSError):
        scratch.rmdir()


def make_model(path: Path, layers: int) -> None:
    """Llama 3.1 8B of so many layers, in bfloat16: its configuration, shards as on the hub, random weights."""
    path.mkdir(parents=True)
    config = LlamaConfig(
        **dataclasses.replace(SOURCE, num_hidden_layers=layers).config_fields(),
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True).save_pretrained(path)
    generator = torch.Generator().manual_seed(0)
    # A new window of one long draw for each tensor: eight billion draws would take longer than the pruning.
    draw = (0.02 * torch.randn(2**26 + 2**16, generator=generator)).bfloat16()
    with checkpoints.ModelWriter(path, config, shard_bytes=SHARD_BYTES) as writer:
        for name, size in checkpoints.shape_of(config).tensors().items():
            number = torch.Size(size).numel()
            start = int(torch.randint(2**16, (), generator=generator))
            flat = torch.cat([draw[start : start + min(2**26, number - at)] for at in range(0, number, 2**26)])
            writer.add(name, 1 + flat if "norm" in name else flat.view(size))
        writer.publish(None, {"recipe": RECIPE})


def recipe(name: str, *overrides: str) -> tuple[dict[str, float], dict[str, float]]:
    """Run a recipe; its seconds by the clock and of processor time, and the highest of what it held, in GiB."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, str(REPOSITORY / "recipes" / f"{name}.py"), *overrides])
    peak = {"held": 0.0, "with_file_pages": 0.0}
    while process.poll() is None:
        held, everything = resident(process.pid)
        peak = {"held": max(peak["held"], held), "with_file_pages": max(peak["with_file_pages"], everything)}
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"recipes/{name}.py ended with {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"clock": time.monotonic() - started, "processor": busy}, peak


def resident(pid: int) -> tuple[float, float]:
    """Memory of its own, and the high-water mark with file pages, in GiB; zero once the process has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0, 0.0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    kib = {name: int(fields.get(name, "0 kB").split()[0]) for name in ("RssAnon", "RssShmem", "VmHWM")}
    return (kib["RssAnon"] + kib["RssShmem"]) * 1024 / GIB, kib["VmHWM"] * 1024 / GIB


def stored_parameters(path: Path) -> int:
    """Numbers in the weight files."""
    total = 0
    for file in path.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            total += sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in list(tensors.keys()))
    return total


def smaller(target: str, layers: int) -> LlamaShape:
    """The published shape with its share of ``layers``."""
    published = TARGETS[target]
    return dataclasses.replace(
        published, num_hidden_layers=max(1, published.num_hidden_layers * layers // SOURCE.num_hidden_layers)
    )


def measure(scratch: Path, target: str, out: str, shape: LlamaShape, *overrides: str) -> dict[str, Any]:
    """Prune to ``target`` and check what came out."""
    shutil.rmtree(scratch / out, ignore_errors=True)
    seconds, peak = recipe(
        "prune",
        f"model.path={scratch / 'model'}",
        f"target={target}",
        f"target.num_hidden_layers={shape.num_hidden_layers}",
        *overrides,
        f"out={scratch / out}",
    )
    checkpoints.Weights(scratch / out)
    row = {
        "target": target,
        "scores": "saved" if any("scores.path" in setting for setting in overrides) else "measured",
        "seconds": round(seconds["clock"]),
        "processor_seconds": round(seconds["processor"]),
        "peak_gib": round(peak["held"], 2),
        "peak_with_file_pages_gib": round(peak["with_file_pages"], 2),
        "parameters": stored_parameters(scratch / out),
    }
    print(json.dumps(row), flush=True)
    assert row["parameters"] == shape.num_parameters, row
    return row


def main() -> None:
    """Make the model and the text, prune to both targets, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="a folder on a disk with 32 GB free")
    parser.add_argument("--dtype", default="bfloat16", help="of the calibration pass")
    parser.add_argument("--layers", type=int, default=SOURCE.num_hidden_layers, help="of the model that is pruned")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--set", nargs="+", default=[], metavar="SETTING=VALUE", help="more for recipes/prune.py")
    parser.add_argument("--keep", action="store_true", help="leave what was made: model and text are used again")
    arguments = parser.parse_args()
    scratch: Path = arguments.scratch
    check_scratch(scratch)
    try:
        if not is_ours(scratch / "model"):
            started = time.monotonic()
            make_model(scratch / "model", arguments.layers)
            print(f"model made in {time.monotonic() - started:.0f} s", flush=True)
        recipe(
            "prepare",
            "source.kind=python_stdlib",
            "source.max_bytes=4000000",
            "tokenizer.vocab_size=4096",
            f"sequence_length={CALIBRATION_TOKENS}",
            f"out={scratch / 'data'}",
        )
        text = (
            f"calibration.path={scratch / 'data'}",
            f"calibration.tokens={CALIBRATION_TOKENS}",
            f"calibration.dtype={arguments.dtype}",
            *arguments.set,
        )
        shapes = {target: smaller(target, arguments.layers) for target in arguments.targets}
        rows = [measure(scratch, target, target, shape, *text) for target, shape in shapes.items()]
        if len(rows) > 1:
            first, last = arguments.targets[0], arguments.targets[-1]
            saved = (*text, f"scores.path={scratch / first}")
            rows.append(measure(scratch, last, "again", shapes[last], *saved))
        print("| target | scores | seconds | processor seconds | GiB held | GiB with file pages | parameters |")
        print("|" + "---|" * 7)
        for row in rows:
            print("| " + " | ".join(str(value) for value in row.values()) + " |")
    finally:
        if not arguments.keep:
            remove(scratch)


if __name__ == "__main__":
    main()
