"""Scores against dense oracles, and what they must not depend on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from calibration import IGNORE, Batch, padded, saved, text
from conftest import tiny_model
from llamita import checkpoints
from llamita.prune import importance, stream
from llamita.prune.scores import Scores


@pytest.fixture(scope="module")
def double() -> LlamaForCausalLM:
    return tiny_model().double()


@pytest.fixture(scope="module")
def weights(double: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Weights:
    return saved(double, tmp_path_factory.mktemp("double"))


def dense_inputs(model: LlamaForCausalLM, batch: Batch) -> tuple[dict[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """Input and output of every module of a whole model, and its logits."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        if arguments and isinstance(output, Tensor):
            seen[module] = (arguments[0], output)

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


def test_streamed_forward_is_the_whole_models(double: LlamaForCausalLM, weights: checkpoints.Weights) -> None:
    batch = text()
    seen, _ = dense_inputs(double, batch)
    (streamed,) = stream.forward(weights, [batch], dtype=torch.float64)
    torch.testing.assert_close(streamed, seen[double.model.norm][0], rtol=0, atol=0)


def test_streamed_loss_is_the_whole_models(double: LlamaForCausalLM, weights: checkpoints.Weights) -> None:
    batch = text()
    _, logits = dense_inputs(double, batch)
    dense = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(1), slice(1, 4))]
    assert stream.mean_loss(weights, parts, dtype=torch.float64) == pytest.approx(float(dense), rel=1e-12)
    assert importance.measure(weights, parts, dtype=torch.float64).info["loss"] == pytest.approx(
        float(dense), rel=1e-12
    )


