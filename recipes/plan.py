"""Say what a stage will take, and what is wrong with it, before it runs: no weights and no GPU are needed.

python recipes/plan.py recipe=distill student.path=pruned data.path=data out=student hardware=h100 num_gpus=8
"""

from __future__ import annotations

from _main import exit_with  # isort: skip

import dataclasses
import json
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

import _compose
import _outlook
import _ways
from _outlook import Recipe
from _world import Outlook, World
from llamita import estimate, redaction, storage
from llamita.distill import capture


class Format(StrEnum):
    """How the plan is printed."""

    table = "table"
    json = "json"


@dataclass(kw_only=True)
class Plan:
    """What a plan can be told; every other override is one of the recipe's own."""

    recipe: Recipe = MISSING
    hardware: estimate.Hardware = estimate.Hardware.h100
    num_gpus: int | None = None
    """Processes of a stage that trains, one per GPU; unset: what the pipeline says, else 8, or 1 without a GPU."""
    mfu: float | None = None
    """Assumed share of the hardware's peak; unset: a usual one, named in the plan."""
    assume_sequence_length: int = 8192
    """Tokens per row where the data does not exist yet."""
    assume_entries_per_token: float = float(capture.USUAL_ENTRIES)
    """Of a cache, at 3 bytes each: 50 systematic samples leave about 12 to 20 different ids of a Llama's vocabulary."""
    format: Format = Format.table
    save: bool = False
    """Also write ``plan.json`` into ``out``."""
    out: Path | None = None
    """The recipe's ``out``."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        for name in ("num_gpus", "assume_sequence_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.assume_entries_per_token <= 1024:
            given = self.assume_entries_per_token
            raise ValueError(f"assume_entries_per_token must be above 0 and at most 1024, got {given}")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"mfu must be above 0 and at most 1, got {self.mfu}")
        if self.save and self.out is None:
            raise ValueError("save=true needs out")


ConfigStore.instance().store("plan_schema", Plan)
OWN = {field.name for field in dataclasses.fields(Plan)}


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The overrides of the plan and those of the recipe; ``out`` belongs to both."""
    own = [argument for argument in arguments if argument.partition("=")[0] in OWN]
    return own, [argument for argument in arguments if argument not in own or argument.startswith("out=")]


def run(config: Plan, overrides: list[str]) -> dict[str, Any]:
    """Plan, print, and return what was printed."""
    device = estimate.device(config.hardware)
    mfu = config.mfu or device.assumed_mfu
    world = World(
        device,
        config.num_gpus,
        config.assume_sequence_length,
        mfu=mfu,
        entries_per_token=config.assume_entries_per_token,
    )
    stages, mistakes = _outlook.of(config.recipe, overrides, world)
    plan = {
        "recipe": config.recipe.value,
        "overrides": [redaction.redacted(override) for override in overrides],
        "hardware": world.hardware.name,
        "assumptions": [
            f"{mfu:.0%} of a peak of {peaks(device)} is reached: assumed, not measured",
            f"a cache holds {config.assume_entries_per_token:g} entries per token: assumed, not measured",
            f"disks move {estimate.DISK_BYTES_PER_SECOND / 1e9:.0f} GB/s: assumed, not measured",
        ],
        "stages": [numbers(stage, world.hardware, mfu) for stage in stages],
        "mistakes": mistakes,
    }
    if config.format is Format.json:
        print(json.dumps(plan, indent=2))
    else:
        show(plan)
    if config.save and config.out is not None and not mistakes:
        config.out.mkdir(parents=True, exist_ok=True)
        storage.write_json(config.out / "plan.json", plan)
    return plan


def peaks(device: estimate.Device) -> str:
    """The device's operations per second in each arithmetic."""
    each = [f"{device.peak(kind) / 1e12:,.1f} TFLOP/s in {kind.value}" for kind in estimate.Arithmetic]
    return ", ".join(each)


def numbers(stage: Outlook, device: estimate.Device, mfu: float) -> dict[str, Any]:
    """The outlook of a stage as plain values, with sums and time."""
    flops, disk = sum(stage.flops.values()), sum(stage.disk.values())
    processes = stage.processes if device.is_gpu else 1
    kinds = {name: stage.arithmetic.get(name, estimate.Arithmetic.bfloat16) for name in stage.flops}
    hours = sum(estimate.hours(each, processes, device, mfu, kinds[name]) for name, each in stage.flops.items())
    hours += stage.hours + (stage.read_bytes + max(disk, stage.written_bytes)) / estimate.DISK_BYTES_PER_SECOND / 3600
    return {
        "stage": stage.name,
        "recipe": stage.recipe,
        "processes": stage.processes,
        "parameters": stage.parameters,
        "memory_bytes": stage.memory | {"total": sum(stage.memory.values())},
        "host_memory_bytes": stage.host_memory | {"total": sum(stage.host_memory.values())},
        "flops": stage.flops | {"total": flops},
        "arithmetic": {name: kind.value for name, kind in stage.arithmetic.items()},
        "disk_bytes": stage.disk | {"total": disk},
        "hours": hours,
        "gpu_hours": hours * stage.processes if flops and device.is_gpu else 0.0,
        "ways": stage.ways,
        "notes": stage.notes,
    }


def show(plan: dict[str, Any]) -> None:
    """Print the plan for a reader."""
    console = Console(highlight=False, soft_wrap=True)
    for stage in plan["stages"]:
        where = f"{stage['processes']} x {plan['hardware']}" if stage["processes"] > 1 else plan["hardware"]
        table = Table(title=f"{stage['stage']}: {stage['recipe']} on {where}", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, count in stage["parameters"].items():
            table.add_row(f"parameters, {name}", f"{count:,}")
        for title, group, text in (
            ("memory of one process", "memory_bytes", estimate.amount),
            ("memory of its host", "host_memory_bytes", estimate.amount),
            ("operations", "flops", lambda value: f"{value:.3g} FLOP"),
            ("disk", "disk_bytes", estimate.amount),
        ):
            if not stage[group]["total"]:
                continue
            table.add_section()
            table.add_row(f"[bold]{title}[/bold]", "")
            for name, value in stage[group].items():
                kind = f" ({stage['arithmetic'][name]})" if group == "flops" and name in stage["arithmetic"] else ""
                table.add_row(f"  {name}{kind}", text(value))
        table.add_section()
        table.add_row("expected time", estimate.duration(stage["hours"]))
        if stage["gpu_hours"]:
            table.add_row("GPU-hours", f"{stage['gpu_hours']:,.1f}")
        console.print(table)
        if stage["ways"]:
            console.print(_ways.table(stage["ways"]))
        for note in stage["notes"]:
            console.print(f"note: {note}", markup=False)
    for assumption in plan["assumptions"] if plan["stages"] else []:
        console.print(f"assumed: {assumption}", markup=False)
    for mistake in plan["mistakes"]:
        console.print(f"mistake: {mistake}", markup=False, style="red")
    console.print("no mistake was found" if not plan["mistakes"] else f"{len(plan['mistakes'])} mistake(s)")


def main() -> None:
    """Compose the plan's own settings from its overrides, leave the others to the recipe, then plan."""
    own, overrides = split(sys.argv[1:])
    if {"--help", "-h"} & set(overrides):
        print(__doc__, *(f"{field.name}=" for field in dataclasses.fields(Plan)))
        return
    config, mistakes = _compose.composed("plan", own, Plan)
    if config is None or mistakes:
        raise ValueError("\n  ".join(mistakes))
    if run(config, overrides)["mistakes"]:
        raise ValueError("nothing was started; correct the mistakes above and plan again")


if __name__ == "__main__":
    exit_with(main)
