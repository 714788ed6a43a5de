"""The recipe from its settings to its directory: every start and every ending."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import invented
from conftest import REPOSITORY
from llamita import checkpoints, runs, storage
from llamita.adapters import LoraConfig
from llamita.distill import hidden, losses, optim, student
from llamita.distill.teachers import Attention, Placement, Storage, TeacherConfig
from llamita.metrics import read_metrics
from llamita.precision import Precision

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred short documents of invented words in rows of 64 tokens."""
    return invented.packed(recipe("prepare"), tmp_path_factory.mktemp("distill"))


def settings(module: ModuleType, data: Path, out: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "data": module._training.DataConfig(path=data),
        "steps": 4,
        "global_batch_rows": 4,
        "micro_batch_rows": 4,
        "checkpoint_every": 2,
        "validation_every": 2,
        "validation_rows": 6,
        "optim": optim.OptimConfig(learning_rate=3e-3, warmup_steps=2),
        "out": out,
    }
    return module.Distill(**{**fields, **changes})


def from_shape(**changes: Any) -> student.StudentConfig:
    return student.StudentConfig(shape=student.ShapeConfig(**{**SHAPE, **changes}))


@pytest.fixture(scope="module")
def teacher(recipe: Callable[[str], ModuleType], data: Path) -> Path:
    """Trained from nothing, without a teacher."""
    module, out = recipe("distill"), data.parent / "teacher"
    module.run(settings(module, data, out, student=from_shape(hidden_size=48)))
    return out


def test_a_model_from_nothing_is_a_stock_llama_with_the_tokenizer_of_the_data(teacher: Path, data: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.config.vocab_size == len(tokenizer) == 640
    assert model.config.rope_parameters["factor"] == 8.0
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert model.config.head_dim == 12
    generation = GenerationConfig.from_pretrained(teacher)
    assert generation.eos_token_id == tokenizer.eos_token_id
    done = runs.check_done(teacher)
    assert set(done["files"]) >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"}
    provenance = json.loads((teacher / "llamita.json").read_text())
    assert provenance["recipe"] == "distill"
    assert provenance["parents"].keys() == {"data"}
    assert done["summary"]["val/held_out/loss"] == provenance["metrics"]["val/held_out/loss"]
    rows = read_metrics(teacher)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "val/held_out/bits_per_byte" in row] == [0, 2, 4]
    assert {"data/tokens", "data/samples", "data/epoch", "perf/tokens_per_s_per_gpu", "optim/lr"} <= rows[1].keys()


def test_two_teachers_make_a_student_and_the_directory_says_so(
    recipe: Callable[[str], ModuleType], teacher: Path, data: Path, tmp_path: Path
) -> None:
    module, out = recipe("distill"), tmp_path / "student"
    before = checkpoints.content_hash(teacher)
    teachers = {"big": TeacherConfig(path=teacher), "other": TeacherConfig(path=teacher, weight=3.0)}
    config = settings(
        module,
        data,
        out,
        student=student.StudentConfig(path=teacher, init=student.Init.random),
        teachers=teachers,
        loss=losses.LossConfig(ce_weight=0.1, temperature=2.0),
        keep_checkpoints=1,
    )
    module.run(config)
    provenance = json.loads((out / "llamita.json").read_text())
    assert provenance["parents"].keys() == {"data", "student", "big", "other"}
    assert provenance["parents"]["big"] == {"path": str(teacher), "sha256": before}
    assert checkpoints.content_hash(teacher) == before
    assert {"kd/kl_big", "kd/kl_other", "kd/top1_agree", "train/kd"} <= runs.check_done(out)["summary"].keys()
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-4"]
    written = (out / "metrics.jsonl").read_bytes()
    module.run(config)
    assert (out / "metrics.jsonl").read_bytes() == written


