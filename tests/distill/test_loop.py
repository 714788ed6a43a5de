"""One process: normalisation, what a step changes, what it never does, and going on after a stop."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import Tensor

from llamita import manifests, runs
from llamita.distill import engines, launch, loop, losses, speed
from llamita.distill.losses import IGNORE, LossConfig, TeacherStates
from llamita.distill.teachers import Attention, ResidentTeacher, document_mask, last_hidden
from llamita.metrics import read_metrics
from llamita.precision import Precision


def losses_of(out: Path, name: str = "train/loss") -> dict[int, float]:
    """A metric by step; the same step twice would be an error of the log."""
    rows = [row for row in read_metrics(out) if name in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row[name] for row in rows}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Tensor]]:
    """The uninterrupted run that others are compared with."""
    out = tmp_path_factory.mktemp("loop") / "whole"
    job = toy.go(out)
    return out, toy.digest(job.engine), toy.weights(job.engine)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_of_unequal_length_change_nothing(
    micro: int, whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    out, _, weights = whole
    job = toy.go(tmp_path / "parts", micro_batch_rows=micro)
    for name, value in toy.weights(job.engine).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-6)
    for name in ("train/loss", "train/ce", "train/kd", "optim/grad_norm", "val/held/loss", "val/held/bits_per_byte"):
        assert losses_of(tmp_path / "parts", name) == pytest.approx(losses_of(out, name), rel=1e-5)


def test_the_logged_loss_is_that_of_the_whole_batch_on_plain_logits(
    whole: tuple[Path, str, dict[str, Tensor]],
) -> None:
    batch = next(toy.Source(batch=8, micro=8))[0]
    student, teacher = toy.model(1), toy.model(2, hidden=24, tied=False)
    fields = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    keep = batch["labels"][:, 1:] != IGNORE
    logits = student(**fields).logits[:, :-1][keep]
    goal = teacher(**fields).logits[:, :-1][keep]
    ce = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][keep])
    p, q = (goal / 2).log_softmax(-1), (logits / 2).log_softmax(-1)
    kd = 4 * torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / keep.sum()
    assert losses_of(whole[0])[1] == pytest.approx((0.25 * ce + 0.75 * kd).item(), rel=1e-5)
    assert losses_of(whole[0], "train/kd")[1] == pytest.approx(kd.item(), rel=1e-5)
    agree = (logits.argmax(-1) == goal.argmax(-1)).float().mean()
    assert losses_of(whole[0], "kd/top1_agree")[1] == pytest.approx(agree.item())


def test_validation_is_the_mean_over_all_tokens_of_the_set(whole: tuple[Path, str, dict[str, Tensor]]) -> None:
    student = toy.model(1)
    nll = tokens = size = 0.0
    for count, seed in ((2, 7), (3, 8), (1, 9)):
        batch = toy.rows(count, seed=seed)
        keep = batch["labels"][:, 1:] != IGNORE
        hidden = last_hidden(student, batch, document_mask(batch["position_ids"]))
        logits = student.lm_head(hidden)[:, :-1][keep]
        wanted = batch["labels"][:, 1:][keep]
        nll += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
        tokens += len(wanted)
        size += (wanted % 5).sum().item()
    assert losses_of(whole[0], "val/held/loss")[0] == pytest.approx(nll / tokens, rel=1e-5)
    assert losses_of(whole[0], "val/held/bits_per_byte")[0] == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert sorted(losses_of(whole[0], "val/held/loss")) == [0, 3, 6]


def test_teachers_are_bit_equal_after_training(tmp_path: Path) -> None:
    model = toy.model(2, hidden=24, tied=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    job = toy.go(tmp_path / "run", teachers=[ResidentTeacher("big", model)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    names = [name for name, _ in job.engine.tensors()]
    assert names == [name for name, _ in toy.model(1).named_parameters()]
    stored = (tmp_path / "run/checkpoints/step-6/weights.safetensors").stat().st_size
    assert stored < 1.2 * sum(4 * tensor.numel() for _, tensor in job.engine.tensors())


def test_training_moves_the_student_towards_its_teacher(tmp_path: Path) -> None:
    toy.go(tmp_path / "run", steps=30, validation_every=0, loss=LossConfig())
    curve = losses_of(tmp_path / "run", "train/kd")
    assert curve[30] < 0.8 * curve[1]


def test_without_a_teacher_it_is_language_modelling(tmp_path: Path) -> None:
    toy.go(tmp_path / "run", teachers=[])
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "run", "train/ce"))
    assert losses_of(tmp_path / "run", "train/kd") == {}


def test_only_supervised_rows_count(tmp_path: Path) -> None:
    """Replacing the tokens of rows without labels by others changes no bit of the student."""
    digests = []
    for shift in (0, 1):
        source = toy.Source(batch=8, micro=4)
        source.data["input_ids"][::5] = (source.data["input_ids"][::5] + shift) % toy.VOCABULARY
        job = toy.go(tmp_path / f"run{shift}", source=source, micro_batch_rows=4, teachers=[])
        digests.append(toy.digest(job.engine))
    assert digests[0] == digests[1]


def test_a_step_without_any_label_makes_no_nan(tmp_path: Path) -> None:
    source = toy.Source(batch=8, micro=4)
    source.data["labels"][:8] = IGNORE
    job = toy.go(tmp_path / "run", source=source, micro_batch_rows=4)
    assert all(torch.isfinite(tensor).all() for tensor in toy.weights(job.engine).values())
    assert losses_of(tmp_path / "run")[1] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"attention": Attention.eager},
    ],
    ids=str,
)
def test_options_of_speed_and_memory_change_nothing(
    options: dict[str, Any], whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    attention = options.get("attention")
    student = toy.model(1, **({"attn_implementation": "eager"} if attention else {}))
    toy.go(tmp_path / "run", student=student, **options)
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(whole[0]), rel=1e-4)


def test_a_compiled_student_takes_the_same_step(
    tmp_path: Path, whole: tuple[Path, str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through dynamo and AOT autograd; the C++ compiler behind them would take half a minute here."""
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: real(module, backend="aot_eager"))
    student = toy.model(1)
    toy.go(tmp_path / "run", student=student, steps=1, validation_every=0, compile=True, log_every=1)
    assert student.model._compiled_call_impl is not None
    assert losses_of(tmp_path / "run")[1] == pytest.approx(losses_of(whole[0])[1], rel=1e-4)


