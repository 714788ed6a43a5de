"""What a plan knows of models and data that exist, or that an earlier stage will make."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llamita import checkpoints, checks, estimate
from llamita.align.dialogues import DialogueData
from llamita.data import shards, tokens
from llamita.distill import capture
from llamita.shapes import PUBLISHED, LlamaShape

T = TypeVar("T")
UNKNOWN = object()
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True)
class Rows:
    """Packed data as far as a plan needs to know it."""

    sequence_length: int
    vocab_size: int
    """0 where it is not known."""
    rows: dict[str, int] = field(default_factory=dict)
    """By split."""
    tokenizer_hash: str | None = None


@dataclass(frozen=True)
class Talks:
    """Dialogues, preference pairs and tasks as far as a plan needs to know them, by ``SPLIT.KIND``."""

    rows: dict[str, int] = field(default_factory=dict)
    """Empty where nothing is known."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of their files."""


@dataclass
class World:
    """What exists, or will exist because an earlier stage of the same pipeline makes it."""

    hardware: estimate.Device
    num_gpus: int | None
    """As asked for; unset: see :attr:`processes`."""
    sequence_length: int
    """Assumed where the data does not exist."""
    mfu: float = 0.35
    """Assumed share of the hardware's peak."""
    entries_per_token: float = float(capture.USUAL_ENTRIES)
    """Assumed of a cache."""
    made: dict[Path, Any] = field(default_factory=dict)
    """A :class:`LlamaShape`, :class:`Rows` or :class:`Talks`, ``UNKNOWN``, or ``None`` for none of these."""
    tokenizers: dict[Path, str] = field(default_factory=dict)
    """Hash of the tokenizer in each of these."""
    waits_for: frozenset[str] = frozenset()
    """Stages that are done before the one at hand begins."""
    stage_processes: int | None = None
    """What the pipeline says about the stage at hand."""

    @property
    def processes(self) -> int:
        """Of a stage that trains."""
        return self.num_gpus or self.stage_processes or (8 if self.hardware.is_gpu else 1)

    @property
    def sharing_processes(self) -> int:
        """Of a stage that only measures or prunes: one, unless it is told otherwise."""
        return self.stage_processes or self.num_gpus or 1

    def model(self, setting: str, path: Path, outlook: Outlook, *, needs_tokenizer: bool = True) -> LlamaShape | None:
        """The shape of a model; what is wrong with it goes to ``outlook``."""
        if normal(path) in self.made:
            return self._earlier(setting, path, outlook, LlamaShape, "model")
        outlook.mistakes += checks.model(setting, path, needs_tokenizer=needs_tokenizer)
        shape = checks.model_shape(path)
        if shape is not None and not (path.is_dir() and checks.has_weights(path)):
            outlook.notes.append(f"{setting}={path} has no weights here: the recipe will need a directory with them")
        return shape

    def rows(self, setting: str, path: Path, outlook: Outlook) -> Rows:
        """The data; where there is none, a row length is assumed."""
        if normal(path) in self.made:
            return self._earlier(setting, path, outlook, Rows, "data") or Rows(self.sequence_length, 0)
        problems = checks.errors_of(lambda: shards.PackedData.open(path))
        outlook.mistakes += [problem if setting in problem else f"{setting}: {problem}" for problem in problems]
        if problems:
            outlook.notes.append(f"{setting} cannot be read: rows of {self.sequence_length} tokens are assumed")
            return Rows(self.sequence_length, 0)
        data = shards.PackedData.open(path)
        rows_by_split = {name: entry["rows"] for name, entry in data.manifest["splits"].items()}
        return Rows(data.sequence_length, data.vocab_size, rows_by_split, data.tokenizer_hash)

    def talks(self, setting: str, path: Path, outlook: Outlook, kind: str | None = None) -> Talks:
        """A directory of dialogues; where it is there, it must have rows of ``kind`` to train on."""
        if normal(path) in self.made:
            return self._earlier(setting, path, outlook, Talks, "dialogues") or Talks()
        found: list[DialogueData] = []
        problems = checks.errors_of(lambda: found.append(DialogueData.open(path)))
        if found and kind is not None:
            problems += checks.errors_of(lambda: found[0].need("train", kind))
        outlook.mistakes += [problem if setting in problem else f"{setting}: {problem}" for problem in problems]
        if problems:
            return Talks()
        files = {name.removesuffix(".jsonl"): entry["rows"] for name, entry in found[0].manifest["files"].items()}
        return Talks(files, {name: (path / f"{name}.jsonl").stat().st_size for name in files})

    def _earlier(self, setting: str, path: Path, outlook: Outlook, kind: type[T], noun: str) -> T | None:
        self.check_order(setting, path, outlook)
        made = self.made[normal(path)]
        if isinstance(made, kind):
            return made
        if made is not UNKNOWN:
            outlook.mistakes.append(f"{setting}={path}: stage {path.name} makes no {noun}")
        return None

    def check_order(self, setting: str, path: Path, outlook: Outlook) -> None:
        """A stage that reads another must wait for it."""
        if path.name not in self.waits_for:
            outlook.mistakes.append(
                f"{setting}={path} is made by stage {path.name}, for which this stage does not wait: add it to after"
            )

    def stage(self, setting: str, path: Path, outlook: Outlook) -> None:
        """A directory that only a finished stage can have made, or that an earlier one will make."""
        if normal(path) in self.made:
            self.check_order(setting, path, outlook)
        else:
            outlook.mistakes += checks.finished_stage(setting, path)

    def is_inside_made(self, path: Path) -> bool:
        """Whether it lies in the directory of another stage, so that it need not exist yet."""
        return any(parent in self.made for parent in normal(path).parents)

    def tokenizer(self, path: Path) -> str | None:
        """The hash of a directory's tokenizer, where it has or will have one that can be read."""
        if (place := normal(path)) in self.made:
            return self.tokenizers.get(place)
        return None if tokenizer_mistakes("", path) else checkpoints.tokenizer_of(path)


