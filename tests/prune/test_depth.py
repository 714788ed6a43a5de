"""Depth scores against the whole model with layers deleted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from calibration import Batch, padded, ranked, saved, text
from conftest import tiny_model
from llamita import checkpoints
from llamita.prune import depth, importance, plan, stream
from llamita.prune.depth import Removals
from llamita.prune.further import Further, first_rows
from llamita.prune.ranking import ScoreConfig, check_wanted
from llamita.prune.scores import LayerScore, Scores, WidthScore
from llamita.prune.target import TargetConfig, target_shape

LAYERS = 5
EXACT = Removals(dtype=torch.float64)


@pytest.fixture(scope="module")
def double() -> LlamaForCausalLM:
    return tiny_model(num_hidden_layers=LAYERS).double()


@pytest.fixture(scope="module")
def weights(double: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Weights:
    return saved(double, tmp_path_factory.mktemp("double"))


@torch.no_grad()
def loss_of(model: LlamaForCausalLM, layers: Sequence[int], batches: Sequence[Batch]) -> float:
    """Mean loss of the whole model with no other layers than these."""
    whole = model.model.layers
    model.model.layers = nn.ModuleList([whole[layer] for layer in layers])
    model.config.num_hidden_layers = len(layers)
    total, count = 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        labels = batch["labels"][:, 1:].flatten()
        total += float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum"))
        count += int((labels >= 0).sum())
    model.model.layers, model.config.num_hidden_layers = whole, len(whole)
    return total / count


def without(*gone: int) -> list[int]:
    return [layer for layer in range(LAYERS) if layer not in gone]


@pytest.mark.parametrize("memory_gib", [1e-9, 4 * 2 * 4 * 24 * 64 * 8 / 2**30, 1.0])
def test_losses_are_those_of_the_models_without_the_layers(
    memory_gib: float, double: LlamaForCausalLM, weights: checkpoints.Weights
) -> None:
    """However many go side by side, and wherever the blocks begin and end."""
    batches, left = [text(rows=2), text(rows=2, seed=1)], [0, 1, 3, 4]
    skips = [(2, 4), (0, 1), (1, 2), (0, 3), (3, 4), (1, 2), (0, 2)]
    how = Removals(dtype=torch.float64, memory_gib=memory_gib)
    found = depth.losses(weights, left, skips, batches, how)
    kept = [left[:first] + left[behind:] for first, behind in skips]
    assert found == pytest.approx([loss_of(double, layers, batches) for layers in [*kept, left]], rel=1e-12)


def test_what_lies_before_a_removed_layer_is_computed_once(
    weights: checkpoints.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round over L layers runs L of the whole model and of candidate i the L - i - 1 behind it, in any memory."""
    calls: list[int] = []
    run = stream.Runner.layer

    def counted(self: stream.Runner, *arguments: Any) -> Any:
        calls.append(1)
        return run(self, *arguments)

    monkeypatch.setattr(stream.Runner, "layer", counted)
    single = [(place, place + 1) for place in range(LAYERS)]
    for memory_gib in (1e-9, 1.0):
        calls.clear()
        depth.losses(weights, range(LAYERS), single, [text()], Removals(dtype=torch.float64, memory_gib=memory_gib))
        assert len(calls) == LAYERS + LAYERS * (LAYERS - 1) / 2


def test_side_by_side_go_as_many_as_memory_holds(weights: checkpoints.Weights) -> None:
    size = 4 * 24 * 64 * 8 / 2**30
    numbers = [Removals(dtype=torch.float64, memory_gib=n * size).at_once(weights, [text()]) for n in (1, 3, 7.5)]
    assert numbers == [2, 2, 6]


