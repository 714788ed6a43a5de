"""Targets, the configurations they give, and which units a plan keeps."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForTokenClassification
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from calibration import ranked
from conftest import REPOSITORY, tiny_config
from llamita import checkpoints, storage
from llamita.prune import plan, surgery
from llamita.prune.importance import norm_gain
from llamita.prune.plan import Plan
from llamita.prune.ranking import ScoreConfig, check_wanted
from llamita.prune.scores import HiddenScore, LayerScore, Scores, WidthScore
from llamita.prune.target import Pairs, Rope, TargetConfig, Tie, target_shape
from llamita.shapes import PUBLISHED, LlamaShape

GUARD_IDS = [19193, 39257, 198, 271, 50, 11, 16, 17, 18, 19, 20, 21, 22, 23, 24, 605, 806, 717, 1032, 128009]
SHAPE = checkpoints.shape_of(tiny_config())


def target(name: str, **changes: Any) -> TargetConfig:
    fields = yaml.safe_load((REPOSITORY / "configs" / "target" / f"{name}.yaml").read_text())
    return TargetConfig(**{**fields, **changes})


def random_scores(shape: LlamaShape, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.rand(sizes, generator=generator, dtype=torch.float64)

    layers, hidden, heads = shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads
    tensors = {
        "layers.block_influence": draw(layers),
        "mlp.norm_product": draw(layers, shape.intermediate_size),
        "mlp.activation": draw(layers, shape.intermediate_size),
        "attention.norm_product": draw(layers, heads, shape.head_dim),
        "hidden.activation": draw(layers, 2, hidden),
        "rotary.query": draw(layers, heads, shape.head_dim // 2),
        "rotary.key": draw(layers, shape.num_key_value_heads, shape.head_dim // 2),
        "norm.energy": draw(2 * layers + 1, hidden),
        "norm.epsilon": draw(2 * layers + 1),
        "mlp.obs": draw(layers, shape.intermediate_size),
        "heads.obs": draw(layers, heads),
        "groups.obs": draw(layers, shape.num_key_value_heads),
        "layers.greedy": draw(layers),
        "directions.energy": draw(hidden).sort(descending=True).values,
        "directions.vectors": torch.linalg.qr(draw(hidden, hidden)).Q if hidden < 1000 else torch.eye(hidden),
    }
    return Scores(tensors=tensors, info={})


def made(source: LlamaConfig, config: TargetConfig) -> tuple[Plan, LlamaConfig]:
    shape = checkpoints.shape_of(source)
    kept = plan.make(random_scores(shape), shape, config, ranked())
    return kept, surgery.pruned_config(source, kept)


@pytest.mark.parametrize(
    ("name", "published", "parameters"),
    [
        ("llama3.2_1b", "meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("llama3.2_3b", "meta-llama/Llama-3.2-3B", 3_212_749_824),
    ],
)
@pytest.mark.parametrize("rope", Rope)
def test_8b_becomes_the_published_small_llama_field_by_field(
    name: str, published: str, parameters: int, rope: Rope
) -> None:
    source = tiny_config(
        **PUBLISHED["meta-llama/Llama-3.1-8B"].config_fields(),
        bos_token_id=128000,
        eos_token_id=[128001, 128008, 128009],
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    kept, config = made(source, target(name, rope=rope))
    assert kept.target == PUBLISHED[published]
    assert kept.target.num_parameters == parameters
    expected = {
        **PUBLISHED[published].config_fields(),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": {Rope.parent: 8.0, Rope.published: 32.0}[rope],
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "pad_token_id": None,
        "dtype": "bfloat16",
    }
    fields = config.to_dict()
    assert {field: fields[field] for field in expected} == expected
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters


# config.json of meta-llama/Llama-3.1-8B-Instruct on the hub: no head_dim, and the names of Transformers 4.
HUB = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama3.2_1b", {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64, "num_attention_heads": 32}),
        ("llama3.2_3b", {"hidden_size": 3072, "num_hidden_layers": 28, "head_dim": 128, "num_attention_heads": 24}),
    ],
)
def test_the_hubs_own_config_becomes_that_of_the_small_llama(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """Every field of the file that is written, but Transformers' version, is that of Meta's once that is loaded."""
    for folder, fields in {
        "large": HUB,
        "small": HUB
        | sizes
        | {
            "intermediate_size": 8192,
            "tie_word_embeddings": True,
            "rope_scaling": {**HUB["rope_scaling"], "factor": 32.0},  # type: ignore[dict-item]
        },
    }.items():
        (tmp_path / folder).mkdir()
        storage.write_json(tmp_path / folder / "config.json", fields)
    _, config = made(checkpoints.load_config(tmp_path / "large"), target(name, rope=Rope.published))
    checkpoints.load_config(tmp_path / "small").save_pretrained(tmp_path / "published")
    config.save_pretrained(tmp_path / "pruned")
    pruned, published = (storage.read_json(tmp_path / folder / "config.json") for folder in ("pruned", "published"))
    assert pruned == published
    assert pruned["rope_parameters"]["rope_theta"] == 500000.0
    assert pruned["dtype"] == "bfloat16"


def test_guard_becomes_the_pruned_guard() -> None:
    source = tiny_config(**PUBLISHED["meta-llama/Llama-Guard-3-1B"].config_fields(), bos_token_id=128000)
    kept, config = made(source, target("llama_guard3_1b_pruned"))
    published = PUBLISHED["meta-llama/Llama-Guard-3-1B-INT4"]
    assert kept.target == dataclasses.replace(published, output_rows=None)
    assert kept.target.num_parameters == 1_123_076_096
    assert config.rope_parameters == source.rope_parameters
    with torch.device("meta"):
        assert sum(p.numel() for p in LlamaForCausalLM(config).parameters()) == 1_123_076_096


def test_the_guards_twenty_rows_are_a_stock_token_classifier() -> None:
    """860,448,768 parameters and the twenty zeros of the classifier's bias."""
    source = tiny_config(**PUBLISHED["meta-llama/Llama-Guard-3-1B"].config_fields())
    kept, config = made(source, target("llama_guard3_1b_pruned", output_rows=GUARD_IDS))
    assert kept.target == PUBLISHED["meta-llama/Llama-Guard-3-1B-INT4"]
    assert kept.target.num_parameters == 860_448_768
    config = surgery.classifier_config(config, GUARD_IDS, [str(token) for token in GUARD_IDS])
    assert config.id2label == {row: str(token) for row, token in enumerate(GUARD_IDS)}
    assert checkpoints.shape_of(config) == kept.target
    with torch.device("meta"):
        model = LlamaForTokenClassification(config)
    assert sum(p.numel() for p in model.parameters()) == 860_448_768 + 20
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert stored == checkpoints.stored_tensors(config)