def test_activation_checkpointing_computes_layers_again(tmp_path: Path) -> None:
    calls: list[bool] = []
    student = toy.model(1)
    student.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    toy.go(tmp_path / "run", student=student, steps=1, validation_every=0, activation_checkpointing=True)
    training = [call for call in calls if call]
    assert len(training) == 2


def test_bfloat16_keeps_float32_weights_and_stays_near(
    whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    seen: set[torch.dtype] = set()
    student = toy.model(1)
    student.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    job = toy.go(tmp_path / "run", student=student, precision=Precision.bfloat16)
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in toy.weights(job.engine).values()} == {torch.float32}
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(whole[0]), rel=0.02)


def test_a_stopped_run_goes_on_bit_for_bit(whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path) -> None:
    out, digest, _ = whole
    again = tmp_path / "run"

    with pytest.raises(runs.Stopped, match="after step 3 of 6"):
        toy.go(again, source=toy.Interrupted(batch=8, micro=8))
    assert (again / "checkpoints/LATEST").read_text() == "step-3\n"
    torch.manual_seed(99)
    job = toy.go(again, student=toy.model(5))
    assert toy.digest(job.engine) == digest
    assert (again / "checkpoints/step-6").is_dir()
    for name in ("weights.safetensors", "optimizer.safetensors"):
        kept, other = (folder / "checkpoints/step-6" / name for folder in (out, again))
        assert kept.read_bytes() == other.read_bytes()
    states = [json.loads((folder / "checkpoints/step-6/state.json").read_text()) for folder in (out, again)]
    for state in states:
        state["last"] = {k: v for k, v in state["last"].items() if not k.startswith("perf/")}
    assert states[0] == states[1]
    random_states = [(folder / "checkpoints/step-6/random-00000.json").read_text() for folder in (out, again)]
    assert json.loads(random_states[0]).keys() == json.loads(random_states[1]).keys()
    for name in ("train/loss", "optim/grad_norm", "val/held/loss", "data/tokens"):
        assert losses_of(out, name) == losses_of(again, name)