def test_adapters_and_matched_layers_end_in_a_stock_llama_and_leave_no_trace_but_in_its_provenance(
    recipe: Callable[[str], ModuleType], teacher: Path, data: Path, tmp_path: Path
) -> None:
    module, out = recipe("distill"), tmp_path / "adapted"
    config = settings(
        module,
        data,
        out,
        student=student.StudentConfig(path=teacher, lora=LoraConfig(rank=2)),
        teachers={"big": TeacherConfig(path=teacher)},
        loss=losses.LossConfig(ce_weight=0.5, hidden=hidden.HiddenConfig(weight=0.1, layers=[0])),
        attention=Attention.documents,
    )
    module.run(config)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (teacher, out))
    assert type(after).__name__ == "LlamaForCausalLM"
    names = {name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])}
    assert names
    assert all("proj" in name for name in names)
    assert "documents" not in (out / "config.json").read_text()
    provenance = json.loads((out / "llamita.json").read_text())
    assert provenance["settings"]["student"]["lora"]["rank"] == 2
    summary = runs.check_done(out)["summary"]
    assert {
        "kd/hidden",
        "perf/student_tflops_per_gpu",
        "perf/teacher_tflops_per_gpu",
        "perf/memory_gib",
    } <= summary.keys()
    assert not any("mfu" in name for name in summary)


def test_layers_are_matched_through_the_plan_of_the_student(
    recipe: Callable[[str], ModuleType], teacher: Path, data: Path, tmp_path: Path
) -> None:
    """A student of one layer, which its plan took from the teacher's two; without a plan nothing starts."""
    module, pruned = recipe("distill"), tmp_path / "pruned"
    compose = [f"model.path={teacher}", "target.num_hidden_layers=1", f"out={pruned}"]
    compose += [f"scores.{axis}=magnitude" for axis in ("mlp", "attention", "hidden", "layers")]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "recipes/prune.py"), *compose], text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    config = settings(
        module,
        data,
        tmp_path / "student",
        student=student.StudentConfig(path=pruned),
        teachers={"big": TeacherConfig(path=teacher)},
        loss=losses.LossConfig(hidden=hidden.HiddenConfig(weight=0.1, layers=[0])),
    )
    module.run(config)
    assert runs.check_done(tmp_path / "student")["summary"]["kd/hidden"] > 0
    config.student.path, config.out = tmp_path / "student", tmp_path / "again"
    with pytest.raises(ValueError, match=r"has no pruning plan: set loss\.hidden\.plan"):
        module.run(config)
    config.loss.hidden.plan = pruned
    module.check(config)
    config.compile = True
    with pytest.raises(ValueError, match=r"compile=true does not go with loss\.hidden\.weight"):
        module.check(config)


def test_a_student_that_is_its_teacher_loses_nothing(
    recipe: Callable[[str], ModuleType], teacher: Path, data: Path, tmp_path: Path
) -> None:
    module, out = recipe("distill"), tmp_path / "same"
    module.run(
        settings(
            module,
            data,
            out,
            student=student.StudentConfig(path=teacher),
            teachers={"big": TeacherConfig(path=teacher)},
            steps=1,
        )
    )
    first = read_metrics(out)[0]
    assert abs(first["val/held_out/kd"]) < 1e-9
    assert first["val/held_out/top1_agree"] == 1
    assert first["val/held_out/loss"] == pytest.approx(runs.check_done(teacher)["summary"]["val/held_out/loss"])
    assert runs.check_done(out)["summary"]["val/held_out/bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": student.StudentConfig()}, "student.path is not set, so student.shape needs num_hidden_layers"),
        ({"student": from_shape(num_key_value_heads=3)}, "multiple of num_key_value_heads=3"),
        ({"student": from_shape(max_position_embeddings=32)}, "rows of 64 tokens, the student at most .*=32"),
        ({"global_batch_rows": 6}, "multiple of micro_batch_rows"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"loss": losses.LossConfig(temperature=2.0)}, r"loss.temperature=2.0 needs a teacher: set teachers.<name>"),
        ({"loss": losses.LossConfig(ce_weight=0.5)}, r"loss.ce_weight=0.5 needs a teacher"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    change: dict[str, Any], message: str, recipe: Callable[[str], ModuleType], data: Path, tmp_path: Path
) -> None:
    module = recipe("distill")
    with pytest.raises(ValueError, match=message):
        module.run(settings(module, data, tmp_path / "out", **{"student": from_shape(), **change}))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("weight", [0.0, float("inf"), float("nan")])
