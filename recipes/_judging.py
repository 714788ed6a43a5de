"""Who judges the answers of the rl recipe, which trainer learns from them, and how both ends of a run are measured."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import _aligning
from llamita.align import reinforce, reward_model, trainers, verifiers, watch
from llamita.align.dialogues import Task
from llamita.align.rejection import evenly
from llamita.align.reward_model import least_where_unread

TRAINERS = {
    "grpo": ("grpo_config", "GRPOConfig", "GroupTrainer"),
    "rloo": ("rloo_config", "RLOOConfig", "LeaveOneOutTrainer"),
    "distill": ("distillation_config", "DistillationConfig", "OnPolicyTrainer"),
}


def check_backend(trainer: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` where answers are to be drawn by a program that is not installed."""
    if trainer.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise ValueError("trainer.use_vllm=true needs vLLM, which is not installed; without it transformers is used")


def kind(method: str) -> tuple[Any, Any]:
    """TRL's settings of a method, and its trainer; imports TRL."""
    module, arguments, trainer = TRAINERS[method]
    ours = importlib.import_module("llamita.align.rl_trainers")
    return getattr(importlib.import_module(f"trl.trainer.{module}"), arguments), getattr(ours, trainer)


def encoded(config: Any, given: _aligning.Given) -> dict[str, reinforce.Prompts]:
    """The tasks of both splits whose prompts leave room for an answer.

    Raises:
        ValueError: there are none, or none fits.
    """
    tasks = {"train": given.data.tasks("train")}
    if config.validation_tasks:
        given.data.need("validation", "tasks", without="validation_tasks=0")
        tasks["validation"] = evenly(given.data.tasks("validation"), config.validation_tasks)
    most = config.max_length - config.max_answer_tokens
    are_verified = config.reward.path is None and config.teacher.path is None
    return {
        split: reinforce.encode(part, given.encoder, most=most, name=f"{split}.tasks.jsonl", are_verified=are_verified)
        for split, part in tasks.items()
    }


def counts(prompts: Mapping[str, reinforce.Prompts]) -> dict[str, float]:
    """How many tasks are used, and how many are left out."""
    found: dict[str, float] = {}
    for split, part in prompts.items():
        kinds = {"tasks": len(part), "too_long": part.too_long, "refused": part.refused, "unjudged": part.unjudged}
        found |= {f"data/{split}_{kind}": number for kind, number in kinds.items()}
    return found


def check(tasks: Sequence[Task], reward: Path | None) -> None:
    """See that every task can be judged.

    Raises:
        ValueError: naming the task, or what is wrong with the reward model.
    """
    if reward is not None:
        reward_model.load_config(reward)
        return
    for task in tasks:
        if not task.check:
            raise ValueError(f"task {task.id} has no check: reward.path must be given, got none")
        try:
            verifiers.validate(task.check)
        except ValueError as error:
            raise ValueError(f"task {task.id}: {error}") from None


def judge(reward: Path | None, stage: _aligning.Stage) -> reinforce.Rewarder:
    """A reward model where there is one, else the checks of the tasks."""
    if reward is None:
        return lambda tasks, answers: [verifiers.check(t.check, a) for t, a in zip(tasks, answers, strict=True)]
    with trainers.not_yet_spread(stage.arguments):  # transformers would spread it too, and nobody gathers it
        model = reward_model.RewardModel.open(reward, device=stage.device)

    def score(tasks: Sequence[Task], answers: Sequence[str]) -> list[float]:
        told = [(task.prompt, answer) for task, answer in zip(tasks, answers, strict=True)]
        names = [task.id for task in tasks]
        return least_where_unread(model.score(told, names, may_be_nan=True), names)

    return score


@dataclass
class HeldOut:
    """What is measured on held-out tasks before the first step and after the last."""

    stage: _aligning.Stage
    prompts: reinforce.Prompts | None
    judge: reinforce.Rewarder | None
    teacher: Any

    def before(self, model: Any) -> dict[str, float]:
        """Mean reward of the likeliest answers, and the divergence from a teacher; kept for later starts."""
        if self.prompts is None:
            return {}
        names = self._names()
        with self.stage.as_trained(model):
            kept = watch.measured_once(
                self.stage.run.path / "reference" / "held_out.safetensors",
                self.stage.about,
                lambda: torch.tensor([self._measure(model, model)[name] for name in names], dtype=torch.float64),
            )
        return dict(zip(names, kept.tolist(), strict=True))

    def after(self, trainer: Any) -> dict[str, float]:
        """The same, and the divergence from the model that training started from."""
        if self.prompts is None:
            return {}
        with trainer.whole_model() as whole:
            found = self._measure(whole, trainer.model_wrapped)
            said = self._answers(whole, temperature=1.0)
        start = self.stage.load_other(self.stage.config.model.path)
        return found | {"val/held_out/kl_to_start": self._divergence(trainer.model_wrapped, start, said)}

    def _names(self) -> list[str]:
        return [f"val/held_out/{'reward' if self.teacher is None else 'kl_to_teacher'}"]

    def _measure(self, speaks: Any, model: Any) -> dict[str, float]:
        assert self.prompts is not None
        if self.teacher is not None:
            said = self._answers(speaks, temperature=1.0)
            return {"val/held_out/kl_to_teacher": self._divergence(model, self.teacher, said)}
        assert self.judge is not None
        texts = [self.stage.given.encoder.text(ids) for ids in self._answers(speaks, temperature=0.0)]
        return {"val/held_out/reward": reinforce.mean(reinforce.judged(self.judge, self.prompts.tasks, texts))}

    def _answers(self, model: Any, *, temperature: float) -> list[list[int]]:
        assert self.prompts is not None
        config: Any = self.stage.config
        torch.manual_seed(config.run.seed + watch.rank())
        with self.stage.autocast():
            return reinforce.answers(
                model,
                self.prompts,
                self.stage.given.encoder,
                most=config.max_answer_tokens,
                batch=config.micro_batch_rows,
                temperature=temperature,
                before_each=self.stage.breathe,
            )

    def _divergence(self, model: Any, other: Any, said: Sequence[list[int]]) -> float:
        assert self.prompts is not None
        return reinforce.divergence(
            model, other, self.prompts, said, dtype=self.stage.computed_in, before_each=self.stage.breathe
        )
