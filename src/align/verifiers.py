"""Rewards that a program can verify: a task's ``check`` and an answer give a number from 0 to 1.

Kinds, each with its keys beside ``kind``:

- ``number``: ``answer``, the right number. 1 or 0. ``marked: true`` takes no number that the answer does not mark.
- ``regex``: ``pattern``, which the whole answer must match (``.`` is a line's end too). 1 or 0.
- ``format``: ``tags``, blocks ``<tag>…</tag>`` that make up the whole answer, in this order; or ``pattern`` as above.
- ``python``: the answer is Python that parses. Optional: ``function`` (a name that it defines), ``arguments`` (names
  of that function's positional parameters), ``docstring`` (true: it has one; false: it has none). The share of these
  demands that hold, parsing being one of them; 0 where it does not parse. Nothing is ever executed.
- ``ifeval``: ``instruction_id_list`` and ``kwargs`` as in IFEval's data; ``variant`` is ``strict`` (default) or
  ``loose``. The share of instructions followed among those that this machine can check.
- ``contains``: lists ``all``, ``any``, ``none`` of texts; ``ignore_case``. The share of demands that hold: each text
  of ``all`` and of ``none`` is one, ``any`` is one together.
- ``length``: ``min`` and ``max`` of the ``unit`` (``words``, ``characters``, ``sentences``). 1 within; below,
  count/min; above, 2 - count/max, not below 0.

An empty answer earns 0, and so does one beyond :data:`MAX_CHARACTERS`. What an answer holds is only ever read as text.
"""

from __future__ import annotations

import ast
import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import regex

from llamita.align import ifeval

log = logging.getLogger(__name__)

MAX_CHARACTERS = 100_000
"""Of an answer that is looked at."""
REGEX_SECONDS = 1.0
"""That one pattern may take for one answer: a pattern with nested repeats can need exponential time."""
MAX_DIGITS = 60
"""Of a number that is read as one."""
LAST_MARKS = 8
LINE_CHARACTERS = 1000
LAST_CHARACTERS = 100

_NUMBER = re.compile(
    r"(?:(?P<sign>(?<![\w.)\]}])[-−–+])(?=[$€£¥.\d\\]))?[$€£¥]?\s?"
    r"(?:\\d?frac\{(?P<top>\d{1,60})\}\{(?P<bottom>\d{1,60})\}"
    r"|(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>(?:(?<=\d)|(?<![\w.]))\.\d+)?"
    r"(?P<power>[eE][-+]?\d{1,2}(?![\w.]))?(?P<over>\s?/\s?\d{1,60}(?![\d.,]*\d))?)"
)
_MARK = re.compile(r"####|answer(?:\s+is\b|\W{0,4}[:=])|\\boxed\s*\{", re.IGNORECASE)
_BEFORE_NUMBER = re.compile(r"[\s*_]*")
_FRACTION = re.compile(r"\\d?frac\{[^{}]*\}\{[^{}]*\}")
_OPERATOR = r"(?:[-−–+*/×·÷^x]|of\b|\\(?:times|cdot|div)\b)"
_AMOUNT = r"[(\s]*-?[$€£¥]?\d[\d.,]*%?(?:\s+[A-Za-z]+){0,3}[)\s]*"
_ARITHMETIC = re.compile(rf"{_AMOUNT}(?:{_OPERATOR}{_AMOUNT})+")
_ENDS_IN_ARITHMETIC = re.compile(rf"{_ARITHMETIC.pattern}\Z")
_VARIABLE = re.compile(r"[\d)][A-Za-z]\b|\b[A-Za-z]\(")
# Possessive: a fence's line that never ends, as of a model that repeats itself, is looked at once, not at every place.
_FENCE = re.compile(r"^[ \t]*+```[ \t]*+([\w+-]*+)[^\n]*+\n(.*?)(?:^[ \t]*+```|\Z)", re.DOTALL | re.MULTILINE)