def test_a_share_without_meaning_is_refused(weight: float, recipe: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ValueError, match=r"teachers.big.weight must be > 0 and finite"):
        recipe("distill").Distill(student=from_shape(), teachers={"big": TeacherConfig(path=Path("x"), weight=weight)})


def test_other_vocabularies_are_refused_before_anything_is_written(
    recipe: Callable[[str], ModuleType], teacher: Path, data: Path, tmp_path: Path
) -> None:
    """Only configuration and tokenizer are there: no weight was needed to find out."""
    module = recipe("distill")
    for name, change in (("size", {"vocab_size": 600}), ("words", {})):
        foreign = tmp_path / name
        foreign.mkdir()
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(teacher / file, foreign / file)
        storage.write_json(foreign / "config.json", storage.read_json(foreign / "config.json") | change)
        if not change:
            tokenizer = storage.read_json(foreign / "tokenizer.json")
            tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
            storage.write_json(foreign / "tokenizer.json", tokenizer)
    for name, message in (
        ("size", "vocabulary of 600, .* 640 ids"),
        ("words", "tokenizer of big .* is not that of data"),
    ):
        with pytest.raises(ValueError, match=message):
            module.run(
                settings(
                    module,
                    data,
                    tmp_path / "out",
                    student=from_shape(),
                    teachers={"big": TeacherConfig(path=tmp_path / name)},
                )
            )
    assert not (tmp_path / "out").exists()


def test_a_truncated_teacher_ends_the_run_without_a_model(
    recipe: Callable[[str], ModuleType], teacher: Path, data: Path, tmp_path: Path
) -> None:
    module, foreign = recipe("distill"), tmp_path / "foreign"
    shutil.copytree(teacher, foreign, ignore=shutil.ignore_patterns("run.json", "DONE.json", "checkpoints"))
    os.truncate(foreign / "model.safetensors", 5000)
    with pytest.raises(ValueError, match="damaged or cut short"):
        module.run(
            settings(
                module,
                data,
                tmp_path / "out",
                student=from_shape(),
                teachers={"big": TeacherConfig(path=foreign)},
            )
        )
    assert not (tmp_path / "out/model.safetensors").exists()
    assert not (tmp_path / "out/DONE.json").exists()


def test_what_is_learnt_cannot_be_changed_on_a_restart_but_bookkeeping_can(
    recipe: Callable[[str], ModuleType], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, out = recipe("distill"), tmp_path / "run"

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(student, "publish", die)
    with pytest.raises(KeyboardInterrupt):
        module.run(settings(module, data, out, student=from_shape()))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"steps: 4 -> 8"):
        module.run(settings(module, data, out, student=from_shape(), steps=8))
    module.run(
        settings(
            module,
            data,
            out,
            student=from_shape(),
            micro_batch_rows=2,
            checkpoint_every=1,
            log_every=2,
            keep_checkpoints=0,
        )
    )
    assert runs.check_done(out)["summary"]["val/held_out/loss"] > 0
    assert list((out / "checkpoints").glob("step-*")) == []