def test_the_loss_reads_the_vocabulary_in_slices(weights: checkpoints.Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stream.mean_loss(weights, [text()], dtype=torch.float64)
    for rows in (1, 7, 50):  # with one row at a time every label lies on a border
        monkeypatch.setattr(stream, "HEAD_CHUNK_ROWS", rows)
        assert stream.mean_loss(weights, [text()], dtype=torch.float64) == pytest.approx(whole, rel=1e-12)


def test_the_loss_of_bfloat16_logits_is_not_itself_in_bfloat16(weights: checkpoints.Weights) -> None:
    batch = text()
    (states,) = stream.forward(weights, [batch], dtype=torch.bfloat16)
    norm = stream.final_norm(weights, torch.bfloat16, "cpu")
    logits = nn.functional.linear(norm(states[:, :-1]), weights.head().bfloat16()).double()
    dense = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert stream.mean_loss(weights, [batch], dtype=torch.bfloat16) == pytest.approx(float(dense), rel=1e-6)


def minitron(x_BSC: Tensor) -> Tensor:
    """Mean over the sequence of |x|, L2 over samples (Muralidharan et al., 2024, arXiv:2407.14679, section 2)."""
    return x_BSC.abs().mean(dim=1).square().sum(dim=0).sqrt()


def test_every_score_is_its_formula_on_the_whole_model(double: LlamaForCausalLM, weights: checkpoints.Weights) -> None:
    batch = text()
    seen, _ = dense_inputs(double, batch)
    scores = importance.measure(weights, [batch], dtype=torch.float64)
    eps = double.config.rms_norm_eps
    for index, layer in enumerate(double.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        units, heads = seen[mlp.down_proj][0], seen[attention.o_proj][0]
        norms = (layer.input_layernorm, layer.post_attention_layernorm)
        before, after = seen[norms[0]][0], seen[layer][1]
        query, key = seen[attention.q_proj][1], seen[attention.k_proj][1]
        # The RMSNorms' inputs, energies relative to what the norm divides by.
        inverse = [1 / (seen[norm][0].square().mean(-1) + eps) for norm in norms]
        expected = {
            "layers.block_influence": 1 - nn.functional.cosine_similarity(before, after, dim=-1).mean(),
            "mlp.activation": minitron(units),
            "mlp.norm_product": units.square().sum((0, 1)).sqrt() * mlp.down_proj.weight.norm(dim=0),
            "mlp.magnitude": mlp.gate_proj.weight.norm(dim=1)
            * mlp.up_proj.weight.norm(dim=1)
            * mlp.down_proj.weight.norm(dim=0),
            "attention.activation": minitron(heads).view(4, 16),
            "attention.norm_product": (heads.square().sum((0, 1)).sqrt() * attention.o_proj.weight.norm(dim=0)).view(
                4, 16
            ),
            "mlp.fluctuation": units.flatten(0, 1).var(0, correction=0) * mlp.down_proj.weight.norm(dim=0).square(),
            "attention.fluctuation": (
                heads.flatten(0, 1).var(0, correction=0) * attention.o_proj.weight.norm(dim=0).square()
            ).view(4, 16),
            "attention.magnitude": attention.o_proj.weight.norm(dim=0).view(4, 16)
            * attention.v_proj.weight.norm(dim=1).view(2, 1, 16).expand(2, 2, 16).reshape(4, 16),
            "hidden.activation": torch.stack([minitron(seen[norm][1]) for norm in norms]),
            "rotary.query": query.view(-1, 4, 2, 8).square().sum(2).mean(0),
            "rotary.key": key.view(-1, 2, 2, 8).square().sum(2).mean(0),
            "layers.magnitude": torch.cat([p.flatten() for p in layer.parameters()]).norm(),
        }
        for name, value in expected.items():
            torch.testing.assert_close(scores[name][index], value.detach(), rtol=1e-10, atol=0, msg=name)
        for place, norm in enumerate(norms):
            energy = (seen[norm][0].square() * inverse[place][..., None]).mean((0, 1))
            torch.testing.assert_close(scores["norm.energy"][2 * index + place], energy, rtol=1e-10, atol=0)
            torch.testing.assert_close(scores["norm.epsilon"][2 * index + place], (eps * inverse[place]).mean())
    read = (seen[double.lm_head][0] / double.model.norm.weight).flatten(0, 1)
    torch.testing.assert_close(scores["head.covariance"], (read.T @ read / len(read)).float())
    norms = [n for layer in double.model.layers for n in (layer.input_layernorm, layer.post_attention_layernorm)]
    normed = torch.cat([(seen[n][1] / n.weight).flatten(0, 1) for n in norms] + [read])
    vectors, energy = scores["directions.vectors"], scores["directions.energy"]
    torch.testing.assert_close(vectors @ energy.diag() @ vectors.T, normed.T @ normed / len(normed))
    assert torch.equal(energy, energy.sort(descending=True).values)


def dense_head(attention: nn.Module, x_BSD: Tensor, batch: Batch, head: int, theta: Tensor) -> Tensor:
    """Output [B, S, E] of one of four query heads of size 16 over two KV heads, document by document."""

    def projected(layer: nn.Module, number: int) -> Tensor:
        return x_BSD @ layer.weight[16 * number : 16 * number + 16].T  # type: ignore[index, union-attr]

    def turned(x_BSE: Tensor) -> Tensor:
        angle = batch["position_ids"][..., None] * theta
        first, second = x_BSE.chunk(2, -1)
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    query, key = turned(projected(attention.q_proj, head)), turned(projected(attention.k_proj, head // 2))
    document = (batch["position_ids"] == 0).cumsum(1)
    seen = torch.ones(x_BSD.shape[1], x_BSD.shape[1]).tril().bool() & (document[:, :, None] == document[:, None])
    logits = (query @ key.mT / 4).masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ projected(attention.v_proj, head // 2)


@torch.no_grad()
def test_heads_under_grouped_queries_see_their_own_input(
    double: LlamaForCausalLM, weights: checkpoints.Weights
) -> None:
    """Scores of a query head are of what it reads from the KV head of its own group."""
    batch = text()
    seen, _ = dense_inputs(double, batch)
    scores = importance.measure(weights, [batch], dtype=torch.float64)
    for index, layer in enumerate(double.model.layers):
        for head in range(4):
            x_BSD, theta = seen[layer.input_layernorm][1], double.model.rotary_emb.inv_freq.double()
            output = dense_head(layer.self_attn, x_BSD, batch, head, theta)
            # The model's rotary angles are float32.
            torch.testing.assert_close(scores["attention.activation"][index, head], minitron(output), rtol=1e-5, atol=0)
            columns = layer.self_attn.o_proj.weight[:, 16 * head : 16 * head + 16]
            product = output.square().sum((0, 1)).sqrt() * columns.norm(dim=0)
            torch.testing.assert_close(scores["attention.norm_product"][index, head], product, rtol=1e-5, atol=0)


def close(first: Scores, second: Scores) -> None:
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(tensor, second.tensors[name], rtol=1e-6, atol=1e-9, msg=name)
    assert first.info == pytest.approx(second.info)


def test_scores_do_not_depend_on_how_rows_are_batched(weights: checkpoints.Weights) -> None:
    batch = text()
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(1), slice(1, 3), slice(3, 4))]
    whole, split = (importance.measure(weights, b, dtype=torch.float64) for b in ([batch], parts))
    close(whole, split)


def test_scores_do_not_depend_on_padding(weights: checkpoints.Weights) -> None:
    batch = text()
    plain, wide = (importance.measure(weights, [b], dtype=torch.float64) for b in (batch, padded(batch, 7)))
    close(plain, wide)


def test_only_padding_is_left_out() -> None:
    """A last document is text if anything in it is supervised, or is another token than that of padding."""
    batch = text(rows=3)
    assert importance.real_tokens(batch).all()
    assert importance.real_tokens({**batch, "labels": torch.full_like(batch["labels"], IGNORE)}).all()
    for pad_id in (None, 1):
        wide = importance.real_tokens(padded(batch, 6), pad_id)
        assert wide[:, :-6].all()
        assert not wide[:, -6:].any()
    one_token_more = padded(batch, 1, pad_id=7)
    assert importance.real_tokens(one_token_more, pad_id=1).all()
    assert not importance.real_tokens(one_token_more, pad_id=7)[:, -1].any()


def test_text_without_a_token_is_refused(weights: checkpoints.Weights) -> None:
    empty = {name: tensor[:, -4:] for name, tensor in padded(text(), 4).items()}
    with pytest.raises(ValueError, match="no token"):
        importance.measure(weights, [empty], dtype=torch.float64)
    with pytest.raises(ValueError, match="no token"):
        importance.measure(weights, [], dtype=torch.float64)


def test_magnitudes_need_no_text(weights: checkpoints.Weights) -> None:
    measured = importance.measure(weights, [text()], dtype=torch.float64)
    alone = importance.from_weights(weights)
    for name in ("layers.magnitude", "mlp.magnitude", "attention.magnitude", "hidden.magnitude"):
        torch.testing.assert_close(alone[name], measured[name], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match=r"calibration\.path"):
        alone["mlp.activation"]


@torch.no_grad()
def test_without_text_a_channel_holds_what_was_written_into_it(
    double: LlamaForCausalLM, weights: checkpoints.Weights
) -> None:
    """Its hidden score is that energy, relative to the mean, times what the norm and its readers make of it."""
    scores = importance.from_weights(weights)
    written = double.model.embed_tokens.weight.square().mean(0)
    for index, layer in enumerate(double.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        steps = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), mlp.down_proj),
        )
        for place, (norm, readers, writer) in enumerate(steps):
            energy = written / written.mean()
            read = torch.cat([reader.weight for reader in readers]).square().sum(0)
            torch.testing.assert_close(scores["norm.energy"][2 * index + place], energy)
            torch.testing.assert_close(scores["hidden.magnitude"][index, place], energy * norm.weight.square() * read)
            written = written + writer.weight.square().sum(1)
    torch.testing.assert_close(scores["norm.energy"][-1], written / written.mean())


def test_a_long_row_in_bfloat16_is_summed_in_float32() -> None:
    """A bfloat16 sum stops to grow after a few hundred equal terms."""
    x_BSC = torch.rand(2, 4096, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask_BS = torch.ones(2, 4096, dtype=torch.bool)
    exact, matrix = x_BSC.double(), x_BSC[0]
    inverse = 1 / (exact.square().mean(-1, keepdim=True) + 1e-5)
    products, epsilon = importance._norm_statistics(x_BSC, mask_BS, 1e-5)
    pairs = [
        (importance._mean_magnitude(x_BSC, mask_BS), minitron(exact).square()),
        (importance._energy(x_BSC, mask_BS), exact.square().sum((0, 1))),
        (products.diagonal(), (exact.square() * inverse).sum((0, 1))),
        (epsilon, (1e-5 * inverse).sum()),
        (importance._square_sums(matrix)[0], matrix.double().square().sum(1)),
        (importance._square_sums(matrix)[1], matrix.double().square().sum(0)),
    ]
    for measured, expected in pairs:
        torch.testing.assert_close(measured, expected, rtol=1e-5, atol=0)


def test_a_small_variance_about_a_large_mean_is_not_lost() -> None:
    """In float32 the mean square of 1000 +- 0.01 says nothing of it."""
    x_BSC = 1000 + 0.01 * torch.randn(3, 500, 4, generator=torch.Generator().manual_seed(0))
    mask_BS = torch.rand(3, 500, generator=torch.Generator().manual_seed(1)) < 0.7
    measured = importance._variance(importance._variance_sums(x_BSC, mask_BS), int(mask_BS.sum()))
    torch.testing.assert_close(measured, x_BSC.double()[mask_BS].var(0, correction=0), rtol=1e-4, atol=0)
    constant = importance._variance_sums(torch.full((1, 7, 1), 0.1), torch.ones(1, 7, dtype=torch.bool))
    assert 0 <= float(importance._variance(constant, 7)) < 1e-15


def test_a_large_row_does_not_swallow_the_small_ones() -> None:
    """Rows are summed in float64: in float32 a hundred million takes no more ones."""
    x_BSC = torch.ones(1001, 1, 1)
    x_BSC[0] = 1e4
    mask_BS = torch.ones(1001, 1, dtype=torch.bool)
    for total in (importance._energy(x_BSC, mask_BS), importance._mean_magnitude(x_BSC, mask_BS)):
        assert float(total) == 1e8 + 1000


def test_block_influence_in_bfloat16_is_that_of_the_states(weights: checkpoints.Weights) -> None:
    """The pass is in bfloat16, the cosine is not: it is near one, where bfloat16 has steps of 0.004."""
    states: list[Tensor] = [weights["model.embed_tokens.weight"][text()["input_ids"]].bfloat16()]

    def visit(index: int, layer: nn.Module, outputs: Iterator[Tensor]) -> list[Tensor]:
        states.extend(kept := list(outputs))
        return kept

    stream.forward(weights, [text()], dtype=torch.bfloat16, visit=visit)
    scores = importance.measure(weights, [text()], dtype=torch.bfloat16)
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        cosine = nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).mean()
        assert float(scores["layers.block_influence"][index]) == pytest.approx(float(1 - cosine), abs=1e-6)


def test_a_pass_in_bfloat16_comes_near(weights: checkpoints.Weights) -> None:
    exact = importance.measure(weights, [text()], dtype=torch.float64)
    rough = importance.measure(weights, [text()], dtype=torch.bfloat16)
    for name in ("mlp.activation", "attention.norm_product", "hidden.activation"):
        torch.testing.assert_close(rough[name], exact[name], rtol=0.25, atol=0.25 * float(exact[name].mean()))


def test_scores_survive_their_file_bit_for_bit(weights: checkpoints.Weights, tmp_path: Path) -> None:
    scores = importance.measure(weights, [text()], dtype=torch.float64, info={"source": "abc"})
    scores.save(tmp_path / "pruning")
    for folder in (tmp_path / "pruning", tmp_path):
        again = Scores.load(folder)
        assert again.info == scores.info
        assert again.tensors.keys() == scores.tensors.keys()
        assert all(torch.equal(again.tensors[name], tensor) for name, tensor in scores.tensors.items())
    with pytest.raises(ValueError, match="holds no scores"):
        Scores.load(tmp_path / "elsewhere")


def test_a_killed_pass_goes_on_behind_its_last_layer_with_the_same_scores(
    weights: checkpoints.Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(info: str = "a", **more: Any) -> Scores:
        return importance.measure(
            weights, [text()], dtype=torch.float32, second_order=True, info={"source": info}, **more
        )

    def killed(done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    file, entered = tmp_path / "pruning" / "partial.safetensors", []
    whole = measured()
    with pytest.raises(KeyboardInterrupt):
        measured(partial=file, watch=killed)
    enter = importance._LayerStatistics.__enter__
    monkeypatch.setattr(importance._LayerStatistics, "__enter__", lambda self: entered.append(1) or enter(self))
    again = measured(partial=file)
    assert len(entered) == weights.shape.num_hidden_layers - 2
    assert again.info == whole.info
    assert again.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole.tensors)
    entered.clear()
    measured("b", partial=file)
    assert len(entered) == weights.shape.num_hidden_layers


def test_one_layer_is_read_at_a_time(weights: checkpoints.Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is asked for, no tensor of the one before is alive."""
    import weakref

    alive: list[weakref.ref[nn.Module]] = []
    made = stream.decoder_layer

    def watched(*arguments: Any) -> Any:
        assert all(reference() is None for reference in alive)
        layer = made(*arguments)
        alive.append(weakref.ref(layer))
        return layer

    monkeypatch.setattr(stream, "decoder_layer", watched)
    importance.measure(weights, [text(), text(seed=1)], dtype=torch.float32)
    stream.mean_loss(weights, [text()], dtype=torch.float32)
    assert len(alive) == 6


def test_hidden_states_are_held_once(weights: checkpoints.Weights) -> None:
    """When a layer's output of a batch is there, the output of the layer before is gone."""
    import weakref

    before: list[weakref.ref[Tensor]] = []

    def visit(index: int, layer: nn.Module, outputs: Iterator[Tensor]) -> list[Tensor]:
        kept: list[Tensor] = []
        for output in outputs:
            kept.append(output)
            assert [reference() is None for reference in before] == [n < len(kept) for n in range(len(before))]
        before[:] = map(weakref.ref, kept)
        return kept

    batches = [text(rows=1, seed=seed) for seed in range(3)]
    assert len(stream.forward(weights, batches, dtype=torch.float32, visit=visit)) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model = saved(broken, tmp_path)
    with pytest.raises(ValueError, match=r"not finite: .*mlp\.activation.*calibration\.dtype=float32, or check the"):
        importance.measure(model, [text()], dtype=torch.float32)
    with pytest.raises(ValueError, match=r"not finite: .*mlp\.magnitude"):
        importance.from_weights(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu_are_those_of_the_cpu(weights: checkpoints.Weights) -> None:
    cpu, gpu = (importance.measure(weights, [text()], dtype=torch.float64, device=d) for d in ("cpu", "cuda"))
    close(cpu, gpu)
