"""Laws of what mends a cut: each part is the optimum that it claims to be, and a kill costs one layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor
from transformers import LlamaForCausalLM

from calibration import saved, text
from conftest import tiny_model
from llamita import checkpoints
from llamita.prune import attention, head, importance, mend, plan, stream, surgery, tie_steps
from llamita.prune import tune as tune_module
from llamita.prune.attention import Attention, divergence, divergence_in_chunks
from llamita.prune.compensation import CompensationConfig, Prefix
from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import HiddenScore, LayerScore, WidthScore
from llamita.prune.stream import Runner
from llamita.prune.streams import Streams
from llamita.prune.target import TargetConfig
from llamita.prune.tune import Objective, Tuned, tune
from pruning_methods import CLOSED, OFF
from storages import Peak

KINDS = ScoreConfig(mlp=WidthScore.norm_product, attention=WidthScore.norm_product, layers=LayerScore.block_influence)
SMALL = TargetConfig(
    num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_key_value_heads=1, num_attention_heads=2, head_dim=8
)


def batches(number: int = 4, rows: int = 8) -> list[dict[str, Tensor]]:
    return [text(rows=rows, length=40, seed=seed) for seed in range(number)]


def cut(path: Path, target: TargetConfig, kinds: ScoreConfig = KINDS, **overrides: Any) -> surgery.Pruned:
    weights = saved(tiny_model(**overrides).double(), path / "source")
    scores = importance.measure(weights, batches(), dtype=torch.float64)
    return surgery.Pruned(weights, plan.make(scores, weights.shape, target, kinds))


def mended(pruned: surgery.Pruned, config: CompensationConfig, folder: Path, **options: Any) -> mend.Mended:
    return mend.mend(pruned, batches(), config, folder, dtype=torch.float64, **options)


def loss(model: stream.Model) -> float:
    found = stream.mean_loss(model, batches(), dtype=torch.float64)
    assert found is not None
    return found


def test_a_narrow_pass_does_not_round_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where what is read is found to be what was read, a matrix stays that of the file, whatever the pass is in."""
    weights = saved(tiny_model(), tmp_path / "source")
    kept = plan.make(None, weights.shape, TargetConfig(keep_layers=[0, 2]), KINDS)
    for module in (mend.halves, head):
        monkeypatch.setattr(module, "reading", lambda *arguments: (torch.eye(64), 1.0))
    monkeypatch.setattr(mend.halves, "measured_gain", lambda *arguments: 1.0)
    config = dataclasses.replace(OFF, readers=True, gains=True)
    pruned = surgery.Pruned(weights, kept)
    result = mend.mend(pruned, batches(1), config, tmp_path / "mended", dtype=torch.bfloat16)
    for index in range(2):
        assert all(torch.equal(result.layer(index)[name], tensor) for name, tensor in pruned.layer(index).items())
    assert torch.equal(result.head(), weights.head())


