"""What the loss would lose to first order without a unit: a backward pass that holds one decoder layer at a time.

One forward pass keeps the input of every layer, on the CPU or in a file; the gradient of the loss at the final states
is computed over slices of tokens and of the vocabulary; then the layers, from the last to the first, are run again
with a graph. What comes out is what backward through the whole model gives.

Shape letters: B = rows, S = positions, T = positions that predict a label, D = hidden size, F = MLP width,
H = query heads, K = KV heads, E = head size, V = vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamita.prune import stream
from llamita.prune.stream import IGNORE, Batch, Model, Runner, embedded, forward, summed
from llamita.shapes import LlamaShape

CHUNK_TOKENS = 2048
"""Tokens whose logits are held at a time, of ``stream.HEAD_CHUNK_ROWS`` rows of the output matrix: 64 MiB."""
UNITS = {"mlp": "mlp.down_proj", "attention": "self_attn.o_proj"}
"""Of each axis, the matrix whose inputs are its units."""


def measure(
    model: Model,
    batches: Sequence[Batch],
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    spill: Path | None = None,
    watch: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """First-order Taylor scores of all MLP units [L, F] and attention channels [L, H, E], by unit and by element.

    L is the mean cross entropy over the labels, z what ``down_proj`` or ``o_proj`` reads.

    - ``taylor_unit``: sqrt(sum_t (z_tj dL/dz_tj)^2), the gate criterion of Molchanov et al., 2019, arXiv:1906.10771,
      with a token as the sample. The squares of a head's channels add up, as the plan adds them.
    - ``taylor_element``: see :func:`element_scores`.

    ``spill`` is a folder with room for the hidden states of all tokens once for each layer; unset: they stay in
    memory. Activations and gradients are in ``dtype``, sums over tokens in float32 (float64 for ``dtype=float64``)
    within a batch and float64 over batches; gradients of weights are added up in float32 (float64). Where there are
    several processes each gives its own batches, and all get the scores of all. ``watch`` is called behind each layer.

    Raises:
        ValueError: nothing in ``batches`` has a label.
    """
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
    labels = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batches)
    num_labels = int(summed(torch.tensor(labels, device=device)))
    if not num_labels:
        raise ValueError("the calibration set holds no label: scores by gradient need text")
    runner = Runner(model.config, device)
    layers: list[dict[str, Tensor]] = []
    with Inputs(spill) as inputs:
        inputs.put(embedded(model, batches, dtype))

        def visit(index: int, layer: LlamaDecoderLayer, outputs: Iterator[Tensor]) -> list[Tensor]:
            hidden = list(outputs)
            if index + 1 < model.shape.num_hidden_layers:
                inputs.put(hidden)
            watch()
            return hidden

        hidden = forward(model, batches, dtype=dtype, device=device, visit=visit)
        gradients = loss_gradient(model, hidden, batches, device)
        del hidden
        for index in reversed(range(model.shape.num_hidden_layers)):
            layer = stream.decoder_layer(model, index, runner.config, dtype, device).requires_grad_()
            sums = _LayerGradients(runner, layer)
            states = inputs.take()
            for number, batch in enumerate(batches):
                gradients[number] = sums.backward(next(states), batch["position_ids"], gradients[number])
            layers.insert(0, {name: score / num_labels for name, score in sums.scores(model.shape).items()})
            del layer, sums
            watch()
    scores = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    for kind in ("taylor_unit", "taylor_element"):
        scores[f"attention.{kind}"] = scores[f"attention.{kind}"].view(len(layers), -1, model.shape.head_dim)
    # A head's score is the sum of the squares of its channels'; its group's elements are to be added, not squared.
    scores["attention.taylor_element"] = scores["attention.taylor_element"].sqrt()
    return scores


class Inputs:
    """The hidden states that each layer reads: put in layer by layer, taken out again from the last to the first."""

    def __init__(self, spill: Path | None) -> None:
        self._spill = spill
        self._file: IO[bytes] | None = None
        self._held: list[list[Tensor]] = []
        self._places: list[list[tuple[int, torch.Size, torch.dtype]]] = []

    def __enter__(self) -> Self:
        if self._spill is not None:
            self._file = tempfile.TemporaryFile(dir=self._spill, buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._held.clear()
        if self._file is not None:
            self._file.close()

    def put(self, hidden: Sequence[Tensor]) -> None:
        """Keep what the next layer reads."""
        if self._file is None:
            self._held.append(list(hidden))
            return
        places = []
        for states in hidden:
            places.append((self._file.tell(), states.shape, states.dtype))
            left = memoryview(states.contiguous().view(torch.uint8).numpy().data).cast("B")
            while left:  # a raw file may take a part
                left = left[self._file.write(left) :]
        self._places.append(places)

    def take(self) -> Iterator[Tensor]:
        """What the last layer that is left reads, batch by batch."""
        if self._file is None:
            yield from self._held.pop()
            return
        for place, shape, dtype in self._places.pop():
            self._file.seek(place)
            size, data = shape.numel() * dtype.itemsize, bytearray()
            while len(data) < size:
                data += self._file.read(size - len(data))
            yield torch.frombuffer(data, dtype=dtype).view(shape)


@torch.no_grad()
def loss_gradient(
    model: Model, hidden: Sequence[Tensor], batches: Sequence[Batch], device: torch.device | str
) -> list[Tensor]:
    """Gradient [B, S, D] of the summed cross entropy at the states behind the last layer, on the CPU.

    With p the softmax of a position's logits W n(x) and y its label, it is W^T (p - e_y) through the final norm n. A
    sum, not a mean: small numbers would be lost in float16.
    """
    if not hidden:
        return []
    dtype = hidden[0].dtype
    norm = stream.final_norm(model, dtype, device)
    head_VD = model.head().to(device=device, dtype=dtype)
    gradients = []
    for states_BSD, batch in zip(hidden, batches, strict=True):
        labels_BS = batch["labels"][:, 1:].to(device)
        with torch.enable_grad():
            leaf_BSD = states_BSD.detach().to(device).requires_grad_()
            read_TD = norm(leaf_BSD[:, :-1][labels_BS != IGNORE])
        labels_T = labels_BS[labels_BS != IGNORE]
        chunks = zip(torch.split(read_TD, CHUNK_TOKENS), torch.split(labels_T, CHUNK_TOKENS), strict=True)
        at_read_TD = torch.cat([_head_gradient(head_VD, read, labels) for read, labels in chunks])
        (gradient_BSD,) = torch.autograd.grad(read_TD, leaf_BSD, at_read_TD.to(dtype))
        gradients.append(gradient_BSD.cpu())
    return gradients


def _head_gradient(head_VD: Tensor, read_TD: Tensor, labels_T: Tensor) -> Tensor:
    """Gradient [T, D] of the summed cross entropy at what the head reads, in float32 or better."""

    def logits(rows_VD: Tensor) -> Tensor:
        logits_TV = functional.linear(read_TD, rows_VD)
        return logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float()

    slices = torch.split(head_VD, stream.HEAD_CHUNK_ROWS)
    log_sum_T = torch.stack([logits(rows).logsumexp(1) for rows in slices]).logsumexp(0)
    gradient_TD = torch.zeros_like(read_TD, dtype=log_sum_T.dtype)
    for rows_VD in slices:
        share_TV = (logits(rows_VD) - log_sum_T[:, None]).exp()
        gradient_TD += (share_TV.to(rows_VD.dtype) @ rows_VD).to(gradient_TD.dtype)
    return gradient_TD - head_VD[labels_T].to(gradient_TD.dtype)


class _LayerGradients:
    """Sums over batches what first-order scores need of one layer."""

    def __init__(self, runner: Runner, layer: LlamaDecoderLayer) -> None:
        self._runner, self._layer = runner, layer
        self._weights = {n.split(".")[-2]: p for n, p in layer.named_parameters() if p.dim() == 2}
        self._device = next(layer.parameters()).device
        self._wide = torch.promote_types(next(layer.parameters()).dtype, torch.float32)
        self._weight_sums = {name: torch.zeros_like(p, dtype=self._wide) for name, p in self._weights.items()}
        # From the start, because a process without text takes part in the sums as well.
        sizes = {axis: self._weights[name.split(".")[-1]].shape[1] for axis, name in UNITS.items()}
        self._unit_sums = {a: torch.zeros(n, dtype=torch.float64, device=self._device) for a, n in sizes.items()}

    def backward(self, states_BSD: Tensor, positions_BS: Tensor, gradient_BSD: Tensor) -> Tensor:
        """Run the layer on its input again, add what this batch gives, and return the gradient at the input."""
        seen: dict[str, Tensor] = {}

        def keep(axis: str) -> Callable[..., None]:
            def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
                seen[axis] = arguments[0]

            return hook

        hooks = [self._layer.get_submodule(n).register_forward_pre_hook(keep(axis)) for axis, n in UNITS.items()]
        with torch.enable_grad():
            leaf_BSD = states_BSD.detach().to(self._device).requires_grad_()
            output_BSD = self._runner.layer(self._layer, leaf_BSD, positions_BS)
        for hook in hooks:
            hook.remove()
        wanted = [leaf_BSD, *seen.values(), *self._weights.values()]
        at_input, *found = torch.autograd.grad(output_BSD, wanted, gradient_BSD.to(output_BSD.device))
        for axis, gradient in zip(seen, found, strict=False):
            product = seen[axis].detach().to(self._wide) * gradient.to(self._wide)
            self._unit_sums[axis] += product.square().flatten(0, 1).sum(0).double()
        for name, gradient in zip(self._weights, found[len(seen) :], strict=True):
            self._weight_sums[name] += gradient
        return at_input.cpu()

    @torch.no_grad()
    def scores(self, shape: LlamaShape) -> dict[str, Tensor]:
        """The layer's scores, of the summed cross entropy, attention channels in one row, on the CPU."""
        for total in (*self._weight_sums.values(), *self._unit_sums.values()):
            summed(total)
        products = {name: (self._weight_sums[name] * weight).abs() for name, weight in self._weights.items()}
        scores = {f"{axis}.taylor_unit": total.sqrt() for axis, total in self._unit_sums.items()}
        return {name: score.cpu() for name, score in (scores | element_scores(products, shape)).items()}


