"""Estimates are counts: each closed form is held against tensors that exist."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from llamita import checkpoints, estimate
from llamita.estimate import Arithmetic, Hardware, Precision, Teacher, Training
from llamita.shapes import PUBLISHED, LlamaShape

LLAMA_8B, LLAMA_70B = PUBLISHED["meta-llama/Llama-3.1-8B"], PUBLISHED["meta-llama/Llama-3.1-70B"]
LLAMA_1B, LLAMA_3B = PUBLISHED["meta-llama/Llama-3.2-1B"], PUBLISHED["meta-llama/Llama-3.2-3B"]


def training(**changes: Any) -> Training:
    """A distillation of 1B from 8B on eight devices."""
    base = Training(
        student=LLAMA_1B,
        teachers=[Teacher(name="big", shape=LLAMA_8B, bytes_per_value=2)],
        precision=Precision.bfloat16,
        zero_stage=2,
        processes=8,
        micro_batch_rows=1,
        rows_per_step=64,
        sequence_length=8192,
        steps=1000,
        packed=False,
        recompute=False,
        chunk_bytes=2**30,
        checkpoint_every=100,
        kept_checkpoints=2,
        validation_rows=0,
        validation_every=0,
    )
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("shape", "passes", "gigaflops"),
    [(LLAMA_8B, 1, 17.2), (LLAMA_70B, 1, 149.7), (LLAMA_1B, 3, 9.0), (LLAMA_3B, 3, 23.5)],
)
def test_operations_per_token_are_those_of_the_literature(shape: LlamaShape, passes: int, gigaflops: float) -> None:
    """Forward for teachers, forward and backward for students, at 8,192 tokens."""
    got = passes * shape.forward_flops_per_token(8192 / 2) / 1e9
    assert got == pytest.approx(gigaflops, abs=0.06)


def test_six_n_for_the_student_and_two_n_for_each_teacher() -> None:
    """Without attention, norms and the input embedding that is only looked up."""
    one = training(sequence_length=1, rows_per_step=1, steps=1)
    flops = estimate.training_flops(one)
    matrices = LLAMA_1B.num_parameters - (2 * 16 + 1) * 2048
    attention = 16 * 2 * 32 * 64 * 0.5
    assert flops["student, forward and backward"] == 6 * (matrices + attention)
    untied = LLAMA_8B.num_parameters - 128256 * 4096 - (2 * 32 + 1) * 4096
    assert flops["teacher big, forward"] == 2 * (untied + 32 * 2 * 32 * 128 * 0.5)


def test_recomputation_repeats_the_layers_and_not_the_head() -> None:
    plain, again = estimate.training_flops(training()), estimate.training_flops(training(recompute=True))
    tokens = 64 * 8192 * 1000
    assert sum(again.values()) - sum(plain.values()) == tokens * LLAMA_1B.forward_flops_per_token(4096, head=False)


@pytest.mark.parametrize(("stage", "per_parameter"), [(1, 2 + 2 + 4 + 12 / 8), (2, 2 + 16 / 8), (3, 18 / 8)])
def test_zero_divides_what_its_stage_says(stage: int, per_parameter: float) -> None:
    """Rajbhandari et al., 2020, figure 1, with 8 processes and gradients summed in float32."""
    items = estimate.state_bytes(LLAMA_1B, Precision.bfloat16, 8, stage)
    for transient in ("gathered weights", "communication buckets"):
        items.pop(transient, None)
    assert sum(items.values()) == pytest.approx(per_parameter * LLAMA_1B.num_parameters)


def test_training_in_float32_keeps_sixteen_bytes_per_parameter(tiny: LlamaForCausalLM) -> None:
    """Counted on the tensors of a model, its gradients and its optimiser."""
    optimiser = torch.optim.AdamW(tiny.parameters(), fused=True)
    tiny(input_ids=torch.randint(0, 128, (2, 8)), labels=torch.randint(0, 128, (2, 8))).loss.backward()
    optimiser.step()
    moments = [v for state in optimiser.state.values() for k, v in state.items() if k != "step"]
    weights = list(tiny.parameters())
    held = {
        "weights": sum(t.nbytes for t in weights),
        "gradients": sum(t.grad.nbytes for t in weights if t.grad is not None),
        "AdamW moments": sum(t.nbytes for t in moments),
    }
    assert estimate.state_bytes(checkpoints.shape_of(tiny.config), Precision.float32, 1, 0) == held


def saved_for_backward(model: LlamaForCausalLM, precision: Precision, positions: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, parameters apart."""
    if precision is Precision.bfloat16:
        model = model.to(torch.bfloat16)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept[place] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision is Precision.autocast),
    ):
        model.model(input_ids=torch.randint(0, 128, positions.shape), position_ids=positions, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("packed", "recompute"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("precision", list(Precision))
def test_activations_are_to_the_byte_what_autograd_saves(
    tiny: LlamaForCausalLM, precision: Precision, packed: bool, recompute: bool
) -> None:
    rows, length = 2, 32
    positions = torch.arange(length).repeat(rows, 1)
    if packed:
        positions[:, 20:] -= 20
    tiny.train()
    if recompute:
        with warnings.catch_warnings():
            # transformers 5.23 has another name for it, which 5.17 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            tiny.gradient_checkpointing_enable({"use_reentrant": False})
    plan = training(
        student=checkpoints.shape_of(tiny.config),
        precision=precision,
        micro_batch_rows=rows,
        sequence_length=length,
        packed=packed,
        recompute=recompute,
    )
    items = estimate.activation_bytes(plan)
    items.pop("one layer again", None)
    items.pop("document mask", None)
    if precision is Precision.autocast and not recompute:
        items |= {"copies": estimate.state_bytes(plan.student, precision, 1, 0)["bfloat16 copies"]}
    if recompute:
        # Cosine and sine go through the checkpoint unsaved.
        items["activations"] -= rows * length * 2 * tiny.config.head_dim * (2 if precision is Precision.bfloat16 else 4)
    assert sum(items.values()) == saved_for_backward(tiny, precision, positions)


def test_activation_checkpointing_and_smaller_micro_batches_save_memory() -> None:
    def total(**changes: Any) -> float:
        return sum(estimate.training_memory(training(**changes)).values())

    assert total(recompute=True) < total() < total(micro_batch_rows=2)
    assert total(zero_stage=3) < total(zero_stage=2) < total(zero_stage=1) < total(zero_stage=0)


def test_memory_of_eight_billion_in_one_process_is_known() -> None:
    """128 GB of state for 8B with Adam: the figure that everybody quotes."""
    assert sum(estimate.state_bytes(LLAMA_8B, Precision.float32, 1, 0).values()) == 16 * 8_030_261_248


def test_teachers_are_all_resident_and_the_widest_one_is_at_work() -> None:
    both = [
        Teacher(name="big", shape=LLAMA_8B, bytes_per_value=2),
        Teacher(name="huge", shape=LLAMA_70B, bytes_per_value=2, processes=8),
    ]
    items = estimate.training_memory(training(teachers=both))
    assert items["teacher big"] == 2 * LLAMA_8B.num_parameters
    head = 2 * 128256 * 8192
    buffers = 2 * max(2 * LLAMA_70B.layer_parameters, head)
    assert items["teacher huge"] == (2 * LLAMA_70B.num_parameters - head) / 8 + head + buffers
    assert items["teacher huge"] == pytest.approx(23.7e9, rel=2e-3)
    assert [name for name in items if name.endswith(": forward")] == ["teacher huge: forward"]


def test_checkpoints_need_room_for_one_more_than_is_kept() -> None:
    disk = estimate.training_disk(training(zero_stage=0, kept_checkpoints=3), saved_bytes_per_value=2)
    assert sum(disk.values()) == (4 * 12 + 2) * LLAMA_1B.num_parameters


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_is_the_same_size_however_the_student_is_spread(stage: int, precision: Precision) -> None:
    plan = training(zero_stage=stage, precision=precision)
    assert estimate.checkpoint_bytes(plan.trained_parameters) == 12 * LLAMA_1B.num_parameters


def test_checkpoints_that_do_not_stay_are_written_all_the_same() -> None:
    plan = training(zero_stage=0, steps=1001, checkpoint_every=100)
    assert estimate.training_written(plan, saved_bytes_per_value=2) == (11 * 12 + 2) * LLAMA_1B.num_parameters


@pytest.mark.parametrize(("every", "times"), [(0, 2), (100, 11), (300, 5), (5000, 2)])
def test_validation_is_counted_before_the_first_step_after_the_last_and_whenever_it_is_due(
    every: int, times: int
) -> None:
    """Forward passes only, of the student and of each teacher."""
    items = estimate.training_flops(training(validation_rows=64, validation_every=every))
    each = LLAMA_1B.forward_flops_per_token(4096) + LLAMA_8B.forward_flops_per_token(4096)
    assert items["validation, forward"] == times * 64 * 8192 * each
    assert "validation, forward" not in estimate.training_flops(training(validation_rows=0))


def test_the_loss_holds_a_second_head_wherever_products_are_bfloat16() -> None:
    name, values = "loss: bfloat16 copy", 128256 * 2048
    assert name not in estimate.loss_bytes(training(precision=Precision.float32))
    assert estimate.loss_bytes(training(precision=Precision.autocast))[name] == 2 * values


def test_preparing_takes_the_time_of_encoding_and_room_for_text_and_tokens() -> None:
    assert estimate.num_text_tokens(4e9) == 1e9
    assert estimate.prepare_hours(estimate.TOKENS_PER_CPU_SECOND * 3600 * 8, 8) == 1
    assert sum(estimate.prepare_disk(4e9, 1e9).values()) == 12e9


def test_an_evaluation_runs_the_teacher_beside_every_other_model() -> None:
    models = {"teacher": LLAMA_8B, "small": LLAMA_1B, "other": LLAMA_3B}
    flops = estimate.evaluation_flops(models, rows=10, sequence_length=8192, teacher="teacher")
    assert flops["teacher, forward"] == 3 * 10 * 8192 * LLAMA_8B.forward_flops_per_token(4096)
    assert flops["small, forward"] == 10 * 8192 * LLAMA_1B.forward_flops_per_token(4096)


def test_an_evaluation_holds_its_teacher_and_the_largest_other_model() -> None:
    def memory(models: dict[str, LlamaShape], teacher: str | None) -> dict[str, float]:
        return estimate.evaluation_memory(
            models, batch_rows=1, sequence_length=8192, bytes_per_value=2, chunk_values=2**26, teacher=teacher
        )

    both = memory({"teacher": LLAMA_8B, "small": LLAMA_1B, "other": LLAMA_3B}, "teacher")
    assert both["teacher"] == 2 * LLAMA_8B.num_parameters
    assert both["largest model"] == 2 * LLAMA_3B.num_parameters
    alone = memory({"teacher": LLAMA_8B}, "teacher")
    assert alone["largest model"] == 2 * LLAMA_8B.num_parameters
    assert "teacher" not in alone


def test_time_is_operations_over_what_the_devices_reach() -> None:
    h100 = estimate.device(Hardware.h100)
    assert estimate.hours(989.4e12 * 3600, 2, h100, 0.5) == pytest.approx(1.0)
    assert estimate.hours(66.9e12 * 3600, 2, h100, 0.5, Arithmetic.float32) == pytest.approx(1.0)


@pytest.mark.parametrize("hardware", list(Hardware))
def test_every_named_hardware_is_known(hardware: Hardware) -> None:
    device = estimate.device(hardware)
    assert device.memory_bytes > 1e9
    assert 0 < device.assumed_mfu < 1
    assert device.peak(Arithmetic.bfloat16) >= device.peak(Arithmetic.float32) >= device.peak(Arithmetic.float64)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (estimate.amount(12), "12 B"),
        (estimate.amount(16_060_522_496), "15.0 GiB"),
        (estimate.amount(5e15), "4,547.5 TiB"),
        (estimate.duration(0.01), "36 s"),
        (estimate.duration(1.5), "90 min"),
        (estimate.duration(36), "36.0 h"),
        (estimate.duration(240), "10.0 days"),
    ],
)
def test_amounts_read_like_amounts(text: str, expected: str) -> None:
    assert text == expected


