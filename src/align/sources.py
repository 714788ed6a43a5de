"""Where dialogues, pairs and tasks come from: files in the forms in which they are published, or Python's own library.

A reader gives rows in the form of :mod:`llamita.align.dialogues`, not yet checked, each with its place and, where
several rows tell the same thing, the group that must stay on one side of the split.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import zstandard

from llamita import hub, stdlib
from llamita.align.dialogues import SPLITS, DialogueData, Message


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


class Demand(StrEnum):
    """What the task of a function of the library asks for."""

    signature = "signature"
    """Python that parses and defines the function, with its arguments."""
    parses = "parses"
    """Python that parses."""


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


@dataclass(frozen=True)
class Raw:
    """A row as it was read."""

    place: str
    kind: str
    row: Mapping[str, Any]
    group: str | None = None
    """Rows of one group stay on one side; unset: rows of one prompt do."""
    split: str | None = None
    """Decided already."""


def read(name: str, source: SourceConfig, *, allow_network: bool = False) -> Iterator[Raw]:
    """The rows of a source, of the kinds that are wanted.

    Raises:
        ValueError: a file is damaged or of another form; of a single row the parser will say what is wrong.
    """
    for raw in _read(name, source, allow_network):
        if raw.kind in source.take:
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
                yield from form(f"{name}:{number}", row)
        case _:
            path = Path(str(source.path))
            form = FORMS[source.kind]
            for number, row in enumerate(objects(path), 1):
                yield from form(f"{path.name}:{number}", row)


def _with_system(raw: Raw, system: str | None) -> Raw:
    key = "messages" if raw.kind == "dialogues" else "prompt"
    messages = raw.row.get(key)
    if system is None or not isinstance(messages, list) or (messages and _role(messages[0]) == "system"):
        return raw
    row = {**raw.row, key: [{"role": "system", "content": system}, *messages]}
    return Raw(raw.place, raw.kind, row, raw.group, raw.split)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


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


def _messages(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    messages = row.get("messages")
    if messages is None and isinstance(row.get("conversations"), list):
        names = {"human": "user", "gpt": "assistant"}
        messages = [
            {"role": names.get(str(m.get("from")), m.get("from")), "content": m.get("value")}
            if isinstance(m, dict)
            else m
            for m in row["conversations"]
        ]
    yield Raw(place, "dialogues", {"messages": messages})


def _instructions(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    asked = "\n\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
    prompt = [{"role": "user", "content": asked}]
    output = row.get("output", row.get("chosen"))
    yield Raw(place, "dialogues", {"messages": [*prompt, {"role": "assistant", "content": output}]})
    if "chosen" in row and "rejected" in row:
        sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        yield Raw(place, "pairs", {"prompt": prompt, **sides})


_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_SPEAKER = {"Human": "user", "Assistant": "assistant"}


def turns(text: str) -> list[Message]:
    """The messages of a text with ``Human:`` and ``Assistant:`` turns, as Anthropic's hh-rlhf writes them."""
    parts = _TURN.split(text)
    return [
        {"role": _SPEAKER[speaker], "content": said.strip()}
        for speaker, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _preferences(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    prompt, sides = row.get("prompt"), {side: row.get(side) for side in ("chosen", "rejected")}
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None:
        told = {side: turns(text) if isinstance(text, str) else text for side, text in sides.items()}
        chosen, rejected = (list(value) if isinstance(value, list) else [] for value in told.values())
        # Some dialogues part before their last turn: what differs behind it was said by people, not by the assistant.
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
        same = min(same, max(0, len(chosen) - 1), max(0, len(rejected) - 1))
        prompt, sides = chosen[:same], {"chosen": chosen[same : same + 1], "rejected": rejected[same : same + 1]}
    else:
        sides = {side: _behind(prompt, value) for side, value in sides.items()}
    yield Raw(place, "pairs", {"prompt": prompt, **sides})


def _behind(prompt: Any, side: Any) -> Any:
    """The answer of a side, which some data sets write with the prompt again before it."""
    if isinstance(side, str):
        return [{"role": "assistant", "content": side}]
    count = len(prompt) if isinstance(prompt, list) else 0
    repeats = isinstance(side, list) and len(side) > count > 0 and _same(side[:count], prompt)
    return side[count:] if repeats else side


def _same(first: list[Any], second: list[Any]) -> bool:
    def told(message: Any) -> Any:
        return (_role(message), message.get("content")) if isinstance(message, Mapping) else message

    return [*map(told, first)] == [*map(told, second)]


def _trees(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    root = row.get("prompt")
    if not isinstance(root, Mapping):
        raise ValueError(f"{place}: a tree needs a prompt")
    group = str(row.get("message_tree_id", place))
    path = [_said(root)]
    node = root
    while replies := _ranked(node):
        node = replies[0]
        path.append(_said(node))
    while path and path[-1]["role"] != "assistant":
        path.pop()
    if path:
        yield Raw(place, "dialogues", {"messages": path}, group)
    for prompt, siblings in _forks(root, []):
        for best, worse in itertools.combinations(siblings, 2):
            row = {"prompt": prompt, "chosen": [_said(best)], "rejected": [_said(worse)]}
            yield Raw(place, "pairs", row, group)


def _said(node: Mapping[str, Any]) -> Message:
    role = {"prompter": "user"}.get(str(node.get("role")), node.get("role"))
    return {"role": role, "content": node.get("text")}


def _ranked(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Replies that were not deleted, the best first; those without a rank come last, in their order."""
    replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
    return sorted(replies, key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))


def _forks(node: Mapping[str, Any], before: list[Message]) -> Iterator[tuple[list[Message], list[Mapping[str, Any]]]]:
    """Prompts with the ranked answers of the assistant to each."""
    prompt = [*before, _said(node)]
    replies = _ranked(node)
    ranked = [reply for reply in replies if reply.get("rank") is not None and _said(reply)["role"] == "assistant"]
    if len(ranked) > 1:
        yield prompt, ranked
    for reply in replies:
        yield from _forks(reply, prompt)


def _gsm8k(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    prompt = [{"role": "user", "content": row.get("question")}]
    worked, mark, answer = str(row.get("answer") or "").rpartition("####")
    if not mark:
        raise ValueError(f"{place}: the answer has no #### before its number")
    worked = re.sub(r"<<[^<>]*>>", "", worked).strip()  # the calculator's marks
    said = f"{worked}\n#### {answer.strip()}"
    yield Raw(place, "dialogues", {"messages": [*prompt, {"role": "assistant", "content": said}]})
    yield Raw(place, "tasks", {"prompt": prompt, "check": {"kind": "number", "answer": answer.strip()}})


def _ifeval(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    given = [{key: value for key, value in (k or {}).items() if value is not None} for k in row.get("kwargs") or []]
    check = {"kind": "ifeval", "instruction_id_list": row.get("instruction_id_list"), "kwargs": given}
    prompt = [{"role": "user", "content": row.get("prompt")}]
    yield Raw(place, "tasks", {"id": str(row.get("key", place)), "prompt": prompt, "check": check})


def _tasks(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    yield Raw(place, "tasks", {"prompt": prompt, "check": row.get("check") or {}})


FORMS: dict[Kind, Callable[[str, Mapping[str, Any]], Iterator[Raw]]] = {
    Kind.messages: _messages,
    Kind.instructions: _instructions,
    Kind.preferences: _preferences,
    Kind.trees: _trees,
    Kind.gsm8k: _gsm8k,
    Kind.ifeval: _ifeval,
    Kind.tasks: _tasks,
}


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


def functions(demand: Demand = Demand.signature) -> Iterator[Raw]:
    """Dialogues about the functions of the standard library that have a docstring, in the order of a hash.

    Each function gives two dialogues, source to docstring and docstring to source, and a task of the second. The order
    of a hash makes the first ``max_rows`` a fair sample.
    """
    found = [(path, function) for path in stdlib.files() for function in _documented(path)]
    found.sort(key=lambda pair: _order(pair[1].source))
    for path, function in found:
        yield from _about(f"{path.relative_to(stdlib.root())}:{function.line}", function, demand)


def _order(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Function:
    """A function of which the docstring is known."""

    name: str
    line: int
    signature: str
    """``def name(…):``, with its decorators left out."""
    docstring: str
    source: str
    """Without docstring and decorators."""
    arguments: tuple[str, ...]


def _documented(path: Path) -> Iterator[Function]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (text := ast.get_docstring(node)):
            bare = ast.FunctionDef(**{**_fields(node), "body": node.body[1:], "decorator_list": []})
            head = ast.FunctionDef(**{**_fields(node), "body": [ast.Pass()], "decorator_list": []})
            yield Function(
                name=node.name,
                line=node.lineno,
                signature=ast.unparse(ast.fix_missing_locations(head)).rpartition("\n")[0],
                docstring=text.strip(),
                source=ast.unparse(ast.fix_missing_locations(bare)),
                arguments=tuple(argument.arg for argument in node.args.args),
            )


def _fields(node: ast.FunctionDef) -> dict[str, Any]:
    return {**dict(ast.iter_fields(node)), "lineno": node.lineno, "col_offset": node.col_offset}


def _about(place: str, function: Function, demand: Demand) -> Iterator[Raw]:
    described = [{"role": "user", "content": f"Write the docstring of this function.\n\n{function.source}"}]
    wanted = f'Write this function.\n\n{function.signature}\n    """{function.docstring}"""'
    asked = [{"role": "user", "content": wanted}]
    for prompt, said in ((described, function.docstring), (asked, function.source)):
        messages = [*prompt, {"role": "assistant", "content": said}]
        yield Raw(place, "dialogues", {"messages": messages}, function.source)
    signature = {"function": function.name, "arguments": list(function.arguments)}
    check = {"kind": "python", **(signature if demand is Demand.signature else {})}
    yield Raw(place, "tasks", {"prompt": asked, "check": check}, function.source)
