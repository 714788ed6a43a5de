"""What a cut broke, mended from the first layer to the last, so that each layer again writes what the whole one wrote.

Two streams run side by side, one layer at a time: the whole model's states x [D] and the smaller one's x' [d], which
should be Q^T x, the whole stream along the axes that stay. Whatever a layer reads is fitted to what the whole layer
read, and whatever it writes to what is still missing from Q^T x. So a layer also makes up for what was lost before it,
and the layer before a removed one for the removed one: where Yang et al. (ReplaceMe, 2025, arXiv:2505.02819) fold a
square map into its down-projection, the down-projection itself is fitted, which can do no worse.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as distributed
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamita import checkpoints, faults, runs
from llamita.prune import halves, head, tie_steps
from llamita.prune.compensation import CompensationConfig, Prefix
from llamita.prune.halves import ATTENTION, MLP, Fit
from llamita.prune.stream import Batch, summed
from llamita.prune.streams import Streams
from llamita.prune.surgery import Pruned

FINAL = "final.safetensors"


class Mended:
    """A cut model whose layers lie, fitted, in files of ``folder``."""

    def __init__(self, pruned: Pruned, folder: Path) -> None:
        """Join what a plan makes and what was fitted.

        Raises:
            ValueError: a file is missing or damaged.
        """
        self.pruned = pruned
        self.config: LlamaConfig = pruned.config
        self.shape = pruned.shape
        self.dtype = pruned.dtype
        self._folder = folder
        self._final, _ = checkpoints.read_tensors(folder / FINAL)

    def layer(self, index: int) -> dict[str, Tensor]:
        """The tensors of layer ``index``."""
        if index == self.shape.num_hidden_layers - 1:
            return {name: self._final[f"layer.{name}"] for name in self.shape.layer_tensors()}
        return checkpoints.read_tensors(layer_file(self._folder, index))[0]

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name that belongs to no layer."""
        match name:
            case "model.norm.weight":
                return self._final["norm"]
            case "lm_head.weight":
                return self.head()
            case "model.embed_tokens.weight" if self.shape.tie_word_embeddings:
                return self.head()
            case _:
                return self.pruned[name]

    def head(self) -> Tensor:
        """The output matrix."""
        return self._final["matrix"]


def layer_file(folder: Path, index: int) -> Path:
    """Where a finished layer lies."""
    return folder / f"layer-{index:03d}.safetensors"


def records(folder: Path, layers: int) -> list[dict[str, float]]:
    """What was measured at each layer, and behind the last, while it was fitted.

    ``error/...`` is the squared error of the stream behind the layer relative to its square: of the layer ``start`` as
    the plan makes it, with both halves fitted (``refit``) and after the steps (``tuned``), each from the same input.
    ``left/...`` is the share of its own squared error that least squares of the ``readers`` and of the ``writers``
    leaves, mean of both halves, and of the divergence of attention on the held-out batches after ``attention_steps``.
    ``seconds/...`` is what each part took: ``gains``, ``readers``, ``values``, ``attention_steps``, ``writers``, the
    ``steps`` of the whole layer, and ``passes``, everything else, most of it running both streams. Behind the last
    layer ``divergence/...`` is KL to the whole model's next-token distributions in nats per held-out token: at the
    ``start`` of the steps there, after those of the last layer, norm and ``head``, and after those of a ``tied``
    matrix; ``seconds/...`` is what these two took.
    """
    files = [*(layer_file(folder, index) for index in range(layers)), folder / FINAL]
    found: list[dict[str, float]] = [json.loads(checkpoints.read_tensors(file)[1]["record"]) for file in files]
    return found


