"""Questions with given endings, of which one is right: HellaSwag, and whatever has its form."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from llamita import chat
from llamita.align import generation
from llamita.align.assistants import Measure, Measures
from llamita.align.generation import Scored

LINES = 6
"""Of a question in a text file: the context, the number of the right ending, and four endings."""


@dataclass(kw_only=True)
class ChoicesConfig:
    """A local file of questions; see :func:`read`."""

    path: Path | None = None
    max_rows: int | None = None
    """At most so many, evenly spaced."""


@dataclass(frozen=True)
class Question:
    """A context and how it may go on."""

    id: str
    context: str
    endings: tuple[str, ...]
    right: int


def read(path: Path, *, most: int | None = None) -> list[Question]:
    """The questions of a file, at most so many, evenly spaced.

    ``.txt``: six lines each, as llm.c and llama.cpp give HellaSwag. ``.jsonl``: objects with HellaSwag's own ``ctx``,
    ``endings`` and ``label``. Both also with ``.gz`` or ``.bz2``.

    Raises:
        ValueError: the file is missing or of another kind, or a question has no right ending; it is named.
    """
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open}
    kind = path.with_suffix("").suffix if path.suffix in openers else path.suffix
    if not path.is_file() or kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path} must be a .txt or .jsonl file that is there, or one of them with .gz or .bz2")
    try:
        with openers.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            lines = file.read().rstrip("\n").split("\n")
        found = [_lines(lines, place) for place in range(0, len(lines), LINES)] if kind == ".txt" else _objects(lines)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not hold questions with endings: {error}") from error
    for question in found:
        if not 0 <= question.right < len(question.endings) or len(question.endings) < 2:
            raise ValueError(f"{path}, question {question.id}: there is no ending {question.right}")
    return (
        [found[place * len(found) // min(most, len(found))] for place in range(min(most, len(found)))]
        if most
        else found
    )


def _lines(lines: Sequence[str], place: int) -> Question:
    context, right, *endings = lines[place : place + LINES]
    if len(endings) != LINES - 2:
        raise ValueError(f"line {place + 1} begins a question of fewer than {LINES} lines")
    return Question(str(place // LINES), context, tuple(endings), int(right))


def _objects(lines: Sequence[str]) -> list[Question]:
    rows = [json.loads(line) for line in lines if line.strip()]
    return [Question(str(n), row["ctx"], tuple(row["endings"]), int(row["label"])) for n, row in enumerate(rows)]


def right(
    model: LlamaForCausalLM, encoder: chat.Encoder, questions: Sequence[Question], *, batch_rows: int
) -> list[tuple[float, float]]:
    """Whether each question's right ending is the likeliest: by its log-probability, and by that per byte of it.

    The context is the user's message and the ending the assistant's; the end of the turn is not scored. lm-eval calls
    the two ``acc`` and ``acc_bytes``; its ``acc_norm`` divides by characters, which is the same where all are ASCII.
    The first of equally likely endings counts.
    """
    texts = [_scored(encoder, question.context, ending) for question in questions for ending in question.endings]
    total_N, _ = generation.log_probabilities(model, texts, batch_rows=batch_rows)
    told, first = [], 0
    for question in questions:
        sums = total_N[first : first + len(question.endings)].tolist()
        sizes = [max(1, len(ending.encode())) for ending in question.endings]
        by_byte = [value / size for value, size in zip(sums, sizes, strict=True)]
        told.append(tuple(float(values.index(max(values)) == question.right) for values in (sums, by_byte)))
        first += len(question.endings)
    return [(by_sum, by_byte) for by_sum, by_byte in told]


def _scored(encoder: chat.Encoder, context: str, ending: str) -> Scored:
    prompt, answer = encoder.answer([{"role": "user", "content": context}], {"role": "assistant", "content": ending})
    end = next((place for place, token in enumerate(answer) if token in encoder.stop_ids), len(answer))
    return Scored.answer(prompt, answer[:end])


def accuracies(name: str, questions: Sequence[Question], told: Sequence[tuple[float, float]]) -> Measures:
    """``choices/NAME`` and ``choices/NAME_per_byte``."""
    found = {f"choices/{name}": Measure(), f"choices/{name}_per_byte": Measure()}
    for question, both in zip(questions, told, strict=True):
        for measure, value in zip(found.values(), both, strict=True):
            measure.add(f"{name}/{question.id}", value)
    return found