def validate(check: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless :func:`check` can judge an answer by this: it names the kind and what is allowed."""
    kind = check.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"check.kind must be one of {', '.join(KINDS)}, got {kind!r}")
    needed, allowed = KEYS[kind]
    given = set(check) - {"kind"}
    if missing := sorted(needed - given):
        raise ValueError(f"check {kind} lacks {', '.join(missing)}; it needs {', '.join(sorted(needed))}")
    if unknown := sorted(given - needed - allowed):
        raise ValueError(f"check {kind} has no {', '.join(unknown)}; allowed are {', '.join(sorted(needed | allowed))}")
    try:
        VALIDATORS[kind](check)
    except ValueError as error:
        raise ValueError(f"check {kind}: {error}") from None


def validate_row(name: str, check: Mapping[str, Any]) -> None:
    """As :func:`validate`, with the row's name in the message."""
    try:
        validate(check)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def check(check: Mapping[str, Any], answer: str) -> float:
    """The reward of an answer, from 0 to 1.

    ``check`` must have passed :func:`validate`. What this machine cannot check (see :func:`is_checkable`) earns 0.
    """
    if not answer.strip() or len(answer) > MAX_CHARACTERS:
        return 0.0
    return KINDS[check["kind"]](check, answer)


def is_checkable(check: Mapping[str, Any]) -> bool:
    """Whether this machine can judge any part of a check: telling languages needs ``langdetect``."""
    return check["kind"] != "ifeval" or any(map(ifeval.is_checkable, check["instruction_id_list"]))


def numbers(text: str) -> list[Fraction]:
    """The numbers of a text, exactly: ``1,234.50``, ``-3/4``, ``\\frac{1}{2}``, ``$18``, ``2e3``."""
    plain = text.replace("{,}", ",").replace(r"\$", "$").replace(r"\!", "")
    return [value for found in _NUMBER.finditer(plain) if (value := _value(found)) is not None]


def _value(found: re.Match[str]) -> Fraction | None:
    part = found.groupdict("")
    digits = part["digits"].replace(",", "") + part["decimals"]
    if not (digits or part["top"]) or len(found.group()) > MAX_DIGITS:
        return None
    over = part["bottom"] or part["over"].strip(" /") or "1"
    value = Fraction(part["top"] or (digits if digits[0] != "." else f"0{digits}"))
    if part["power"]:
        value *= Fraction(10) ** int(part["power"][1:])
    # Twelve over nought is no number; the twelve is.
    value = value / int(over) if int(over) else value
    return -value if part["sign"].strip() in ("-", "−", "–") else value


def final_number(answer: str, *, marked: bool = False) -> Fraction | None:
    """The number that an answer gives as its result.

    That is the number behind its last mark, on the same line: ``####`` as in GSM8K (Cobbe et al., 2021,
    arXiv:2110.14168), ``\\boxed{``, ``answer is`` or ``answer:``. The two in words decide only where no later line has
    a number, or with ``marked``. Without a mark it is the last number of all, or with ``marked`` none.
    """
    # A model that repeats itself may write ten thousand marks: the last few decide.
    for mark in reversed(list(_MARK.finditer(answer))[-LAST_MARKS:]):
        begin = mark.end() + len(_BEFORE_NUMBER.match(answer, mark.end()).group())  # type: ignore[union-attr]
        rest = answer[begin : begin + LINE_CHARACTERS]
        if mark.group().startswith("\\"):
            rest = _braced(rest)
        in_words = mark.group()[0] in "aA"
        if in_words and not marked and re.search(r"\d", answer[begin:].partition("\n")[2]):
            continue
        line = rest.partition("\n")[0]
        if (found := _worked(line) if mark.group()[-1] in ":=" else _stated(line)) is not None:
            return found
    if marked:
        return None
    return next(iter(reversed(numbers(answer))), None)


def _stated(line: str) -> Fraction | None:
    """The first number of a line, behind each ``=`` before which there is no more than what was worked out."""
    rest = line
    while "=" in rest and _is_worked(rest.partition("=")[0]):
        rest = rest.partition("=")[2]
    return next(iter(numbers(rest) or numbers(line)), None)


def _worked(line: str) -> Fraction | None:
    """The number that a line begins with, else the first behind its last ``=``: here an answer may be worked out."""
    before, _, result = line.rpartition("=")
    begins = re.match(r"[^\w=]*\d", line) is not None
    if begins and not _ENDS_IN_ARITHMETIC.search(before[-LAST_CHARACTERS:]):
        return _stated(line)
    return next(iter(numbers(result) or numbers(line)), None)


def _is_worked(side: str) -> bool:
    """Whether one side of an equation has no number, or is arithmetic or a formula behind words: ``it is 5 + 3``."""
    plain = _FRACTION.sub("1", side)
    first = re.search(r"\d", plain)
    if first is None:
        return True
    expression = plain[first.start() :]
    is_formula = _VARIABLE.search(plain) is not None and not re.search(r"[A-Za-z]{2}", expression)
    return is_formula or _ARITHMETIC.fullmatch(expression) is not None


def _braced(text: str) -> str:
    """The text up to the brace that closes the one before it."""
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:place]
    return text


def _number(check: Mapping[str, Any], answer: str) -> float:
    return float(final_number(answer, marked=check.get("marked", False)) == _right(check))


