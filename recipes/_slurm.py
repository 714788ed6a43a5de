"""Hand one stage to Slurm, to start when the stage before it is done."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "slurm" / "run.sbatch"

DISTRIBUTED = frozenset({"distill", "cache", "sft", "reward", "dpo", "rl"})
"""Recipes that run as one process per GPU; every other is one process on one node."""

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
TIME = re.compile(r"(\d{1,3}-)?\d{1,3}(:\d{2}){0,2}")
JOB = re.compile(r"\d+")


class Launcher(StrEnum):
    """Where a pipeline's stages run."""

    local = "local"
    """One after the other, in processes of this machine."""
    slurm = "slurm"
    """As Slurm jobs, each depending on the one before."""


@dataclass(kw_only=True)
class LauncherConfig:
    """How a pipeline's stages are started."""

    kind: Launcher = Launcher.local
    nodes: int = 1
    """Nodes of a stage that trains; every other stage takes one."""
    gpus_per_node: int = 0
    """GPUs of each node of a stage that trains; every other stage takes one where this is not 0."""
    time: str = "24:00:00"
    """Limit of one start, in Slurm's form days-hours:minutes:seconds. A stage that needs longer is started again."""
    options: list[str] = field(default_factory=list)
    """More options of sbatch, one argument each, such as --partition=gpu or --account=abc."""
    dry_run: bool = False
    """Print the commands and submit nothing."""

    def __post_init__(self) -> None:
        _check(self.nodes, self.gpus_per_node, self.time, self.options)


def submit(
    recipe: str,
    overrides: Sequence[str],
    *,
    name: str,
    out: Path,
    after: Sequence[str] = (),
    nodes: int = 1,
    gpus_per_node: int = 0,
    time: str = "24:00:00",
    options: Sequence[str] = (),
    dry_run: bool = False,
) -> str:
    """Submit ``recipes/<recipe>.py`` with ``overrides`` (``out=`` among them) and return the job's id.

    The job starts when the jobs ``after`` have ended with 0, and is cancelled when that cannot happen any more. A stage
    that is already queued or running for the same ``out`` is not submitted a second time. With ``dry_run`` the command
    is printed and the id is ``dry-run``'s own.

    Raises:
        ValueError: a name or an option that Slurm must not get, or sbatch refused or is not here.
    """
    if not (ROOT / "recipes" / f"{recipe}.py").is_file() or not recipe.isidentifier() or recipe.startswith("_"):
        raise ValueError(f"recipe must be the name of a file in recipes/, got {recipe!r}")
    if not NAME.fullmatch(name):
        raise ValueError(f"name of a job must be 1 to 64 characters of A-Z a-z 0-9 . _ -, got {name!r}")
    if wrong := [job for job in after if not JOB.fullmatch(job) and not dry_run]:
        raise ValueError(f"after must hold numbers of jobs, got {wrong}")
    _check(nodes, gpus_per_node, time, options)
    folder = out.absolute() / "slurm"
    if "%" in str(folder) or "\n" in str(folder):
        raise ValueError(f"out must hold no % and no line break, which mean something to Slurm, got {str(out)!r}")
    if recipe not in DISTRIBUTED:
        nodes, gpus_per_node = 1, min(gpus_per_node, 1)
    command = [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        f"--comment={folder.parent}",
        f"--output={folder}/%x-%j.out",
        f"--nodes={nodes}",
        f"--time={time}",
        *([f"--gpus-per-node={gpus_per_node}"] if gpus_per_node else []),
        *([f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes"] if after else []),
        *options,
        str(SCRIPT),
        recipe,
        *overrides,
    ]
    if dry_run:
        print(shlex.join(command))
        return f"dry-run-{name}"
    if job := queued(name, folder.parent):
        return job
    folder.mkdir(parents=True, exist_ok=True)  # Slurm drops the log, and says nothing, where its folder is missing
    return _sbatch(command)


def _check(nodes: int, gpus_per_node: int, time: str, options: Sequence[str]) -> None:
    if nodes < 1:
        raise ValueError(f"launcher.nodes must be at least 1, got {nodes}")
    if gpus_per_node < 0:
        raise ValueError(f"launcher.gpus_per_node must be at least 0, got {gpus_per_node}")
    if not TIME.fullmatch(time):
        raise ValueError(f"launcher.time must be like 24:00:00 or 2-12:00:00, got {time!r}")
    for option in options:
        if not option.startswith("--") or option.startswith("--wrap"):
            raise ValueError(f"launcher.options must be long options of sbatch such as --partition=gpu, got {option!r}")


def queued(name: str, out: Path) -> str | None:
    """The job of that name and directory that Slurm still has, if any: a second submission is a second owner."""
    query = ["squeue", "--me", "--noheader", f"--name={name}", "--format=%i|%k"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    for line in answer.splitlines():
        job, _, comment = line.strip().partition("|")
        if comment == str(out) and JOB.fullmatch(job):
            return job
    return None


def _sbatch(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=os.environ | {"LLAMITA_ROOT": str(ROOT)}
        )
    except FileNotFoundError as error:
        raise ValueError("launcher=slurm needs sbatch on this machine; there is none") from error
    job = done.stdout.strip().partition(";")[0]
    if done.returncode or not JOB.fullmatch(job):
        raise ValueError(f"sbatch refused the job: {(done.stderr or done.stdout).strip()}")
    return job
