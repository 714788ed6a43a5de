"""Where the student's weights come from, and how the trained ones become a model directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from llamita import checkpoints, faults
from llamita.adapters import LoraConfig
from llamita.distill import lora
from llamita.distill.teachers import Attention
from llamita.shapes import SIZES, LlamaShape, SizesConfig


class Init(StrEnum):
    """What a student with a path begins with."""

    checkpoint = "checkpoint"
    random = "random"
    """The sizes of the directory with fresh weights: the baseline of a pruned student."""


def _llama3_rope() -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


@dataclass(kw_only=True)
class ShapeConfig(SizesConfig):
    """Sizes of a student that starts from nothing; vocabulary and special tokens are those of the data.

    ``head_dim`` unset: hidden_size / num_attention_heads.
    """

    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131_072
    rope_parameters: dict[str, Any] = field(default_factory=_llama3_rope)
    """Llama 3.1's, whose factor is 8."""

    def is_set(self) -> bool:
        """Whether any size is given."""
        return any(getattr(self, name) is not None for name in SIZES)


@dataclass(kw_only=True)
class StudentConfig:
    """The model to train."""

    path: Path | None = None
    """A model directory; unset: ``shape`` with random weights."""
    init: Init = Init.checkpoint
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def check(self) -> None:
        """Raise ``ValueError`` unless it is said where the student comes from."""
        if self.path is not None and self.shape.is_set():
            raise ValueError(f"student.shape must not be set beside student.path={self.path}: the path decides")
        if self.path is None:
            optional = {"head_dim"}
            missing = [name for name in SIZES if name not in optional and getattr(self.shape, name) is None]
            if missing:
                raise ValueError(f"student.path is not set, so student.shape needs {', '.join(missing)}")
        if self.lora.rank and (self.path is None or self.init is Init.random):
            raise ValueError(
                f"student.lora.rank={self.lora.rank} corrects weights that are there: it needs student.path and "
                f"student.init=checkpoint, got student.path={self.path} and student.init={self.init}"
            )


def llama_config(student: StudentConfig, *, vocab_size: int, tokenizer_path: Path, sequence_length: int) -> LlamaConfig:
    """The student's configuration, before any weight is read or made.

    Raises:
        ValueError: sizes that no Llama can have, or rows longer than its positions.
    """
    if student.path is not None:
        config = checkpoints.load_config(student.path)
    else:
        config = _from_shape(student.shape, vocab_size, tokenizer_path)
    if config.max_position_embeddings < sequence_length:
        raise ValueError(
            f"the data has rows of {sequence_length} tokens, the student at most "
            f"max_position_embeddings={config.max_position_embeddings}"
        )
    return config


def _from_shape(shape: ShapeConfig, vocab_size: int, tokenizer_path: Path) -> LlamaConfig:
    values = {f.name: getattr(shape, f.name) for f in fields(shape)}
    assert shape.hidden_size is not None
    assert shape.num_attention_heads is not None
    if shape.num_attention_heads < 1:
        raise ValueError(f"student.shape.num_attention_heads must be at least 1, got {shape.num_attention_heads}")
    values["head_dim"] = shape.head_dim or shape.hidden_size // shape.num_attention_heads
    sizes = {name: values[name] for name in SIZES}
    LlamaShape(**sizes, vocab_size=vocab_size, tie_word_embeddings=shape.tie_word_embeddings)
    tokenizer = checkpoints.load_tokenizer(tokenizer_path)
    return LlamaConfig(
        **values,
        vocab_size=vocab_size,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@faults.phase("loading the student", memory="deepspeed=zero2, zero3 or zero3_offload, more GPUs")
def load(
    student: StudentConfig,
    config: LlamaConfig,
    *,
    seed: int,
    attention: Attention,
    device: torch.device,
    resting: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """The student with float32 weights: read onto ``device``, or drawn from the seed on the CPU.

    With adapters only these are float32, and the weights that rest in ``resting``.
    """
    if student.path is not None and student.init is Init.checkpoint:
        dtype = resting if student.lora.rank else torch.float32
        model = checkpoints.load_model(student.path, dtype=dtype, attn_implementation=attention, device=device)
        if student.lora.rank:
            lora.adapt(model, student.lora, seed=seed)
        return model
    torch.manual_seed(seed)
    config._attn_implementation = attention.value
    model = LlamaForCausalLM(config)
    torch.nn.Module.float(model)
    assert isinstance(model, LlamaForCausalLM)
    if student.path is not None and (student.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(student.path)
    return model


class Trained(Protocol):
    """Whatever holds a student's weights: the engine of a run, or the files of a checkpoint."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights by their names in a Hugging Face file."""
        ...


def publish(
    trained: Trained,
    config: LlamaConfig,
    out: Path,
    *,
    main: bool,
    source: Path,
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
) -> list[str]:
    """Write the trained student to the root of ``out``; every rank calls this, the main one writes.

    Tokenizer and generation settings come from ``source``; where it has no generation settings, the special tokens of
    ``config`` make them. Returns the names of the files.

    Raises:
        ValueError: a weight is not finite; nothing is published then.
    """
    config = LlamaConfig.from_dict(config.to_dict())
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    with ExitStack() as stack:
        writer = stack.enter_context(checkpoints.ModelWriter(out, config)) if main else None
        for name, tensor in trained.tensors():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is not finite: the run has failed and publishes nothing")
            if writer is not None:
                writer.add(name, tensor.to(dtype))
        if writer is None:
            return []
        generation = None
        if not (source / "generation_config.json").is_file():
            tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
            generation = GenerationConfig(**tokens)  # type: ignore[no-untyped-call]
        return writer.publish(source, provenance, generation=generation)
