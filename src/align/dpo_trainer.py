"""TRL's trainer of direct preference optimisation, with the terms of Llama 3.1. Imports TRL, which is slow."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer

from llamita.align.watch import Watched


class PairTrainer(Watched, DPOTrainer):
    """Rafailov et al. (2023, arXiv:2305.18290, equation 7) on rows of ids, plus the likelihood of the chosen answer.

    A pair costs -log sigmoid(beta (log p(w)/p_ref(w) - log p(l)/p_ref(l))) - ``nll_weight`` * log p(w) / |w|, the mean
    of which over the pairs of a step is the loss. The second term is that of Pang et al. (2024, arXiv:2404.19733,
    equation 1), whose weight Llama 3.1 has at 0.2 (arXiv:2407.21783, section 4.1.4). TRL's own (``sft``) is a mean
    over the tokens of a micro-batch, which changes with the split; here each pair is divided by its own length |w|, so
    that the loss is the same for any split into micro-batches and ranks. Both terms leave out the same tokens.
    """

    def __init__(self, *args: Any, nll_weight: float, **kwargs: Any) -> None:
        self._nll_weight = nll_weight
        super().__init__(*args, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """Tensors on their device, as they are: transformers would round the reference's sums to DeepSpeed's bfloat16.

        From 128 nats on, which an answer of some hundred tokens has, its steps are whole nats.
        """
        if isinstance(data, Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """The rows are ids already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        """The rows hold them already: TRL's own would lie in a cache that only one process finds."""
        return dataset

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        seen: list[Tensor] = []

        def through(**given: Any) -> Any:
            outputs = model(**given)
            seen.append(outputs.log_probs)
            return outputs

        loss = super()._compute_loss(through, inputs, return_outputs)  # type: ignore[no-untyped-call]
        counts = inputs["completion_mask"][:, 1:]
        lengths = counts.chunk(2)[0].sum(1)
        sums = seen[0][:, -counts.shape[1] :].chunk(2)[0].sum(1)
        nll = -(sums / lengths.clamp(min=1)).mean()
        self._metrics["train"]["nll"].append(self.accelerator.gather(nll.detach()).mean().item())
        return loss + self._nll_weight * nll
