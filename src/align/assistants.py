"""How good an assistant is, row by row: every figure is a ratio of two sums over rows that are the same for all models.

So the rows give the standard error of a figure and, paired, the interval of a difference between two models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaForCausalLM

from llamita import chat
from llamita.align import generation, refusals, verifiers
from llamita.align.dialogues import Dialogue, Pair, Task
from llamita.align.generation import Answer, Scored
from llamita.align.ifeval import Variant


@dataclass
class Measure:
    """What each row adds to the two sums of a figure."""

    rows: list[str] = field(default_factory=list)
    """Their names."""
    numerator: list[float] = field(default_factory=list)
    denominator: list[float] = field(default_factory=list)

    def add(self, name: str, numerator: float, denominator: float = 1.0) -> None:
        """One row more."""
        self.rows.append(name)
        self.numerator.append(float(numerator))
        self.denominator.append(float(denominator))


Measures = dict[str, Measure]


def losses(
    model: LlamaForCausalLM, encoder: chat.Encoder, dialogues: Sequence[Dialogue], *, batch_rows: int
) -> list[tuple[float, float]]:
    """Nats and tokens of what the assistant says in each dialogue, the ends of its turns included."""
    encoded = [encoder.dialogue(dialogue.messages) for dialogue in dialogues]
    total, count = generation.log_probabilities(
        model, [Scored(one.ids, one.supervised) for one in encoded], batch_rows=batch_rows
    )
    return list(zip((-total).tolist(), count.tolist(), strict=True))


def preferences(
    model: LlamaForCausalLM, encoder: chat.Encoder, pairs: Sequence[Pair], *, batch_rows: int
) -> list[tuple[float, float]]:
    """Whether each pair's chosen answer is likelier than the rejected one: as a whole, and per token; a tie is half."""
    texts = [
        Scored.answer(*encoder.answer(pair.prompt, side)) for pair in pairs for side in (pair.chosen, pair.rejected)
    ]
    total, count = generation.log_probabilities(model, texts, batch_rows=batch_rows)
    mean = total / count
    return [
        (_above(float(total[place]), float(total[place + 1])), _above(float(mean[place]), float(mean[place + 1])))
        for place in range(0, len(texts), 2)
    ]


def _above(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def likelihoods(dialogues: Sequence[Dialogue], told: Sequence[tuple[float, float]]) -> Measures:
    """``loss`` in nats per token of the assistant."""
    found = Measure()
    for dialogue, (nats, tokens) in zip(dialogues, told, strict=True):
        found.add(dialogue.id, nats, tokens)
    return {"loss": found} if dialogues else {}


def accuracies(pairs: Sequence[Pair], told: Sequence[tuple[float, float]]) -> Measures:
    """``preference_accuracy`` by the log-probability of the whole answer, and per token of it."""
    found = {"preference_accuracy": Measure(), "preference_accuracy_per_token": Measure()}
    for pair, both in zip(pairs, told, strict=True):
        for measure, value in zip(found.values(), both, strict=True):
            measure.add(pair.id, value)
    return found if pairs else {}


def verified(tasks: Sequence[Task], answers: Sequence[Answer]) -> Measures:
    """What each kind of check says of the answers.

    ``number/exact``; ``python/parses`` and ``python/score``; for IFEval (Zhou et al., 2023, arXiv:2311.07911, section
    3.1) ``ifeval/prompt_strict``: all instructions of a prompt are followed, ``ifeval/instruction_strict``: the share
    of instructions, and both ``_loose``; ``KIND/score`` for others. An instruction that this machine cannot check is
    left out, and a prompt that has none left too; how many is ``ifeval/checkable``. ``truncated`` is the share of
    answers that did not end.
    """
    found: Measures = {}

    def add(measure: str, name: str, numerator: float, denominator: float = 1.0) -> None:
        found.setdefault(measure, Measure()).add(name, numerator, denominator)

    for task, answer in zip(tasks, answers, strict=True):
        add("truncated", task.id, not answer.finished)
        match task.check.get("kind"):
            case None:
                continue
            case "ifeval":
                for variant in Variant:
                    told = [
                        value for value in verifiers.followed(task.check, answer.text, variant) if value is not None
                    ]
                    if told:
                        add(f"ifeval/prompt_{variant}", task.id, all(told))
                        add(f"ifeval/instruction_{variant}", task.id, sum(told), len(told))
                add("ifeval/checkable", task.id, len(told), len(task.check["instruction_id_list"]))
            case "number":
                add("number/exact", task.id, verifiers.check(task.check, answer.text))
            case "python":
                add("python/parses", task.id, verifiers.check({"kind": "python"}, answer.text))
                add("python/score", task.id, verifiers.check(task.check, answer.text))
            case kind:
                add(f"{kind}/score", task.id, verifiers.check(task.check, answer.text))
    return found


def refused(name: str, prompts: Sequence[str], answers: Sequence[Answer]) -> Measures:
    """``refused/NAME``: the share of answers that begin as refusals do."""
    found = Measure()
    for number, (_, answer) in enumerate(zip(prompts, answers, strict=True)):
        found.add(f"{name}/{number}", refusals.is_refusal(answer.text))
    return {f"refused/{name}": found}


def toxic(answers: Mapping[str, Answer], words: Sequence[str]) -> Measures:
    """``listed_words``: the share of all answers that hold a word of the given list."""
    found = Measure()
    for name, answer in answers.items():
        found.add(name, refusals.holds(answer.text, words))
    return {"listed_words": found} if answers else {}


def rewarded(rewards: Mapping[str, float]) -> Measures:
    """``reward``: what the reward model gives on average."""
    found = Measure()
    for name, value in rewards.items():
        found.add(name, value)
    return {"reward": found} if rewards else {}


def wins(model: Measure, baseline: Measure) -> Measure:
    """Rows in which a model's answer has the higher reward; equal ones are half a win.

    Raises:
        ValueError: the two were not asked the same.
    """
    if model.rows != baseline.rows:
        raise ValueError("a win rate needs both models asked the same")
    found = Measure()
    for name, mine, other in zip(model.rows, model.numerator, baseline.numerator, strict=True):
        found.add(name, _above(mine, other))
    return found


def read(told: Mapping[str, Any]) -> Measures:
    """Measures from a file."""
    return {name: Measure(**value) for name, value in told.items()}
