"""First-order scores against autograd through the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from calibration import IGNORE, Batch, padded, saved, text
from conftest import tiny_model
from llamita import checkpoints
from llamita.prune import gradients, importance, stream
from llamita.prune.further import Further

HEADS, KEYS, SIZE = 4, 2, 16


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock RMSNorm computes in float32 even in a float64 model, which would hide differences below 1e-7."""

    def normalise(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, True) + self.variance_epsilon)).to(x.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", normalise)


@pytest.fixture(scope="module")
def double() -> LlamaForCausalLM:
    return tiny_model().double()


@pytest.fixture(scope="module")
def weights(double: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Weights:
    return saved(double, tmp_path_factory.mktemp("double"))


def whole(model: LlamaForCausalLM, batch: Batch) -> dict[str, list[Tensor]]:
    """Scores of each layer from one backward pass through the whole model, loops for sums."""
    read: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        arguments[0].retain_grad()
        read[module] = arguments[0]

    readers = [m for layer in model.model.layers for m in (layer.mlp.down_proj, layer.self_attn.o_proj)]
    hooks = [module.register_forward_pre_hook(keep) for module in readers]
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
    for hook in hooks:
        hook.remove()
    found: dict[str, list[Tensor]] = {name: [] for name in ("mlp.unit", "mlp.element", "attention.unit", "group")}
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        product = {
            name: (m.weight * m.weight.grad).abs()
            for block in (attention, mlp)
            for name, m in block.named_children()
            if isinstance(m, nn.Linear)
        }
        for axis, module in (("mlp", mlp.down_proj), ("attention", attention.o_proj)):
            z = read[module]
            assert z.grad is not None
            found[f"{axis}.unit"].append((z * z.grad).square().sum((0, 1)).sqrt().detach())
        units = [
            product["gate_proj"][j].sum() + product["up_proj"][j].sum() + product["down_proj"][:, j].sum()
            for j in range(mlp.down_proj.in_features)
        ]
        found["mlp.element"].append(torch.stack(units).detach())
        found["group"].append({name: p.detach() for name, p in product.items()})  # type: ignore[arg-type]
    return found


def test_scores_are_those_of_autograd_through_the_whole_model(
    double: LlamaForCausalLM, weights: checkpoints.Weights
) -> None:
    batch = text()
    expected, scores = whole(double, batch), gradients.measure(weights, [batch], dtype=torch.float64)
    for name, other in (("mlp.unit", "mlp.taylor_unit"), ("mlp.element", "mlp.taylor_element")):
        torch.testing.assert_close(scores[other], torch.stack(expected[name]), rtol=1e-9, atol=1e-15)
    unit = torch.stack(expected["attention.unit"]).view(3, HEADS, SIZE)
    torch.testing.assert_close(scores["attention.taylor_unit"], unit, rtol=1e-9, atol=1e-15)


def test_a_kv_groups_elements_are_all_weights_that_leave_with_it(
    double: LlamaForCausalLM, weights: checkpoints.Weights
) -> None:
    """Summed as the plan sums them, squares over a head's channels; and a value channel has its own row and columns."""
    batch, group = text(), HEADS // KEYS
    scores = gradients.measure(weights, [batch], dtype=torch.float64)["attention.taylor_element"]
    products: list[Any] = whole(double, batch)["group"]
    for index, product in enumerate(products):
        channels = scores[index].square()
        for key in range(KEYS):
            rows, queries = (slice(key * n * SIZE, (key + 1) * n * SIZE) for n in (1, group))
            together = product["k_proj"][rows].sum() + product["v_proj"][rows].sum()
            together = together + product["q_proj"][queries].sum() + product["o_proj"][:, queries].sum()
            torch.testing.assert_close(channels[key * group : (key + 1) * group].sum(), together)
            own = product["v_proj"][rows].sum(1)
            for head in range(key * group, (key + 1) * group):
                own = own + product["o_proj"][:, head * SIZE : (head + 1) * SIZE].sum(0)
            rest = channels[key * group : (key + 1) * group].sum(0) - own
            torch.testing.assert_close(rest, rest.mean().expand(SIZE))
            first, second = (product["q_proj"][(key * group + i) * SIZE :][:SIZE].sum() for i in range(2))
            columns = [product["o_proj"][:, (key * group + i) * SIZE :][:, :SIZE].sum() for i in range(2)]
            difference = channels[key * group].sum() - channels[key * group + 1].sum()
            torch.testing.assert_close(difference, first + columns[0] - second - columns[1])


def close(first: dict[str, Tensor], second: dict[str, Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    for name, score in first.items():
        torch.testing.assert_close(score, second[name], msg=name, **(tolerance or {"rtol": 1e-9, "atol": 1e-15}))


def test_they_do_not_depend_on_batches_padding_slices_or_where_inputs_lie(
    weights: checkpoints.Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batch = text()
    plain = gradients.measure(weights, [batch], dtype=torch.float64)
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(1), slice(1, 4))]
    close(plain, gradients.measure(weights, parts, dtype=torch.float64))
    close(plain, gradients.measure(weights, [padded(batch, 7)], dtype=torch.float64))
    spilt = gradients.measure(weights, parts, dtype=torch.float64, spill=tmp_path)
    close(spilt, gradients.measure(weights, parts, dtype=torch.float64), rtol=0, atol=0)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(stream, "HEAD_CHUNK_ROWS", 7)
    monkeypatch.setattr(gradients, "CHUNK_TOKENS", 5)
    close(plain, gradients.measure(weights, [batch], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_inputs_that_lie_in_a_file_come_back_bit_for_bit_the_last_first(dtype: torch.dtype, tmp_path: Path) -> None:
    layers = [[torch.randn(n, 3, 5).to(dtype) for n in (1, 2)] for _ in range(3)]
    for spill in (None, tmp_path):
        with gradients.Inputs(spill) as inputs:
            for hidden in layers:
                inputs.put(hidden)
            for hidden in reversed(layers):
                for first, second in zip(hidden, inputs.take(), strict=True):
                    assert torch.equal(first, second)


def test_the_gradient_at_the_final_states_is_the_probability_gap(
    double: LlamaForCausalLM, weights: checkpoints.Weights
) -> None:
    """W^T (softmax(W n) - e_y) through the norm, nothing where no label is predicted."""
    batch, states = text(), torch.randn(4, 24, 64, dtype=torch.float64)
    (found,) = gradients.loss_gradient(weights, [states], [batch], "cpu")
    leaf = states.clone().requires_grad_()
    logits = double.lm_head(double.model.norm(leaf))[:, :-1].flatten(0, 1)
    nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    torch.testing.assert_close(found, leaf.grad, rtol=1e-9, atol=1e-12)
    assert not found[:, -1].any()
    assert not found[:, :-1][batch["labels"][:, 1:] == IGNORE].any()


def test_a_pass_in_bfloat16_comes_near(weights: checkpoints.Weights) -> None:
    exact, rough = (gradients.measure(weights, [text()], dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, score in exact.items():
        correlation = torch.corrcoef(torch.stack([score.flatten().log(), rough[name].flatten().log()]))[0, 1]
        assert correlation > 0.98, name


def test_one_layer_is_held_at_a_time(weights: checkpoints.Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    alive: list[weakref.ref[nn.Module]] = []
    made = stream.decoder_layer

    def watched(*arguments: Any) -> Any:
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(layer := made(*arguments)))
        return layer

    monkeypatch.setattr(stream, "decoder_layer", watched)
    gradients.measure(weights, [text(), text(seed=1)], dtype=torch.float32)
    assert len(alive) == 6


def test_a_tied_head_is_read_like_an_untied_one(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True).double()
    expected = whole(model, text())
    scores = gradients.measure(saved(model, tmp_path), [text()], dtype=torch.float64)
    torch.testing.assert_close(scores["mlp.taylor_unit"], torch.stack(expected["mlp.unit"]), rtol=1e-9, atol=1e-15)


def test_text_without_a_label_is_refused(weights: checkpoints.Weights) -> None:
    with pytest.raises(ValueError, match="no label"):
        gradients.measure(weights, [{**text(), "labels": torch.full((4, 24), IGNORE)}], dtype=torch.float64)


def test_they_stand_among_the_scores_in_shape(weights: checkpoints.Weights) -> None:
    scores = importance.measure(weights, [text()], dtype=torch.float64, further=Further(by_gradient=True))
    for kind in ("taylor_unit", "taylor_element"):
        assert scores[f"mlp.{kind}"].shape == scores["mlp.magnitude"].shape
        assert scores[f"attention.{kind}"].shape == scores["attention.magnitude"].shape
        assert scores[f"mlp.{kind}"].dtype == torch.float64
