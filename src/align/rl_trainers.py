"""TRL's trainers that learn from a model's own answers. Imports TRL, which is slow."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from trl.models.utils import unwrap_model_for_generation
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from llamita import chat
from llamita.align.watch import Watched


class Prompted(Watched):
    """Mixed into such a trainer: prompts are written as everywhere else in this project.

    TRL renders the template itself, with today's date where it asks for one, and reads special tokens in what a user
    says as real ones.
    """

    encoder: chat.Encoder

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self.encoder.prompt(prompt) for prompt in prompts], None, {}

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        if self._buffered_inputs is None:  # type: ignore[attr-defined]
            # TRL counts micro-batches from zero at every start, also in the middle of answers that are used for long.
            self._step = self.state.global_step * self.args.gradient_accumulation_steps  # type: ignore[attr-defined]
        return super()._prepare_inputs(generation_batch)  # type: ignore[misc]

    def whole_model(self) -> AbstractContextManager[Any]:
        """The model to let it speak; whole on every rank while the context is open."""
        context: AbstractContextManager[Any] = unwrap_model_for_generation(
            self.model_wrapped,  # type: ignore[attr-defined]
            self.accelerator,  # type: ignore[attr-defined]
        )
        return context


class GroupTrainer(Prompted, GRPOTrainer):
    """Shao et al. (2024, arXiv:2402.03300, equation 3); TRL's default loss sums over the tokens of a whole step."""


class LeaveOneOutTrainer(Prompted, RLOOTrainer):
    """Ahmadian et al. (2024, arXiv:2402.14740, section 2): the baseline is the mean reward of the other answers."""


class OnPolicyTrainer(Prompted, DistillationTrainer):
    """Agarwal et al. (2023, arXiv:2306.13649): a teacher's whole distribution on what the student itself says."""
