"""Laws of the cut: what was silent is not missed, what is not cut is not touched, and any Llama program can load it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForTokenClassification

from calibration import Batch, ranked, saved, text
from conftest import tiny_model
from llamita import checkpoints
from llamita.prune import importance, plan, stream, surgery
from llamita.prune.plan import Plan
from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import HiddenScore, LayerScore, WidthScore
from llamita.prune.target import Pairs, TargetConfig, Tie, target_shape
from llamita.prune.tie import COVARIANCE_WEIGHT

MEASURED = ranked()
MINITRON = ranked(mlp=WidthScore.activation, attention=WidthScore.activation)
MAGNITUDES = ranked(
    mlp=WidthScore.magnitude,
    attention=WidthScore.magnitude,
    hidden=HiddenScore.magnitude,
    layers=LayerScore.magnitude,
)


def write(pruned: surgery.Pruned, path: Path, **options: Any) -> None:
    path.mkdir()
    config = options.pop("config", pruned.config)
    with checkpoints.ModelWriter(path, config, **options) as writer:
        surgery.write(pruned, writer)
        writer.publish(None, {})


def cut(
    model: LlamaForCausalLM, path: Path, target: TargetConfig, kinds: ScoreConfig = MEASURED
) -> tuple[LlamaForCausalLM, Plan]:
    """The pruned model, by way of its files."""
    weights = saved(model, path / "source")
    if kinds is MAGNITUDES:
        scores = importance.from_weights(weights)
    else:
        scores = importance.measure(weights, [text()], dtype=torch.float32)
    kept = plan.make(scores, weights.shape, target, kinds)
    write(surgery.Pruned(weights, kept), path / "pruned")
    return checkpoints.load_model(path / "pruned").eval(), kept


@torch.no_grad()
def logits(model: Any, batch: Batch) -> Tensor:
    output: Tensor = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return output


def silence_mlp(model: LlamaForCausalLM) -> None:
    """Half of the units of each layer, by one matrix in turn."""
    for index, layer in enumerate(model.model.layers):
        units = torch.randperm(96)[:48]
        if index == 2:
            layer.mlp.down_proj.weight[:, units] = 0
        else:
            (layer.mlp.gate_proj, layer.mlp.up_proj)[index].weight[units] = 0


def silence_query_heads(model: LlamaForCausalLM) -> None:
    """One of the two query heads of each KV head."""
    for index, layer in enumerate(model.model.layers):
        for head in (index % 2, 2 + (index + 1) % 2):
            layer.self_attn.o_proj.weight[:, 16 * head : 16 * head + 16] = 0


def silence_kv_head(model: LlamaForCausalLM) -> None:
    for index, layer in enumerate(model.model.layers):
        first = 16 * (index % 2)
        layer.self_attn.v_proj.weight[first : first + 16] = 0


def silence_hidden(model: LlamaForCausalLM) -> None:
    """Channels into which nothing is ever written."""
    channels = torch.randperm(64)[:32]
    model.model.embed_tokens.weight[:, channels] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[channels] = 0
        layer.mlp.down_proj.weight[channels] = 0


def silence_layer(model: LlamaForCausalLM) -> None:
    """A layer that adds nothing to the residual stream."""
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.model.layers[1].mlp.down_proj.weight.zero_()


def silence_half_of_each_head(model: LlamaForCausalLM) -> None:
    """The odd rotary pairs of queries and keys, and half of the value channels."""
    for layer in model.model.layers:
        attention = layer.self_attn
        for matrix in (attention.q_proj, attention.k_proj):
            matrix.weight.view(-1, 2, 8, 64)[:, :, 1::2] = 0
        for key in range(2):
            attention.v_proj.weight[16 * key + torch.randperm(16)[:8]] = 0


SILENT: dict[str, tuple[Any, dict[str, Any]]] = {
    "mlp": (silence_mlp, {"intermediate_size": 48}),
    "query heads": (silence_query_heads, {"num_attention_heads": 2}),
    "kv head": (silence_kv_head, {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "hidden": (silence_hidden, {"hidden_size": 32}),
    "layer": (silence_layer, {"num_hidden_layers": 2}),
    "head size": (silence_half_of_each_head, {"head_dim": 8}),
}


# Minitron's statistic is of activations alone: it does not see that an output column is zero.
SEES = [(unit, kinds) for unit in SILENT for kinds in (MEASURED, MAGNITUDES)]
SEES += [(unit, MINITRON) for unit in ("kv head", "hidden", "layer", "head size")]


def agree(pruned: LlamaForCausalLM, model: LlamaForCausalLM) -> None:
    # A Llama's norms compute in float32, whatever its weights are.
    torch.testing.assert_close(logits(pruned, text()), logits(model, text()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("unit", "kinds"), SEES, ids=[f"{unit}-{kinds.mlp}" for unit, kinds in SEES])
def test_silent_units_are_not_missed(unit: str, kinds: ScoreConfig, tmp_path: Path) -> None:
    silence, target = SILENT[unit]
    # A small eps: its share of a norm is all that a gain which is one for all tokens cannot follow.
    model = tiny_model(rms_norm_eps=1e-9).double()
    with torch.no_grad():
        silence(model)
    pruned, _ = cut(model, tmp_path, TargetConfig(**target), kinds)
    agree(pruned, model)


def test_all_silent_units_at_once_are_not_missed(tmp_path: Path) -> None:
    model, target = tiny_model(rms_norm_eps=1e-9).double(), {}
    with torch.no_grad():
        for unit in ("mlp", "query heads", "hidden", "layer", "head size"):
            SILENT[unit][0](model)
            target |= SILENT[unit][1]
    pruned, kept = cut(model, tmp_path, TargetConfig(**target))
    assert kept.layers.tolist() == [0, 2]
    agree(pruned, model)


@pytest.mark.parametrize("kinds", [MEASURED, MAGNITUDES], ids=["measured", "magnitude"])
def test_three_of_four_query_heads_stay_with_their_kv_head(kinds: ScoreConfig, tmp_path: Path) -> None:
    """As from 8B to 3B, with halved heads on top: each group loses another head, each KV head other channels."""
    sizes = {"num_attention_heads": 8, "hidden_size": 48, "num_hidden_layers": 2}
    model = tiny_model(**sizes, rms_norm_eps=1e-9).double()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            for head in (1 + index, 4 + 3 * index):
                attention.o_proj.weight[:, 16 * head : 16 * head + 16] = 0
            for matrix in (attention.q_proj, attention.k_proj):
                matrix.weight.view(-1, 2, 8, 48)[:, :, 1::2] = 0
            for key in range(2):
                attention.v_proj.weight[16 * key + torch.randperm(16)[:8]] = 0
    pruned, kept = cut(model, tmp_path, TargetConfig(num_attention_heads=6, head_dim=8), kinds)
    assert kept.heads.tolist() == [[0, 2, 3, 5, 6, 7], [0, 1, 3, 4, 5, 6]]
    assert kept.values[0, 0].tolist() != kept.values[0, 1].tolist()
    agree(pruned, model)


@pytest.mark.parametrize("pairs", Pairs)
def test_a_head_whose_odd_rotary_pairs_are_silent_is_its_half_to_1e_6(pairs: Pairs, tmp_path: Path) -> None:
    model = tiny_model(head_dim=128, num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(0.1)  # to the size of trained weights
        for matrix in (attention.q_proj, attention.k_proj):
            matrix.weight.view(-1, 2, 64, 64)[:, :, 1::2] = 0
        attention.v_proj.weight.view(2, 128, 64)[:, 1::2] = 0
    pruned, kept = cut(model, tmp_path, TargetConfig(head_dim=64, pairs=pairs))
    assert kept.pairs[0, 0].tolist() == list(range(0, 64, 2))
    states, outputs = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(3)), []
    with torch.no_grad():
        for llama in (model, pruned):
            turns = llama.model.rotary_emb(states, torch.arange(24)[None])
            outputs.append(llama.model.layers[0].self_attn(states, position_embeddings=turns, attention_mask=None)[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-6)


def test_the_scale_of_queries_is_rounded_once(tmp_path: Path) -> None:
    """sqrt(1/2) in float32, then the cast: not in bfloat16 steps."""
    model = tiny_model().bfloat16()
    pruned, kept = cut(model, tmp_path, TargetConfig(head_dim=8), MAGNITUDES)
    query = model.model.layers[0].self_attn.q_proj.weight.view(4, 2, 8, 64)[:, :, ::2].reshape(32, 64)
    expected = (query.float() * 0.5**0.5).bfloat16()
    assert torch.equal(pruned.model.layers[0].self_attn.q_proj.weight, expected)
    assert kept.query_scale == 0.5**0.5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_shape_is_the_identity_bit_for_bit(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    cut(tiny_model(tie_word_embeddings=tied).to(dtype), tmp_path, TargetConfig())
    source, result = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "pruned"))
    assert source.keys() == result.keys()
    for name, tensor in source.items():
        assert result[name].dtype == tensor.dtype == dtype
        assert torch.equal(result[name], tensor), name
    assert (tmp_path / "source/config.json").read_text() == (tmp_path / "pruned/config.json").read_text()


def test_kept_units_are_copied_bit_for_bit(tmp_path: Path) -> None:
    """Only queries (head size) and norms (hidden size) are scaled."""
    model = tiny_model().bfloat16()
    target = TargetConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=40, num_attention_heads=2, head_dim=8)
    pruned, kept = cut(model, tmp_path, target)
    for index, old in enumerate(kept.layers.tolist()):
        before, after = model.model.layers[old], pruned.model.layers[index]
        assert torch.equal(after.mlp.up_proj.weight, before.mlp.up_proj.weight[kept.mlp[index]][:, kept.hidden])
        assert torch.equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight[kept.hidden][:, kept.mlp[index]])
        for key in range(2):
            mine = slice(8 * key, 8 * key + 8)
            rows = 16 * key + torch.cat([kept.pairs[index, key], kept.pairs[index, key] + 8])
            assert torch.equal(
                after.self_attn.k_proj.weight[mine], before.self_attn.k_proj.weight[rows][:, kept.hidden]
            )
            rows = 16 * key + kept.values[index, key]
            assert torch.equal(
                after.self_attn.v_proj.weight[mine], before.self_attn.v_proj.weight[rows][:, kept.hidden]
            )
            columns = 16 * kept.heads[index, key] + kept.values[index, key]
            assert torch.equal(
                after.self_attn.o_proj.weight[:, mine], before.self_attn.o_proj.weight[kept.hidden][:, columns]
            )
    assert torch.equal(pruned.lm_head.weight, model.lm_head.weight[:, kept.hidden])


def test_queries_keep_the_pairs_of_their_kv_head_and_each_norm_its_own_gain(tmp_path: Path) -> None:
    model = tiny_model()
    pruned, kept = cut(model, tmp_path, TargetConfig(head_dim=8, hidden_size=32, pairs=Pairs.strongest))
    assert len(kept.norm_gain.unique()) == 7
    for index, (before, after) in enumerate(zip(model.model.layers, pruned.model.layers, strict=True)):
        assert not torch.equal(kept.pairs[index, 0], kept.pairs[index, 1])
        for head in range(4):
            rows = 16 * head + torch.cat([kept.pairs[index, head // 2], kept.pairs[index, head // 2] + 8])
            expected = before.self_attn.q_proj.weight[rows][:, kept.hidden] * 0.5**0.5
            torch.testing.assert_close(after.self_attn.q_proj.weight[8 * head : 8 * head + 8], expected)
        for place, norm in enumerate(("input_layernorm", "post_attention_layernorm")):
            expected = getattr(before, norm).weight[kept.hidden] * kept.norm_gain[2 * index + place]
            torch.testing.assert_close(getattr(after, norm).weight, expected.float())
    torch.testing.assert_close(
        pruned.model.norm.weight, (model.model.norm.weight[kept.hidden] * kept.norm_gain[-1]).float()
    )


def test_a_norm_is_rescaled_for_the_energy_it_lost(tmp_path: Path) -> None:
    """Over the calibration tokens, its mean square output in the kept channels is that of the whole norm."""
    model = tiny_model(rms_norm_eps=1e-9)
    pruned, kept = cut(model, tmp_path, TargetConfig(hidden_size=32))
    inputs = model.model.embed_tokens(text()["input_ids"]).detach()
    norm, cut_norm = model.model.layers[0].input_layernorm, pruned.model.layers[0].input_layernorm
    gains = norm.weight.detach()[kept.hidden]
    whole, part = norm(inputs)[..., kept.hidden] / gains, cut_norm(inputs[..., kept.hidden]) / gains
    assert part.square().mean().item() == pytest.approx(whole.square().mean().item(), rel=1e-5)


@torch.no_grad()
def least_squares(model: LlamaForCausalLM, kept: Plan) -> Tensor:
    """(a E + U E[n n'^T]) (a I + E[n' n'^T])^-1, n' the kept channels of the final norm's output n."""
    assert kept.head_covariance is not None
    gain = model.model.norm.weight.double()
    outer = gain[:, None] * kept.head_covariance.double() * gain
    inner = outer[kept.hidden][:, kept.hidden]
    pull = COVARIANCE_WEIGHT * inner.diagonal().mean() * torch.eye(len(inner)).double()
    embedding, head = model.model.embed_tokens.weight.double()[:, kept.hidden], model.lm_head.weight.double()
    return torch.linalg.solve(inner + pull, (embedding @ pull + head @ outer[:, kept.hidden]).T).T


@pytest.mark.parametrize("tie", Tie)
def test_two_matrices_become_one_by_the_formula_asked_for(tie: Tie, tmp_path: Path) -> None:
    model = tiny_model()
    pruned, kept = cut(model, tmp_path, TargetConfig(tie_word_embeddings=True, tie=tie, hidden_size=32))
    embedding, head = (
        matrix.weight.detach()[:, kept.hidden].double() for matrix in (model.model.embed_tokens, model.lm_head)
    )
    expected = {Tie.embedding: embedding, Tie.head: head, Tie.mean: (embedding + head) / 2}
    if tie is Tie.least_squares:
        expected[tie] = least_squares(model, kept)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    torch.testing.assert_close(pruned.lm_head.weight.detach().double(), expected[tie], rtol=1e-5, atol=1e-6)
    assert "lm_head.weight" not in load_file(tmp_path / "pruned/model.safetensors")


def test_a_mixture_of_bfloat16_matrices_is_rounded_once(tmp_path: Path) -> None:
    model = tiny_model().bfloat16()
    pruned, kept = cut(model, tmp_path, TargetConfig(tie_word_embeddings=True, tie=Tie.least_squares))
    # Half a step of bfloat16, and a little for the product in float32.
    torch.testing.assert_close(
        pruned.lm_head.weight.detach().double(), least_squares(model, kept), rtol=2**-8, atol=1e-6
    )


@pytest.mark.parametrize("tie", Tie)
def test_tying_two_equal_matrices_changes_nothing(tie: Tie, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    pruned, _ = cut(model, tmp_path, TargetConfig(tie_word_embeddings=True, tie=tie))
    torch.testing.assert_close(logits(pruned, text()), logits(model, text()), rtol=1e-4, atol=1e-4)


def test_an_untied_head_is_a_copy(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    pruned, _ = cut(model, tmp_path, TargetConfig(tie_word_embeddings=False))
    assert not pruned.config.tie_word_embeddings
    assert pruned.lm_head.weight is not pruned.model.embed_tokens.weight
    assert torch.equal(logits(pruned, text()), logits(model, text()))


def test_a_plan_of_another_shape_is_refused(tmp_path: Path) -> None:
    weights = saved(tiny_model(), tmp_path)
    other = saved(tiny_model(intermediate_size=64), tmp_path / "other")
    with pytest.raises(ValueError, match="made for"):
        surgery.Pruned(weights, plan.make(None, other.shape, TargetConfig(), MEASURED))


def test_a_pruned_view_runs_as_its_files_do(tmp_path: Path) -> None:
    """The loss of the smaller model is known before it is written."""
    target = TargetConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=40, head_dim=8, tie_word_embeddings=True
    )
    weights = saved(tiny_model(), tmp_path / "model")
    scores = importance.measure(weights, [text()], dtype=torch.float32)
    view = surgery.Pruned(weights, plan.make(scores, weights.shape, target, MEASURED))
    write(view, tmp_path / "pruned")
    of_view, of_files = (
        stream.mean_loss(model, [text()], dtype=torch.float32)
        for model in (view, checkpoints.Weights(tmp_path / "pruned"))
    )
    assert of_view == of_files


def test_kept_output_rows_are_a_token_classifiers_logits(tmp_path: Path) -> None:
    model, rows = tiny_model(), [7, 3, 100]
    weights = saved(model, tmp_path / "source")
    pruned = surgery.Pruned(weights, plan.make(None, weights.shape, TargetConfig(output_rows=rows), MEASURED))
    write(
        pruned, tmp_path / "out", config=surgery.classifier_config(pruned.config, rows, ["seven", "three", "hundred"])
    )
    stock, info = LlamaForTokenClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert stock.config.id2label == {0: "seven", 1: "three", 2: "hundred"}
    torch.testing.assert_close(logits(stock.eval(), text()), logits(model, text())[..., rows])
    again = checkpoints.Weights(tmp_path / "out")
    assert again.shape == pruned.shape
    assert torch.equal(again.head(), model.lm_head.weight[rows])
    with pytest.raises(ValueError, match="token classifier of 3 output rows"):
        checkpoints.load_model(tmp_path / "out")
    with pytest.raises(ValueError, match="lost output rows already"):
        target_shape(again.shape, TargetConfig())


STOCK = """
import sys, warnings
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "llamita":
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
warnings.simplefilter("error")
auto = {"causal": AutoModelForCausalLM, "classifier": AutoModelForTokenClassification}[sys.argv[2]]
model, info = auto.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info.values()), info
ids = torch.arange(2, 10)[None]
if sys.argv[2] == "causal":
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=1)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    assert cached.shape == (1, 14)
    assert torch.equal(cached, plain)
print(type(model).__name__, sum(p.numel() for p in model.parameters()))
"""


@pytest.mark.parametrize("rows", [None, [4, 2]], ids=["causal", "classifier"])
def test_the_result_loads_where_this_project_is_unknown(rows: list[int] | None, tmp_path: Path) -> None:
    """No missing or unexpected keys, no word on stderr, and generation uses its cache (layers are numbered anew)."""
    target = TargetConfig(
        keep_layers=[0, 2],
        hidden_size=32,
        intermediate_size=40,
        num_attention_heads=2,
        head_dim=8,
        tie_word_embeddings=rows is None,
        output_rows=rows,
    )
    weights = saved(tiny_model(), tmp_path / "source")
    scores = importance.measure(weights, [text()], dtype=torch.float32)
    pruned = surgery.Pruned(weights, plan.make(scores, weights.shape, target, MEASURED))
    config = surgery.classifier_config(pruned.config, rows, ["a", "b"]) if rows else pruned.config
    write(pruned, tmp_path / "out", config=config, shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    command = [sys.executable, "-c", STOCK, str(tmp_path / "out"), "classifier" if rows else "causal"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    noise = [line for line in done.stderr.splitlines() if "Loading weights" not in line and line.strip()]
    assert (done.returncode, noise) == (0, [])
    name = "LlamaForTokenClassification" if rows else "LlamaForCausalLM"
    assert done.stdout.split() == [name, str(pruned.shape.num_parameters + len(rows or []))]
