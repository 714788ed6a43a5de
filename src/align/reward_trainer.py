"""TRL's trainer of reward models on rows of ids. Imports TRL, which is slow."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification
from trl.trainer.reward_trainer import RewardTrainer

from llamita.align.watch import Watched


class DialogueTrainer(Watched, RewardTrainer):
    """The mean over pairs of -log sigmoid(r(w) - r(l)) (Ouyang et al., 2022, arXiv:2203.02155, equation 1).

    Every pair counts once, so that the loss is the same for any split into micro-batches and ranks. A reward is read
    at the last token of the dialogue, which ends the answer's turn.
    """


def with_score(model: LlamaForCausalLM, *, pad_id: int, seed: int) -> LlamaForSequenceClassification:
    """A language model with a head for one number in the place of its output matrix.

    The head is drawn from N(0, 1 / (d + 1)) for hidden size d (Stiennon et al., 2020, arXiv:2009.01325, appendix B.1),
    so that rewards begin near zero.
    """
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, pad_id
    with torch.device("meta"):
        made: Any = LlamaForSequenceClassification(config)  # type: ignore[no-untyped-call]
    made.model = model.model
    generator = torch.Generator().manual_seed(seed)
    size = config.hidden_size
    values = torch.randn(1, size, generator=generator) / (size + 1) ** 0.5
    made.score.weight = torch.nn.Parameter(values.to(device=model.device, dtype=model.dtype))
    assert isinstance(made, LlamaForSequenceClassification)
    return made
