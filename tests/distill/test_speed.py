"""Operations counted one by one, and the shares that follow from them."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
import toy
from torch.utils.flop_counter import FlopCounterMode

from llamita import checkpoints, runs
from llamita.adapters import LoraConfig
from llamita.distill import engines, losses, speed
from llamita.distill.speed import Meter, Tally
from llamita.metrics import read_metrics

SHAPE = checkpoints.shape_of(toy.model(1).config)


def test_operations_are_those_that_torch_counts() -> None:
    """Whole rows: torch counts attention's squares in full, of which causality leaves half; and each label's head."""
    model, batch = toy.model(1), toy.rows(4, 20)
    model.config._attn_implementation = "eager"
    batch = batch | {"position_ids": torch.arange(20).expand(4, -1), "labels": batch["input_ids"]}
    module = engines.Student(model, losses.LossConfig(chunk_mebibytes=64), torch.float32, autocast=False)
    work = engines.MicroBatch(batch, None, [])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(work, False)
    squares = 2 * 2 * SHAPE.num_hidden_layers * 4 * 20**2 * SHAPE.num_attention_heads * SHAPE.head_dim
    tally = Tally(tokens=80, context_tokens=4 * 20 * 10, supervised=4 * 19)
    # transformers 5.17 makes rotary angles by a product, of less than a thousandth of all operations.
    assert tally.forward_flops(SHAPE) == pytest.approx(counter.get_total_flops() - squares / 2, rel=1e-3)


def test_documents_attend_to_themselves_only() -> None:
    """Two documents of 10 tokens attend to half as much as one of 20, and a head without labels costs nothing."""
    per_token = 2 * SHAPE.num_hidden_layers * (SHAPE.attention_parameters + SHAPE.mlp_parameters)
    heads = SHAPE.num_attention_heads * SHAPE.head_dim
    for context in (20 * 10.0, 2 * 10 * 5.0):
        wanted = 20 * per_token + 4 * SHAPE.num_hidden_layers * heads * context
        assert Tally(20, context, 0).forward_flops(SHAPE) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.9),
        ("NVIDIA GeForce RTX 2080", None),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_name_and_none_of_a_stranger(name: str, peak: float | None) -> None:
    assert speed.peak_tflops(name) == peak


def test_the_teachers_operations_are_told_apart() -> None:
    tally = Tally(1000, 5000, 900)
    one = tally.forward_flops(SHAPE)
    meter = Meter(student=SHAPE, teachers=[SHAPE, SHAPE], peak_tflops=1e-5)
    got = meter.metrics(tally, seconds=2.0, devices=4)
    assert got["perf/student_tflops_per_gpu"] == pytest.approx(3 * one / 8 / 1e12)
    assert got["perf/teacher_tflops_per_gpu"] == pytest.approx(2 * one / 8 / 1e12)
    assert got["perf/student_mfu"] == pytest.approx(3 * one / 8 / 1e7)
    assert got["perf/total_mfu"] == pytest.approx(5 * one / 8 / 1e7)
    assert not any("mfu" in name for name in Meter(student=SHAPE).metrics(tally, 1.0, 1))


def test_resting_weights_cost_two_passes_and_adapters_six_operations() -> None:
    tally = Tally(1000, 5000, 900)
    count = LoraConfig(rank=4).num_parameters(SHAPE)
    meter = Meter(student=SHAPE, adapter_parameters=count)
    assert meter.student_flops(tally) == 2 * tally.forward_flops(SHAPE) + 6 * 1000 * count


def test_a_run_tells_rates_and_the_peak_of_memory(tmp_path: Path) -> None:
    """The rate times the seconds of all steps are the operations of all rows."""
    with runs.start(tmp_path / "run", "toy", {}, runs.RunConfig()) as run:
        job = toy.trainer(run, micro_batch_rows=2, log_every=3)
        job.meter = Meter(student=SHAPE, teachers=[SHAPE], peak_tflops=2.0)
        job.train()
    rows = [row for row in read_metrics(tmp_path / "run") if "perf/total_mfu" in row]
    assert [row["step"] for row in rows] == [3, 6]
    seen = toy.Source(batch=8, micro=8)
    for row in rows:
        batches = [next(seen)[0] for _ in range(3)]
        tally = Tally()
        for batch in batches:
            context = float(batch["position_ids"].sum()) + batch["labels"].numel() / 2
            tally += Tally(batch["labels"].numel(), context, int(losses.supervised(batch["labels"]).sum()))
        assert row["perf/student_mfu"] * 2e12 * 3 * row["perf/step_s"] == pytest.approx(job.meter.student_flops(tally))
        assert row["perf/total_mfu"] == pytest.approx(row["perf/student_mfu"] * 4 / 3)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert 0.5 * most < rows[-1]["perf/memory_gib"] <= most * 1.001


def test_without_a_known_peak_no_share_is_told(tmp_path: Path) -> None:
    toy.go(tmp_path / "run", peak_tflops=None)
    assert not any("mfu" in name for row in read_metrics(tmp_path / "run") for name in row)


def test_a_peak_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="peak_tflops must be > 0 and finite, got 0"):
        toy.settings(peak_tflops=0.0)