def test_every_option_of_the_loss_reaches_the_run(
    recipe: Callable[[str], ModuleType], teacher: Path, data: Path, tmp_path: Path
) -> None:
    module, seen = recipe("distill"), set()
    for kind in losses.Divergence:
        out = tmp_path / kind
        module.run(
            settings(
                module,
                data,
                out,
                student=from_shape(tie_word_embeddings=True),
                teachers={"big": TeacherConfig(path=teacher)},
                loss=losses.LossConfig(divergence=kind, chunk_mebibytes=1),
                steps=1,
                validation_rows=0,
                precision=Precision.float32,
                keep_checkpoints=0,
            )
        )
        seen.add(round(runs.check_done(out)["summary"]["train/loss"], 6))
        assert "lm_head.weight" not in checkpoints.Weights(out).files
    assert len(seen) == len(losses.Divergence)


def test_a_teacher_in_pieces_and_one_in_eight_bits_teach_with_moving_shares(
    recipe: Callable[[str], ModuleType], teacher: Path, data: Path, tmp_path: Path
) -> None:
    """The first one at the last step's share of one half; the log says what the second one's bits cost."""
    module, out = recipe("distill"), tmp_path / "student"
    given = {
        "spread": TeacherConfig(path=teacher, placement=Placement.zero3, weight=2.0, weight_end=1.0),
        "small": TeacherConfig(path=teacher, weights=Storage.int8),
    }
    module.run(settings(module, data, out, student=from_shape(), teachers=given))
    summary = runs.check_done(out)["summary"]
    assert summary["kd/share_spread"] == 0.5
    assert summary["kd/kl_spread"] == pytest.approx(summary["kd/kl_small"], rel=0.05)
    costs = [row["teacher/kl_quantised_small"] for row in read_metrics(out) if "teacher/kl_quantised_small" in row]
    assert len(costs) == 1
    assert 0 < costs[0] < 1e-2


ASKED_AFTER_STEP_3 = """
import os, runpy, signal, sys
from llamita.progress import Progress
told = Progress.update
def update(self, completed, note=""):
    told(self, completed, note)
    if completed == 3:
        os.kill(os.getpid(), signal.SIGTERM)
Progress.update = update
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(data: Path, out: Path, *overrides: str) -> list[str]:
    shape = [f"student.shape.{name}={value}" for name, value in SHAPE.items()]
    return [
        sys.executable,
        "-c",
        ASKED_AFTER_STEP_3,
        str(REPOSITORY / "recipes/distill.py"),
        *shape,
        f"data.path={data}",
        f"out={out}",
        *overrides,
    ]


@pytest.mark.slow
def test_a_stop_signal_ends_with_75_and_a_restart_ends_with_the_same_model(
    recipe: Callable[[str], ModuleType], data: Path, tmp_path: Path
) -> None:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "typings"), "OMP_NUM_THREADS": "1"}
    overrides = ("steps=60", "global_batch_rows=4", "micro_batch_rows=4", "validation_every=0")
    process = subprocess.run(
        command(data, tmp_path / "run", *overrides),
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    output = process.stdout
    assert process.returncode == runs.EXIT_REQUEUE, output
    assert "start it again to go on" in output
    assert not (tmp_path / "run/DONE.json").exists()
    module = recipe("distill")
    for name in ("run", "whole"):
        config = settings(
            module,
            data,
            tmp_path / name,
            student=from_shape(),
            steps=60,
            checkpoint_every=500,
            validation_every=0,
            validation_rows=64,
            optim=optim.OptimConfig(),
        )
        module.run(config)
    assert (tmp_path / "run/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    steps = [row["step"] for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert steps == list(range(1, 61))


def test_weights_are_drawn_from_the_seed(recipe: Callable[[str], ModuleType], data: Path, tmp_path: Path) -> None:
    module, hashes = recipe("distill"), []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out = tmp_path / name
        module.run(
            settings(module, data, out, student=from_shape(), steps=1, validation_rows=0, run=runs.RunConfig(seed=seed))
        )
        hashes.append(storage.sha256(out / "model.safetensors"))
        torch.rand(3)
    assert hashes[0] == hashes[1] != hashes[2]