def test_greedy_removes_what_brute_force_removes(double: LlamaForCausalLM, weights: checkpoints.Weights) -> None:
    batches, gone = [text()], list[int]()
    rank, table = depth.greedy(weights, batches, LAYERS - 1, EXACT)
    for number in range(LAYERS - 1):
        for layer in range(LAYERS):
            assert float(table[number, layer]) == pytest.approx(loss_of(double, without(*gone, layer), batches))
        left = {layer: loss_of(double, without(*gone, layer), batches) for layer in without(*gone)}
        gone.append(min(left, key=left.__getitem__))
        assert int(rank[gone[-1]]) == number
    assert sorted(rank.tolist()) == list(range(LAYERS))
    for number in range(1, LAYERS):
        assert depth.first_to_leave(rank, number).tolist() == sorted(gone[:number])


def test_fewer_rounds_are_the_first_of_more(weights: checkpoints.Weights) -> None:
    many, few = (depth.greedy(weights, [text()], rounds, EXACT) for rounds in (4, 2))
    assert torch.equal(few[1], many[1][:2])
    assert torch.equal(few[0], many[0].clamp(max=2))


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({}, [4, 3]),
        ({"tokens": 24}, [5, 4, 3]),
        ({"seed": 1}, [5, 4, 3]),
        ({"info": {"model": "b"}}, [5, 4, 3]),
        ({"dtype": torch.float32}, [5, 4, 3]),
    ],
)
def test_rounds_of_a_killed_pass_are_taken_over_where_nothing_else_decides_them(
    changes: dict[str, Any],
    again: list[int],
    weights: checkpoints.Weights,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    losses, rounds = depth.losses, list[int]()

    def measured(
        partial: Path | None, *, tokens: int = 48, seed: int = 0, dtype: torch.dtype = torch.float64, **more: Any
    ) -> Scores:
        further = Further(greedy_rounds=3, depth_tokens=tokens)
        more = {"info": {"model": "a"}, **more}
        return importance.measure(weights, [text(seed=seed)], dtype=dtype, further=further, partial=partial, **more)

    def dying(model: stream.Model, layers: Sequence[int], *rest: Any) -> list[float]:
        if len(layers) == LAYERS - 1:
            raise KeyboardInterrupt
        return losses(model, layers, *rest)

    def counted(model: stream.Model, layers: Sequence[int], *rest: Any) -> list[float]:
        rounds.append(len(layers))
        return losses(model, layers, *rest)

    monkeypatch.setattr(depth, "losses", dying)
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path / "partial.safetensors")
    monkeypatch.setattr(depth, "losses", counted)
    found = measured(tmp_path / "partial.safetensors", **changes)
    assert rounds == again
    fresh = measured(None, **changes)
    for name in ("layers.greedy", "depth.greedy"):
        assert torch.equal(found[name], fresh[name])


def test_blocks_are_those_of_brute_force(double: LlamaForCausalLM, weights: checkpoints.Weights) -> None:
    table = depth.contiguous(weights, [text()], 3, EXACT)
    for number in range(1, 4):
        losses = [loss_of(double, without(*range(a, a + number)), [text()]) for a in range(LAYERS - number + 1)]
        assert table[: len(losses), number - 1].tolist() == pytest.approx(losses, rel=1e-12)
        assert not table[len(losses) :, number - 1].any()
        first = losses.index(min(losses))
        assert depth.least_block(table, number).tolist() == list(range(first, first + number))


