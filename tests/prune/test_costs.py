"""What a plan says of pruning: counts on the shapes, item by item, and against what a run holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from calibration import saved, text
from conftest import tiny_model
from llamita import checkpoints, estimate
from llamita.estimate import Arithmetic
from llamita.prune import attention, costs, gradients, head, importance, mend, plan, surgery, tune
from llamita.prune.compensation import CompensationConfig
from llamita.prune.costs import Pruning
from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import LayerScore, WidthScore
from llamita.prune.target import TargetConfig
from llamita.shapes import PUBLISHED
from storages import Peak

LLAMA_8B = PUBLISHED["meta-llama/Llama-3.1-8B"]
LLAMA_1B, LLAMA_3B = PUBLISHED["meta-llama/Llama-3.2-1B"], PUBLISHED["meta-llama/Llama-3.2-3B"]
STEPS = {"attention_steps": 200, "layer_steps": 200, "head_steps": 200, "tied_steps": 200}


def pruning(**changes: Any) -> Pruning:
    """8B to 1B on 128 rows of 2,048 tokens."""
    base = Pruning(
        source=LLAMA_8B,
        target=LLAMA_1B,
        tokens=2**18,
        row_tokens=2048,
        batch_tokens=2048,
        stored_bytes=2,
        compute_bytes=2,
        shard_bytes=checkpoints.SHARD_BYTES,
        depth_tokens=2**14,
        depth_bytes=4.0 * estimate.GIB,
        attention_chunk_bytes=attention.CHUNK_BYTES,
        logit_chunk_bytes=head.CHUNK_BYTES,
    )
    return dataclasses.replace(base, **changes)


DEFAULT = {"second_order": True, "greedy_rounds": 16, "mended": True, **STEPS}


def flops(run: Pruning) -> dict[str, float]:
    return {name: work.flops for name, work in costs.operations(run).items()}


def test_without_text_nothing_is_computed() -> None:
    assert costs.operations(pruning(tokens=0)) == {}


def test_eight_billion_to_one_fits_a_small_gpu_and_its_host() -> None:
    """The promise: 24 GiB of GPU memory and 8 GiB of host memory, at 128 rows of 2,048 tokens and at long rows."""
    memory = costs.memory(pruning(**DEFAULT))
    assert sum(memory.host.values()) < 8 * estimate.GIB
    assert sum(memory.device.values()) < 24 * estimate.GIB
    longer = costs.memory(pruning(**DEFAULT, row_tokens=8192, batch_tokens=8192))
    assert sum(longer.device.values()) < 24 * estimate.GIB


def test_every_setting_that_costs_something_changes_the_sums() -> None:
    """The Taylor scores, further layers, the block test, each kind of steps."""
    base = pruning(**DEFAULT)
    for changes in (
        {"gradient_tokens": 32768},
        {"greedy_rounds": 28},
        {"longest_block": 16},
        {"second_order": False},
        *({name: 0} for name in STEPS),
    ):
        assert sum(flops(dataclasses.replace(base, **changes)).values()) != sum(flops(base).values()), changes
    hungry = {"gradient_tokens": 2**18}
    held = [sum(costs.memory(pruning(**hungry, spills=spills)).host.values()) for spills in (False, True)]
    assert held[0] - held[1] > 30 * 2 * 2**18 * 4096 - 4 * estimate.GIB
    short = pruning(mended=True, attention_steps=200, tokens=8192, row_tokens=8192, batch_tokens=8192)
    with_attention = costs.memory(short).device
    assert sum(with_attention.values()) >= sum(
        costs.memory(dataclasses.replace(short, attention_steps=0)).device.values()
    )


def test_scores_of_an_earlier_run_cost_nothing() -> None:
    found = costs.operations(pruning(**DEFAULT, measured=False))
    assert not any(name.startswith("calibration") for name in found)


def test_a_step_is_a_batch_forward_and_backward_in_wide_numbers() -> None:
    cut = LLAMA_1B.forward_flops_per_token(1024, head=False)
    with_steps, without = (costs.operations(pruning(mended=True, layer_steps=steps)) for steps in (200, 0))
    assert with_steps["mending, steps"].arithmetic is Arithmetic.float32
    assert with_steps["mending, steps"].flops > 3 * 200 * 2048 * cut
    assert without["mending, steps"].flops == 0
    assert costs.operations(pruning(second_order=True))["calibration, elimination"].arithmetic is Arithmetic.float64


def test_a_matrix_that_is_input_and_output_runs_each_layer_once_more() -> None:
    layers, head_flops = LLAMA_1B.forward_flops_per_token(1024, head=False), 2.0 * 128256 * 2048
    held = 2 * 16 * 2048  # one batch in eight, before and after
    tied = flops(pruning(mended=True, tied_steps=200))["mending, steps"]
    assert tied == pytest.approx(200 * 2048 * (4 * layers + 3 * head_flops) + held * (layers + head_flops))
    untied = dataclasses.replace(LLAMA_1B, tie_word_embeddings=False)
    assert flops(pruning(target=untied, mended=True, tied_steps=200))["mending, steps"] == 0


def test_a_round_of_removal_runs_what_is_behind_each_layer() -> None:
    """Half the model behind each of 32 layers, 528 layers in all, and 33 times the head."""
    one = flops(pruning(greedy_rounds=1))["calibration, greedy removal"] / 2**14
    layer = LLAMA_8B.forward_flops_per_token(1024, head=False) / 32
    assert one == pytest.approx(528 * layer + 33 * 2.0 * 128256 * 4096)
    # All blocks of one layer are a round; those of two run 31 * 30 / 2 layers more.
    blocks = [flops(pruning(longest_block=n))["calibration, contiguous removal"] / 2**14 for n in (1, 2)]
    assert blocks[1] - blocks[0] == pytest.approx(30 * 31 / 2 * layer + 31 * 2.0 * 128256 * 4096)


def test_attention_is_counted_where_heads_narrow() -> None:
    found = costs.operations(pruning(mended=True, attention_steps=200))
    steps, held = 200 * 2048, 2 * 16 * 2048
    forward = 2.0 * 16 * 64 * (40 * 2048 + 32 * 2048)
    assert found["mending, attention steps"].flops == pytest.approx((3 * steps + held) * forward)
    assert "mending, attention steps" not in costs.operations(
        pruning(target=LLAMA_3B, mended=True, attention_steps=200)
    )


def test_constants_that_are_said_twice_are_the_same() -> None:
    assert (costs.ATTENTION_TENSORS, costs.HELD_OUT) == (attention.CHUNK_TENSORS, tune.HELD_OUT)


def test_the_largest_pass_is_the_peak_of_each_side() -> None:
    few, many = (costs.memory(pruning(tokens=tokens)) for tokens in (2048, 2**20))
    assert any(name.startswith("surgery") for name in few.host)
    assert many.host["calibration: hidden states, before and behind the final norm"] == 2 * 2**20 * 4096 * 2
    assert not any(name.startswith(("surgery", "Python")) for name in few.device)
    assert sum(few.together.values()) <= sum(few.host.values()) + sum(few.device.values())


def test_pruning_holds_far_less_than_the_model() -> None:
    total = sum(costs.memory(pruning(tokens=2048)).together.values())
    assert 2 * LLAMA_1B.num_parameters < total < 4 * estimate.GIB
    assert sum(costs.memory(pruning(tokens=2048, target=LLAMA_3B)).together.values()) < 8 * estimate.GIB


def test_a_tied_matrix_is_fitted_with_all_layers_at_hand() -> None:
    run = pruning(mended=True, head_steps=1, tokens=2048)
    ways = [costs.memory(dataclasses.replace(run, tied_steps=steps)).device for steps in (0, 1)]
    more = sum(ways[1].values()) - sum(ways[0].values())
    assert more == 2 * 16 * LLAMA_1B.layer_parameters + 4 * 16 * 2048 * 2048
    assert ways[0]["mending: output matrices"] == 128256 * (2 * 4096 + 5 * 4 * 2048)


def narrow(path: Path, model: LlamaForCausalLM) -> surgery.Pruned:
    kinds = ScoreConfig(
        mlp=WidthScore.norm_product, attention=WidthScore.norm_product, layers=LayerScore.block_influence
    )
    weights = saved(model, path)
    scores = importance.measure(weights, [text(rows=4, length=48)], dtype=torch.float32)
    target = TargetConfig(hidden_size=64, intermediate_size=128, head_dim=8, tie_word_embeddings=True)
    return surgery.Pruned(weights, plan.make(scores, weights.shape, target, kinds))


def test_a_plan_bounds_what_mending_and_gradients_hold(tmp_path: Path) -> None:
    """Every tensor that is made, in float32, of a model whose states and weights both count."""
    model = tiny_model(num_hidden_layers=4, hidden_size=128, intermediate_size=256, head_dim=32)
    pruned, many = narrow(tmp_path / "source", model), [text(rows=4, length=48, seed=seed) for seed in range(32)]
    tokens = 32 * 4 * 48
    sizes = {"stored_bytes": 4, "compute_bytes": 4, "row_tokens": 48, "batch_tokens": 192, "tokens": tokens}
    run = pruning(source=pruned.model.shape, target=pruned.shape, **sizes)
    config = CompensationConfig(attention_steps=1, layer_steps=1, head_steps=1, tied_steps=1)
    with Peak() as mending:
        mend.mend(pruned, many, config, tmp_path / "mended", dtype=torch.float32)
    wanted = dataclasses.replace(run, mended=True, measured=False, **dict.fromkeys(STEPS, 1))
    assert 0.7 < planned(wanted) / mending.most < 1.5
    with Peak() as taylor:
        gradients.measure(pruned.model, many, dtype=torch.float32)
    assert 0.7 < planned(dataclasses.replace(run, gradient_tokens=tokens)) / taylor.most < 1.5


def planned(run: Pruning) -> float:
    """The sum but for Python's own."""
    return sum(costs.memory(run).together.values()) - estimate.PYTHON_BYTES
