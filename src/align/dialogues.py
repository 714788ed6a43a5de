"""What alignment learns from: dialogues, preference pairs, and tasks whose answer can be checked.

Each is one JSON object a line, in the form that TRL and the hub use:

- dialogue: ``{"id", "messages": [{"role", "content"}, …]}``
- pair: ``{"id", "prompt": [messages], "chosen": [message], "rejected": [message]}``
- task: ``{"id", "prompt": [messages], "check": {"kind": …, …}}``; ``check`` may be empty, where a reward model judges.

A row is either right or refused with its place and the reason; nothing is guessed, and nothing is left out in silence.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self, TypeVar

from llamita import storage

log = logging.getLogger(__name__)

MANIFEST = "dialogues.json"
FORMAT = 1
SPLITS = ("train", "validation")

Message = dict[str, Any]
"""``role``, ``content``, and ``code: true`` on what the assistant writes for an interpreter."""


class Role(StrEnum):
    """Who speaks, by Llama 3's names; ``tool`` is read as ``ipython``."""

    system = "system"
    user = "user"
    assistant = "assistant"
    ipython = "ipython"


@dataclass(frozen=True)
class Dialogue:
    """Messages of which the assistant's are learnt."""

    id: str
    messages: tuple[Message, ...]

    def row(self) -> dict[str, Any]:
        """The object of its line."""
        return {"id": self.id, "messages": list(self.messages)}

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What stands before the assistant's first message."""
        first = next(place for place, message in enumerate(self.messages) if message["role"] == Role.assistant)
        return self.messages[:first]


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first is preferred."""

    id: str
    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message

    def row(self) -> dict[str, Any]:
        """The object of its line."""
        prompt = list(self.prompt)
        return {"id": self.id, "prompt": prompt, "chosen": [self.chosen], "rejected": [self.rejected]}


@dataclass(frozen=True)
class Task:
    """A prompt, and how an answer to it is checked."""

    id: str
    prompt: tuple[Message, ...]
    check: Mapping[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The object of its line."""
        return {"id": self.id, "prompt": list(self.prompt), "check": dict(self.check)}


Row = Dialogue | Pair | Task
R = TypeVar("R", Dialogue, Pair, Task)