def test_a_tied_base_untied_by_the_guard_target_has_the_same_count() -> None:
    kept = target_shape(PUBLISHED["meta-llama/Llama-3.2-1B"], target("llama_guard3_1b_pruned"))
    assert kept.num_parameters == 1_123_076_096


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 128}, r"target\.hidden_size must be at most the source's 64, got 128"),
        ({"num_hidden_layers": 4}, r"target\.num_hidden_layers must be at most the source's 3, got 4"),
        ({"num_attention_heads": 3}, "nearest are 2 and 4; got 3"),
        ({"num_attention_heads": 4, "num_key_value_heads": 1}, "nearest are 2; got 4"),
        ({"num_key_value_heads": 1}, "between 1 and 2 of the query heads"),
        ({"hidden_size": 50}, "nearest are 48 and 52; got 50"),
        ({"head_dim": 6}, "nearest are 4 and 8; got 6"),
        ({"head_dim": 5}, "must be even"),
        ({"intermediate_size": 0}, r"target\.intermediate_size must be at least 1, got 0"),
        ({"output_rows": [1, 2], "tie_word_embeddings": True}, r"needs target\.tie_word_embeddings=false"),
        ({"tie": Tie.mean}, r"target\.tie says how .* needs target\.tie_word_embeddings=true: got mean"),
        ({"tie": Tie.head, "tie_word_embeddings": False}, r"needs target\.tie_word_embeddings=true: got head"),
        ({"output_rows": [1, 128]}, r"0\.\.127, got \[128\]"),
        ({"output_rows": [1, 1]}, "each token id once"),
        ({"output_rows": []}, "at least one token id"),
        ({"keep_layers": [0, 3]}, r"0\.\.2, got \[3\]"),
        ({"keep_layers": [1, 0]}, "rise"),
        ({"keep_layers": [0], "num_hidden_layers": 2}, r"must name target\.num_hidden_layers=2 layers"),
    ],
)
def test_targets_that_cannot_be_cut_are_refused_with_the_nearest_that_can(fields: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        target_shape(SHAPE, TargetConfig(**fields))


def test_what_is_unset_stays_as_in_the_source() -> None:
    assert target_shape(SHAPE, TargetConfig()) == SHAPE
    assert target_shape(SHAPE, TargetConfig(keep_layers=[0, 2])).num_hidden_layers == 2


def test_nothing_to_cut_needs_no_scores() -> None:
    kept = plan.make(None, SHAPE, TargetConfig(), ranked())
    assert kept.layers.tolist() == [0, 1, 2]
    assert kept.mlp.tolist() == [list(range(96))] * 3
    assert kept.heads.tolist() == [[0, 1, 2, 3]] * 3
    assert kept.values.tolist() == [[list(range(16))] * 2] * 3
    assert (kept.norm_gain == 1).all()
    assert kept.query_scale == 1
    with pytest.raises(ValueError, match="needs scores"):
        plan.make(None, SHAPE, TargetConfig(num_hidden_layers=2), ranked())


def test_the_highest_scores_stay_and_equals_go_to_the_lowest_index() -> None:
    scores = random_scores(SHAPE)
    scores.tensors["mlp.norm_product"][:] = 0
    scores.tensors["mlp.norm_product"][1, 90] = 1
    scores.tensors["layers.block_influence"][:] = torch.tensor([0.3, 0.1, 0.2])
    kept = plan.make(scores, SHAPE, TargetConfig(intermediate_size=3, num_hidden_layers=2), ranked())
    assert kept.layers.tolist() == [0, 2]
    assert kept.mlp.tolist() == [[0, 1, 2]] * 2
    kept = plan.make(scores, SHAPE, TargetConfig(intermediate_size=3, keep_layers=[1, 2]), ranked())
    assert kept.layers.tolist() == [1, 2]
    assert kept.mlp.tolist() == [[0, 1, 90], [0, 1, 2]]


def test_an_axis_is_ranked_by_the_score_that_was_asked_for() -> None:
    scores = random_scores(SHAPE)
    small = TargetConfig(intermediate_size=40)
    for kind in (WidthScore.activation, WidthScore.norm_product):
        kept = plan.make(scores, SHAPE, small, ranked(mlp=kind)).mlp
        assert torch.equal(kept, scores[f"mlp.{kind}"].topk(40).indices.sort().values)
    with pytest.raises(ValueError, match=r"mlp\.magnitude"):
        plan.make(scores, SHAPE, small, ranked(mlp=WidthScore.magnitude))


def test_query_heads_are_ranked_within_their_kv_group() -> None:
    """However strong one group is, each KV head keeps as many of its own query heads."""
    scores = random_scores(SHAPE)
    scores.tensors["attention.norm_product"][:, :2] += 10
    kept = plan.make(scores, SHAPE, TargetConfig(num_attention_heads=2), ranked())
    best = scores["attention.norm_product"].norm(dim=-1).view(3, 2, 2).argmax(-1)
    assert kept.kv_heads.tolist() == [[0, 1]] * 3
    assert torch.equal(kept.heads, best + torch.tensor([0, 2]))


def test_a_kv_head_leaves_with_its_query_heads() -> None:
    scores = random_scores(SHAPE)
    scores.tensors["attention.norm_product"][1, 2] += 10
    small = TargetConfig(num_attention_heads=2, num_key_value_heads=1)
    kept = plan.make(scores, SHAPE, small, ranked())
    assert (kept.kv_heads.tolist()[1], kept.heads.tolist()[1]) == ([1], [2, 3])
    assert torch.equal(kept.heads // 2, kept.kv_heads.repeat_interleave(2, 1))


def test_a_kv_head_counts_for_what_stays_with_it() -> None:
    """Not for the query heads that it loses; values and pairs likewise are chosen by the query heads that stay."""
    shape = dataclasses.replace(SHAPE, num_attention_heads=8)
    scores = random_scores(shape)
    scores.tensors["attention.norm_product"][0] = torch.tensor([3.0, 3, 3, 3, 5, 1, 1, 1])[:, None]
    config = TargetConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=8, pairs=Pairs.strongest)
    kept = plan.make(scores, shape, config, ranked())
    # All four of the first group have the norm 6, of the second 5.3; the best two 4.2 and 5.1.
    assert (kept.kv_heads[0].tolist(), kept.heads[0].tolist()) == ([1], [4, 5])
    for layer, (key,) in enumerate(kept.kv_heads.tolist()):
        heads = kept.heads[layer]
        score = scores["attention.norm_product"][layer, heads].square().sum(0)
        assert kept.values[layer, 0].tolist() == score.sort(descending=True, stable=True).indices[:8].sort()[0].tolist()
        energy = scores["rotary.query"][layer, heads].sum(0) * scores["rotary.key"][layer, key]
        assert kept.pairs[layer, 0].tolist() == [2 * i + int(pair.argmax()) for i, pair in enumerate(energy.view(4, 2))]


@pytest.mark.parametrize(("large", "small"), [(128, 64), (128, 32), (96, 32)])
def test_the_kept_pairs_of_a_head_turn_at_the_frequencies_of_the_small_head(large: int, small: int) -> None:
    """Bit for bit: pair i of the small head is pair r i of the large one."""
    frequencies = [LlamaRotaryEmbedding(tiny_config(head_dim=size)).inv_freq for size in (large, small)]
    shape = dataclasses.replace(SHAPE, head_dim=large)
    kept = plan.make(random_scores(shape), shape, TargetConfig(head_dim=small), ranked())
    assert torch.equal(frequencies[0][kept.pairs[0, 0]], frequencies[1])


def test_the_published_rope_factor_changes_35_of_64_frequencies() -> None:
    kept, config = made(tiny_config(head_dim=128), TargetConfig(rope=Rope.published))
    parent, published = LlamaRotaryEmbedding(tiny_config(head_dim=128)).inv_freq, LlamaRotaryEmbedding(config).inv_freq
    assert int((parent != published).sum()) == 35
    assert kept.rope is Rope.published
    plain = tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.raises(ValueError, match=r"target\.rope=published needs a rope_type of 'llama3', got 'default'"):
        made(plain, TargetConfig(rope=Rope.published))


def test_the_strongest_of_neighbouring_pairs_may_stay_instead() -> None:
    scores = random_scores(SHAPE)
    kept = plan.make(scores, SHAPE, TargetConfig(head_dim=8, pairs=Pairs.strongest), ranked())
    energy = scores["rotary.query"].view(3, 2, 2, 8).sum(2) * scores["rotary.key"]
    for slot, pair in enumerate(kept.pairs.unbind(-1)):
        assert torch.equal(pair, 2 * slot + energy[..., 2 * slot : 2 * slot + 2].argmax(-1))


def test_hidden_channels_are_one_set_by_the_norms_of_the_layers_that_stay() -> None:
    scores = random_scores(SHAPE)
    kept = plan.make(scores, SHAPE, TargetConfig(hidden_size=32, keep_layers=[0, 2]), ranked())
    total = scores["hidden.activation"][[0, 2]].sum((0, 1))
    assert torch.equal(kept.hidden, total.topk(32).indices.sort().values)
    assert kept.norm_gain.shape == (5,)
    for gain, norm in zip(kept.norm_gain, (0, 1, 4, 5, 6), strict=True):
        assert gain == norm_gain(scores["norm.energy"][norm], scores["norm.epsilon"][norm], kept.hidden)


def test_the_gain_is_the_lost_energy() -> None:
    """sqrt(D / d) times the kept part of the input's norm; 1 when the energy is spread evenly; 1 when all stay."""
    inputs = torch.randn(1000, 64, dtype=torch.float64)
    inputs[:, 32:] *= 0.1
    eps, keep = 1e-5, torch.arange(32)
    inverse = 1 / (inputs.square().mean(1) + eps)
    energy, epsilon = (inputs.square() * inverse[:, None]).mean(0), (eps * inverse).mean()
    part = (inputs[:, keep].norm(dim=1) / inputs.norm(dim=1)).square().mean().sqrt()
    assert float(norm_gain(energy, epsilon, keep)) == pytest.approx(float(part * 2**0.5), rel=1e-4)
    assert norm_gain(energy, epsilon, torch.arange(64)) == 1
    # With an epsilon as large as the input, what counts is the quotient of what the two norms divide by.
    divisor = inputs.square().mean(1) + 1
    energy, epsilon = (inputs.square() / divisor[:, None]).mean(0), (1 / divisor).mean()
    quotient = ((inputs[:, keep].square().mean(1) + 1) / divisor).mean().sqrt()
    assert float(norm_gain(energy, epsilon, keep)) == pytest.approx(float(quotient), rel=1e-12)
    assert float(norm_gain(torch.ones(64), torch.tensor(0.0), keep)) == 1


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    small = TargetConfig(num_hidden_layers=2, hidden_size=32, head_dim=8, output_rows=[5, 3])
    kept = plan.make(random_scores(SHAPE), SHAPE, small, ranked())
    kept.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.tensors().keys() == kept.tensors().keys()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in kept.tensors().items())
    assert again.summary() == kept.summary()
    assert str(again) == str(kept)
    with pytest.raises(ValueError, match="holds no plan"):
        Plan.load(tmp_path / "elsewhere")