def _right(check: Mapping[str, Any]) -> Fraction:
    given = check["answer"]
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        raise ValueError(f"answer must be a number, got {given!r}")
    found = numbers(str(given))
    if len(found) != 1:
        raise ValueError(f"answer must hold one number, got {given!r}")
    return found[0]


def _validate_number(check: Mapping[str, Any]) -> None:
    _right(check)
    _boolean(check, "marked")


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, regex.DOTALL)


@lru_cache(maxsize=256)
def _warn_slow(pattern: str) -> None:
    log.warning("pattern %r took longer than %s s for an answer, which earns 0", pattern[:200], REGEX_SECONDS)


def _matches(pattern: str, answer: str) -> float:
    try:
        return float(_compiled(pattern).fullmatch(answer.strip(), timeout=REGEX_SECONDS) is not None)
    except TimeoutError:
        _warn_slow(pattern)
        return 0.0


def _regex(check: Mapping[str, Any], answer: str) -> float:
    return _matches(check["pattern"], answer)


def _validate_regex(check: Mapping[str, Any]) -> None:
    if not isinstance(check["pattern"], str) or not check["pattern"]:
        raise ValueError(f"pattern must be a regular expression, got {check['pattern']!r}")
    try:
        _compiled(check["pattern"])
    except regex.error as error:
        raise ValueError(f"pattern {check['pattern']!r} is not a regular expression: {error}") from None


def _format(check: Mapping[str, Any], answer: str) -> float:
    if "pattern" in check:
        return _regex(check, answer)
    rest = answer.strip()
    for tag in check["tags"]:
        opening, closing = f"<{tag}>", f"</{tag}>"
        inside, closed, after = rest.removeprefix(opening).partition(closing)
        if not (rest.startswith(opening) and closed) or opening in inside or not inside.strip():
            return 0.0
        rest = after.lstrip()
    return float(not rest)


def _validate_format(check: Mapping[str, Any]) -> None:
    if ("pattern" in check) == ("tags" in check):
        raise ValueError("give either tags or pattern")
    if "pattern" in check:
        _validate_regex(check)
    elif not all(re.fullmatch(r"[A-Za-z][\w-]*", tag) for tag in _texts(check, "tags")):
        raise ValueError(f"tags must be names such as think and answer, got {check['tags']!r}")


def code_of(answer: str) -> str:
    """The code of an answer: its fenced blocks of Python, else those of no named language; without blocks all of it.

    A block that is never closed, as of an answer that was cut, goes to the end.
    """
    blocks = _FENCE.findall(answer)
    named = [code for language, code in blocks if language.lower() in ("py", "python", "python3")]
    unnamed = [code for language, code in blocks if not language]
    return "\n".join(named or unnamed) if blocks else answer


def parsed(code: str) -> ast.Module | None:
    """The syntax tree of code, or None where it does not parse, or is no more than names and constants."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a string that holds a wrong escape
            tree = ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    says = [node for node in tree.body if not (isinstance(node, ast.Expr) and _is_plain(node.value))]
    return tree if says else None


def _is_plain(value: ast.expr) -> bool:
    # One word, a number or a quoted sentence parse as Python too, and would be the cheapest way to the reward.
    return isinstance(value, ast.Name | ast.Constant)


def _python(check: Mapping[str, Any], answer: str) -> float:
    if (tree := parsed(code_of(answer))) is None:
        return 0.0
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    wanted = next((node for node in functions if node.name == check.get("function", node.name)), None)
    held = [True]
    if "function" in check:
        held.append(wanted is not None)
    if "arguments" in check:
        held.append(wanted is not None and list(check["arguments"]) in _parameters(wanted))
    if "docstring" in check:
        held.append(wanted is not None and (ast.get_docstring(wanted) is not None) == check["docstring"])
    return sum(held) / len(held)


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[list[str]]:
    """The names of its positional parameters; a method's with and without the object that it belongs to."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return [names, names[1:]] if names[:1] in (["self"], ["cls"]) else [names]


def _validate_python(check: Mapping[str, Any]) -> None:
    if "function" in check and not (isinstance(check["function"], str) and check["function"].isidentifier()):
        raise ValueError(f"function must be a name, got {check['function']!r}")
    if "arguments" in check:
        if "function" not in check:
            raise ValueError("arguments are those of a function: give its name too")
        if not all(name.isidentifier() for name in _texts(check, "arguments", may_be_empty=True)):
            raise ValueError(f"arguments must be names, got {check['arguments']!r}")
    _boolean(check, "docstring")