def parse_messages(value: Any, *, ends_with: Role | None = None) -> tuple[Message, ...]:
    """Messages as they are kept.

    Raises:
        ValueError: there are none, a role is unknown, a content is empty or no text, or the last role is another one.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ValueError("messages must be a list that is not empty")
    messages = tuple(_message(message) for message in value)
    if ends_with is not None and messages[-1]["role"] != ends_with:
        raise ValueError(f"the last message must be of the {ends_with}, it is of the {messages[-1]['role']}")
    for place, message in enumerate(messages):
        if message["role"] == Role.system and place:
            raise ValueError("a system message must come first")
    return messages


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"a message must have role and content, got {str(value)[:80]!r}")
    role = {"tool": "ipython"}.get(str(value.get("role")), value.get("role"))
    if role not in list(Role):
        raise ValueError(f"role must be one of {', '.join(Role)}, got {role!r}")
    content = value.get("content")
    if calls := value.get("tool_calls"):
        if content:
            raise ValueError("a message has either content or tool_calls, this one has both")
        content = pythonic(calls)
    if not isinstance(content, str):
        raise ValueError(f"the message of the {role} must be text, got {type(content).__name__}")
    if not content.strip():
        raise ValueError(f"the message of the {role} is empty")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the message of the {role} holds half a character, which no file can: {content[:40]!a}"
        ) from None
    code = {"code": True} if value.get("code") and role == Role.assistant else {}
    return {"role": str(role), "content": content, **code}


def pythonic(calls: Any) -> str:
    """Tool calls as Llama 3.2 1B and 3B write them: ``[f(a='x'), g(b=1)]``.

    Source: llama-models, models/llama3_2/text_prompt_format.md.

    Raises:
        ValueError: they are no list, a call has no name, or its arguments are no mapping.
    """
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValueError(f"tool_calls must be a list, got {str(calls)[:80]!r}")
    return f"[{', '.join(map(_call, calls))}]"


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, Mapping) else (None, {})
    if isinstance(arguments, str) and arguments:  # OpenAI's form
        arguments = json.loads(arguments)
    if not isinstance(name, str) or not isinstance(arguments or {}, Mapping):
        raise ValueError(f"a tool call needs a name and a mapping of arguments, got {str(call)[:80]!r}")
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in (arguments or {}).items())})"


def parse_dialogue(row: Mapping[str, Any], id: str) -> Dialogue:  # noqa: A002  (the field's name)
    """A dialogue up to the assistant's last word; ``ValueError`` as :func:`parse_messages`, or where it says nothing.

    What people or tools say behind it teaches nothing and is cut off.
    """
    messages = list(parse_messages(row.get("messages")))
    while messages and messages[-1]["role"] != Role.assistant:
        messages.pop()
    if not messages:
        raise ValueError("no message of the assistant, so nothing to learn from")
    return Dialogue(str(row.get("id", id)), tuple(messages))


def parse_pair(row: Mapping[str, Any], id: str) -> Pair:  # noqa: A002
    """A pair with two different answers; ``ValueError`` as :func:`parse_messages`, or where they answer nothing."""
    prompt = parse_messages(row.get("prompt"))
    if (last := prompt[-1]["role"]) not in (Role.user, Role.ipython):
        raise ValueError(f"the prompt of a pair must end with a user or a tool, it ends with the {last}")
    chosen, rejected = (_answer(row.get(side), side) for side in ("chosen", "rejected"))
    if chosen["content"].strip() == rejected["content"].strip():
        raise ValueError(f"chosen and rejected are equal: {chosen['content'][:60]!r}")
    return Pair(str(row.get("id", id)), prompt, chosen, rejected)


def _answer(value: Any, side: str) -> Message:
    try:
        messages = parse_messages(value, ends_with=Role.assistant)
    except ValueError as error:
        raise ValueError(f"{side}: {error}") from None
    if len(messages) != 1:
        raise ValueError(f"{side} must be one message, got {len(messages)}: what both share belongs to the prompt")
    return messages[0]


def parse_task(row: Mapping[str, Any], id: str) -> Task:  # noqa: A002
    """A task; ``ValueError`` as :func:`parse_messages`."""
    prompt = parse_messages(row.get("prompt"))
    if prompt[-1]["role"] == Role.assistant:
        raise ValueError("the prompt of a task must not end with the assistant")
    check = row.get("check") or {}
    if not isinstance(check, Mapping) or (check and not isinstance(check.get("kind"), str)):
        raise ValueError(f"check must be a mapping with a kind, got {str(check)[:80]!r}")
    return Task(str(row.get("id", id)), prompt, dict(check))


PARSERS: dict[str, Callable[[Mapping[str, Any], str], Row]] = {
    "dialogues": parse_dialogue,
    "pairs": parse_pair,
    "tasks": parse_task,
}


@dataclass
class Refused:
    """Rows that were not taken, by reason."""

    max_share: float = 0.05
    """Of all rows of a source that may be refused before the whole source is."""
    setting: str = ""
    """What the user calls that share; empty where no setting says it."""
    counts: dict[str, int] = field(default_factory=dict)
    first: list[str] = field(default_factory=list)
    """The first of them, with their places."""

    def add(self, place: str, reason: str) -> None:
        """Count a row and tell of it: each by name, at most twenty of them."""
        kind = reason.partition(":")[0]
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.first) < 20:
            self.first.append(f"{place}: {reason}")
            log.warning("%s: %s: the row is left out", place, reason)

    @property
    def total(self) -> int:
        """Rows refused."""
        return sum(self.counts.values())

    def check(self, name: str, taken: int) -> None:
        """Raise ``ValueError`` where more than ``max_share`` of a source was refused, or all of it."""
        if self.total > self.max_share * (self.total + taken) or not taken:
            told = "\n  ".join(self.first[:5]) or "it has no rows"
            share = f"{self.setting}={self.max_share} allows fewer"
            most = share if self.setting else f"at most {self.max_share:.0%} may be"
            raise ValueError(f"{name}: {self.total} of {self.total + taken} rows were refused, {most}:\n  {told}")


def is_held_out(prompt: Iterable[Message], *, share: float, seed: int) -> bool:
    """Whether rows of this prompt are held out: decided by its text alone, so that it holds over sources and rounds.

    White space around a message does not count: dialogues are written without it, so a model reads the same prompt.
    Nor does what the system says beside a question: one question under two of them is one to remember the answer of.
    """
    told = list(prompt)
    asked = [m for m in told if m["role"] != Role.system] or told
    text = json.dumps([seed, *([m["role"], m["content"].strip()] for m in asked)], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def characters(row: Row) -> int:
    """Of all messages of a row; of a pair's answers the longer one."""
    match row:
        case Dialogue():
            return sum(len(message["content"]) for message in row.messages)
        case Pair():
            answers = (row.chosen, row.rejected)
        case Task():
            answers = ({"content": ""}, {"content": ""})
    return sum(len(m["content"]) for m in row.prompt) + max(len(answer["content"]) for answer in answers)