def test_angles_are_between_the_last_tokens_of_the_rows(double: LlamaForCausalLM, weights: checkpoints.Weights) -> None:
    """arccos(cos(x_l, x_{l+n})) / pi, mean over rows, padding not counted (Gromov et al., 2024, arXiv:2403.17887)."""
    batch = text()
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda m, a: states.append(a[0][:, -1])) for layer in double.model.layers]
    hooks += [double.model.norm.register_forward_pre_hook(lambda m, a: states.append(a[0][:, -1]))]
    with torch.no_grad():
        double(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    expected = torch.ones(LAYERS, LAYERS, dtype=torch.float64)
    for first, behind in itertools.combinations(range(LAYERS + 1), 2):
        cosine = nn.functional.cosine_similarity(states[first], states[behind], dim=-1)
        expected[first, behind - first - 1] = cosine.arccos().mean() / math.pi
    for rows in ([batch], [padded(batch, 7)]):
        table = importance.measure(weights, rows, dtype=torch.float64)["depth.angular"]
        torch.testing.assert_close(table, expected, rtol=1e-9, atol=0)


def test_right_angles_are_one_half() -> None:
    turned = [torch.eye(3)[[axis, axis]] for axis in (0, 1, 0)]
    assert depth.angular(turned).tolist() == [[0.5, 0.0], [0.5, 1.0]]


def test_a_row_of_padding_has_no_last_token() -> None:
    states = torch.arange(12.0).view(3, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert depth.last_tokens([states], [mask]).flatten().tolist() == [1.0, 11.0]


@pytest.mark.parametrize("kind", [LayerScore.angular, LayerScore.greedy, LayerScore.contiguous])
def test_a_plan_keeps_the_layers_that_the_score_leaves(
    kind: LayerScore, double: LlamaForCausalLM, weights: checkpoints.Weights
) -> None:
    kinds, target = ranked(layers=kind), TargetConfig(num_hidden_layers=LAYERS - 2)
    further = kinds.further(weights.shape, target)
    scores = importance.measure(weights, [text()], dtype=torch.float64, further=further)
    kept = plan.make(scores, weights.shape, target, kinds).layers.tolist()
    pairs = {pair: loss_of(double, without(*pair), [text()]) for pair in itertools.combinations(range(LAYERS), 2)}
    match kind:
        case LayerScore.angular:
            first = int(scores["depth.angular"][: LAYERS - 1, 1].argmin())
            assert kept == without(first, first + 1)
        case LayerScore.greedy:
            one = {layer: loss_of(double, without(layer), [text()]) for layer in range(LAYERS)}
            first = min(one, key=one.__getitem__)
            assert kept == without(*min((p for p in pairs if first in p), key=pairs.__getitem__))
        case LayerScore.contiguous:
            assert kept == without(*min((p for p in pairs if p[1] == p[0] + 1), key=pairs.__getitem__))


def test_only_what_is_asked_for_is_measured(weights: checkpoints.Weights) -> None:
    shape, two, width = weights.shape, TargetConfig(num_hidden_layers=3), TargetConfig(intermediate_size=48)
    asked = {
        ranked().further(shape, two): Further(),
        ranked(layers=LayerScore.greedy).further(shape, two): Further(greedy_rounds=2),
        ranked(layers=LayerScore.greedy).further(shape, width): Further(),
        ranked(layers=LayerScore.greedy, removed_layers=4).further(shape, two): Further(greedy_rounds=4),
        ranked(layers=LayerScore.contiguous).further(shape, two): Further(longest_block=2),
        ranked(mlp=WidthScore.taylor_unit).further(shape, two): Further(),
        ranked(mlp=WidthScore.taylor_unit).further(shape, width): Further(by_gradient=True),
        ranked(all=True).further(shape, two): Further(by_gradient=True, greedy_rounds=2, longest_block=2),
    }
    for found, expected in asked.items():
        assert found == expected
    shapes = [target_shape(shape, one) for one in (two, width)]
    both = ranked(layers=LayerScore.greedy, mlp=WidthScore.taylor_unit).further(shape, TargetConfig(), shapes)
    assert both == Further(by_gradient=True, greedy_rounds=2)
    plain = importance.measure(weights, [text()], dtype=torch.float64, further=Further())
    assert not [name for name in plain.tensors if "taylor" in name or "greedy" in name or "contiguous" in name]


def test_units_are_eliminated_only_on_an_axis_that_is_cut(weights: checkpoints.Weights) -> None:
    shape, depth_only, width = weights.shape, TargetConfig(num_hidden_layers=3), TargetConfig(intermediate_size=48)
    heads = TargetConfig(num_attention_heads=2, num_key_value_heads=2)
    defaults, mlp = ScoreConfig(), ranked(mlp=WidthScore.leverage)
    found = [defaults.eliminates(shape, target) for target in (depth_only, width, heads)]
    found += [mlp.eliminates(shape, target) for target in (depth_only, width, heads)]
    assert found == [False, True, True, False, True, False]
    assert ranked(all=True).eliminates(shape, depth_only)
    assert not ranked().eliminates(shape, width)
    assert defaults.eliminates(shape, TargetConfig(), [target_shape(shape, one) for one in (depth_only, width)])


def saved_scores(weights: checkpoints.Weights, path: Path, further: Further) -> Path:
    importance.measure(weights, [text()], dtype=torch.float64, further=further).save(path)
    return path


def test_saved_scores_that_lack_what_is_asked_for_are_refused(weights: checkpoints.Weights, tmp_path: Path) -> None:
    plain = saved_scores(weights, tmp_path / "plain", Further())
    one = saved_scores(weights, tmp_path / "one", Further(greedy_rounds=1, longest_block=1))
    shape, target = weights.shape, TargetConfig(num_hidden_layers=3, intermediate_size=48)
    cut = target_shape(shape, target)
    for path, message, kinds in (
        (plain, r"hold no layers\.greedy: .*calibration\.path", {"layers": LayerScore.greedy}),
        (plain, r"hold no depth\.contiguous", {"layers": LayerScore.contiguous}),
        (plain, r"hold no mlp\.taylor_unit", {"mlp": WidthScore.taylor_unit}),
        (one, r"at most 1 do, and target\.num_hidden_layers removes 2", {"layers": LayerScore.greedy}),
        (one, r"at most 1 do.*scores\.removed_layers=2", {"layers": LayerScore.contiguous}),
    ):
        config = ranked(path=path, **kinds)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=message):
            check_wanted(shape, cut, target, config, has_text=True, rope_type=None)
        with pytest.raises(ValueError, match=message):
            plan.make(Scores.load(path), shape, target, config)


@pytest.mark.parametrize("removed", [1, LAYERS])
def test_a_number_of_layers_that_cannot_be_removed_is_refused(removed: int, weights: checkpoints.Weights) -> None:
    target, kinds = TargetConfig(num_hidden_layers=3), ranked(removed_layers=removed)
    shape = target_shape(weights.shape, target)
    with pytest.raises(ValueError, match=rf"scores\.removed_layers must be in 2\.\.4, .* got {removed}"):
        check_wanted(weights.shape, shape, target, kinds, has_text=True, rope_type=None)


def test_no_round_leaves_no_layer_and_no_label_no_loss(weights: checkpoints.Weights) -> None:
    mute = {**text(), "labels": torch.full((4, 24), -100)}
    for measure in (depth.greedy, depth.contiguous):
        with pytest.raises(ValueError, match=r"scores\.removed_layers must be in 1\.\.4.*got 5"):
            measure(weights, [text()], LAYERS, EXACT)
        with pytest.raises(ValueError, match="no label"):
            measure(weights, [mute], 1, EXACT)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("removed_layers", 0),
        ("gradient_tokens", 0),
        ("depth_tokens", -1),
        ("depth_gib", 0.0),
        ("spill_path", Path("x")),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"scores\.{setting} must be .*got {value}"):
        ranked(**{setting: value})


def test_the_first_rows_are_as_many_as_fit_and_one_at_least() -> None:
    batches = [text(rows=2), text(rows=3, seed=1)]
    for tokens, expected in ((1, [1]), (24, [1]), (71, [2]), (72, [2, 1]), (1000, [2, 3])):
        rows = first_rows(batches, tokens)
        assert [len(batch["input_ids"]) for batch in rows] == expected
        assert all(
            torch.equal(a["labels"], b["labels"][: len(a["labels"])]) for a, b in zip(rows, batches, strict=False)
        )