@torch.no_grad()
@faults.phase("mending", memory="a smaller calibration.tokens for the host, calibration.batch_rows for a GPU")
def mend(
    pruned: Pruned,
    batches: Sequence[Batch],
    config: CompensationConfig,
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    pad_id: int | None = None,
    seed: int = 0,
    watch: Callable[[int], None] = lambda layer: None,
) -> Mended:
    """Fit ``pruned`` to the model that it was cut from on ``batches``; of several processes each gives its own.

    The whole model's pass runs in ``dtype``, the rest in float32 or wider. Finished layers are saved in ``folder`` and
    taken from there by a later call, which must be of the same plan, text and settings. ``watch`` is told how many
    layers are done.

    Raises:
        ValueError: there is no token to fit to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = [int(number) for number in pruned.plan.layers]
    finished = _finished(folder, len(layers), device)
    if finished > len(layers):
        return Mended(pruned, folder)
    streams = Streams.start(pruned, batches, dtype=dtype, device=device, pad_id=pad_id)
    for number in range(layers[0]):
        streams.advance_whole(number)
    before: list[Tensor] = []
    for index, number in enumerate(layers):
        following = layers[index + 1] if index + 1 < len(layers) else pruned.plan.source.num_hidden_layers
        if config.prefix is Prefix.whole:
            before = streams.cut = []  # let go before there are new ones
            streams.cut = list(streams.along(streams.whole))
        layer, before = streams.cut_layer(index), streams.cut
        if index < finished:
            _load(layer, checkpoints.read_tensors(layer_file(folder, index))[0])
            for passed in range(number, following):
                streams.advance_whole(passed)
            streams.cut = list(streams.passing(layer, before))
        else:
            fit = Fit(streams, config, index, streams.source_layer(number), layer)
            record = _fit_layer(fit, range(number + 1, following), seed=seed)
            _store(layer_file(folder, index), _stored(layer, pruned.dtype), record)
        watch(index + 1)
    started = time.monotonic()
    final = head.fit(streams, layer, before, config, seed=seed)
    record = {"seconds/head": time.monotonic() - started}
    last = _stored(layer, pruned.dtype)
    if pruned.shape.tie_word_embeddings and config.tied_steps:
        started = time.monotonic()
        if distributed.is_initialized():  # the layers that the first process stored
            distributed.barrier()
        others = (checkpoints.read_tensors(layer_file(folder, index))[0] for index in range(len(layers) - 1))
        tie_steps.fit(streams, batches, itertools.chain(others, [last]), final, config, seed=seed)
        record["seconds/tied"] = time.monotonic() - started
    tensors = {f"layer.{name}": tensor for name, tensor in last.items()}
    tensors |= {"norm": final.norm.weight.to(pruned.dtype), "matrix": final.matrix.to(pruned.dtype)}
    record |= {f"divergence/{place}": value for place, value in final.divergences.items()}
    _store(folder / FINAL, tensors, record)
    if distributed.is_initialized():
        distributed.barrier()
    return Mended(pruned, folder)


def _finished(folder: Path, layers: int, device: torch.device | str) -> int:
    """How many layers are there, and one more where the end is; as the first process sees it."""
    number = 0
    if runs.is_main_process():
        files = [*(layer_file(folder, index) for index in range(layers)), folder / FINAL]
        number = next((place for place, file in enumerate(files) if not file.is_file()), len(files))
    return int(summed(torch.tensor(number, device=device)))


def _fit_layer(fit: Fit, removed: range, *, seed: int) -> dict[str, float]:
    """Fit a layer, take both streams through it, and the whole one through the ``removed`` that follow.

    Beside the states that the layer reads, which the steps and the last layer need, one more copy of the cut stream's
    exists at a time, and of the whole one's none: batches take the place of those that they were made of.
    """
    streams, config, before = fit.streams, fit.config, fit.streams.cut
    started = time.monotonic()
    as_cut, cut = copy.deepcopy(fit.layer), list(before)
    for half in (ATTENTION, MLP):
        halves.read(fit, half, streams.whole, cut, seed=seed)
        for batch, x_BSD in enumerate(streams.whole):
            x_BSD = x_BSD.to(streams.device)
            streams.whole[batch] = half.output(streams.whole_runner, fit.source, x_BSD, streams.positions[batch]).cpu()
        if half is MLP:
            for number in removed:
                streams.advance_whole(number)
        halves.write(fit, half, cut)
        if half is ATTENTION and config.prefix is Prefix.whole:
            for batch, x_BSd in enumerate(streams.along(streams.whole)):
                cut[batch] = x_BSd
    errors = {"error/start": streams.error(streams.passing(as_cut, before)), "error/refit": streams.error(cut)}
    del as_cut, cut
    if config.layer_steps:
        with fit.part("steps"):
            halves.fit_layer(fit, streams.whole, before, seed=seed)
    # What is stored, not what was fitted, is what later layers read, and it is read from the layer's own input: so it
    # is when the layer is read again after a kill.
    _load(fit.layer, _stored(fit.layer, streams.pruned.dtype))
    streams.cut = list(streams.passing(fit.layer, before))
    if config.layer_steps:
        errors["error/tuned"] = streams.error(streams.cut)
    parts = sum(value for name, value in fit.record.items() if name.startswith("seconds/"))
    return errors | fit.record | {"seconds/passes": time.monotonic() - started - parts}


def _load(layer: LlamaDecoderLayer, tensors: dict[str, Tensor]) -> None:
    for name, parameter in layer.named_parameters():
        parameter.copy_(tensors[name])


def _stored(layer: LlamaDecoderLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: parameter.detach().to(dtype) for name, parameter in layer.named_parameters()}


def _store(path: Path, tensors: dict[str, Tensor], record: dict[str, float]) -> None:
    if runs.is_main_process():
        cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        checkpoints.write_tensors(path, cpu, {"record": json.dumps(record)})
