"""A trained model as a stock directory: weights, configuration, tokenizer with a template, ids that end a turn."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from llamita import chat, checkpoints, runs


def weights(trainer: Any) -> dict[str, Tensor]:
    """The trained weights by their names in a Hugging Face file, adapters added to what they correct.

    Every rank calls this; what is spread over ranks is whole on the main one.
    """
    if trainer.is_deepspeed_enabled:
        state: dict[str, Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        state = trainer.accelerator.unwrap_model(trainer.model_wrapped).state_dict()
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    return _merged(state, model) if hasattr(model, "peft_config") else state


@torch.no_grad()
def _merged(state: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    """W + (alpha / rank) B A, computed in float32: whoever stores it rounds once."""
    found: dict[str, Tensor] = {}
    prefix = "base_model.model."
    for name, tensor in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        plain = name.removeprefix(prefix).replace(".modules_to_save.default.", ".")
        owner, is_corrected, last = plain.partition(".base_layer.")
        if is_corrected:
            a, b = (state[f"{prefix}{owner}.lora_{side}.default.weight"].float() for side in "AB")
            tensor = torch.addmm(tensor.float(), b, a, alpha=model.get_submodule(f"{prefix}{owner}").scaling["default"])
            plain = f"{owner}.{last}"
        found[plain] = tensor
    return found


@contextmanager
def _source(parent: Path, out: Path, encoder: chat.Encoder) -> Iterator[Path]:
    """The parent's tokenizer and generation settings, with a chat template and the ids that end an answer."""
    for stale in out.glob(".source-*"):
        shutil.rmtree(stale)
    folder = out / f".source-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        checkpoints.copy_tokenizer(parent, folder)
        if not checkpoints.load_tokenizer(folder).chat_template:
            (folder / "chat_template.jinja").write_text(chat.TEMPLATE, encoding="utf-8")
        if (parent / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(parent)
        else:
            generation = GenerationConfig(bos_token_id=encoder.borders.bos_id)  # type: ignore[no-untyped-call]
        generation.eos_token_id = encoder.stop_ids
        generation.pad_token_id = encoder.borders.pad_id
        generation.save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(
    state: Mapping[str, Tensor],
    config: LlamaConfig,
    out: Path,
    *,
    parent: Path,
    encoder: chat.Encoder,
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
) -> list[str]:
    """Write the model to the root of ``out`` on the main process; returns the names of its files.

    ``config`` says what is published: its tensors, and nothing that a trainer has made of it.

    Raises:
        ValueError: a weight is not finite; nothing is published then.
    """
    if not runs.is_main_process():
        return []
    config = LlamaConfig.from_dict(config.to_dict())
    config.dtype = dtype
    wanted = checkpoints.stored_tensors(config)
    if wrong := [name for name in wanted if not torch.isfinite(state[name]).all()]:
        raise ValueError(f"{wrong[0]} is not finite: the run has failed and publishes nothing")
    with _source(parent, out, encoder) as source, checkpoints.ModelWriter(out, config) as writer:
        for name in wanted:
            writer.add(name, state[name].to(dtype))
        return writer.publish(source, provenance)
