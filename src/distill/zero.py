"""What DeepSpeed ZeRO spreads over processes, as whole tensors: to read it, and to put it back.

The stages keep float32 weights and moments in flat partitions of their own making. DeepSpeed's accessors translate
between a parameter and its places in them, whatever the stage and the number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from llamita.distill import saved


def _partitions(optimizer: Any) -> list[Tensor]:
    """This process's flat float32 partitions, by which the inner optimiser knows its states."""
    # Stage 3; stages 1 and 2; stage 1 in bfloat16.
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    raise AssertionError(f"{type(optimizer).__name__} keeps its partitions under no known name")


def _states(optimizer: Any) -> list[dict[str, Any]]:
    """The states of AdamW for each partition; empty before the first step."""
    return [optimizer.optimizer.state.get(part, {}) for part in _partitions(optimizer)]


@torch.no_grad()
def read(
    engine: Any, parameters: Mapping[str, nn.Parameter], rank: int, world: int
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Whole float32 weights and moments, on the CPU, of the parameters that ``rank`` writes; every rank calls this.

    All of them learn. One parameter at a time is whole on the device.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = [state for state in _states(engine.optimizer) if state]
    if states:
        _link(engine.optimizer)
    mine = saved.owners({name: _numel(parameter) for name, parameter in parameters.items()}, world)
    weights: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    for name, parameter in parameters.items():
        full = {"": safe_get_full_fp32_param(parameter)}
        for key in ("exp_avg", "exp_avg_sq") if states else ():
            full[key] = safe_get_full_optimizer_state(parameter, key)
        if mine[name] != rank:
            continue
        on_cpu = {key: value.detach().float().to("cpu", copy=True) for key, value in full.items()}
        weights[name] = on_cpu.pop("")
        moments[name] = on_cpu
        if states:
            on_cpu["step"] = torch.as_tensor(states[0]["step"]).float().to("cpu", copy=True)
    return weights, moments


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


@torch.no_grad()
def write(engine: Any, parameters: Mapping[str, nn.Parameter], found: saved.Saved) -> None:
    """Put weights and moments back; every rank calls this and reads every file.

    Raises:
        ValueError: the checkpoint is of other parameters.
    """
    import deepspeed

    found.check(list(parameters))
    steps = {float(state["step"]) for name in parameters if (state := found.moments(name))}
    assert len(steps) <= 1, "every parameter takes every step"
    if steps:
        _make_states(engine.optimizer, steps.pop())
    for name, parameter in parameters.items():
        value = found.weight(name)
        # The layers' own weights: whole on every rank, or, in stage 3, cut up again when the block ends.
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        _set(parameter, value, None)
        for key, moment in found.moments(name).items():
            if key != "step":
                _set(parameter, moment, key)


def _set(parameter: Any, value: Tensor, key: str | None) -> None:
    """Put a whole float32 tensor where this process keeps its part of it: the weight, or the moment ``key``."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # Not the accessor for whole tensors: it reads past the end of one that the ranks cannot share equally.
    length = parameter.partition_numel()
    first = dist.get_rank(parameter.ds_process_group) * length
    piece = value.flatten()[first : first + length]
    piece = functional.pad(piece, (0, length - len(piece)))
    if key is None:
        utils.safe_set_local_fp32_param(parameter, piece)
    else:
        utils.safe_set_local_optimizer_state(parameter, piece, key)


def _make_states(optimizer: Any, step: float) -> None:
    """Give the inner optimiser the states that it makes in its first step, and their places to the parameters."""
    counts_in_tensors = isinstance(optimizer.optimizer, torch.optim.AdamW)  # DeepSpeed's own has a plain number
    for part in _partitions(optimizer):
        optimizer.optimizer.state[part] = {
            "step": torch.tensor(step, device=part.device) if counts_in_tensors else int(step),
            "exp_avg": torch.zeros_like(part),
            "exp_avg_sq": torch.zeros_like(part),
        }
    _link(optimizer)


def _link(optimizer: Any) -> None:
    """Let parameters know where their moments lie.

    Stages 1 and 2 do this once, in the first step, after the first group's update: when later groups have none yet.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
