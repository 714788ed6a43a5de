"""What each choice of the pruner is worth: one axis of a model is cut at a time, and the held-out loss is printed.

python benchmarks/prune_axes.py outputs/demo/teacher outputs/demo/data

Any directory of a small Llama with an untied head, and data of its tokenizer. Nothing is trained afterwards; what two
matrices become one by is also the start of steps on that matrix and the final norm alone.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import pruning_methods
from llamita import checkpoints
from llamita.data import loader, shards
from llamita.prune import importance, plan, stream, surgery
from llamita.prune.further import Further
from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import HiddenScore, LayerScore, WidthScore
from llamita.prune.target import Pairs, TargetConfig, Tie
from llamita.shapes import LlamaShape

TIED_STEPS = (100, 200)
Cut = tuple[str, str, TargetConfig, ScoreConfig]
"""Axis, choice, and what asks for it."""


def cuts(shape: LlamaShape) -> Iterator[Cut]:
    """Every axis by every choice."""
    heads, keys = shape.num_attention_heads, shape.num_key_value_heads
    widths: list[tuple[str, TargetConfig]] = [
        (
            f"MLP {shape.intermediate_size} → {shape.intermediate_size * 4 // 7}",
            _target(intermediate_size=4 / 7, of=shape),
        ),
        (f"query heads {heads} → {heads // 2}", TargetConfig(num_attention_heads=heads // 2)),
        (
            f"KV heads {keys} → {keys // 2} with their query heads",
            TargetConfig(num_attention_heads=heads // 2, num_key_value_heads=keys // 2),
        ),
    ]
    for pairs in Pairs:
        target = TargetConfig(head_dim=shape.head_dim // 2, pairs=pairs)
        widths.append((f"head size {shape.head_dim} → {shape.head_dim // 2}, pairs `{pairs}`", target))
    for axis, target in widths:
        for width in WidthScore:
            yield axis, width, target, ScoreConfig(mlp=width, attention=width)
    for share in (3 / 4, 1 / 2):
        target = _target(hidden_size=share, of=shape)
        for channels in HiddenScore:
            yield f"hidden {shape.hidden_size} → {target.hidden_size}", channels, target, ScoreConfig(hidden=channels)
    fewer = TargetConfig(num_hidden_layers=shape.num_hidden_layers - 1)
    for kind in LayerScore:
        yield f"layers {shape.num_hidden_layers} → {fewer.num_hidden_layers}", kind, fewer, ScoreConfig(layers=kind)
    for layer in range(shape.num_hidden_layers):
        kept = [index for index in range(shape.num_hidden_layers) if index != layer]
        yield "a single layer", f"without {layer}", TargetConfig(keep_layers=kept), ScoreConfig()
    for tie in Tie:
        yield "two matrices → one", tie, TargetConfig(tie_word_embeddings=True, tie=tie), ScoreConfig()


def _target(*, of: LlamaShape, **shares: float) -> TargetConfig:
    sizes: dict[str, Any] = {name: round(getattr(of, name) * share) for name, share in shares.items()}
    return TargetConfig(**sizes)


def rows(data: shards.PackedData, split: str, number: int) -> list[stream.Batch]:
    """The first rows of a split."""
    return list(loader.Sequential(data.split(split), batch_rows=16, max_rows=number))


def main() -> None:
    """Score once, cut every way, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--calibration-rows", type=int, default=128)
    parser.add_argument("--held-out-rows", type=int, default=64)
    told = parser.parse_args()
    weights, data = checkpoints.Weights(told.model), shards.PackedData.open(told.data)
    held_out, exact = rows(data, "validation", told.held_out_rows), torch.float32
    further = Further(by_gradient=True, greedy_rounds=1, longest_block=1)
    text = rows(data, "train", told.calibration_rows)
    scores = importance.measure(weights, text, dtype=exact, second_order=True, further=further)
    print(f"torch {torch.__version__}, {weights.shape}")
    print("| cut | by | loss |\n|---|---|---|")
    print(f"| nothing | | {stream.mean_loss(weights, held_out, dtype=exact):.3f} |", flush=True)
    for axis, choice, target, kinds in cuts(weights.shape):
        kept = plan.make(scores, weights.shape, target, kinds)
        plans = {choice: kept}
        if target.hidden_size is not None:
            plans[f"{choice}, norm gains as they were"] = dataclasses.replace(
                kept, norm_gain=torch.ones_like(kept.norm_gain)
            )
        for name, one in plans.items():
            pruned = surgery.Pruned(weights, one)
            models: dict[str, stream.Model] = {name: pruned}
            if one.tie is not None:
                for steps in TIED_STEPS:
                    config = dataclasses.replace(pruning_methods.OFF, tied_steps=steps)
                    models[f"{name}, {steps} steps"] = pruning_methods.mended(pruned, text, config, "cpu")
            for label, model in models.items():
                print(f"| {axis} | {label} | {stream.mean_loss(model, held_out, dtype=exact):.3f} |", flush=True)


if __name__ == "__main__":
    main()
