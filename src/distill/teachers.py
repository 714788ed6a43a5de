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
from llamita.distill.losses import Targets, TeacherStates

Batch = Mapping[str, Tensor]


class Attention(StrEnum):
    """The attention kernel, by its name in transformers."""

    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"
    """Takes the borders of documents from the position ids and makes no mask; needs a GPU and bfloat16."""
    documents = "documents"
    """SDPA's causal kernel on one document after the other: no mask, and no work between documents."""
    eager = "eager"


class Placement(StrEnum):
    """Where a teacher's layers lie."""

    resident = "resident"
    """Whole on every process's device."""
    zero3 = "zero3"
    """Spread over the processes of a node, gathered one layer at a time."""


class Storage(StrEnum):
    """What a teacher's layers are stored in; embedding, norms and head are never quantised."""

    full = "full"
    """The precision of the student's layers."""
    int8 = "int8"
    nf4 = "nf4"
    """Four bits; needs the package bitsandbytes."""


@dataclass(kw_only=True)
class PlacementConfig:
    """A model that only reads: where its weights lie, and in how many bits."""

    path: Path | None = None
    placement: Placement = Placement.resident
    weights: Storage = Storage.full
    max_kl: float = 0.1
    """Nats per token by which quantised weights may differ from the full ones; the run ends where they differ more."""

    @property
    def is_common(self) -> bool:
        """Whether all processes must come along when it is made ready: to spread it, or to measure what bits cost."""
        return self.placement is not Placement.resident or self.weights is not Storage.full

    def check(self, setting: str) -> None:
        """Refuse what does not go together.

        Raises:
            ValueError: naming ``setting``, which this is the value of.
        """
        if not 0 < self.max_kl < math.inf:
            raise ValueError(f"{setting}.max_kl must be > 0 and finite, got {self.max_kl}")
        if self.weights is Storage.full and self.max_kl != PlacementConfig.max_kl:
            raise ValueError(f"{setting}.max_kl={self.max_kl} needs weights=int8 or nf4, got full")
        if self.placement is Placement.zero3 and self.weights is not Storage.full:
            raise ValueError(
                f"{setting}.weights={self.weights} does not go with placement=zero3: spread weights are not "
                "quantised; choose weights=full or placement=resident"
            )


@dataclass(kw_only=True)
class TeacherConfig(PlacementConfig):
    """A model to learn from: run beside the student, or read from a cache that was made of it before.

    Its ``path`` beside ``cache`` is the teacher that the cache must be of.
    """

    cache: Path | None = None
    """A directory of ``recipes/cache.py``; the teacher itself is not run then."""
    weight: float = 1.0
    """Its share in the mixture; shares are divided by their sum."""
    weight_end: float | None = None
    """Its share at the last step, reached on a straight line; unset: as ``weight``."""

    def check(self, setting: str) -> None:
        super().check(setting)
        for name, value in (("weight", self.weight), ("weight_end", self.weight_end)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{setting}.{name} must be > 0 and finite, got {value}")
        if self.path is None and self.cache is None:
            raise ValueError(f"{setting} needs path, or cache, or both, got neither")
        if self.cache is not None and self.is_common:
            raise ValueError(
                f"{setting}.placement={self.placement} and weights={self.weights} say how a teacher is run: "
                "one with a cache is not run, leave them at resident and full"
            )

    def share(self, step: int, steps: int) -> float:
        """The undivided share at ``step`` of ``steps``."""
        end = self.weight if self.weight_end is None else self.weight_end
        return self.weight + (end - self.weight) * step / steps


def check_settings(configs: Mapping[str, TeacherConfig]) -> None:
    """Refuse settings of teachers that cannot be meant, without looking at any file.

    Raises:
        ValueError: naming the setting.
    """
    for name, config in configs.items():
        config.check(f"teachers.{name}")
        if len(configs) == 1 and config.weight_end is not None:
            raise ValueError(f"teachers.{name}.weight_end={config.weight_end} needs another teacher to share with")


class Teacher(Protocol):
    """Whatever can say, for a micro-batch, from which hidden states and head its distribution follows."""

    name: str
    weight: float
    is_sparse: bool
    """Whether it gives sparse targets instead of hidden states and a head."""

    def states(self, batch: Batch, mask: Tensor | None) -> Targets:
        """Last hidden states ``[B, S, E]`` and head, or sparse targets; every rank calls this equally often."""
        ...


class ResidentTeacher:
    """A teacher whose weights lie on this process's device, whole."""

    is_sparse = False

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


def mask_for(attention: Attention, position_ids_BS: Tensor) -> Tensor | None:
    """The mask that a kernel needs: the other kernels take theirs from the position ids."""
    return document_mask(position_ids_BS) if attention is Attention.sdpa else None


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


def check_vocabularies(data: Vocabulary, models: list[Vocabulary]) -> None:
    """Refuse models whose ids mean something else than the data's.

    A model's matrix may have more rows than the tokenizer has tokens, and each model its own number of them: the loss
    leaves out the rows beyond the data's vocabulary.

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
