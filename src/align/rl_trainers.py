"""TRL's trainers that learn from a model's own answers. Imports TRL, which is slow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # Adapters hide the wrapper that chooses the precision, and an embedding that is trained is float32 beside
        # layers that rest in bfloat16.
        with self.accelerator.autocast():  # type: ignore[attr-defined]
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def whole_model(self) -> Iterator[Any]:
        """The model to let it speak; whole on every rank while the context is open."""
        wrapped: Any = self.model_wrapped  # type: ignore[attr-defined]
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        with unwrap_model_for_generation(wrapped, accelerator) as model, accelerator.autocast():
            yield model


class GroupTrainer(Prompted, GRPOTrainer):
    """Shao et al. (2024, arXiv:2402.03300, equation 3); TRL's default loss sums over the tokens of a whole step."""


class LeaveOneOutTrainer(Prompted, RLOOTrainer):
    """Ahmadian et al. (2024, arXiv:2402.14740, section 2): the baseline is the mean reward of the other answers."""


class OnPolicyTrainer(Prompted, DistillationTrainer):
    """Agarwal et al. (2023, arXiv:2306.13649): a teacher's whole distribution on what the student itself says."""

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        # TRL puts the loss in the place of the forward pass, and with it of the wrapper that chooses the precision.
        with self.accelerator.autocast():
            return super()._compute_loss(*args, **kwargs)  # type: ignore[no-untyped-call]
