"""A teacher whose decoder layers are stored in eight or four bits, and how far that moves what it says.

Only the matrices of the decoder layers are quantised, weights only: embedding, norms and head stay, and all arithmetic
runs in the precision of the student's layers. A teacher sees thousands of tokens at a time, where a product costs far
more than to restore its matrix, so that one matrix at a time is restored and multiplied as ever.

Eight bits need 1 byte per weight, NF4 0.5 and 0.016 for its scales: the layers of a 70B take 68.4 or 35.3 GB instead
of 136.9, beside 4.2 GB of embedding and head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from llamita import checkpoints
from llamita.distill.losses import LossConfig, TeacherStates, distillation_loss, supervised
from llamita.distill.teachers import Attention, Batch, Storage, document_mask, last_hidden, mask_for

NF4_BLOCK = 64
"""Weights that share a scale."""


class Int8Linear(nn.Module):
    """W[i, j] = s[i] q[i, j] with s[i] = max_j abs(W[i, j]) / 127 and q rounded to -127..127.

    Vector-wise quantisation (Dettmers et al., 2022, arXiv:2208.07339, section 2.1), of weights alone.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # A row of zeros has no scale; any does.
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / 127
        # Not saved, so that the model's files could only ever be those of a stock model.
        self.register_buffer("quantised", (weight.float() / scale).round().to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.quantised: Tensor
        self.scale: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        # A scale in bfloat16 would be wrong by as much as the rounding to eight bits.
        return functional.linear(hidden, (self.quantised * self.scale).to(hidden.dtype))


class Nf4Linear(nn.Module):
    """The sixteen quantiles of a normal distribution, with a scale for each block of weights.

    QLoRA (Dettmers et al., 2023, arXiv:2305.14314, section 3), the scales quantised too, by bitsandbytes.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        from bitsandbytes.functional import quantize_4bit

        packed, self.state = quantize_4bit(
            weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=True
        )
        self.register_buffer("packed", packed, persistent=False)
        self.packed: Tensor

    def forward(self, hidden: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return functional.linear(hidden, dequantize_4bit(self.packed, self.state).to(hidden.dtype))


def check(setting: str, storage: Storage) -> None:
    """Refuse what the installed packages cannot do, before anything is read.

    Raises:
        ValueError: naming the setting and the package.
    """
    if storage is Storage.nf4 and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{setting}.weights=nf4 needs the package bitsandbytes, which is not installed: "
            "pip install '.[quantised]', or choose int8 or full"
        )


def load(
    path: Path, storage: Storage, *, dtype: torch.dtype, device: torch.device, attention: Attention
) -> LlamaForCausalLM:
    """A model with quantised layers on ``device``; one matrix at a time is there in full.

    Raises:
        ValueError: as :class:`checkpoints.Weights`: a missing or unexpected tensor is fatal.
    """
    weights = checkpoints.Weights(path)
    weights.config._attn_implementation = attention.value
    model = checkpoints.meta_model(weights.config, dtype=dtype, device=device)
    names = set(weights.files)
    for index, layer in enumerate(model.model.layers):
        for below in [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]:
            name = f"model.layers.{index}.{below}.weight"
            names.remove(name)
            parent, _, child = below.rpartition(".")
            matrix = weights[name].to(device=device, dtype=dtype, copy=True)
            setattr(layer.get_submodule(parent), child, _linear(storage, matrix))
    tensors = {name: weights[name].to(device=device, dtype=dtype, copy=True) for name in sorted(names)}
    if weights.shape.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    return model


def _linear(storage: Storage, weight: Tensor) -> nn.Module:
    match storage:
        case Storage.int8:
            return Int8Linear(weight)
        case Storage.nf4:
            return Nf4Linear(weight)
        case Storage.full:
            raise AssertionError("full weights are not quantised")


@torch.no_grad()
def full_states(path: Path, batches: Sequence[Batch], *, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Last hidden states of the model in ``path`` as it is stored, one decoder layer at a time in memory.

    The states of all batches wait between layers, so every layer is read once.
    """
    weights = checkpoints.Weights(path)
    weights.config._attn_implementation = Attention.sdpa.value
    model = checkpoints.meta_model(weights.config, dtype=dtype, device=device).train(False).model

    def fill(module: nn.Module, tensors: dict[str, Tensor]) -> None:
        on_device = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
        module.load_state_dict(on_device, strict=True, assign=True)

    fill(model.embed_tokens, {"weight": weights["model.embed_tokens.weight"]})
    states = [model.embed_tokens(batch["input_ids"]) for batch in batches]
    model.embed_tokens.to("meta")
    inputs: list[dict[str, Any]] = [
        {
            "attention_mask": document_mask(batch["position_ids"]),
            "position_ids": batch["position_ids"],
            "position_embeddings": model.rotary_emb(hidden, batch["position_ids"]),
        }
        for batch, hidden in zip(batches, states, strict=True)
    ]
    for index in range(len(model.layers)):
        fill(model.layers[0], weights.layer(index))
        states = [model.layers[0](hidden, **given) for hidden, given in zip(states, inputs, strict=True)]
    fill(model.norm, {"weight": weights["model.norm.weight"]})
    return [model.norm(hidden) for hidden in states]


@torch.no_grad()
def divergence(
    model: LlamaForCausalLM, path: Path, batches: Sequence[Batch], *, dtype: torch.dtype, device: torch.device
) -> tuple[float, int]:
    """Sum of KL(stored model || ``model``) over the supervised positions of ``batches``, in nats, and their number."""
    total, count = 0.0, 0
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    for batch, full in zip(batches, full_states(path, batches, dtype=dtype, device=device), strict=True):
        attention = Attention(model.config._attn_implementation)
        ours = last_hidden(model, batch, mask_for(attention, batch["position_ids"]))
        head = model.lm_head.weight
        loss, _ = distillation_loss(
            ours, head, batch["labels"], [TeacherStates(full, head)], LossConfig(), measure=False
        )
        total += loss.item()
        count += int(supervised(batch["labels"]).sum())
    return total, count
