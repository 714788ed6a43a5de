"""The forms in which dialogues, pairs and tasks are published: what a row of each tells.

A reader of a form takes a row with its place and gives rows in the form of :mod:`llamita.align.dialogues`, not yet
checked. It raises ``ValueError`` for a row that cannot be read so far.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llamita.align.dialogues import Message


@dataclass(frozen=True)
class Raw:
    """A row as it was read."""

    place: str
    kind: str
    row: Mapping[str, Any]
    group: str | None = None
    """Rows of one group stay on one side, also where their prompts differ; unset: rows of one prompt do."""
    split: str | None = None
    """Decided already."""
    wrong: str | None = None
    """Why it could not be read in its form; such a row is of no kind."""


Form = Callable[[str, Mapping[str, Any]], Iterator[Raw]]


def read(form: Form, place: str, row: Mapping[str, Any]) -> list[Raw]:
    """What a row gives in a form: all of it, or one row that is wrong."""
    try:
        return [*form(place, row)]
    except ValueError as error:
        return [Raw(place, "", {}, wrong=str(error))]


def messages(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    """A dialogue of ``messages``, or of ShareGPT's ``conversations``."""
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


def instructions(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    """A dialogue of one turn; with ``chosen`` and ``rejected`` also a pair."""
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


def preferences(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    """A pair, whose prompt ends where ``chosen`` and ``rejected`` part."""
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
        return (role_of(message), message.get("content")) if isinstance(message, Mapping) else message

    return [*map(told, first)] == [*map(told, second)]


def role_of(message: Any) -> Any:
    """Who says a message; ``None`` where it is none."""
    return message.get("role") if isinstance(message, Mapping) else None


def trees(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    """The best answers of a tree as a dialogue, and its siblings of different ranks as pairs.

    All of them begin with the root's prompt, which keeps them on one side of the split.
    """
    root = row.get("prompt")
    if not isinstance(root, Mapping):
        raise ValueError(f"the prompt of a tree must be a message, got {type(root).__name__}")
    path = [_said(root)]
    node = root
    while replies := _ranked(node):
        node = replies[0]
        path.append(_said(node))
    while path and path[-1]["role"] != "assistant":
        path.pop()
    if path:
        yield Raw(place, "dialogues", {"messages": path})
    for prompt, siblings in _forks(root, []):
        for best, worse in itertools.combinations(siblings, 2):
            if best["rank"] != worse["rank"]:
                yield Raw(place, "pairs", {"prompt": prompt, "chosen": [_said(best)], "rejected": [_said(worse)]})


def _said(node: Mapping[str, Any]) -> Message:
    role = {"prompter": "user"}.get(str(node.get("role")), node.get("role"))
    return {"role": role, "content": node.get("text")}


def _ranked(node: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Replies that were not deleted, the best first; those without a rank come last, in their order."""
    replies = node.get("replies") or []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise ValueError(f"replies must be a list of messages, got {str(replies)[:80]!r}")
    if wrong := [reply["rank"] for reply in replies if not isinstance(reply.get("rank"), int | float | None)]:
        raise ValueError(f"the rank of a reply must be a number, got {str(wrong[0])[:80]!r}")
    replies = [reply for reply in replies if not reply.get("deleted")]
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


def gsm8k(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    """A dialogue of the worked answer, and a task whose number is checked."""
    prompt = [{"role": "user", "content": row.get("question")}]
    worked, mark, answer = str(row.get("answer") or "").rpartition("####")
    if not mark:
        raise ValueError("the answer has no #### before its number")
    worked = re.sub(r"<<[^<>]*>>", "", worked).strip()  # the calculator's marks
    said = f"{worked}\n#### {answer.strip()}"
    yield Raw(place, "dialogues", {"messages": [*prompt, {"role": "assistant", "content": said}]})
    yield Raw(place, "tasks", {"prompt": prompt, "check": {"kind": "number", "answer": answer.strip()}})


def ifeval(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    """A task of instructions that can be checked."""
    given = row.get("kwargs")
    if isinstance(given, list):
        given = [_given(arguments) for arguments in given]
    check = {"kind": "ifeval", "instruction_id_list": row.get("instruction_id_list"), "kwargs": given}
    prompt = [{"role": "user", "content": row.get("prompt")}]
    yield Raw(place, "tasks", {"id": str(row.get("key", place)), "prompt": prompt, "check": check})


def _given(arguments: Any) -> Any:
    # A table has one column for every argument, which is empty where an instruction has none of that name.
    if isinstance(arguments, Mapping):
        return {key: value for key, value in arguments.items() if value is not None}
    return {} if arguments is None else arguments


def tasks(place: str, row: Mapping[str, Any]) -> Iterator[Raw]:
    """A task, its prompt being a text or messages."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    yield Raw(place, "tasks", {"prompt": prompt, "check": row.get("check") or {}})
