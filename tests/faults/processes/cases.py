"""A training run that suffers faults, start after start, and what became of it."""

from __future__ import annotations

import itertools
import json
import signal
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import starts
from starts import Start, Zygote

from llamita import manifests, storage
from llamita.distill import state

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
BATCH = 4
EVERY = 3
ACCUMULATE = "llamita.distill.engines:Replicated.accumulate"
STEP = "llamita.distill.engines:Replicated.step"
"""Called once per optimiser step."""


@dataclass
class Case:
    """A run of ``distill`` in ``out``; every start records the rows that it reads."""

    zygote: Zygote
    out: Path
    data: Path
    steps: int = 12
    changes: dict[str, Any] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)

    @property
    def rows_file(self) -> Path:
        return self.out.with_name(f"{self.out.name}.rows")

    @property
    def folder(self) -> Path:
        return self.out / "checkpoints"

    def arguments(self, **changes: Any) -> list[str]:
        """Overrides of the recipe."""
        fields: dict[str, Any] = {f"student.shape.{name}": size for name, size in SHAPE.items()}
        fields |= {"data.path": self.data, "steps": self.steps, "out": self.out}
        fields |= {"global_batch_rows": BATCH, "micro_batch_rows": 1, "checkpoint_every": EVERY}
        fields |= {"validation_every": 5, "validation_rows": 4, "optim.learning_rate": 0.01}
        return [f"{name}={value}" for name, value in (fields | self.changes | changes).items()]

    def start(self, *, spies: dict[str, Any] | None = None, **options: Any) -> Start:
        """Start it, or start it again."""
        changes = options.pop("changes", {})
        recorded = {"record_rows": [str(self.rows_file), len(self.starts)], **(spies or {})}
        self.starts.append(self.zygote.start("distill", *self.arguments(**changes), spies=recorded, **options))
        return self.starts[-1]

    def killed(self, **options: Any) -> Start:
        """A start that must die by SIGKILL; the ranks that are left are killed too."""
        start = self.start(**options)
        while not any(start.ended(rank, 0.05) for rank in range(len(start.pids))):
            pass
        start.kill()
        codes = start.wait()
        assert -signal.SIGKILL in codes, f"nobody was killed: {codes}\n{start.output()}"
        return start

    def ends(self, *codes: int, **options: Any) -> Start:
        """A start that must end so on its ranks."""
        start = self.start(**options)
        assert start.wait() == list(codes), start.output()
        return start

    def good(self) -> list[int]:
        """Published steps, each with all of its content."""
        steps = state.steps_in(self.folder)
        return [s for s in steps if manifests.check_manifest(self.folder / f"step-{s}", hashes=True) is None]

    def taken(self) -> list[tuple[int, int, list[dict[str, Any]]]]:
        """Of each start that took a step: the step it went on from, the last one it began, and what it read."""
        lines = [json.loads(line) for line in self.rows_file.read_text().splitlines()]
        found = []
        for number in range(len(self.starts)):
            mine = [line for line in lines if line["start"] == number]
            if mine:
                positions = [line["position"] // BATCH for line in mine]
                found.append((min(positions), max(positions) + 1, mine))
        return found

    def lost(self) -> list[int]:
        """Steps that each start after the first had to take again, one that was under way included."""
        taken = self.taken()
        return [before[1] - after[0] for before, after in itertools.pairwise(taken)]

    def samples(self) -> list[int]:
        """The rows that made the final weights, in order: of each start, the steps before the next one's first."""
        taken = self.taken()
        kept: dict[int, int] = {}
        for index, (_, _, lines) in enumerate(taken):
            end = min([after[0] for after in taken[index + 1 :]], default=self.steps) * BATCH
            for line in lines:
                places = enumerate(line["rows"], line["position"])
                for place, row in places:
                    if place < end:
                        assert place not in kept, f"sample {place} was learnt from twice"
                        kept[place] = row
        return [kept.get(place, -1) for place in range(self.steps * BATCH)]

    def wrong_samples(self, whole: Case) -> int:
        """Samples that were skipped, or that are not those of the undisturbed run."""
        return sum(mine != theirs for mine, theirs in zip(self.samples(), whole.samples(), strict=True))

    def check_equal(self, whole: Case, *, every: int = EVERY) -> dict[str, int]:
        """Hold it against the undisturbed run: bit for bit, every row of metrics once, nothing left behind."""
        assert (self.out / "DONE.json").is_file()
        assert starts.model_hash(self.out) == starts.model_hash(whole.out)
        last = f"step-{self.steps}"
        assert starts.state_hashes(self.folder / last) == starts.state_hashes(whole.folder / last)
        for name in ("train/loss", "optim/grad_norm", "data/samples", "val/validation/loss"):
            assert starts.curve(self.out, name) == starts.curve(whole.out, name), name
        assert [step for step, _ in starts.curve(self.out)] == list(range(1, self.steps + 1))
        hidden = [p.name for p in [*self.out.rglob(".*")]]
        assert hidden == [], hidden
        assert self.good() == whole.good()
        assert (self.folder / "LATEST").is_dir() or (self.folder / "LATEST").read_text() == f"{last}\n"
        assert max(self.lost(), default=0) <= every
        found = {"steps_lost": max(self.lost(), default=0), "samples_wrong": self.wrong_samples(whole)}
        assert found["samples_wrong"] == 0
        return found


def epochs(rows: list[int], size: int) -> list[Counter[int]]:
    """How often each row was learnt from, epoch by epoch."""
    return [Counter(rows[first : first + size]) for first in range(0, len(rows), size)]


def ids(out: Path) -> str:
    """The identity that a dashboard knows the run by."""
    return str(storage.read_mapping(out / "run.json")["id"])