def test_a_stop_is_saved_before_the_validation_of_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which may take longer than the time of grace."""
    saved, validate = {}, loop.Trainer.validate

    def noted(trainer: loop.Trainer) -> None:
        saved[trainer.counters.step] = (tmp_path / f"run/checkpoints/step-{trainer.counters.step}").is_dir()
        validate(trainer)

    monkeypatch.setattr(loop.Trainer, "validate", noted)
    with pytest.raises(runs.Stopped, match="after step 3 of 6"):
        toy.go(tmp_path / "run", source=toy.Interrupted(batch=8, micro=8))
    assert saved == {0: False, 3: True}


def test_random_states_survive(tmp_path: Path) -> None:
    import random

    import numpy

    from llamita.distill.state import random_state, set_random_state

    saved = json.loads(json.dumps(random_state()))
    first = [random.random(), numpy.random.rand(), torch.rand(1).item()]
    set_random_state(saved)
    assert first == [random.random(), numpy.random.rand(), torch.rand(1).item()]


def test_a_damaged_checkpoint_is_passed_over_and_made_again(
    whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, digest, _ = whole
    again = tmp_path / "run"
    shutil.copytree(out, again)
    file = again / "checkpoints/step-6/weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (again / "checkpoints/LATEST").write_text("../../elsewhere")
    (again / "checkpoints/.tmp-step-9-00000000").mkdir()
    job = toy.go(again)
    assert "step-6 is passed over: weights.safetensors has another content" in caplog.text
    assert toy.digest(job.engine) == digest
    assert sorted(p.name for p in (again / "checkpoints").iterdir()) == ["LATEST", "step-4", "step-6"]
    assert file.read_bytes() == (out / "checkpoints/step-6/weights.safetensors").read_bytes()


def test_no_good_checkpoint_is_no_reason_to_start_afresh(
    whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(whole[0], again)
    for folder in (again / "checkpoints").glob("step-*"):
        os.truncate(folder / "optimizer.safetensors", 10)
    with pytest.raises(ValueError, match="none is whole"):
        toy.go(again)


def test_other_parents_are_refused(whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(whole[0], again)
    with runs.start(again, "toy", {}, runs.RunConfig()) as run:
        job = toy.trainer(run)
        job.parents = {"teacher": "changed"}
        with pytest.raises(ValueError, match="trained from other weights"):
            job.train()


def test_a_checkpoint_of_other_parameters_is_refused(
    whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    again = tmp_path / "run"
    shutil.copytree(whole[0], again)
    with (
        runs.start(again, "toy", {}, runs.RunConfig()) as run,
        pytest.raises(ValueError, match=r"step-6 and the student differ in 1 parameters: lm_head.weight"),
    ):
        toy.trainer(run, student=toy.model(1, tied=False)).train()


def test_averages_that_were_not_measured_are_not_logged(tmp_path: Path) -> None:
    job = toy.go(tmp_path / "run", log_every=4, validation_every=0)
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["step"] for row in rows] == [4, 6]
    assert all(row["kd/student_entropy"] > 0 for row in rows)
    assert rows[1]["data/tokens"] == 6 * 96
    assert job.last["perf/step_s"] == rows[1]["perf/step_s"]


class Broken:
    """A teacher that says NaN for the micro-batches named."""

    name, weight, is_sparse = "broken", 1.0, False

    def __init__(self, bad: set[int]) -> None:
        self.inner = ResidentTeacher("broken", toy.model(2, hidden=24, tied=False))
        self.calls, self.bad = 0, bad

    def states(self, batch: Any, mask: Tensor | None) -> TeacherStates:
        self.calls += 1
        states = self.inner.states(batch, mask)
        return TeacherStates(states.hidden * float("nan") if self.calls in self.bad else states.hidden, states.head)


def test_a_step_with_a_loss_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    job = toy.go(tmp_path / "run", teachers=[Broken({3, 5})], micro_batch_rows=4, validation_rows=0, steps=4)
    assert job.counters.skipped >= 1
    assert all(torch.isfinite(tensor).all() for tensor in toy.weights(job.engine).values())
    rows = [row for row in read_metrics(tmp_path / "run") if "optim/lr" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_run_without_finite_gradients_ends_naming_step_and_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 steps in a row .* step 3; the loss of rows 16, 17, 18, 19, 20, 21"):
        toy.go(tmp_path / "run", teachers=[Broken(set(range(100)))], steps=20, max_skipped_in_a_row=3)


class Greedy(Broken):
    """A teacher that finds no memory for the micro-batches named."""

    def states(self, batch: Any, mask: Tensor | None) -> TeacherStates:
        self.calls += 1
        if self.calls in self.bad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.inner.states(batch, mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (3 + 3, r"out of memory in step 3 on rank 0 .* a smaller micro_batch_rows, activation_checkpointing=true"),
        (3 + 3 + 1, r"out of memory in the validation after step 3 .* a smaller micro_batch_rows"),
    ],
    ids=["step", "validation"],
)
def test_f24_memory_that_runs_out_names_phase_and_setting_and_leaves_the_checkpoint(
    tmp_path: Path, call: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):  # three held-out batches come before the first step
        toy.go(tmp_path / "run", teachers=[Greedy({call})])
    assert manifests.check_manifest(tmp_path / "run/checkpoints/step-2", hashes=True) is None


def test_f24_memory_that_runs_out_in_a_save_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.Replicated.save

    def short(self: engines.Replicated, folder: Path) -> list[str]:
        if "step-4" in folder.name:
            raise MemoryError
        return real(self, folder)

    monkeypatch.setattr(engines.Replicated, "save", short)
    with pytest.raises(ValueError, match="out of memory in saving step 4"):
        toy.go(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["LATEST", "step-2"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engines.Replicated.save

    def full(self: engines.Replicated, folder: Path) -> list[str]:
        if "step-4" in folder.name:
            (folder / "weights.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device", str(folder))
        return real(self, folder)

    monkeypatch.setattr(engines.Replicated, "save", full)
    with pytest.raises(OSError, match="No space left"):
        toy.go(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["LATEST", "step-2"]


def test_retention_counts_only_whole_checkpoints(tmp_path: Path) -> None:
    from llamita.distill import state

    for step in (1, 2, 3, 10, 11):
        with manifests.publishing(tmp_path / f"step-{step}") as folder:
            (folder / "weights").write_text("x" * step)
    for step in (10, 11):
        (tmp_path / f"step-{step}" / "weights").unlink()
    (tmp_path / ".trash-step-0").mkdir()
    state.prune(tmp_path, 2)
    assert not (tmp_path / ".trash-step-0").exists()
    assert state.steps_in(tmp_path) == [11, 10, 3, 2]
    assert state.newest_good(tmp_path) == 3


def test_rows_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiple of micro_batch_rows \* processes = 8 \* 3, got 8"):
        toy.settings().micro_batches(3)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        toy.settings(steps=0)
    with pytest.raises(ValueError, match="micro_batch_rows must be at least 1, got 0"):
        toy.settings(micro_batch_rows=0)


@pytest.mark.parametrize(
    ("stage", "config", "message"),
    [
        (2, {"optimizer": {}}, "must not hold optimizer"),
        (2, {"data_types": {}, "steps_per_print": 1}, "must not hold data_types, steps_per_print"),
        (2, {"zero_optimization": {"stage": 3}}, r"must not hold zero_optimization\.stage"),
        (1, {"zero_optimization": {"compute_grad_norm": False}}, r"must not hold zero_optimization\.compute_grad_norm"),
        (0, {"zero_optimization": {"overlap_comm": True}}, "needs deepspeed=zero1, zero2 or zero3, got none"),
        (4, {}, "must be 0, 1, 2 or 3, got 4"),
    ],
)
def test_what_deepspeed_must_not_be_told_is_refused(stage: int, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        launch.DeepSpeedConfig(stage=stage, config=config)


@pytest.mark.parametrize(
    ("options", "stage", "gpu", "message"),
    [
        ({"compile": True}, 2, False, "compile=true does not go with deepspeed"),
        ({"attention": Attention.flash_attention_2}, 0, False, "needs a GPU"),
        (
            {"attention": Attention.flash_attention_2, "precision": Precision.float32},
            0,
            True,
            "needs precision=bfloat16, got float32",
        ),
        (
            {"attention": Attention.flash_attention_2, "precision": Precision.bfloat16},
            0,
            True,
            "needs the package flash-attn",
        ),
        (
            {"compile": True, "attention": Attention.documents},
            0,
            False,
            "compile=true does not go with attention=documents",
        ),
    ],
)
def test_settings_that_cannot_run_here_are_refused(
    options: dict[str, Any], stage: int, gpu: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=message):
        launch.check_launch(toy.settings(**options), launch.DeepSpeedConfig(stage=stage))


def test_a_launcher_that_chooses_the_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    launch.check_launch(toy.settings(), launch.DeepSpeedConfig(stage=2))
    with pytest.raises(ValueError, match=r"ACCELERATE_USE_DEEPSPEED.* choose deepspeed=zero1, zero2 or zero3"):
        launch.check_launch(toy.settings(), launch.DeepSpeedConfig())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP"):
        launch.check_launch(toy.settings(), launch.DeepSpeedConfig(stage=2))


def test_validation_knows_no_dropout_and_draws_no_random_number(
    whole: tuple[Path, str, dict[str, Tensor]], tmp_path: Path
) -> None:
    student = toy.model(1, attention_dropout=0.5)
    with runs.start(tmp_path / "run", "toy", {}, runs.RunConfig()) as run:
        job = toy.trainer(run, student=student)
        before = torch.get_rng_state()
        job.validate()
        assert torch.equal(before, torch.get_rng_state())
        assert student.training
        assert job.last["val/held/loss"] == pytest.approx(losses_of(whole[0], "val/held/loss")[0], rel=1e-6)


def test_validation_takes_none_of_the_time_of_steps(tmp_path: Path) -> None:
    with runs.start(tmp_path / "run", "toy", {}, runs.RunConfig()) as run:
        job = toy.trainer(run)
        job._add("perf/teacher_s", 3.0)
        job.validate()
        assert job._interval == {"perf/teacher_s": 3.0}
        assert job._teacher_time.take() == 0


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_the_time_of_a_device_is_that_of_its_work_and_not_of_queueing_it(device: str) -> None:
    clock, size = speed.DeviceTime(torch.device(device)), 4096 if device == "cuda" else 512
    matrix = torch.rand(size, size, device=device)
    matrix @ matrix
    for _ in range(2):
        with clock:
            for _ in range(10):
                matrix @ matrix
    matrix.cpu()
    first, second = clock.take(), clock.take()
    assert first > 1e-3
    assert second == 0


def test_a_run_that_took_no_step_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 steps in a row had no finite gradient"):
        toy.go(tmp_path / "run", teachers=[Broken(set(range(100)))], steps=2)


def test_what_training_returns_can_be_written_down(tmp_path: Path) -> None:
    with runs.start(tmp_path / "run", "toy", {}, runs.RunConfig()) as run:
        metrics = toy.trainer(run, teachers=[Broken({5})], validation_rows=0, steps=2, micro_batch_rows=8).train()
        assert all(math.isfinite(value) for value in metrics.values())


def test_without_room_for_a_checkpoint_nobody_starts_to_write(tmp_path: Path) -> None:
    from llamita.distill.state import Checkpoints

    with runs.start(tmp_path / "run", "toy", {}, runs.RunConfig()) as run:
        job = toy.trainer(run)
    parameters = sum(tensor.numel() for _, tensor in job.engine.tensors())
    assert job.engine.checkpoint_bytes == 12 * parameters
    written: list[Path] = []
    with pytest.raises(OSError, match="no space left for a checkpoint"):
        Checkpoints(tmp_path / "full", job.accelerator, keep=2).save(1, {}, written.append, size=2**80)
    assert written == []
    assert list((tmp_path / "full").iterdir()) == []


def test_a_weight_that_is_not_finite_is_never_published(tmp_path: Path) -> None:
    from llamita.distill import student

    model = toy.model(1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")

    class Engine:
        def tensors(self) -> Iterator[tuple[str, Tensor]]:
            yield from model.named_parameters()

    with pytest.raises(ValueError, match=r"model.norm.weight is not finite"):
        student.publish(
            Engine(), model.config, tmp_path, main=True, source=tmp_path, dtype=torch.float32, provenance={}
        )
    assert list(tmp_path.iterdir()) == []


def test_statistics_have_one_name_each() -> None:
    assert len(losses.statistics(["one", "two"])) == 7


def test_a_log_gets_one_line_with_all_facts_for_each_logged_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = toy.go(tmp_path / "run", log_every=2, checkpoint_every=4)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run: ")]
    assert [line.split("  ")[0] for line in lines] == [f"run: step {step}/6" for step in (2, 4, 6)]
    assert [line.partition("checkpoint ")[2].split()[0] for line in lines] == ["-", "4", "6"]
    logged = losses_of(tmp_path / "run")
    assert all(f"  loss {logged[step]:.4f}  " in line for step, line in zip((2, 4, 6), lines, strict=True))
    assert f"  held loss {losses_of(tmp_path / 'run', 'val/held/loss')[6]:.4f}  " in lines[-1]
    assert f"  lr {job.last['optim/lr']:.2e}  tokens/s {job.last['perf/tokens_per_s_per_gpu']:,.0f}  " in lines[-1]
    assert f"  memory {job.last['perf/memory_gib']:.2f} GiB  " in lines[-1]
