"""Read dialogues, preference pairs and tasks from where they are published; check, split and count every row.

python recipes/dialogues.py sources.gsm8k.kind=gsm8k sources.gsm8k.path=train.jsonl out=data/gsm8k
"""

from __future__ import annotations

from _main import command, exit_with, store  # isort: skip

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from llamita import runs, storage
from llamita.align import dialogues, sources, verifiers
from llamita.align.dialogues import PARSERS, SPLITS, Dialogue, Refused, Row, Task
from llamita.align.forms import Raw
from llamita.align.sources import Kind, Side, SourceConfig

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Dialogues:
    """Everything that this recipe can be told."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """By name."""
    held_out: float = 0.05
    """Share of the prompts that go to the validation split, decided by each prompt's text alone."""
    max_refused: float = 0.05
    """Share of a source's rows that may be wrong; more than that, and the source is."""
    allow_network: bool = False
    """Let ``kind=datasets`` download."""
    run: runs.RunConfig = field(default_factory=runs.RunConfig)
    out: Path = MISSING

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if not self.sources:
            raise ValueError("there are no sources: give sources.<name>.kind and sources.<name>.path")
        for name in ("held_out", "max_refused"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in 0..1 and below 1, got {getattr(self, name)}")
        for name, source in self.sources.items():
            source.check(name)


store("dialogues_schema", Dialogues)


def run(config: Dialogues) -> None:
    """Read all sources, then publish."""
    with runs.start(config.out, "dialogues", storage.plain(config), config.run) as this:
        if this.done or not runs.is_main_process():
            return
        rows: dict[str, dict[str, list[Row]]] = {split: {kind: [] for kind in PARSERS} for split in SPLITS}
        counts: dict[str, dict[str, Any]] = {}
        seen: set[str] = set()
        for name, source in config.sources.items():
            counts[name] = take(config, name, source, rows, seen)
        parents = {
            name: dialogues.DialogueData.open(Path(str(source.path))).content_hash
            for name, source in config.sources.items()
            if source.kind is Kind.stage
        }
        summary = {f"{split}/{kind}": len(found) for split, kinds in rows.items() for kind, found in kinds.items()}
        files = dialogues.write_all(config.out, rows, {"sources": counts, "seed": config.run.seed})
        this.log({f"data/{key}": value for key, value in summary.items()})
        for name, source_counts in counts.items():
            this.log({f"source/{name}/{key}": value for key, value in source_counts.items() if key != "refused_for"})
        log.info("%s: %s", config.out, summary)
        this.finish(files, parents=parents, summary=summary)


def take(
    config: Dialogues, name: str, source: SourceConfig, rows: dict[str, dict[str, list[Row]]], seen: set[str]
) -> dict[str, Any]:
    """Put the rows of a source where they belong; returns how many were taken, and why others were not.

    ``shortened`` of them are dialogues that went on behind the assistant's last word.

    Raises:
        ValueError: too many of them are wrong.
    """
    refused, taken, shortened = Refused(config.max_refused, "max_refused"), Counter[str](), 0
    for raw in sources.read(name, source, allow_network=config.allow_network):
        if all(taken[kind] == source.max_rows for kind in source.take):
            break
        try:
            row = parse(raw, f"{name}/{raw.place}")
        except ValueError as error:
            refused.add(f"{name}, {raw.place}", str(error))
            continue
        text = json.dumps({**row.row(), "id": None}, sort_keys=True)
        if source.max_characters is not None and dialogues.characters(row) > source.max_characters:
            taken["too_long"] += 1
        elif text in seen:
            taken["repeated"] += 1
        elif taken[raw.kind] != source.max_rows:
            seen.add(text)
            rows[side(config, source, raw, row)][raw.kind].append(row)
            taken[raw.kind] += 1
            shortened += isinstance(row, Dialogue) and len(row.messages) < len(raw.row["messages"])
    refused.check(f"sources.{name}", sum(taken.values()))
    more = {"shortened": shortened} if shortened else {}
    return {**taken, **more, "refused": refused.total, "refused_for": refused.counts}


def parse(raw: Raw, id: str) -> Row:  # noqa: A002  (the field's name)
    """A row that is right; ``ValueError`` says why it is none."""
    if raw.wrong is not None:
        raise ValueError(raw.wrong)
    row = PARSERS[raw.kind](raw.row, id)
    if isinstance(row, Task) and row.check:
        verifiers.validate(row.check)
    return row


def side(config: Dialogues, source: SourceConfig, raw: Raw, row: Row) -> str:
    """The split of a row."""
    if source.side is not Side.auto:
        return str(source.side)
    if raw.split is not None:
        return raw.split
    told = [{"role": "group", "content": raw.group}] if raw.group else dialogues.prompt_of(row)
    held = dialogues.is_held_out(told, share=config.held_out, seed=config.run.seed)
    return "validation" if held else "train"


main = command("dialogues", Dialogues, run)

if __name__ == "__main__":
    exit_with(main)