def test_a_plan_says_what_it_keeps_and_how_two_differ() -> None:
    small = TargetConfig(intermediate_size=48, hidden_size=32)
    first, second = (plan.make(random_scores(SHAPE, seed), SHAPE, small, ranked()) for seed in (0, 1))
    assert f"{first.target.num_parameters:,} parameters" in str(first)
    assert "hidden_size" in str(first)
    assert set(first.diff(first).values()) == {1.0}
    shared = first.diff(second)
    assert (shared["layers"], shared["heads"]) == (1.0, 1.0)
    assert 0.2 < shared["mlp"] < 0.8
    assert shared["hidden"] < 1
    heads = [
        plan.make(random_scores(SHAPE), SHAPE, TargetConfig(head_dim=8, pairs=pairs, num_hidden_layers=n), ranked())
        for pairs, n in ((Pairs.first, 3), (Pairs.strongest, 3), (Pairs.strongest, 2))
    ]
    shared = heads[0].diff(heads[1])
    assert (shared["values"], shared["kv_heads"]) == (1.0, 1.0)
    assert shared["pairs"] == (heads[0].pairs == heads[1].pairs).double().mean()
    assert heads[1].diff(heads[2])["values"] == pytest.approx(2 / 3)
    other = dataclasses.replace(SHAPE, intermediate_size=64)
    with pytest.raises(ValueError, match="different sources"):
        first.diff(plan.make(None, other, TargetConfig(), ranked()))