def followed(check: Mapping[str, Any], answer: str, variant: ifeval.Variant) -> list[bool | None]:
    """Per instruction of an ``ifeval`` check whether the answer follows it; None where this machine cannot tell."""
    pairs = zip(check["instruction_id_list"], check["kwargs"], strict=True)
    return [ifeval.follows(name, given, answer, variant) for name, given in pairs]


def _ifeval(check: Mapping[str, Any], answer: str) -> float:
    variant = ifeval.Variant(check.get("variant", ifeval.Variant.strict))
    told = [value for value in followed(check, answer, variant) if value is not None]
    return sum(told) / len(told) if told else 0.0


def _validate_ifeval(check: Mapping[str, Any]) -> None:
    names, given = check["instruction_id_list"], check["kwargs"]
    if not isinstance(names, Sequence) or isinstance(names, str) or not names:
        raise ValueError(f"instruction_id_list must be a list of ids, got {names!r}")
    if not isinstance(given, Sequence) or isinstance(given, str) or len(given) != len(names):
        raise ValueError(f"kwargs must hold one mapping for each of the {len(names)} instructions, got {given!r}")
    for name, arguments in zip(names, given, strict=True):
        if not isinstance(name, str) or not isinstance(arguments, Mapping):
            raise ValueError(f"an instruction is an id and a mapping, got {name!r} and {arguments!r}")
        ifeval.validate(name, arguments)
    if check.get("variant", "strict") not in list(ifeval.Variant):
        raise ValueError(f"variant must be one of {', '.join(ifeval.Variant)}, got {check['variant']!r}")


def _contains(check: Mapping[str, Any], answer: str) -> float:
    def there(text: str) -> bool:
        return text.lower() in answer.lower() if check.get("ignore_case", False) else text in answer

    held = [there(text) for text in check.get("all", [])] + [not there(text) for text in check.get("none", [])]
    if "any" in check:
        held.append(any(there(text) for text in check["any"]))
    return sum(held) / len(held)


def _validate_contains(check: Mapping[str, Any]) -> None:
    lists = [name for name in ("all", "any", "none") if name in check]
    if not lists:
        raise ValueError("give all, any or none: a list of texts")
    for name in lists:
        _texts(check, name)
    _boolean(check, "ignore_case")


UNITS: Mapping[str, Callable[[str], int]] = {
    "words": ifeval.words,
    "characters": len,
    "sentences": ifeval.sentences,
}


def _length(check: Mapping[str, Any], answer: str) -> float:
    count = UNITS[check.get("unit", "words")](answer.strip())
    if count < check.get("min", 0):
        return float(count / check["min"])
    most = check.get("max", count)
    return max(0.0, 2.0 - count / most) if count > most else 1.0


def _validate_length(check: Mapping[str, Any]) -> None:
    if check.get("unit", "words") not in list(UNITS):
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {check['unit']!r}")
    bounds = {name: check[name] for name in ("min", "max") if name in check}
    if not bounds:
        raise ValueError("give min, max or both")
    for name, value in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if bounds.get("min", 1) > bounds.get("max", bounds.get("min", 1)):
        raise ValueError(f"min {bounds['min']} is above max {bounds['max']}")


def _texts(check: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> Sequence[str]:
    value = check[name]
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_list or not all(isinstance(text, str) and text for text in value) or not (value or may_be_empty):
        raise ValueError(f"{name} must be a list of texts, got {value!r}")
    return [str(text) for text in value]


def _boolean(check: Mapping[str, Any], name: str) -> None:
    if not isinstance(check.get(name, False), bool):
        raise ValueError(f"{name} must be true or false, got {check[name]!r}")


KINDS: Mapping[str, Callable[[Mapping[str, Any], str], float]] = {
    "number": _number,
    "regex": _regex,
    "format": _format,
    "python": _python,
    "ifeval": _ifeval,
    "contains": _contains,
    "length": _length,
}
VALIDATORS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "number": _validate_number,
    "regex": _validate_regex,
    "format": _validate_format,
    "python": _validate_python,
    "ifeval": _validate_ifeval,
    "contains": _validate_contains,
    "length": _validate_length,
}
KEYS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "number": (frozenset({"answer"}), frozenset({"marked"})),
    "regex": (frozenset({"pattern"}), frozenset()),
    "format": (frozenset(), frozenset({"tags", "pattern"})),
    "python": (frozenset(), frozenset({"function", "arguments", "docstring"})),
    "ifeval": (frozenset({"instruction_id_list", "kwargs"}), frozenset({"variant"})),
    "contains": (frozenset(), frozenset({"all", "any", "none", "ignore_case"})),
    "length": (frozenset(), frozenset({"unit", "min", "max"})),
}
"""What each kind must have, and what it may."""
