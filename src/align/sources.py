"""Where dialogues, pairs and tasks come from: files in the forms in which they are published, or Python's own library.

A source gives rows in the form of :mod:`llamita.align.dialogues`, not yet checked, each with its place and, where
several rows tell the same thing, the group that must stay on one side of the split.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import zstandard

from llamita import hub
from llamita.align import forms
from llamita.align.dialogues import SPLITS, DialogueData
from llamita.align.forms import Form, Raw
from llamita.align.python_stdlib import Demand, functions


class Kind(StrEnum):
    """What a source is."""

    messages = "messages"
    """JSONL of ``messages``, or ShareGPT's ``conversations`` of ``from`` and ``value``."""
    instructions = "instructions"
    """Rows of ``instruction``, ``input`` and ``output``; with ``chosen`` and ``rejected`` also a pair."""
    preferences = "preferences"
    """Rows of ``chosen`` and ``rejected``: texts of ``Human:`` and ``Assistant:`` turns, messages, or one message each
    behind a ``prompt``."""
    trees = "trees"
    """Open-Assistant's conversation trees: the best answers as a dialogue, ranked siblings as pairs."""
    gsm8k = "gsm8k"
    """``question`` and worked ``answer``: a dialogue, and a task whose last number is checked."""
    ifeval = "ifeval"
    """Prompts with the ids of instructions that can be checked: tasks."""
    tasks = "tasks"
    """Rows of ``prompt`` (a text or messages) and ``check``."""
    python_stdlib = "python_stdlib"
    """Functions of the running interpreter's standard library: source to docstring, docstring to source; a task of the
    second, whose answer must parse."""
    stage = "stage"
    """A directory that ``dialogues`` or ``sample`` wrote; its rows keep their split."""
    datasets = "datasets"
    """A data set of the hub, or a folder that ``Dataset.save_to_disk`` wrote, whose rows are as ``form`` says."""


class Side(StrEnum):
    """Which split a source's rows go to."""

    auto = "auto"
    """A share of the prompts is held out."""
    train = "train"
    validation = "validation"


@dataclass(kw_only=True)
class SourceConfig:
    """One source."""

    kind: Kind = Kind.messages
    path: str | None = None
    """A file (also .gz and .zst), a directory of a stage, or the name of a data set; ``python_stdlib`` needs none."""
    form: Kind = Kind.messages
    """Of the rows of ``kind=datasets``."""
    subset: str | None = None
    split: str = "train"
    """Of ``kind=datasets``: the configuration and split of the data set."""
    side: Side = Side.auto
    take: list[str] = field(default_factory=lambda: ["dialogues", "pairs", "tasks"])
    """Which rows are wanted, where a source gives several kinds."""
    demand: Demand = Demand.signature
    """Of the tasks of ``kind=python_stdlib``; what an answer does of it is its reward."""
    system: str | None = None
    """A system message put before rows that have none."""
    max_rows: int | None = None
    """Of each kind, the first so many that are not too long."""
    max_characters: int | None = None
    """Of all messages of a row together; longer rows are left out, and counted."""

    def check(self, name: str) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if unknown := sorted(set(self.take) - {"dialogues", "pairs", "tasks"}):
            raise ValueError(f"sources.{name}.take: no kind of row is called {unknown[0]!r}: dialogues, pairs, tasks")
        for setting in ("max_rows", "max_characters"):
            if (value := getattr(self, setting)) is not None and value < 1:
                raise ValueError(f"sources.{name}.{setting} must be at least 1, got {value}")
        if self.kind is not Kind.python_stdlib and not self.path:
            raise ValueError(f"sources.{name}.path must be given: kind={self.kind} reads one")
        if self.kind is Kind.datasets and self.form in (Kind.datasets, Kind.stage, Kind.python_stdlib, Kind.trees):
            raise ValueError(f"sources.{name}.form={self.form}: rows of a data set cannot have this form")
        # A stage of the same pipeline may not have run yet when its directory is named here.
        looked_for = self.kind not in (Kind.datasets, Kind.python_stdlib, Kind.stage)
        if looked_for and not Path(str(self.path)).exists():
            raise ValueError(f"sources.{name}.path={self.path} does not exist")


FORMS: dict[Kind, Form] = {
    Kind.messages: forms.messages,
    Kind.instructions: forms.instructions,
    Kind.preferences: forms.preferences,
    Kind.trees: forms.trees,
    Kind.gsm8k: forms.gsm8k,
    Kind.ifeval: forms.ifeval,
    Kind.tasks: forms.tasks,
}


def read(name: str, source: SourceConfig, *, allow_network: bool = False) -> Iterator[Raw]:
    """The rows of a source, of the kinds that are wanted, and those that are wrong.

    Raises:
        ValueError: a file is damaged or of another form; of a single row the parser will say what is wrong.
    """
    for raw in _read(name, source, allow_network):
        if raw.kind in source.take or raw.wrong is not None:
            yield _with_system(raw, source.system)


def _read(name: str, source: SourceConfig, allow_network: bool) -> Iterator[Raw]:
    match source.kind:
        case Kind.stage:
            yield from _stage(Path(str(source.path)))
        case Kind.python_stdlib:
            yield from functions(source.demand)
        case Kind.datasets:
            form = FORMS[source.form]
            rows = hub.load(str(source.path), subset=source.subset, split=source.split, allow_network=allow_network)
            for number, row in enumerate(rows):
                yield from forms.read(form, f"{name}:{number}", row)
        case _:
            path = Path(str(source.path))
            form = FORMS[source.kind]
            for number, row in enumerate(objects(path), 1):
                yield from forms.read(form, f"{path.name}:{number}", row)


def _with_system(raw: Raw, system: str | None) -> Raw:
    key = "messages" if raw.kind == "dialogues" else "prompt"
    messages = raw.row.get(key)
    if system is None or not isinstance(messages, list) or (messages and forms.role_of(messages[0]) == "system"):
        return raw
    return replace(raw, row={**raw.row, key: [{"role": "system", "content": system}, *messages]})


def objects(path: Path) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSON list or of JSON lines, compressed or not.

    Raises:
        ValueError: a line is no JSON object, or the file is no list of them.
    """
    with _open(path) as file:
        try:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            if first == "[":
                rows = json.loads(first + file.read())
                yield from (_mapping(row, path, number) for number, row in enumerate(rows, 1))
                return
            lines = itertools.chain([first + file.readline()], file)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _mapping(json.loads(line), path, number)
        except (json.JSONDecodeError, EOFError, UnicodeDecodeError, gzip.BadGzipFile, zstandard.ZstdError) as error:
            raise ValueError(f"{path} is not a list or lines of JSON objects: {error}") from error


def _mapping(row: Any, path: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{path}, row {number}: a row must be an object, got {type(row).__name__}")
    return row


def _open(path: Path) -> IO[str]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    match path.suffix:
        case ".gz":
            return gzip.open(path, "rt", encoding="utf-8")
        case ".zst":
            return io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(path.open("rb")), encoding="utf-8")
        case _:
            return path.open(encoding="utf-8")


def _stage(path: Path) -> Iterator[Raw]:
    data = DialogueData.open(path)
    for split in SPLITS:
        for kind, rows in (
            ("dialogues", data.dialogues(split)),
            ("pairs", data.pairs(split)),
            ("tasks", data.tasks(split)),
        ):
            for row in rows:
                yield Raw(row.id, kind, row.row(), split=split)
