"""Starts of recipes for the fault tests: forked from a process that has imported everything, waited for, killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from llamita import storage
from llamita.metrics import read_metrics

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
PATIENCE = 240.0


@dataclass
class Start:
    """One start of a recipe, of one process or of several ranks."""

    zygote: Zygote
    pids: list[int]
    outputs: list[Path]
    codes: dict[int, int] = field(default_factory=dict)

    def kill(self, rank: int | None = None, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank, or to all."""
        for index, pid in enumerate(self.pids):
            if rank in (None, index) and index not in self.codes:
                os.kill(pid, number)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes of the ranks, negative for a signal."""
        for rank in range(len(self.pids)):
            assert self.ended(rank, seconds), f"rank {rank} does not end:\n{self.output()}"
        return [self.codes[rank] for rank in range(len(self.pids))]

    def ended(self, rank: int = 0, seconds: float = 0.0) -> bool:
        """Whether a rank has ended, within so many seconds from now."""
        if rank not in self.codes:
            code = self.zygote.ask(wait=self.pids[rank], seconds=seconds)
            if code is not None:
                self.codes[rank] = code
        return rank in self.codes

    def output(self) -> str:
        """What the ranks printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.outputs)


class Zygote:
    """The process that forks the starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "typings"), "OMP_NUM_THREADS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
        self.environment = {k: v for k, v in environment.items() if not k.startswith(("LLAMITA_", "PYTEST_", "SLURM_"))}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.environment,
        )
        self.threads = self._answer()["threads"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the forking process ended with {self.process.poll()}"
        return json.loads(line)

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def start(
        self,
        recipe: str,
        *arguments: str,
        ranks: int = 1,
        crash_at: str | None = None,
        spies: dict[str, Any] | None = None,
        rank_spies: dict[int, dict[str, Any]] | None = None,
        **environment: str,
    ) -> Start:
        """Start ``recipes/RECIPE.py`` with these overrides."""
        self.count += 1
        told = {**self.environment, **({"LLAMITA_CRASH_AT": crash_at} if crash_at else {}), **environment}
        port = str(free_port()) if ranks > 1 else ""
        pids, outputs = [], []
        for rank in range(ranks):
            group = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
            outputs.append(self.folder / f"start-{self.count:04d}-{rank}.txt")
            request = {
                "file": str(REPOSITORY / "recipes" / f"{recipe}.py"),
                "arguments": list(arguments),
                "environment": told | ({**group, "MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}),
                "folder": str(self.folder),
                "output": str(outputs[-1]),
                "spies": {**(spies or {}), **(rank_spies or {}).get(rank, {})},
            }
            pids.append(self.ask(**request))
        return Start(self, pids, outputs)

    def run(self, recipe: str, *arguments: str, **options: Any) -> Start:
        """Start a recipe and wait for its end."""
        start = self.start(recipe, *arguments, **options)
        start.wait()
        return start


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def model_hash(out: Path) -> str:
    """Hash of the published weights."""
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def curve(out: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    """A metric's rows, each as step and value, in the order of the file."""
    return [(row["step"], row[name]) for row in read_metrics(out) if name in row]


def state_hashes(checkpoint: Path) -> dict[str, str]:
    """Hash of each file of a checkpoint that decides how training goes on."""
    kept = [*checkpoint.glob("*.safetensors"), *checkpoint.glob("random-*.json")]
    return {file.name: storage.sha256(file) for file in sorted(kept)}
