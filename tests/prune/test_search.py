"""Which shapes a search considers: held against every shape of a small grid, one by one."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from calibration import ranked, saved, text
from conftest import tiny_model
from llamita.prune import importance, plan, predict, search
from llamita.prune.scores import Scores
from llamita.prune.target import TargetConfig, target_shape
from llamita.shapes import PUBLISHED, SIZES, LlamaShape

EIGHT = PUBLISHED["meta-llama/Llama-3.1-8B"]
SOURCE = LlamaShape(
    num_hidden_layers=3,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    tie_word_embeddings=False,
)
TARGET = TargetConfig()


def axes(**values: list[int]) -> search.AxesConfig:
    return search.AxesConfig(**{name: search.AxisConfig(values=given) for name, given in values.items()})


GRID = axes(
    num_hidden_layers=[1, 2, 3],
    hidden_size=[32, 48, 60, 64],
    intermediate_size=[32, 64, 96],
    num_attention_heads=[1, 2, 3, 4],
    num_key_value_heads=[1, 2],
    head_dim=[6, 8, 16],
)


def every_valid_shape() -> list[LlamaShape]:
    """The grid by loops, judged by what a stock Llama and its rotary frequencies allow."""
    names = [[*getattr(GRID, name).values] for name in SIZES]
    found = []
    for layers, hidden, width, heads, keys, size in itertools.product(*names):
        if heads % keys or heads // keys > 2 or hidden % heads or 16 % size:
            continue
        sizes = (layers, hidden, width, heads, keys, size)
        shape = dataclasses.replace(SOURCE, **dict(zip(SIZES, sizes, strict=True)))  # type: ignore[arg-type]
        if shape != SOURCE:
            found.append(shape)
    return found


def test_the_grid_holds_exactly_the_shapes_that_can_be_cut() -> None:
    assert search.shapes(SOURCE, GRID, TARGET) == every_valid_shape()


def contains(big: LlamaShape, small: LlamaShape) -> bool:
    """Whether units of every kind are at least as many; query heads are those of each KV head."""
    group = [shape.num_attention_heads // shape.num_key_value_heads for shape in (big, small)]
    names = [name for name in SIZES if name != "num_attention_heads"]
    return group[0] >= group[1] and all(getattr(big, n) >= getattr(small, n) for n in names)


BUDGETS: list[dict[str, Any]] = [
    {"parameters": 60_000},
    {"bytes": 40_000, "bits": 4.5},
    {"kv_bytes_per_token": 100, "kv_bits": 8},
    {"parameters": 70_000, "kv_bytes_per_token": 160},
]


@pytest.mark.parametrize("limits", BUDGETS, ids=str)
def test_candidates_are_those_of_brute_force(limits: dict[str, Any]) -> None:
    """Within every limit, contained in no other that is, and close to one of the limits."""
    budget = search.BudgetConfig(**limits, slack=0.2)

    def used(shape: LlamaShape) -> float:
        weights = sum(torch.Size(size).numel() for size in shape.tensors().values())
        cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
        costs = {
            "parameters": weights,
            "bytes": weights * limits.get("bits", 16) / 8,
            "kv_bytes_per_token": cache * limits.get("kv_bits", 16) / 8,
        }
        return max(costs[name] / limit for name, limit in limits.items() if name in costs)

    inside = [shape for shape in every_valid_shape() if used(shape) <= 1]
    wanted = {s for s in inside if used(s) >= 0.8 and not any(contains(o, s) for o in inside if o != s)}
    found = search.within(SOURCE, search.shapes(SOURCE, GRID, TARGET), budget)
    assert set(found) == set(inside)
    random.Random(0).shuffle(found)
    losses = {shape: -float(sum(search.units(shape))) for shape in found}
    picked = search.pick(losses, budget, budget.costs, most=10**6)
    assert {candidate.shape for candidate in picked} == wanted
    assert len(picked) == len(wanted) > 0
    first = search.pick(losses, budget, budget.costs, most=2)
    assert [c.shape for c in first] == [c.shape for c in picked][:2]


def test_a_shape_is_timed_only_where_that_can_change_the_answer() -> None:
    """With a limit that rises with size, brute force finds the same, and far more is timed there."""
    budget = search.BudgetConfig(latency_ms=20_000, slack=0.99)
    timed: list[LlamaShape] = []

    def costs(shape: LlamaShape) -> dict[str, float]:
        timed.append(shape)
        return {**budget.costs(shape), "latency_ms": shape.layer_parameters * shape.num_hidden_layers}

    found = search.shapes(SOURCE, GRID, TARGET)
    losses = {shape: -float(sum(search.units(shape))) for shape in found}
    picked = {candidate.shape for candidate in search.pick(losses, budget, costs, most=10**6)}
    inside = [s for s in found if s.layer_parameters * s.num_hidden_layers <= 20_000]
    assert picked == {s for s in inside if not any(contains(o, s) for o in inside if o != s)}
    assert len(set(timed)) == len(timed) < len(found)


def test_default_axes_of_an_8b_hold_the_published_shapes() -> None:
    found = set(search.shapes(EIGHT, search.AxesConfig(), TargetConfig(tie_word_embeddings=True)))
    for name in ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"):
        assert PUBLISHED[name] in found
    assert {shape.hidden_size % 256 for shape in found} == {shape.intermediate_size % 512 for shape in found} == {0}


def test_a_size_of_the_target_is_the_only_one_of_its_axis() -> None:
    found = search.shapes(SOURCE, search.AxesConfig(), TargetConfig(head_dim=8, tie_word_embeddings=True))
    assert {shape.head_dim for shape in found} == {8}
    assert all(shape.tie_word_embeddings for shape in found)
    with pytest.raises(ValueError, match=r"target\.head_dim=8 leaves no choice"):
        search.shapes(SOURCE, axes(head_dim=[8, 16]), TargetConfig(head_dim=8))


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    weights = saved(tiny_model(), tmp_path_factory.mktemp("search"))
    return importance.measure(weights, [text()], dtype=torch.float64)


def test_a_larger_shape_never_loses_more(scores: Scores) -> None:
    """To the last bit: the order in which dominated shapes are discarded rests on it."""
    removed = predict.Removed(scores, SOURCE, ranked())
    prediction = predict.Prediction(whole=5.0, weights={"layers": 3.1, "hidden": 0.7, "mlp": 0.3, "attention": 0.9})
    found = every_valid_shape()
    losses = {shape: prediction.loss(removed.shares(shape)) for shape in found}
    for big, small in itertools.product(found, repeat=2):
        assert not contains(big, small) or losses[big] <= losses[small]
    assert set(removed.shares(SOURCE).values()) == {0.0}


def test_removed_shares_are_those_of_the_plan(scores: Scores) -> None:
    """One axis at a time, the units that a plan drops hold exactly the removed share of squared scores."""
    removed, kinds = predict.Removed(scores, SOURCE, ranked()), ranked()

    def cut(**sizes: Any) -> tuple[plan.Plan, dict[str, float]]:
        target = TargetConfig(**sizes)
        shape = target_shape(SOURCE, target)
        return plan.make(scores, SOURCE, target, kinds), removed.shares(shape)

    kept, shares = cut(intermediate_size=40)
    energy = scores["mlp.norm_product"].square()
    share = energy.gather(1, kept.mlp).sum(1) / energy.sum(1)
    assert shares["mlp"] == pytest.approx(1 - float(share.mean()), abs=1e-12)
    kept, shares = cut(hidden_size=32)
    energy = scores["hidden.activation"].sum((0, 1)).square()
    assert shares["hidden"] == pytest.approx(1 - float(energy[kept.hidden].sum() / energy.sum()), abs=1e-12)
    kept, shares = cut(num_hidden_layers=1)
    energy = scores["layers.block_influence"]
    assert shares["layers"] == pytest.approx(1 - float(energy[kept.layers].sum() / energy.sum()), abs=1e-12)
    kept, shares = cut(num_attention_heads=1, num_key_value_heads=1)
    energy = scores["attention.norm_product"].square().sum(-1)
    share = energy.gather(1, kept.heads).sum(1) / energy.sum(1)
    assert shares["attention"] == pytest.approx(1 - float(share.mean()), abs=1e-12)


def test_a_prediction_gives_back_the_cuts_that_it_was_made_of() -> None:
    rises = {"layers": (0.5, 0.25), "hidden": (1.0, 0.5), "mlp": (-0.1, 0.3)}
    prediction = predict.Prediction.fitted(2.0, rises)
    nothing = dict.fromkeys(predict.AXES, 0.0)
    assert prediction.loss(nothing) == 2.0
    assert prediction.loss(nothing | {"layers": 0.25}) == 2.5
    assert prediction.loss(nothing | {"layers": 0.25, "hidden": 0.25}) == 3.0
    assert prediction.loss(nothing | {"mlp": 0.3}) == 2.0
    assert prediction.weights["attention"] == pytest.approx((2 + 2 + 0) / 3)


def test_one_axis_alone_is_cut_to_its_smallest_size() -> None:
    found = predict.alone(SOURCE, search.sizes(SOURCE, GRID, TARGET), TARGET)
    changed = {axis: {n for n in SIZES if getattr(s, n) != getattr(SOURCE, n)} for axis, s in found.items()}
    assert changed["layers"] == {"num_hidden_layers"}
    assert changed["hidden"] == {"hidden_size"}
    assert changed["mlp"] == {"intermediate_size"}
    assert changed["attention"] == {"num_attention_heads", "num_key_value_heads", "head_dim"}
    assert (found["layers"].num_hidden_layers, found["hidden"].hidden_size) == (1, 32)


def test_the_recovered_loss_decides_among_those_that_have_one() -> None:
    def candidate(layers: int, loss: float, recovered: float | None) -> search.Candidate:
        shape = dataclasses.replace(SOURCE, num_hidden_layers=layers)
        return search.Candidate(shape=shape, costs={}, loss=loss, recovered=recovered)

    best, second, third = candidate(1, 5.0, 2.0), candidate(2, 4.0, 2.5), candidate(3, 3.0, None)
    assert search.ranked([third, second, best]) == [best, second, third]


def test_what_was_found_out_is_read_back(tmp_path: Path) -> None:
    shape = dataclasses.replace(SOURCE, num_hidden_layers=1)
    kept = [search.Candidate(shape=shape, costs={"parameters": 5, "latency_ms": 1.5}, predicted=3.0, loss=2.0)]
    assert search.load(tmp_path) == []
    search.save(kept, tmp_path)
    assert search.load(tmp_path) == kept
    (tmp_path / search.FILE).write_text('{"name": "half')
    with pytest.raises(ValueError, match=r"candidates\.jsonl is damaged"):
        search.load(tmp_path)


def test_shapes_that_miss_the_budget_are_told_by_how_much() -> None:
    found = search.shapes(SOURCE, GRID, TARGET)
    with pytest.raises(ValueError, match=r"nearest, l1-d32-f32-h1-k1-e8, costs 12,\d+ of budget.parameters=5,000"):
        search.within(SOURCE, found, search.BudgetConfig(parameters=5000))
    with pytest.raises(ValueError, match="the whole model is within the budget"):
        search.within(SOURCE, found, search.BudgetConfig(parameters=1e9))
    budget = search.BudgetConfig(parameters=60_000, slack=0)
    with pytest.raises(
        ValueError, match=r"no shape uses 100.0% of the budget, the nearest \d\d\.\d%: raise budget.slack"
    ):
        search.pick(dict.fromkeys(search.within(SOURCE, found, budget), 0.0), budget, budget.costs, 9)