def prompt_of(row: Row) -> tuple[Message, ...]:
    """What decides on which side a row is held: the messages before the assistant's first."""
    prompt = row.prompt
    first = next((place for place, m in enumerate(prompt) if m["role"] == Role.assistant), len(prompt))
    return prompt[:first]


def write(path: Path, rows: Iterable[Row]) -> int:
    """Write rows one to a line; returns how many."""
    lines = [json.dumps(row.row(), ensure_ascii=False) for row in rows]
    storage.write_atomically(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def read(path: Path, parse: Callable[[Mapping[str, Any], str], R]) -> Iterator[R]:
    """The rows of a file that this project wrote.

    Raises:
        ValueError: a line is not such a row; it is named.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                yield parse(row, f"{path.name}:{number}")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


@dataclass(frozen=True)
class DialogueData:
    """A directory that ``dialogues`` or ``sample`` wrote: ``SPLIT.KIND.jsonl`` and a manifest with their hashes."""

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a finished directory.

        Raises:
            ValueError: it is none, or a file is not what was written.
        """
        if not (path / MANIFEST).is_file():
            raise ValueError(f"data.path={path} is not a directory that dialogues or sample wrote: no {MANIFEST}")
        if (path / "run.json").is_file() and not (path / "DONE.json").is_file():
            raise ValueError(f"data.path={path} is the directory of an unfinished run: finish that stage first")
        manifest = storage.read_mapping(path / MANIFEST)
        if manifest.get("format") != FORMAT:
            raise ValueError(f"{path / MANIFEST} has format {manifest.get('format')!r}, this program reads {FORMAT}")
        for name, entry in manifest["files"].items():
            if Path(name).name != name or not (path / name).is_file():
                raise ValueError(f"{path / MANIFEST} names {name!r}, which is not there")
            if storage.sha256(path / name) != entry["sha256"]:
                raise ValueError(f"{path / name} is not what was written: make it again")
        return cls(path, manifest)

    @property
    def content_hash(self) -> str:
        """Hash of all rows."""
        text = "\n".join(f"{name} {entry['sha256']}" for name, entry in sorted(self.manifest["files"].items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def count(self, split: str, kind: str) -> int:
        """Rows of a kind (``dialogues``, ``pairs`` or ``tasks``) in a split."""
        return int(self.manifest["files"].get(f"{split}.{kind}.jsonl", {}).get("rows", 0))

    def dialogues(self, split: str) -> list[Dialogue]:
        """The dialogues of a split; none where there are none."""
        return self._rows(split, "dialogues", parse_dialogue)

    def pairs(self, split: str) -> list[Pair]:
        """The preference pairs of a split."""
        return self._rows(split, "pairs", parse_pair)

    def tasks(self, split: str) -> list[Task]:
        """The tasks of a split."""
        return self._rows(split, "tasks", parse_task)

    def _rows(self, split: str, kind: str, parse: Callable[[Mapping[str, Any], str], R]) -> list[R]:
        file = self.path / f"{split}.{kind}.jsonl"
        return list(read(file, parse)) if file.is_file() else []

    def need(self, split: str, kind: str, without: str = "") -> None:
        """Raise ``ValueError`` unless the split has rows of that kind; ``without`` says how to do without them."""
        if not self.count(split, kind):
            there = ", ".join(f"{entry['rows']} in {name}" for name, entry in self.manifest["files"].items())
            hint = f" ({without} does without)" if without else ""
            raise ValueError(f"data.path={self.path} has no {split}.{kind}.jsonl; it has {there or 'nothing'}{hint}")


def write_all(folder: Path, rows: Mapping[str, Mapping[str, Sequence[Row]]], extra: Mapping[str, Any]) -> list[str]:
    """Write ``rows[split][kind]`` and the manifest, which also holds ``extra``; returns the names of the files."""
    files = {}
    for split, kinds in rows.items():
        for kind, items in kinds.items():
            if items:
                name = f"{split}.{kind}.jsonl"
                files[name] = {"rows": write(folder / name, items), "sha256": storage.sha256(folder / name)}
    storage.write_json(folder / MANIFEST, {"format": FORMAT, "files": files, **extra})
    return [*files, MANIFEST]
