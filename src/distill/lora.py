"""Low-rank adapters: a student whose own weights rest while a small correction of each projection is learnt.

Beside weights that rest, of 2 bytes each on a GPU, an adapter of rank r holds r (in + out) values with their gradients
and moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from llamita.adapters import ENDS, LoraConfig

ADAPTER = "default"


def adapt(student: LlamaForCausalLM, config: LoraConfig, *, seed: int) -> None:
    """Let the student's weights rest and put float32 adapters drawn from ``seed`` beside its projections."""
    import peft

    torch.manual_seed(seed)
    peft.inject_adapter_in_model(config.of_peft(), student, adapter_name=ADAPTER)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_trained(name, config))
        if is_trained(name, config):
            parameter.data = parameter.data.float()
    for layer in student.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            # Autocast chooses the precision of the products; a float32 copy of every input would be kept for nothing.
            layer.cast_input_dtype_enabled = False


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def is_trained(name: str, config: LoraConfig) -> bool:
    """Whether a parameter of that name is trained beside the weights that rest."""
    return is_adapter(name) or (config.embeddings and name in ENDS)


def _together(_: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    return nullcontext()


class Merged:
    """A student with adapters as it is published: one matrix where an adapter corrects another."""

    def __init__(self, student: LlamaForCausalLM) -> None:
        self._student = student

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As the function of that name."""
        return tensors(self._student)


@torch.no_grad()
def tensors(
    student: LlamaForCausalLM, gathered: Callable[[list[nn.Parameter]], AbstractContextManager[Any]] = _together
) -> Iterator[tuple[str, Tensor]]:
    """The student's weights by their names in a Hugging Face file, adapters added to what they correct.

    W + (alpha / rank) B A is computed in float32 and returned so: whoever stores it rounds once. ``gathered`` makes
    parameters whole that are spread over ranks, as long as its context is open; every rank must iterate to the end.
    """
    for name, parameter in student.named_parameters():
        if is_adapter(name):
            continue
        owner, found, last = name.partition(".base_layer.")
        if not found:
            with gathered([parameter]):
                tensor = parameter.detach().clone()
            yield name, tensor
            continue
        layer: Any = student.get_submodule(owner)
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        with gathered([parameter, a, b]):
            merged = torch.addmm(parameter.float(), b.float(), a.float(), alpha=layer.scaling[ADAPTER])
        yield f"{owner}.{last}", merged
