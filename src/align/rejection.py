"""Rejection sampling: of many answers to a prompt the best is learnt, and preferred to one that is worse.

The Llama team, 2024, arXiv:2407.21783, section 4.2.2: 10 to 30 answers to a prompt, of which a reward model picks one.
An answer that is empty, was cut off, or whose reward is no number is counted and never chosen, nor rejected.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from llamita.align import duplicates, estimators, verifiers
from llamita.align.dialogues import Dialogue, Message, Pair, Task

R = TypeVar("R")


class Prompts(StrEnum):
    """What is answered."""

    tasks = "tasks"
    dialogues = "dialogues"
    """What stands before the assistant's first message; needs a reward model."""
    both = "both"


class Pairs(StrEnum):
    """Which worse answer the best one is preferred to."""

    worst = "worst"
    random = "random"
    """Any that is worse by the margin, drawn by the prompt's name."""
    none = "none"


class Status(StrEnum):
    """Whether an answer can be chosen."""

    usable = "usable"
    empty = "empty"
    truncated = "truncated"
    """It had not ended after ``sampling.max_new_tokens``."""
    no_number = "no_number"
    """Its reward is not a finite number."""
    unjudged = "unjudged"
    """Nothing here can tell how good it is: its check needs a library that is not installed."""


@dataclass(kw_only=True)
class SelectionConfig:
    """Which answers are learnt."""

    gate: float = 1.0
    """What a task's verifier must give an answer that is chosen, 0 to 1; where a reward model ranks, too."""
    min_score: float | None = None
    """What the score by which answers are ranked must be: the reward model's, or the verifier's where there is none.
    Unset: any."""
    pairs: Pairs = Pairs.worst
    min_margin: float = 0.0
    """By how much a rejected answer's score must be below the chosen one's; one that does not pass the gate always is
    worse."""
    duplicate_threshold: float | None = 0.8
    """Resemblance from which a chosen answer is a duplicate of an earlier one and left out; unset: none is."""
    shingle_words: int = 5
    """Words of the runs by which answers are compared."""
    duplicate_min_words: int = 20
    """Shorter answers are never duplicates: "72" is right more than once."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for what cannot be meant."""
        if not 0 <= self.gate <= 1:
            raise ValueError(f"selection.gate must be in 0..1, got {self.gate}")
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise ValueError(f"selection.min_score must be finite, got {self.min_score}")
        if not 0 <= self.min_margin < math.inf:
            raise ValueError(f"selection.min_margin must be >= 0 and finite, got {self.min_margin}")
        if self.duplicate_threshold is not None and not 0 < self.duplicate_threshold <= 1:
            raise ValueError(
                f"selection.duplicate_threshold must be above 0 and at most 1, got {self.duplicate_threshold}"
            )
        for name in ("shingle_words", "duplicate_min_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"selection.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Asked:
    """A prompt under a name of its own, and how answers to it are checked."""

    name: str
    messages: tuple[Message, ...]
    check: Mapping[str, Any]


def evenly(rows: Sequence[R], most: int | None) -> list[R]:
    """At most so many rows, evenly spaced: those of one source stand together."""
    if most is None or most >= len(rows):
        return list(rows)
    return [rows[place * len(rows) // most] for place in range(most)]


def asked(
    tasks: Sequence[Task], given: Sequence[Dialogue], which: Prompts, *, most: int | None, is_ranked: bool
) -> list[Asked]:
    """The prompts of a split, each once, in their order, at most so many of them, evenly spaced.

    Raises:
        ValueError: a check is wrong; or a prompt has none and no reward model ranks.
    """
    rows: list[tuple[str, tuple[Message, ...], Mapping[str, Any]]] = []
    if which is not Prompts.dialogues:
        rows += [(task.id, task.prompt, task.check) for task in tasks]
    if which is not Prompts.tasks:
        rows += [(dialogue.id, dialogue.prompt, {}) for dialogue in given if dialogue.prompt]
    found: dict[str, Asked] = {}
    seen = set()
    for name, messages, check in rows:
        key = repr([(m["role"], m["content"]) for m in messages])
        if key in seen:
            continue
        seen.add(key)
        while name in found:
            name += "'"
        if check:
            verifiers.validate_row(name, check)
        elif not is_ranked:
            raise ValueError(f"{name} has no check: only a reward model can judge answers to it, set reward.path=")
        found[name] = Asked(name, messages, check)
    return evenly(list(found.values()), most)


@dataclass(frozen=True)
class Sample:
    """One answer and what is thought of it."""

    prompt: Asked
    number: int
    text: str
    tokens: int
    finished: bool
    verified: float | None
    """What the verifier gives; None where there is none."""
    reward: float | None
    """What the reward model gives; None where there is none, or where it is no number."""
    is_ranked: bool
    """Whether a reward model ranks."""

    @property
    def name(self) -> str:
        """Of its row."""
        return f"{self.prompt.name}/{self.number}"

    @property
    def score(self) -> float | None:
        """By what answers are ranked."""
        return self.reward if self.is_ranked else self.verified

    @property
    def status(self) -> Status:
        """Whether it can be chosen."""
        if not self.text:
            return Status.empty
        if not self.finished:
            return Status.truncated
        if self.score is None:
            return Status.no_number if self.is_ranked else Status.unjudged
        return Status.usable

    def passes(self, gate: float) -> bool:
        """Whether its verifier, where there is one, gives enough."""
        return self.verified is None or self.verified >= gate

    def row(self, use: str) -> dict[str, Any]:
        """Its line in ``samples.jsonl``."""
        told = {"id": self.name, "answer": self.text, "tokens": self.tokens, "status": str(self.status)}
        return told | {"verified": self.verified, "reward": self.reward, "use": use}


def verify(prompt: Asked, text: str) -> float | None:
    """What the prompt's verifier gives an answer; None where it has none, or where this machine cannot judge."""
    if not prompt.check or not verifiers.is_checkable(prompt.check):
        return None
    return verifiers.check(prompt.check, text)


@dataclass(frozen=True)
class Chosen:
    """The best answer to a prompt, and the worse one that it is preferred to."""

    best: Sample
    worse: Sample | None


def choose(samples: Sequence[Sample], config: SelectionConfig) -> Chosen | None:
    """The best of one prompt's answers; None where none is good enough. Of equals it is the first."""
    usable = [sample for sample in samples if sample.status is Status.usable]
    good = [sample for sample in usable if sample.passes(config.gate) and _score(sample) >= _least(config)]
    if not good:
        return None
    best = max(good, key=lambda sample: (_score(sample), -sample.number))
    return Chosen(best, _worse(best, usable, config))


def _worse(best: Sample, usable: Sequence[Sample], config: SelectionConfig) -> Sample | None:
    margin = config.min_margin

    def is_worse(sample: Sample) -> bool:
        gap = _score(best) - _score(sample)
        return not sample.passes(config.gate) or (gap > 0 and gap >= margin)

    worse = [sample for sample in usable if is_worse(sample) and sample.text != best.text]
    match config.pairs:
        case Pairs.none:
            return None
        case Pairs.worst:
            return min(worse, key=lambda s: (s.passes(config.gate), _score(s), s.number), default=None)
        case Pairs.random:
            draw = int.from_bytes(hashlib.sha256(best.prompt.name.encode()).digest()[:8], "big")
            return worse[draw % len(worse)] if worse else None


def _score(sample: Sample) -> float:
    assert sample.score is not None
    return sample.score


def _least(config: SelectionConfig) -> float:
    return -math.inf if config.min_score is None else config.min_score


@dataclass(frozen=True)
class Selection:
    """What is learnt from one split."""

    samples: list[list[Sample]]
    """Per prompt."""
    chosen: list[Chosen]
    duplicates: dict[str, str]
    """Names of chosen answers that are left out, and what they resemble."""

    @property
    def dialogues(self) -> list[Dialogue]:
        """The best answers."""
        kept = [one.best for one in self.chosen if one.best.name not in self.duplicates]
        return [Dialogue(best.name, (*best.prompt.messages, _said(best))) for best in kept]

    @property
    def pairs(self) -> list[Pair]:
        """The best answers and worse ones."""
        return [
            Pair(one.best.name, one.best.prompt.messages, _said(one.best), _said(one.worse))
            for one in self.chosen
            if one.worse is not None
        ]

    def rows(self, split: str) -> list[dict[str, Any]]:
        """Every answer, and what it is used for."""
        use = {one.worse.name: "rejected" for one in self.chosen if one.worse is not None}
        use |= {one.best.name: "chosen" for one in self.chosen}
        use |= dict.fromkeys(self.duplicates, "duplicate")
        return [{"split": split, **s.row(use.get(s.name, ""))} for group in self.samples for s in group]


def _said(sample: Sample) -> Message:
    return {"role": "assistant", "content": sample.text}


def select(samples: Sequence[Sequence[Sample]], config: SelectionConfig) -> Selection:
    """What is learnt from the answers to each prompt."""
    chosen = [found for group in samples if (found := choose(group, config)) is not None]
    same: dict[str, str] = {}
    if config.duplicate_threshold is not None:
        long = [one.best for one in chosen if len(one.best.text.split()) >= config.duplicate_min_words]
        settings = {"threshold": config.duplicate_threshold, "words": config.shingle_words}
        earlier = duplicates.near_duplicates([best.text for best in long], **settings)  # type: ignore[arg-type]
        same = {best.name: long[place].name for best, place in zip(long, earlier, strict=True) if place is not None}
    return Selection([list(group) for group in samples], chosen, same)


def summary(selection: Selection, config: SelectionConfig) -> dict[str, Any]:
    """Figures of a split.

    ``mean_reward`` and ``best_of_k`` are of the ranking score over all answers that have one, cut ones too: of prompts
    that have k such answers. ``pass_at_k`` is over prompts with a verifier; an answer counts where it was finished and
    passes the gate.
    """
    everything = [sample for group in selection.samples for sample in group]
    scores = [sample.score for sample in everything if sample.score is not None]
    count = Counter(str(sample.status) for sample in everything)
    most = max((len(group) for group in selection.samples), default=0)
    found: dict[str, Any] = {
        "prompts": len(selection.samples),
        "answers": len(everything),
        "answered_prompts": len(selection.chosen),
        "dialogues": len(selection.dialogues),
        "pairs": len(selection.pairs),
        "mean_tokens": _mean([sample.tokens for sample in everything]),
        "mean_reward": _mean(scores),
        "share_duplicate": len(selection.duplicates) / len(selection.chosen) if selection.chosen else 0.0,
    }
    found |= {f"share_{status}": count[status] / max(1, len(everything)) for status in Status}
    for k in estimators.powers(most) if most else []:
        groups = [[s.score for s in group if s.score is not None] for group in selection.samples]
        found[f"best_of_{k}"] = _mean([estimators.best_of_k(group, k) for group in groups if len(group) >= k])
        verified = [group for group in selection.samples if any(s.verified is not None for s in group)]
        right = [
            (len(g), sum(s.finished and s.verified is not None and s.passes(config.gate) for s in g)) for g in verified
        ]
        found[f"pass_at_{k}"] = _mean([estimators.pass_at_k(n, c, k) for n, c in right if n >= k])
    found["histogram"] = estimators.bins(scores) if scores else {}
    return found


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
