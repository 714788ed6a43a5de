"""Models that the student learns from: frozen, without logits, caches or gradients.

A teacher gives its last hidden states and its head. The loss applies the head chunk by chunk, so that a teacher's
logits never exist for a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from llamita import checkpoints
from llamita.distill import documents, hidden
from llamita.distill.losses import TeacherStates

Batch = Mapping[str, Tensor]


class Attention(StrEnum):
    """The attention kernel, by its name in transformers."""

    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    """Takes the borders of documents from the position ids and makes no mask; needs a GPU and bfloat16."""
    documents = "documents"
    """SDPA's causal kernel on one document after the other: no mask, and no work between documents."""
    eager = "eager"


@dataclass(kw_only=True)
class TeacherConfig:
    """A model directory to learn from."""

    path: Path
    weight: float = 1.0
    """Its share in the mixture; shares are divided by their sum."""

    def __post_init__(self) -> None:
        if not 0 < self.weight < math.inf:
            raise ValueError(f"teachers.<name>.weight must be > 0 and finite, got {self.weight}")


class Teacher(Protocol):
    """Whatever can say, for a micro-batch, from which hidden states and head its distribution follows."""

    name: str
    weight: float

    def states(self, batch: Batch, mask: Tensor | None) -> TeacherStates:
        """Last hidden states ``[B, S, E]`` and head; every rank calls this equally often."""
        ...


class ResidentTeacher:
    """A teacher whose weights lie on this process's device, whole."""

    def __init__(self, name: str, model: LlamaForCausalLM, weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight
        self.layers: tuple[int, ...] = ()
        """Of which the states are given too."""
        self.model = model.requires_grad_(False)
        self.model.train(False)

    @classmethod
    def load(
        cls,
        name: str,
        path: Path,
        weight: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: Attention,
    ) -> Self:
        """Read a model directory onto ``device``."""
        model = checkpoints.load_model(path, dtype=dtype, attn_implementation=attention, device=device)
        return cls(name, model, weight)

    @torch.no_grad()
    def states(self, batch: Batch, mask: Tensor | None) -> TeacherStates:
        """Last hidden states and head, without gradient."""
        with hidden.captured(self.model, self.layers) as layers:
            last = last_hidden(self.model, batch, mask)
        return TeacherStates(last, self.model.lm_head.weight, self.weight, layers)


def last_hidden(model: LlamaForCausalLM, batch: Batch, mask: Tensor | None) -> Tensor:
    """Hidden states after the last norm, ``[B, S, H]``.

    transformers looks for document borders only in a batch of one row when FlashAttention runs: in more rows the
    documents would attend to each other without a word. So the rows are joined to one; every row starts at position 0.
    """
    ids, positions = batch["input_ids"], batch["position_ids"]
    size = ids.shape
    if str(model.config._attn_implementation).startswith("flash"):
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
    kernel: dict[str, Any] = {}
    if model.config._attn_implementation == documents.NAME:
        kernel["document_lengths"] = documents.lengths(positions)
    output = model.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, **kernel)
    hidden: Tensor = output.last_hidden_state
    return hidden.reshape(*size, -1)


def document_mask(position_ids_BS: Tensor) -> Tensor | None:
    """Where attention is allowed, ``[B, 1, S, S]``: to itself and backwards, never across a restart of the positions.

    One mask serves student and teachers. ``None`` where every row is a single document: then the causal kernel, which
    needs no mask, is right and faster.
    """
    restarts_BS = position_ids_BS[:, 1:] != position_ids_BS[:, :-1] + 1
    if not restarts_BS.any():
        return None
    document_BS = functional.pad(restarts_BS.cumsum(1), (1, 0))
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril()[:, None]


@dataclass(frozen=True)
class Vocabulary:
    """What two models, or a model and data, must share so that an id means the same to both."""

    size: int
    tokenizer_hash: str
    owner: str
    """Whose it is, for messages."""

    @classmethod
    def of_model(cls, path: Path, owner: str) -> Vocabulary:
        """Read from a model directory's ``config.json`` and tokenizer, before any weight is loaded."""
        size = checkpoints.shape_of(checkpoints.load_config(path)).vocab_size
        return cls(size, checkpoints.tokenizer_hash(checkpoints.load_tokenizer(path)), f"{owner} ({path})")


def check_model(name: str, path: Path, sequence_length: int) -> None:
    """Refuse a directory that is of no language model, or of one with fewer positions than a row has.

    Raises:
        ValueError: naming the directory.
    """
    llama = checkpoints.load_config(path)
    if checkpoints.is_classifier(llama):
        raise ValueError(f"{name}={path} is a token classifier of {llama.num_labels} output rows, not a language model")
    if llama.max_position_embeddings < sequence_length:
        raise ValueError(
            f"the data has rows of {sequence_length} tokens, {name}={path} at most "
            f"max_position_embeddings={llama.max_position_embeddings}"
        )


def check_vocabularies(data: Vocabulary, models: list[Vocabulary], *, student_size: int | None = None) -> None:
    """Refuse models whose ids mean something else than the data's or each other's.

    ``student_size`` is the vocabulary of a student that is not among ``models`` because it starts from nothing.

    A model's matrix may have more rows than the tokenizer has tokens, but all models must agree on how many.

    Raises:
        ValueError: naming both sides.
    """
    for model in models:
        if model.tokenizer_hash != data.tokenizer_hash:
            raise ValueError(
                f"the tokenizer of {model.owner} is not that of {data.owner}: {model.tokenizer_hash[:12]} and "
                f"{data.tokenizer_hash[:12]}; prepare the data with the model's tokenizer"
            )
        if model.size < data.size:
            raise ValueError(
                f"{model.owner} has a vocabulary of {model.size}, {data.owner} uses {data.size} ids: "
                "it must be at least as large"
            )
        size = student_size or models[0].size
        if model.size != size:
            other = "the student" if student_size else models[0].owner
            raise ValueError(
                f"{model.owner} has a vocabulary of {model.size}, {other} of {size}: "
                "student and teachers must have the same"
            )
