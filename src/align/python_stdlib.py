"""Dialogues and tasks about the functions of Python's own library: source to docstring, and docstring to source."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from llamita import stdlib
from llamita.align.forms import Raw


class Demand(StrEnum):
    """What the task of a function of the library asks for."""

    signature = "signature"
    """Python that parses and defines the function, with its arguments."""
    parses = "parses"
    """Python that parses."""


def functions(demand: Demand = Demand.signature) -> Iterator[Raw]:
    """Dialogues about the functions of the standard library that have a docstring, in the order of a hash.

    Each function gives two dialogues, source to docstring and docstring to source, and a task of the second. The order
    of a hash makes the first ``max_rows`` a fair sample. Functions that share a prompt, as two with one signature and
    one docstring do, are of one group, so that no prompt of a held-out function is trained on.
    """
    found = [(path, function) for path in stdlib.files() for function in _documented(path)]
    found.sort(key=lambda pair: _order(pair[1].source))
    groups = _groups([function for _, function in found])
    for (path, function), group in zip(found, groups, strict=True):
        yield from _about(f"{path.relative_to(stdlib.root())}:{function.line}", function, group, demand)


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

    @property
    def prompts(self) -> tuple[str, str]:
        """What asks for its docstring, and what asks for its source."""
        wanted = f'Write this function.\n\n{self.signature}\n    """{self.docstring}"""'
        return f"Write the docstring of this function.\n\n{self.source}", wanted


def _groups(functions: Sequence[Function]) -> list[str]:
    """Per function the least source among those it is tied to: two that share a prompt are, directly or by others."""
    groups = [function.source for function in functions]
    while True:
        least: dict[str, str] = {}
        for function, group in zip(functions, groups, strict=True):
            for prompt in function.prompts:
                least[prompt] = min(group, least.get(prompt, group))
        tied = [min(least[prompt] for prompt in function.prompts) for function in functions]
        if tied == groups:
            return groups
        groups = tied


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
                arguments=tuple(argument.arg for argument in (*node.args.posonlyargs, *node.args.args)),
            )


def _fields(node: ast.FunctionDef) -> dict[str, Any]:
    return {**dict(ast.iter_fields(node)), "lineno": node.lineno, "col_offset": node.col_offset}


def _about(place: str, function: Function, group: str, demand: Demand) -> Iterator[Raw]:
    described, wanted = ([{"role": "user", "content": prompt}] for prompt in function.prompts)
    for prompt, said in ((described, function.docstring), (wanted, function.source)):
        messages = [*prompt, {"role": "assistant", "content": said}]
        yield Raw(place, "dialogues", {"messages": messages}, group)
    signature = {"function": function.name, "arguments": list(function.arguments)}
    check = {"kind": "python", **(signature if demand is Demand.signature else {})}
    yield Raw(place, "tasks", {"prompt": wanted, "check": check}, group)
