"""Every computed row of the table of published dense Llamas (llama-models ``models/sku_list.py``; model cards)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import tiny_config
from llamita.shapes import PUBLISHED, LlamaShape

MIB = 2**20

# name: parameters per layer, attention, MLP, one embedding matrix, all parameters, bf16 MiB, KV cache KiB per token
TABLE = {
    "meta-llama/Llama-3.1-8B": (218_112_000, 41_943_040, 176_160_768, 525_336_576, 8_030_261_248, 15_316.5, 128),
    "meta-llama/Llama-3.1-70B": (
        855_654_400,
        150_994_944,
        704_643_072,
        1_050_673_152,
        70_553_706_496,
        134_570.5,
        320,
    ),
    "meta-llama/Llama-3.1-405B": (
        3_187_703_808,
        570_425_344,
        2_617_245_696,
        2_101_346_304,
        405_853_388_800,
        774_103.9,
        504,
    ),
    "meta-llama/Llama-3.2-1B": (60_821_504, 10_485_760, 50_331_648, 262_668_288, 1_235_814_400, 2_357.1, 32),
    "meta-llama/Llama-3.2-3B": (100_669_440, 25_165_824, 75_497_472, 394_002_432, 3_212_749_824, 6_127.8, 112),
    "meta-llama/Llama-Guard-3-8B": (218_112_000, 41_943_040, 176_160_768, 525_336_576, 8_030_261_248, 15_316.5, 128),
    "meta-llama/Llama-Guard-3-1B": (60_821_504, 10_485_760, 50_331_648, 262_668_288, 1_498_482_688, 2_858.1, 32),
}

# layers, hidden, MLP, heads, KV heads, head size, tied
SIZES = {
    "meta-llama/Llama-3.1-8B": (32, 4096, 14336, 32, 8, 128, False),
    "meta-llama/Llama-3.1-70B": (80, 8192, 28672, 64, 8, 128, False),
    "meta-llama/Llama-3.1-405B": (126, 16384, 53248, 128, 8, 128, False),
    "meta-llama/Llama-3.2-1B": (16, 2048, 8192, 32, 8, 64, True),
    "meta-llama/Llama-3.2-3B": (28, 3072, 8192, 24, 8, 128, True),
    "meta-llama/Llama-Guard-3-8B": (32, 4096, 14336, 32, 8, 128, False),
    "meta-llama/Llama-Guard-3-1B": (16, 2048, 8192, 32, 8, 64, False),
    "meta-llama/Llama-Guard-3-1B-INT4": (12, 2048, 6400, 32, 8, 64, False),
}


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_are_the_published_ones(name: str) -> None:
    shape = PUBLISHED[name]
    assert (
        shape.num_hidden_layers,
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_attention_heads,
        shape.num_key_value_heads,
        shape.head_dim,
        shape.tie_word_embeddings,
    ) == SIZES[name]
    assert shape.vocab_size == 128_256
    assert PUBLISHED.keys() == SIZES.keys()


@pytest.mark.parametrize("name", TABLE)
def test_counts_are_those_of_the_table(name: str) -> None:
    shape = PUBLISHED[name]
    layer, attention, mlp, embedding, parameters, mebibytes, cache = TABLE[name]
    assert shape.layer_parameters == layer
    assert shape.attention_parameters == attention
    assert shape.mlp_parameters == mlp
    assert shape.vocab_size * shape.hidden_size == embedding
    assert shape.num_parameters == parameters
    assert round(2 * shape.num_parameters / MIB, 1) == mebibytes
    assert 2 * shape.kv_cache_values_per_token == cache * 1024


def test_the_pruned_guard_has_both_published_counts() -> None:
    """1,123 million with a whole output matrix (model card), 860 million with the 20 rows that it keeps."""
    cut = PUBLISHED["meta-llama/Llama-Guard-3-1B-INT4"]
    whole = dataclasses.replace(cut, output_rows=None)
    assert (cut.layer_parameters, cut.attention_parameters, cut.mlp_parameters) == (49_811_456, 10_485_760, 39_321_600)
    assert (whole.num_parameters, cut.num_parameters) == (1_123_076_096, 860_448_768)
    assert round(2 * whole.num_parameters / MIB, 1) == 2_142.1
    assert 2 * cut.kv_cache_values_per_token == 24 * 1024


@pytest.mark.parametrize(
    ("layers", "ffn", "parameters"), [(12, 8192, 1_255_196_672), (16, 6400, 1_322_321_920)], ids=["depth", "width"]
)
def test_guard_between_its_two_cuts(layers: int, ffn: int, parameters: int) -> None:
    guard = PUBLISHED["meta-llama/Llama-Guard-3-1B"]
    assert dataclasses.replace(guard, num_hidden_layers=layers, intermediate_size=ffn).num_parameters == parameters


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "INT4" not in name])
def test_tensors_are_those_of_transformers(name: str) -> None:
    """Names, shapes and number of parameters, on the meta device."""
    shape = PUBLISHED[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config(**shape.config_fields()))
    stored = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if shape.tie_word_embeddings:
        del stored["lm_head.weight"]
    assert stored == shape.tensors()
    assert sum(p.numel() for p in model.parameters()) == shape.num_parameters


def test_sizes_survive_a_transformers_configuration() -> None:
    for name, shape in PUBLISHED.items():
        if shape.output_rows is None:
            assert LlamaShape.from_config(tiny_config(**shape.config_fields()).to_dict()) == shape, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads=3"),
        ({"hidden_size": 70}, "multiple of num_attention_heads=4"),
        ({"head_dim": 15}, "even"),
        ({"hidden_size": 0}, "at least 1"),
        ({"output_rows": 129}, "1..128"),
        ({"output_rows": 20, "tie_word_embeddings": True}, "tied matrix"),
    ],
)
def test_sizes_that_no_stock_llama_has_are_refused(change: dict[str, int], words: str) -> None:
    shape = LlamaShape.from_config(tiny_config().to_dict())
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(shape, **change)


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias"])
def test_biases_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        LlamaShape.from_config(tiny_config(**{field: True}).to_dict())


def test_flops_of_a_forward_pass_are_two_per_weight_and_token() -> None:
    """Without attention to other tokens, every matrix is used once; norms and the embedding look-up count nothing."""
    shape = LlamaShape.from_config(tiny_config().to_dict())
    vectors = shape.hidden_size * (2 * shape.num_hidden_layers + 1)
    matrices = shape.num_parameters - vectors - shape.vocab_size * shape.hidden_size
    assert shape.forward_flops_per_token(0) == 2 * matrices
    heads = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
    assert shape.forward_flops_per_token(10) - shape.forward_flops_per_token(0) == 2 * 2 * heads * 10
