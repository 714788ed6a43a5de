"""The mean of several models' weights, tensor by tensor, so that no model is ever whole in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamita import checkpoints
from llamita.checkpoints import ModelWriter, Weights


@dataclass(kw_only=True)
class MemberConfig:
    """One of the models."""

    path: Path | None = None
    weight: float = 1.0
    """Its share, relative to the others' weights."""


def check(members: Mapping[str, MemberConfig]) -> None:
    """Raise ``ValueError`` for what cannot be averaged; no weight is read.

    Raises:
        ValueError: no path, a weight that is not positive, fewer than two models, or models of different
            configuration or tokenizer.
    """
    if len(members) < 2:
        raise ValueError(f"models: an average needs at least two models, got {len(members)}")
    for name, member in members.items():
        if member.path is None:
            raise ValueError(f"models.{name}.path must be given")
        if not 0 < member.weight < math.inf:
            raise ValueError(f"models.{name}.weight must be > 0 and finite, got {member.weight}")
    (first, path), *others = ((name, member.path) for name, member in members.items() if member.path is not None)
    config, tokenizer = _identity(path), checkpoints.tokenizer_of(path)
    for name, other in others:
        if differing := sorted(key for key, value in _identity(other).items() if config.get(key) != value):
            raise ValueError(
                f"models.{name}.path={other} and models.{first}.path={path} differ in {', '.join(differing)}: "
                "weights of different models have no mean"
            )
        if checkpoints.tokenizer_of(other) != tokenizer:
            raise ValueError(f"models.{name}.path={other} and models.{first}.path={path} have different tokenizers")


IGNORED = {"dtype", "torch_dtype", "transformers_version", "eos_token_id", "pad_token_id", "use_cache"}
"""Parts of a configuration that do not say what a weight means."""


def _identity(path: Path) -> dict[str, Any]:
    return {key: value for key, value in checkpoints.load_config(path).to_dict().items() if key not in IGNORED}


def mean(tensors: list[Tensor], weights: list[float]) -> Tensor:
    """``sum_i w_i t_i / sum_i w_i`` in float64, in the dtype of the first.

    Wortsman et al., 2022, arXiv:2203.05482, section 2 (a uniform soup where the weights are equal); Llama 3.1 does so
    after the reward model, SFT and DPO (Dubey et al., 2024, arXiv:2407.21783, section 4.1.5).
    """
    total = sum(weights)
    found = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        found.add_(tensor.double(), alpha=weight / total)
    return found.to(tensors[0].dtype)


def publish(members: Mapping[str, MemberConfig], out: Path, provenance: Mapping[str, Any]) -> list[str]:
    """Write the mean as a model directory, with the configuration and tokenizer of the first; returns its files.

    Raises:
        ValueError: a weight of a model is not finite.
    """
    check(members)
    paths = [member.path for member in members.values() if member.path is not None]
    opened = [Weights(path) for path in paths]
    shares = [member.weight for member in members.values()]
    with ModelWriter(out, opened[0].config) as writer:
        for name in checkpoints.stored_tensors(opened[0].config):
            averaged = mean([weights[name] for weights in opened], shares)
            if not averaged.isfinite().all():
                raise ValueError(f"{name} of the mean is not finite: one of {', '.join(map(str, paths))} is damaged")
            writer.add(name, averaged)
        return writer.publish(paths[0], provenance)
