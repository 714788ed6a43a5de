"""Text for the tests of pruning: rows of random documents, as the data directory gives them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llamita import checkpoints
from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import HiddenScore, LayerScore, WidthScore

Batch = dict[str, Tensor]
IGNORE = -100


def text(rows: int = 4, length: int = 24, *, seed: int = 0, vocab: int = 128) -> Batch:
    """Rows of documents of unequal length, labelled as the data directory does it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocab, (rows, length), generator=generator)
    positions, labels = torch.zeros_like(ids), ids.clone()
    for row in range(rows):
        cut = 5 + 3 * row
        positions[row] = torch.cat([torch.arange(cut), torch.arange(length - cut)])
    labels[positions == 0] = IGNORE
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def padded(batch: Batch, extra: int, pad_id: int = 1) -> Batch:
    """The rows with a document of padding behind."""
    rows = len(batch["input_ids"])
    tails = {
        "input_ids": torch.full((rows, extra), pad_id),
        "labels": torch.full((rows, extra), IGNORE),
        "position_ids": torch.arange(extra).expand(rows, -1),
    }
    return {name: torch.cat([tensor, tails[name]], 1) for name, tensor in batch.items()}


def saved(model: LlamaForCausalLM, path: Path) -> checkpoints.Weights:
    path.mkdir(parents=True, exist_ok=True)
    checkpoints.save_model(model, path, source=None, provenance={})
    return checkpoints.Weights(path)


def ranked(**kinds: Any) -> ScoreConfig:
    """Scores of one cheap pass, but for what is said otherwise."""
    return ScoreConfig(
        **{
            "mlp": WidthScore.norm_product,
            "attention": WidthScore.norm_product,
            "hidden": HiddenScore.activation,
            "layers": LayerScore.block_influence,
        }
        | kinds
    )
