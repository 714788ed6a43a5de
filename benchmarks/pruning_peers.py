"""What the peers' own packages make of the same models, where they are installed.

``pip install --no-deps optipfair torch-pruning nvidia-modelopt pulp`` into a folder that ``PYTHONPATH`` names.
All of them are given the MLP family only, the one that all can cut to an equal stock shape.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamita import checkpoints
from llamita.prune import importance, stream
from pruning_methods import Loaded, loaded
from pruning_shapes import Family, Target


def installed(name: str) -> ModuleType | None:
    """The module; ``None``, and the reason said, where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        print(f"{name} is left out: {error}", flush=True)
        return None


def models(
    weights: checkpoints.Weights, calibration: list[stream.Batch], target: Target
) -> Iterator[tuple[str, Callable[[], stream.Model]]]:
    """Names, with versions, of what can be made, and how."""
    if target.family is not Family.mlp:
        return
    if installed("optipfair"):
        version = importlib.metadata.version("optipfair")
        for criterion in ("MAW", "VOW", "PON"):
            yield f"optipfair {version} {criterion}", partial(optipfair, weights, target, criterion, None)
        yield f"optipfair {version} MAW, data", partial(optipfair, weights, target, "MAW", calibration)
    if installed("torch_pruning"):
        version = importlib.metadata.version("torch-pruning")
        yield f"torch-pruning {version} group magnitude", partial(torch_pruning, weights, target)


def optipfair(
    weights: checkpoints.Weights, target: Target, criterion: str, calibration: list[stream.Batch] | None
) -> stream.Model:
    """Gate and up rows by their weights (and activations, with text); documents in a row see each other."""
    package = installed("optipfair")
    assert package is not None
    width = weights.shape.intermediate_size
    # The package cuts int(percentage / 100 * width) units: aim at the middle of the right one.
    percentage = 100 * (width - target.shape.intermediate_size + 0.5) / width
    text = None if calibration is None else [{"input_ids": batch["input_ids"]} for batch in calibration]
    pruned = package.prune_model(
        loaded(weights).model,
        pruning_type="MLP_GLU",
        neuron_selection_method=criterion,
        pruning_percentage=percentage,
        dataloader=text,
        show_progress=False,
    )
    return same_shape(pruned, target)


def torch_pruning(weights: checkpoints.Weights, target: Target) -> stream.Model:
    """Its dependency graph and its group magnitude, on the gate projections and what hangs on them."""
    package = installed("torch_pruning")
    assert package is not None
    llama = loaded(weights).model
    llama.config.use_cache = False
    gates = [layer.mlp.gate_proj for layer in llama.model.layers]
    couplings = {name for name, _ in llama.named_modules() if name.endswith(("gate_proj", "up_proj", "down_proj"))}
    inside = [module for name, module in llama.named_modules() if name in couplings]
    ratio = 1 - target.shape.intermediate_size / weights.shape.intermediate_size
    pruner = package.pruner.BasePruner(
        llama,
        torch.ones(1, 8, dtype=torch.long),
        importance=package.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.0,
        pruning_ratio_dict=dict.fromkeys(gates, ratio),
        ignored_layers=[
            module for module in llama.modules() if isinstance(module, torch.nn.Linear) and module not in inside
        ],
        output_transform=lambda output: output.logits,
    )
    pruner.step()
    llama.config.intermediate_size = llama.model.layers[0].mlp.gate_proj.out_features
    return same_shape(llama, target)


def same_shape(model: LlamaForCausalLM, target: Target) -> stream.Model:
    """The package's model.

    Raises:
        ValueError: its shape is not the target's.
    """
    made = Loaded(model.eval())
    wrong = [name for name, size in target.shape.tensors().items() if tuple(made[name].shape) != size]
    if made.shape != target.shape or wrong:
        raise ValueError(f"the package made {made.shape} instead of {target.shape}; other shapes: {wrong}")
    return made


@torch.no_grad()
def minitron_gap(weights: checkpoints.Weights, calibration: list[stream.Batch], pad_id: int) -> float | None:
    """Largest relative difference of our Minitron scores of MLP units from NVIDIA's ``L2NormHook``.

    On the rows without padding, of which the hook knows nothing; ``None`` where the package is not installed.
    """
    hooks = installed("modelopt.torch.prune.importance_hooks.base_hooks")
    if hooks is None:
        return None
    full = [stream.real_tokens(batch, pad_id).all(1) for batch in calibration]
    batches = [
        {name: tensor[rows] for name, tensor in batch.items()} for batch, rows in zip(calibration, full, strict=True)
    ]
    theirs = [hooks.L2NormHook() for _ in range(weights.shape.num_hidden_layers)]

    def visit(index: int, layer: LlamaDecoderLayer, outputs: Iterator[Tensor]) -> list[Tensor]:
        def read(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            theirs[index](module, (inputs[0].transpose(0, 1),), output)  # it reads [tokens, rows, units]

        handle = layer.mlp.down_proj.register_forward_hook(read)
        states = list(outputs)
        handle.remove()
        return states

    stream.forward(weights, batches, dtype=torch.float32, visit=visit)
    expected_LF = torch.stack([hook.accumulate().double() for hook in theirs])
    ours_LF = importance.measure(weights, batches, dtype=torch.float32, pad_id=pad_id)["mlp.activation"]
    return float(((ours_LF - expected_LF).abs() / expected_LF).max())