def normal(path: Path) -> Path:
    return Path(os.path.normpath(path.absolute()))


@dataclass
class Outlook:
    """What a stage will take."""

    name: str
    recipe: str
    out: Path
    processes: int = 1
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    """Bytes per process."""
    host_memory: dict[str, float] = field(default_factory=dict)
    """Of the host of an accelerator, where the stage needs much of it."""
    flops: dict[str, float] = field(default_factory=dict)
    arithmetic: dict[str, estimate.Arithmetic] = field(default_factory=dict)
    """Of operations that are not in bfloat16."""
    read_bytes: float = 0.0
    disk: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    may_change: tuple[str, ...] = ()
    makes: LlamaShape | Rows | Talks | None = None
    tokenizer: str | None = None
    """Hash of that of the model or data that it makes."""
    hours: float = 0.0
    """Beside operations and disks."""
    written_bytes: float = 0.0
    ways: list[dict[str, Any]] = field(default_factory=list)
    """What each way to have the teachers would take; see :func:`_ways.compare`."""
    on_accelerator: bool = True
    """Whether the memory is that of an accelerator, not of its host."""


def is_only_a_name(path: Path) -> bool:
    """Whether this is a published model's name on the hub, and no directory."""
    return str(path) in PUBLISHED and not path.is_dir()


def tokenizer_mistakes(setting: str, path: Path) -> list[str]:
    if not (path / "tokenizer.json").is_file():
        return [f"{setting}={path} has no tokenizer.json"]
    return [f"{setting}: {problem}" for problem in checks.errors_of(lambda: tokens.load(path))]


def split_of(rows: Rows, setting: str, path: Path, name: str) -> list[str]:
    """A split that the data does not have, or that is empty."""
    if not rows.rows or rows.rows.get(name):
        return []
    filled = ", ".join(split for split, number in rows.rows.items() if number)
    return [f"{setting}={path} has no rows in split {name!r}; it has {filled}"]


def same_tokens(setting: str, path: Path, shape: LlamaShape, data: str, rows: Rows | None, world: World) -> list[str]:
    """Whether the data's ids mean the same to the model."""
    if rows is None:
        return []
    model, made_with = f"{setting}={path}", rows.tokenizer_hash
    if is_only_a_name(path) and rows.vocab_size not in (0, shape.vocab_size):
        return [f"{data} has {rows.vocab_size} token ids, the tokenizer of {model} has {shape.vocab_size}"]
    return checks.same_tokens(model, shape.vocab_size, world.tokenizer(path), data, rows.vocab_size, made_with)