def test_an_estimate_needs_no_torch() -> None:
    program = "import sys, llamita.estimate, llamita.prune.costs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_system_that_does_not_tell_which_cores_are_mine_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert estimate.device(Hardware.cpu).name == f"{os.cpu_count()} CPU cores"


def test_adapters_are_all_that_the_optimiser_and_a_checkpoint_hold() -> None:
    """Eight processes under ZeRO-2: 2 bytes of every resting weight, and 4 + (4 + 8) / 8 of an adapter's."""
    one = training(adapter_parameters=8_000_000, teachers=())
    items = estimate.training_memory(one)
    assert items["resting weights"] == 2 * LLAMA_1B.num_parameters
    assert items["adapters"] + items["gradients"] + items["AdamW moments"] == 8_000_000 * (4 + 4 / 8 + 8 / 8)
    assert not {"weights", "loss: gradient of the head"} & items.keys()
    assert estimate.checkpoint_bytes(one.trained_parameters) == 12 * 8_000_000
    tokens = 64 * 8192 * 1000
    forward = LLAMA_1B.forward_flops_per_token(4096)
    assert estimate.training_flops(one)["student, forward and backward"] == tokens * (2 * forward + 6 * 8_000_000)


def test_a_quantised_teacher_keeps_embedding_and_head_as_they_are() -> None:
    matrices = LLAMA_8B.num_hidden_layers * (LLAMA_8B.attention_parameters + LLAMA_8B.mlp_parameters)
    rest = LLAMA_8B.num_parameters - matrices
    assert Teacher(name="big", shape=LLAMA_8B, bytes_per_value=2).weight_bytes == 2 * LLAMA_8B.num_parameters
    quantised = Teacher(name="big", shape=LLAMA_8B, bytes_per_value=2, matrix_bytes=0.5)
    assert quantised.weight_bytes == matrices / 2 + 2 * rest
