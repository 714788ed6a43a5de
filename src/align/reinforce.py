"""Learning from a model's own answers: which tasks, what an answer earns, and how far the model moves.

A :data:`Rewarder` is whatever gives one number for an answer to a task: a program that verifies it, or a reward model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import GenerationConfig

from llamita import chat
from llamita.align import verifiers
from llamita.align.dialogues import Refused, Task

Rewarder = Callable[[Sequence[Task], Sequence[str]], list[float]]
"""Answers of one task each to their rewards, in order."""


@dataclass(frozen=True)
class Prompts:
    """Tasks whose prompts fit."""

    tasks: list[Task]
    ids: list[list[int]]
    """With the header of the answer."""
    too_long: int = 0
    refused: int = 0
    unjudged: int = 0
    """Tasks whose check this machine cannot tell: each answer would earn 0, whatever it says."""

    def __len__(self) -> int:
        return len(self.tasks)


def encode(tasks: Sequence[Task], encoder: chat.Encoder, *, most: int, name: str, are_verified: bool = True) -> Prompts:
    """All tasks whose prompts have at most ``most`` tokens and, where checks reward, whose check can be told here.

    Raises:
        ValueError: none is left, or the template refuses more than a few.
    """
    refused = Refused()
    found = Prompts([], [])
    too_long = 0
    judged = [task for task in tasks if not are_verified or _is_told(task)]
    if tasks and not judged:
        raise ValueError(
            f"this machine can judge none of the {len(tasks)} tasks of {name}: telling languages needs langdetect"
        )
    for task in judged:
        try:
            ids = encoder.prompt(task.prompt)
        except ValueError as error:
            refused.add(f"{name} {task.id}", str(error))
            continue
        if len(ids) > most:
            too_long += 1
            continue
        found.tasks.append(task)
        found.ids.append(ids)
    refused.check(name, len(found) + too_long)
    if not len(found):
        raise ValueError(f"max_length leaves {most} tokens for a prompt, too few for all {too_long} tasks of {name}")
    return Prompts(found.tasks, found.ids, too_long, refused.total, len(tasks) - len(judged))


def _is_told(task: Task) -> bool:
    """Whether this machine can tell a part of the check; one that is wrong is named later."""
    is_ifeval = task.check.get("kind") == "ifeval" and task.check.get("instruction_id_list")
    return not is_ifeval or verifiers.is_checkable(task.check)


def dataset(prompts: Prompts) -> Dataset:
    """The tasks as TRL's trainers read them; ``task`` is the place of the task."""
    messages = [
        [{"role": m["role"], "content": m["content"], "code": bool(m.get("code"))} for m in task.prompt]
        for task in prompts.tasks
    ]
    return Dataset.from_dict({"prompt": messages, "task": list(range(len(prompts)))})


def judged(judge: Rewarder, tasks: Sequence[Task], answers: Sequence[str]) -> list[float]:
    """The rewards of answers, of which each is a number.

    Raises:
        ValueError: one is not finite, or no number; the task and the answer are named.
    """
    values = judge(tasks, answers)
    if len(values) != len(tasks):
        raise ValueError(f"{len(tasks)} answers were to be judged, {len(values)} rewards came back")
    for task, answer, value in zip(tasks, answers, values, strict=True):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"the reward of task {task.id} must be a finite number, got {value!r} for {answer[:60]!r}")
    return [float(value) for value in values]


def reward_function(judge: Rewarder, tasks: Sequence[Task], encoder: chat.Encoder) -> Callable[..., list[float]]:
    """The same as TRL calls it: with the ids that were said, and the place of each task."""

    def reward(*, completion_ids: Sequence[Sequence[int]], task: Sequence[int], **_: Any) -> list[float]:
        return judged(judge, [tasks[place] for place in task], [encoder.text(ids) for ids in completion_ids])

    return reward


def my_share(total: int) -> list[tuple[int, bool]]:
    """Which of ``total`` items this rank takes, and whether each counts: every rank takes as many.

    A rank that has none left takes the first again, because a model that is spread over ranks needs all of them.
    """
    state = PartialState()
    rounds = range(0, total, state.num_processes)
    places = [first + state.process_index for first in rounds]
    return [(place, True) if place < total else (0, False) for place in places]


@contextmanager
def _settings(model: Any, settings: GenerationConfig) -> Iterator[None]:
    """Settings of its own would be mixed into those that are asked for."""
    before, was_training = model.generation_config, model.training
    model.generation_config = settings
    model.eval()
    try:
        yield
    finally:
        model.generation_config = before
        model.train(was_training)


@torch.no_grad()
def answers(
    model: Any,
    prompts: Prompts,
    encoder: chat.Encoder,
    *,
    most: int,
    batch: int,
    temperature: float = 0.0,
    before_each: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """What a model says to each prompt, with the end of its turn, at most ``most`` tokens; the same on every rank.

    ``temperature`` 0 takes the likeliest token at each place; any other draws from the softened distribution.
    """
    device, pad_id = PartialState().device, encoder.borders.pad_id
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=most, eos_token_id=encoder.stop_ids, pad_token_id=pad_id, **drawn
    )
    share = my_share(len(prompts))
    found: list[tuple[int, list[int]]] = []
    with _settings(model, settings):
        for first in range(0, len(share), batch):
            before_each()
            mine = share[first : first + batch]
            rows = [prompts.ids[place] for place, _ in mine]
            length = max(map(len, rows))
            ids = torch.tensor([[pad_id] * (length - len(row)) + row for row in rows], device=device)
            mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
            said = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)[:, length:]
            ended = [_until_end(row, encoder.stop_ids) for row in said.tolist()]
            found += [(place, row) for (place, counts), row in zip(mine, ended, strict=True) if counts]
    table: list[list[int]] = [[] for _ in prompts.ids]
    for place, row in gather_object(found):
        table[place] = row
    return table


def _until_end(row: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in stop_ids), len(row) - 1)
    return row[: end + 1]


@torch.no_grad()
def divergence(
    policy: Any,
    other: Any,
    prompts: Prompts,
    said: Sequence[list[int]],
    *,
    dtype: torch.dtype,
    before_each: Callable[[], None] = lambda: None,
) -> float:
    """KL(policy || other) in nats for each token of an answer: exact at each place, in the contexts that were said.

    sum_v p(v) (log p(v) - log q(v)) over the whole vocabulary, averaged over all tokens of all answers. With answers
    drawn from the policy this is the divergence of the two as sequences, per token, without the noise of the usual
    estimate from the drawn tokens alone (k3 of Schulman, 2020), which TRL logs while it trains.
    """
    device = PartialState().device
    modes = [(model, model.training) for model in (policy, other)]
    for model, _ in modes:
        model.eval()
    total, count = 0.0, 0
    for place, counts in my_share(len(prompts)):
        before_each()
        ids = torch.tensor([[*prompts.ids[place], *said[place]]], device=device)
        kept = len(said[place])
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = [model(input_ids=ids, use_cache=False, logits_to_keep=kept + 1).logits for model, _ in modes]
        here, there = (each[0, :-1].double().log_softmax(-1) for each in logits)
        if counts:
            total += (here.exp() * (here - there)).sum().item()
            count += kept
    for model, was_training in modes:
        model.train(was_training)
    sums = gather_object([(total, count)])
    return float(sum(value for value, _ in sums) / max(1, sum(number for _, number in sums)))


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of none."""
    return sum(values) / max(1, len(values))