def element_scores(products: dict[str, Tensor], shape: LlamaShape) -> dict[str, Tensor]:
    """Sums of |w dL/dw|, given for each matrix of a layer, over the weights that leave together, in float64.

    Ma et al., 2023, arXiv:2305.11627, eq. 3-5, first order, element-wise, importance of a group = sum over it:

    - an MLP unit [F]: its rows of ``gate_proj`` and ``up_proj`` and its column of ``down_proj``;
    - a channel of a query head [H E]: its column of ``o_proj``, its share of the row of ``v_proj``, and an equal share
      of what the whole head has in ``q_proj`` and ``k_proj``. Rows of k and v are shared equally by the query heads
      that read them, so a head's channels, or a KV group's heads, add up to the group that leaves with them. As its
      share of q and k is the same for each of its channels, which value channels stay does not depend on it: queries
      and keys are cut by rotary pairs, not with the values.
    """
    rows = {name: product.sum(1, dtype=torch.float64) for name, product in products.items()}
    columns = {name: products[name].sum(0, dtype=torch.float64) for name in ("down_proj", "o_proj")}
    group = shape.num_attention_heads // shape.num_key_value_heads

    def by_head(name: str, sharing: int) -> Tensor:
        """[H, E]"""
        return rows[name].view(-1, shape.head_dim).repeat_interleave(sharing, 0) / sharing

    read_HE = by_head("q_proj", 1) + by_head("k_proj", group)
    channels_HE = columns["o_proj"].view_as(read_HE) + by_head("v_proj", group) + read_HE.mean(1, keepdim=True)
    return {
        "mlp.taylor_element": rows["gate_proj"] + rows["up_proj"] + columns["down_proj"],
        "attention.taylor_element": channels_HE.flatten(),
    }