def test_untied_becomes_tied_by_least_squares_where_the_heads_input_is_known() -> None:
    scores = random_scores(SHAPE)
    tied = TargetConfig(tie_word_embeddings=True, hidden_size=32)
    assert plan.make(scores, SHAPE, tied, ranked()).tie is Tie.mean
    with pytest.raises(ValueError, match=r"head\.covariance"):
        plan.make(scores, SHAPE, dataclasses.replace(tied, tie=Tie.least_squares), ranked())
    scores.tensors["head.covariance"] = torch.randn(64, 64)
    kept = plan.make(scores, SHAPE, tied, ranked())
    assert kept.tie is Tie.least_squares
    assert torch.equal(kept.head_covariance, scores["head.covariance"])
    assert plan.make(scores, dataclasses.replace(SHAPE, tie_word_embeddings=True), tied, ranked()).tie is None


MAGNITUDES = ranked(
    mlp=WidthScore.magnitude,
    attention=WidthScore.magnitude,
    hidden=HiddenScore.magnitude,
    layers=LayerScore.magnitude,
)


@pytest.mark.parametrize(
    ("cut", "axis"),
    [
        ({"num_hidden_layers": 2}, "layers"),
        ({"hidden_size": 32}, "hidden"),
        ({"intermediate_size": 40}, "mlp"),
        ({"num_attention_heads": 2}, "attention"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "attention"),
        ({"head_dim": 8}, "attention"),
        ({"keep_layers": [0, 1]}, None),
        ({}, None),
    ],
)
def test_only_an_axis_that_is_cut_needs_text(cut: dict[str, Any], axis: str | None) -> None:
    config = TargetConfig(**cut)
    shape = target_shape(SHAPE, config)

    def check(kinds: ScoreConfig, *, has_text: bool) -> None:
        check_wanted(SHAPE, shape, config, kinds, has_text=has_text, rope_type="default")

    check(ranked(), has_text=True)
    check(MAGNITUDES, has_text=False)
    if axis is None:
        check(ranked(), has_text=False)
        plan.make(None, SHAPE, config, ranked())
        return
    kind = getattr(ranked(), axis)
    words = f"scores.{axis}={kind} is measured on text: set calibration.path, or scores.{axis}=magnitude"
    with pytest.raises(ValueError, match=re.escape(words)):
        check(ranked(), has_text=False)


def test_what_else_needs_text_or_another_rope_is_said_before_anything_is_read() -> None:
    def check(config: TargetConfig, rope_type: str | None = "llama3") -> None:
        shape = target_shape(SHAPE, config)
        check_wanted(SHAPE, shape, config, MAGNITUDES, has_text=False, rope_type=rope_type)

    check(TargetConfig(pairs=Pairs.strongest))
    check(TargetConfig(tie_word_embeddings=True))
    for rope_type in ("llama3", None):
        check(TargetConfig(rope=Rope.published), rope_type)
    with pytest.raises(ValueError, match=r"target\.pairs=strongest is measured on text"):
        check(TargetConfig(pairs=Pairs.strongest, head_dim=8))
    with pytest.raises(ValueError, match=r"target\.tie=least_squares is measured on text"):
        check(TargetConfig(tie=Tie.least_squares, tie_word_embeddings=True))
    with pytest.raises(ValueError, match=r"target\.rope=published needs .* got 'default'"):
        check(TargetConfig(rope=Rope.published), "default")