def test_a_model_of_which_nothing_was_cut_stays_as_it_is(tmp_path: Path) -> None:
    pruned = cut(tmp_path, TargetConfig())
    result = mended(pruned, CompensationConfig(), tmp_path / "mended")
    for index in range(3):
        for name, tensor in pruned.layer(index).items():
            torch.testing.assert_close(result.layer(index)[name], tensor, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(result.head(), pruned.head(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_what_is_written_is_fitted_by_least_squares(tmp_path: Path) -> None:
    """Against float64 lstsq on the whole model's own activations, each token by one over its mean square."""
    pruned = cut(tmp_path, TargetConfig(intermediate_size=48))
    result = mended(pruned, dataclasses.replace(OFF, writers=True, ridge=1e-12), tmp_path / "mended")
    model = tiny_model().double()
    units, stream_in, stream_out = [], [], []
    layer = model.model.layers[0]
    hooks = [
        layer.mlp.down_proj.register_forward_hook(lambda m, i, o: units.append(i[0].flatten(0, 1))),
        layer.post_attention_layernorm.register_forward_hook(lambda m, i, o: stream_in.append(i[0].flatten(0, 1))),
        layer.register_forward_hook(lambda m, i, o: stream_out.append(o.flatten(0, 1))),
    ]
    for batch in batches():
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    z, x, y = torch.cat(units)[:, pruned.plan.mlp[0]], torch.cat(stream_in), torch.cat(stream_out)
    root = y.square().mean(-1, keepdim=True).rsqrt()
    dense = torch.linalg.lstsq(root * z, root * (y - x)).solution.T
    torch.testing.assert_close(result.layer(0)["mlp.down_proj.weight"], dense, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_what_is_read_is_fitted_by_least_squares(tmp_path: Path) -> None:
    """The first layer reads the kept channels of the embeddings: W [E n n'^T] [E n' n'^T]^-1, by lstsq."""
    pruned = cut(tmp_path, TargetConfig(hidden_size=32), dataclasses.replace(KINDS, hidden=HiddenScore.activation))
    result = mended(pruned, dataclasses.replace(OFF, readers=True, ridge=1e-12), tmp_path / "mended")
    model = tiny_model().double()
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches()])
    whole, kept = model.model.embed_tokens.weight[ids], pruned.plan.hidden
    eps = model.config.rms_norm_eps
    norm = model.model.layers[0].input_layernorm.weight

    def normed(x: Tensor, gain: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain

    before = normed(whole, norm)
    after = normed(whole[:, kept], norm[kept] * float(pruned.plan.norm_gain[0]))
    seen = torch.linalg.lstsq(after, before).solution.T
    for name in ("q_proj", "k_proj", "v_proj"):
        expected = getattr(model.model.layers[0].self_attn, name).weight @ seen
        # Stock RMSNorm is float32.
        torch.testing.assert_close(result.layer(0)[f"self_attn.{name}.weight"], expected, rtol=1e-3, atol=1e-4)


def test_every_part_brings_each_layer_closer_to_what_the_whole_one_wrote(tmp_path: Path) -> None:
    pruned = cut(tmp_path, SMALL, dataclasses.replace(KINDS, hidden=HiddenScore.pca))
    steps = dataclasses.replace(CompensationConfig(), attention_steps=30, layer_steps=60, head_steps=0, tied_steps=0)
    mend.mend(pruned, [text(rows=8, length=40)] * 4, steps, tmp_path / "mended", dtype=torch.float64)
    for record in mend.records(tmp_path / "mended", 2)[:-1]:
        assert record["error/tuned"] < record["error/refit"] < record["error/start"]


def test_each_part_says_what_it_took_and_what_it_leaves(tmp_path: Path) -> None:
    pruned = cut(tmp_path, SMALL, dataclasses.replace(KINDS, hidden=HiddenScore.pca))
    steps = CompensationConfig(attention_steps=30, layer_steps=2, head_steps=0, tied_steps=0)
    mend.mend(pruned, [text(rows=8, length=40)] * 4, steps, tmp_path / "mended", dtype=torch.float64)
    parts = {"gains", "readers", "values", "attention_steps", "writers", "steps", "passes"}
    for record in mend.records(tmp_path / "mended", 2)[:-1]:
        assert {name for name in record if name.startswith("seconds/")} == {f"seconds/{part}" for part in parts}
        assert all(record[f"seconds/{part}"] >= 0 for part in parts)
        assert all(0 < record[f"left/{part}"] < 1 for part in ("readers", "attention_steps", "writers"))


@pytest.mark.parametrize("readers", [True, False])
@pytest.mark.parametrize(
    "target", [TargetConfig(intermediate_size=48), TargetConfig(num_hidden_layers=2), SMALL], ids=str
)
def test_the_whole_model_stays_as_it_is(tmp_path: Path, target: TargetConfig, readers: bool) -> None:
    """Tensors that are not cut are views on the source's: what is fitted must lie in memory of its own."""
    pruned = cut(tmp_path, target, tie_word_embeddings=False)
    source = pruned.model

    def tensors() -> list[Tensor]:
        names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        return [*(source[name] for name in names), *(t for i in range(3) for t in source.layer(i).values())]

    before = [tensor.clone() for tensor in tensors()]
    mended(
        pruned,
        CompensationConfig(readers=readers, attention_steps=2, layer_steps=2, head_steps=2, tied_steps=2),
        tmp_path / "mended",
    )
    assert all(torch.equal(tensor, other) for tensor, other in zip(tensors(), before, strict=True))


def test_steps_on_the_distributions_bring_them_closer(tmp_path: Path) -> None:
    pruned = cut(tmp_path, SMALL, dataclasses.replace(KINDS, hidden=HiddenScore.pca))
    gaps = []
    for steps in (0, 60):
        config, same = dataclasses.replace(CLOSED, head_steps=steps), [text(rows=8, length=40)] * 4
        result = mend.mend(pruned, same, config, tmp_path / str(steps), dtype=torch.float64)
        logits = [dense_logits(model) for model in (pruned.model, result)]
        gaps.append(functional.kl_div(logits[1], logits[0], reduction="sum", log_target=True))
    assert gaps[1] < gaps[0]


def test_steps_of_a_shared_matrix_have_the_gradients_of_both_of_its_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through a stock Llama, whose one matrix is read twice."""
    target = dataclasses.replace(SMALL, tie_word_embeddings=True)
    pruned = cut(tmp_path, target, dataclasses.replace(KINDS, hidden=HiddenScore.pca), tie_word_embeddings=False)
    seen: dict[str, Any] = {}

    def looked_at(parameters: dict[str, Tensor], objective: Objective, **_: Any) -> Tuned:
        for tensor in parameters.values():
            tensor.requires_grad_()
        with torch.enable_grad():
            sums = [objective(number, True) for number in range(4)]
        seen.update(sum=sum(total for total, _ in sums), tokens=sum(count for _, count in sums))
        seen.update({name: tensor.grad for name, tensor in parameters.items()})
        for tensor in parameters.values():
            tensor.requires_grad_(False)
        return Tuned(0.0, 0.0)

    monkeypatch.setattr(tie_steps, "tune", looked_at)
    result = mended(pruned, dataclasses.replace(CLOSED, tied_steps=1), tmp_path / "mended")
    model = LlamaForCausalLM(pruned.config).double()
    model.load_state_dict(dict(surgery.tensors(result)), strict=False)
    whole = tiny_model(tie_word_embeddings=False).double()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches():
        read = {name: batch[name] for name in ("input_ids", "position_ids")}
        with torch.no_grad():
            wanted = whole(**read, use_cache=False).logits.log_softmax(-1)
        found = model(**read, use_cache=False).logits.log_softmax(-1)
        gap = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        total = total + gap[stream.real_tokens(batch)].sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert seen["tokens"] == sum(int(stream.real_tokens(batch).sum()) for batch in batches())
    torch.testing.assert_close(seen["sum"], total.detach(), rtol=1e-5, atol=1e-8)
    for name, parameter in (("matrix", model.model.embed_tokens.weight), ("norm", model.model.norm.weight)):
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_steps_of_a_shared_matrix_bring_the_distributions_closer(tmp_path: Path) -> None:
    target = dataclasses.replace(SMALL, tie_word_embeddings=True)
    pruned = cut(tmp_path, target, dataclasses.replace(KINDS, hidden=HiddenScore.pca), tie_word_embeddings=False)
    config = dataclasses.replace(CLOSED, tied_steps=60)
    result = mend.mend(pruned, [text(rows=8, length=40)] * 4, config, tmp_path / "mended", dtype=torch.float64)
    record = mend.records(tmp_path / "mended", 2)[-1]
    assert record["divergence/tied"] < record["divergence/start"]
    whole, found = dense_logits(pruned.model), dense_logits(result)
    tokens = stream.real_tokens(text(rows=8, length=40))
    gap = functional.kl_div(found, whole, reduction="none", log_target=True).sum(-1)[tokens].mean()
    assert float(gap) == pytest.approx(record["divergence/tied"], rel=1e-5)
    assert torch.equal(result.head(), result["model.embed_tokens.weight"])


@torch.no_grad()
def dense_logits(model: stream.Model) -> Tensor:
    """Logarithms of the next-token distributions."""
    norm = stream.final_norm(model, torch.float64, "cpu")
    (hidden,) = stream.forward(model, [text(rows=8, length=40)], dtype=torch.float64)
    found: Tensor = (norm(hidden) @ model.head().double().T).log_softmax(-1)
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_a_mended_model_loads_as_any_llama(tied: bool, tmp_path: Path) -> None:
    target = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    pruned = cut(tmp_path, target, dataclasses.replace(KINDS, hidden=HiddenScore.pca))
    steps = dataclasses.replace(CompensationConfig(), attention_steps=3, layer_steps=3, head_steps=3, tied_steps=3)
    result = mended(pruned, steps, tmp_path / "mended")
    path = tmp_path / "model"
    path.mkdir()
    with checkpoints.ModelWriter(path, pruned.config) as writer:
        surgery.write(result, writer)
        writer.publish(None, {})
    assert loss(checkpoints.Weights(path)) == pytest.approx(loss(result), rel=1e-9)


def test_a_removed_layer_is_made_up_for_by_the_layer_before(tmp_path: Path) -> None:
    pruned = cut(tmp_path, TargetConfig(keep_layers=[0, 2]))
    mended(pruned, dataclasses.replace(OFF, writers=True), tmp_path / "mended")
    before, *_ = mend.records(tmp_path / "mended", 2)
    assert before["error/refit"] < before["error/start"]


def test_a_removed_first_layer_is_made_up_for_by_what_reads_behind_it(tmp_path: Path) -> None:
    pruned = cut(tmp_path, TargetConfig(keep_layers=[1, 2]))
    mended(pruned, CLOSED, tmp_path / "mended")
    first, *_ = mend.records(tmp_path / "mended", 2)
    assert first["error/refit"] < first["error/start"]


class KilledError(Exception):
    """What ends a process between two layers."""


@pytest.mark.parametrize(
    ("layers", "prefix", "layer_steps"),
    [(1, Prefix.cut, 4), (2, Prefix.cut, 4), (1, Prefix.whole, 4), (2, Prefix.whole, 0)],
)
def test_a_killed_fit_goes_on_behind_its_last_layer(
    layers: int, prefix: Prefix, layer_steps: int, tmp_path: Path
) -> None:
    pruned = cut(tmp_path, TargetConfig(hidden_size=32, intermediate_size=48, keep_layers=[0, 2]))
    steps = CompensationConfig(prefix=prefix, layer_steps=layer_steps, head_steps=4, tied_steps=4)
    undisturbed = mended(pruned, steps, tmp_path / "undisturbed")

    def die(done: int) -> None:
        if done == layers:
            raise KilledError

    with pytest.raises(KilledError):
        mended(pruned, steps, tmp_path / "killed", watch=die)
    files = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").iterdir()}
    assert len(files) == layers
    resumed = mended(pruned, steps, tmp_path / "killed")
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == when for name, when in files.items())
    for index in range(2):
        for name, tensor in undisturbed.layer(index).items():
            assert torch.equal(resumed.layer(index)[name], tensor), name
    assert torch.equal(resumed.head(), undisturbed.head())


@pytest.mark.parametrize("prefix", Prefix)
def test_mending_holds_the_whole_stream_once_and_the_cut_one_twice(prefix: Prefix, tmp_path: Path) -> None:
    """Every tensor of a run over many small batches: weights, and what one batch takes, are next to nothing."""
    pruned = cut(tmp_path, SMALL, dataclasses.replace(KINDS, hidden=HiddenScore.pca))
    many = [text(rows=8, length=40, seed=seed) for seed in range(64)]
    steps = CompensationConfig(prefix=prefix, attention_steps=1, layer_steps=1, head_steps=1, tied_steps=1)
    tokens = sum(batch["input_ids"].numel() for batch in many)
    with Peak() as storages:
        mend.mend(pruned, many, steps, tmp_path / "mended", dtype=torch.float64)
    one = tokens * 8 * SMALL.hidden_size  # type: ignore[operator]
    whole = tokens * 8 * 64
    assert storages.most < whole + 3 * one


def test_the_prefix_decides_what_a_layer_is_fitted_to_read(tmp_path: Path) -> None:
    pruned = cut(tmp_path, TargetConfig(intermediate_size=24))
    both = [
        mended(pruned, dataclasses.replace(OFF, writers=True, prefix=prefix), tmp_path / prefix) for prefix in Prefix
    ]
    first, second = (result.layer(0)["self_attn.o_proj.weight"] for result in both)
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(*(result.layer(2)["mlp.down_proj.weight"] for result in both), atol=1e-3)


@torch.no_grad()
def test_attention_is_that_of_the_model() -> None:
    model = tiny_model()
    batch, layer = text(), model.model.layers[0]
    normed = layer.input_layernorm(model.model.embed_tokens(batch["input_ids"]))
    runner = Runner(model.config, "cpu")
    attention = Attention(runner, layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
    found = attention.log_probabilities(normed, batch["position_ids"])
    value = (normed @ layer.self_attn.v_proj.weight.T).view(4, 24, 2, 16).transpose(1, 2).repeat_interleave(2, 1)
    heads = (found.exp() @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(heads, runner.heads(layer.self_attn, normed, batch["position_ids"]))
    assert float(divergence(found, found, torch.ones(4, 24))) == 0.0


def test_divergence_counts_what_is_not_padding() -> None:
    whole, other = (torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(s)).log_softmax(-1) for s in (0, 1))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    expected = functional.kl_div(other, whole, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(whole, other, mask), (expected * mask[:, None]).sum())


def attentions(dtype: torch.dtype) -> tuple[Attention, Attention, Tensor, dict[str, Tensor]]:
    """Those of a layer and of one with heads of half the size, what both read, and a batch."""
    model, batch = tiny_model().to(dtype), text()
    normed = torch.randn(4, 24, 64, dtype=dtype, generator=torch.Generator().manual_seed(1))
    layer, runner = model.model.layers[0].self_attn, Runner(model.config, "cpu")
    whole = Attention(runner, layer.q_proj.weight.detach(), layer.k_proj.weight.detach())
    half = Runner(tiny_model(head_dim=8).config, "cpu")
    narrow = (whole.query[:32].clone().requires_grad_(), whole.key[:16].clone().requires_grad_())
    return whole, Attention(half, *narrow), normed, batch


@pytest.mark.parametrize("bytes_of_a_chunk", [2**30, 2 * 6 * 8 * 4 * 2 * 24 * 24, 6 * 8 * 4 * 2 * 24 * 24, 30_000, 1])
def test_attention_in_chunks_diverges_as_attention_whole(
    bytes_of_a_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sum and gradients against one graph over all heads and positions, in float64."""
    monkeypatch.setattr(attention, "CHUNK_BYTES", bytes_of_a_chunk)
    whole, cut_, normed, batch = attentions(torch.float64)
    positions, mask = batch["position_ids"], torch.arange(24) < torch.tensor([24, 20, 7, 24])[:, None]
    found = []
    for chunked in (False, True):
        cut_.query.grad = cut_.key.grad = None
        if chunked:
            both = whole.turned(normed, positions), cut_.turned(normed, positions)
            total = divergence_in_chunks(*both, positions, mask, learn=True)
        else:
            both_dense = (each.log_probabilities(normed, positions) for each in (whole, cut_))
            total = divergence(*both_dense, mask)
            torch.autograd.backward(total)
        assert cut_.query.grad is not None
        assert cut_.key.grad is not None
        found.append((total.detach(), cut_.query.grad, cut_.key.grad))
    for dense, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-12, atol=1e-12)
        if bytes_of_a_chunk == 2**30:
            assert torch.equal(mine, dense)


@pytest.mark.parametrize("limit", [10**9, 6 * 4 * 4 * 4 * 24 * 24, 100_000, 1])
def test_every_pair_of_positions_is_in_one_chunk_that_fits(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK_BYTES", limit)
    seen_times = torch.zeros(2, 24)
    pieces = list(attention.chunks(4, 2, 4, 24, 4))
    for chunk in pieces:
        seen_times[chunk.keys, chunk.rows] += 1
        keys, rows = chunk.keys.stop - chunk.keys.start, chunk.rows.stop - chunk.rows.start
        assert 6 * 4 * 4 * keys * 4 * rows * 24 <= limit or (keys, rows) == (1, 1)
    assert torch.equal(seen_times, torch.ones(2, 24))
    assert (len(pieces) == 1) == (limit == 10**9)


def test_attention_of_long_rows_stays_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every storage that comes to be while the divergence of a batch is learnt, of heads that do not fit at once."""
    limit = 2**21
    monkeypatch.setattr(attention, "CHUNK_BYTES", limit)
    whole, cut_, _, _ = attentions(torch.float32)
    positions = torch.arange(512)[None]
    normed = torch.randn(1, 512, 64, generator=torch.Generator().manual_seed(1))
    both = whole.turned(normed, positions), cut_.turned(normed, positions)
    with Peak() as storages:
        divergence_in_chunks(*both, positions, torch.ones(1, 512).bool(), learn=True)
    turned = 4 * 512 * 4 * 16 * 4  # what is made of queries and keys: their gradients, and those of what they were
    assert 0.7 * limit < storages.most < 1.05 * limit + turned


@pytest.mark.parametrize("steps", ["attention_steps", "layer_steps", "head_steps", "tied_steps"])
def test_steps_for_which_memory_is_short_name_their_setting(
    steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = cut(tmp_path, dataclasses.replace(SMALL, tie_word_embeddings=True), tie_word_embeddings=False)

    def short(*_: Any, **__: Any) -> Tuned:
        raise RuntimeError("CUDA out of memory. Tried to allocate 8.00 GiB")

    for module in (tune_module, head, tie_steps):
        monkeypatch.setattr(module, "tune", short)
    with pytest.raises(ValueError, match=rf"to need less: .*compensation\.{steps}=0"):
        mended(pruned, dataclasses.replace(OFF, **{steps: 1}), tmp_path / "mended")


def test_steps_that_do_not_help_where_they_did_not_look_are_taken_back() -> None:
    weight = torch.ones(3)

    def objective(batch: int, learn: bool) -> tuple[Tensor, int]:
        total = (weight * (1.0 if batch < 8 else -1.0)).sum()
        if learn:
            torch.autograd.backward(total)
        return total.detach(), 1

    tuned = tune({"weight": weight}, objective, batches=9, steps=20, learning_rate=0.1, seed=0)
    assert not tuned.kept
    assert torch.equal(weight, torch.ones(3))


def test_steps_find_the_least_of_a_parabola_at_a_rate_of_the_weights_own_size() -> None:
    for size in (1e-3, 1.0, 1e3):
        weight = torch.full((4,), size)

        def objective(batch: int, learn: bool, weight: Tensor = weight, size: float = size) -> tuple[Tensor, int]:
            total = ((weight / size - 2) ** 2).sum()
            if learn:
                torch.autograd.backward(total)
            return total.detach(), 4

        tuned = tune({"weight": weight}, objective, batches=1, steps=200, learning_rate=0.05, seed=0)
        assert tuned.before == pytest.approx(1.0)
        assert tuned.after < 1e-3


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match=r"compensation\.layer_steps must be at least 0, got -1"):
        CompensationConfig(layer_steps=-1)
    with pytest.raises(ValueError, match=r"compensation\.ridge must be between 0 and 1, got 0"):
        CompensationConfig(ridge=0.0)


def test_padding_alone_is_nothing_to_fit_to(tmp_path: Path) -> None:
    pruned = cut(tmp_path, TargetConfig(intermediate_size=48))
    empty = {
        "input_ids": torch.ones(1, 8).long(),
        "labels": torch.full((1, 8), -100),
        "position_ids": torch.arange(8)[None],
    }
    with pytest.raises(ValueError, match="no token that is not padding"):
        mend.mend(pruned, [empty], CLOSED, tmp_path / "mended", dtype=torch.float64)


def test_the_head_is_fitted_by_the_gradient_of_the_dense_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunk by chunk, backward through the last layer, against one graph over all tokens."""

    pruned = cut(tmp_path, TargetConfig(intermediate_size=48))
    streams = Streams.start(pruned, batches(1), dtype=torch.float64, device="cpu", pad_id=None)
    model: LlamaForCausalLM = tiny_model().double()
    source = stream.final_norm(pruned.model, torch.float64, "cpu")
    layer = streams.cut_layer(2)
    norm = stream.final_norm(pruned, torch.float64, "cpu")
    matrix = pruned.head().clone()
    parameters = [*layer.parameters(), norm.weight, matrix]
    objective = head.Divergence(streams)
    monkeypatch.setattr(head, "CHUNK_BYTES", 7 * 4 * 128)
    for parameter in parameters:
        parameter.requires_grad_()
    written = streams.cut_runner.layer(layer, streams.cut[0], streams.positions[0])
    total, count = objective(0, written, head.Final(norm, matrix, {}), True)
    chunked = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    states = streams.cut_runner.layer(layer, streams.cut[0], streams.positions[0])
    cut_logits = (norm(states) @ matrix.T).log_softmax(-1)
    whole_logits = (source(streams.whole[0]) @ model.lm_head.weight.detach().T).log_softmax(-1)
    dense = functional.kl_div(cut_logits, whole_logits, reduction="sum", log_target=True)
    torch.autograd.backward(dense)
    assert count == streams.masks[0].sum()
    torch.testing.assert_close(total, dense.detach(), rtol=1e-5, atol=1e-5)
    for mine, parameter in zip(chunked, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-4)
