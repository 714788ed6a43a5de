"""A benchmark leaves alone what it did not make, and measures every choice that there is."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import calibration
import overhead
from conftest import REPOSITORY, tiny_model
from llamita import storage
from llamita.metrics import read_metrics
from llamita.prune import importance, plan, stream, surgery
from llamita.prune.further import Further
from llamita.prune.scores import HiddenScore, LayerScore, WidthScore
from llamita.prune.target import Tie
from llamita.shapes import LlamaShape


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def prune_large(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, with stand-ins for what takes long."""
    module = benchmark("prune_large")

    def make_model(path: Path, layers: int) -> None:
        path.mkdir(parents=True)
        storage.write_json(path / "llamita.json", {"recipe": module.RECIPE})

    def measure(scratch: Path, target: str, out: str, shape: LlamaShape, *overrides: str) -> dict[str, Any]:
        (scratch / out).mkdir(exist_ok=True)
        return {"target": target}

    monkeypatch.setattr(module, "make_model", make_model)
    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "recipe", lambda *arguments: None)
    return module


def start(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prune_large.py", *arguments])
    module.main()


def test_a_folder_of_someone_else_is_refused_and_kept(
    prune_large: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(SystemExit, match="is not empty, and holds no model of this benchmark"):
        start(prune_large, monkeypatch, str(tmp_path))
    assert (tmp_path / "model" / "config.json").is_file()


def test_only_what_was_made_is_removed(
    prune_large: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    start(prune_large, monkeypatch, str(scratch), "--keep")
    assert {path.name for path in scratch.iterdir()} == {"model", "llama3.2_1b", "llama3.2_3b", "again"}
    (scratch / "thesis.tex").touch()
    start(prune_large, monkeypatch, str(scratch))
    assert [path.name for path in scratch.iterdir()] == ["thesis.tex"]
    (scratch / "thesis.tex").unlink()
    start(prune_large, monkeypatch, str(scratch))
    assert not scratch.exists()


def test_a_model_of_fewer_layers_keeps_the_share_of_llama_3_2(prune_large: ModuleType) -> None:
    for target, published in prune_large.TARGETS.items():
        assert prune_large.smaller(target, 32) == published
    assert [prune_large.smaller("llama3.2_1b", layers).num_hidden_layers for layers in (2, 5)] == [1, 2]


def test_every_axis_is_cut_by_every_choice_into_a_model_that_can_be_run(tmp_path: Path) -> None:
    weights, text = calibration.saved(tiny_model(tie_word_embeddings=False), tmp_path), calibration.text()
    further = Further(by_gradient=True, greedy_rounds=1, longest_block=1)
    scores = importance.measure(weights, [text], dtype=torch.float32, second_order=True, further=further)
    asked = list(benchmark("prune_axes").cuts(weights.shape))
    for _, _, target, kinds in asked:
        kept = plan.make(scores, weights.shape, target, kinds)
        assert kept.target.num_parameters < weights.shape.num_parameters
        assert stream.mean_loss(surgery.Pruned(weights, kept), [text], dtype=torch.float32)
    choices = {choice for _, choice, _, _ in asked}
    assert choices >= {*WidthScore, *HiddenScore, *LayerScore, *Tie}


@pytest.mark.parametrize("way", ["online", "cached", "adapters"])
def test_a_training_step_is_measured_behind_the_warm_up_with_and_without_its_teacher(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = benchmark("train_step")
    monkeypatch.setattr(sys, "argv", ["train_step.py", "--small", "--length=32", f"--way={way}", "--student=small"])
    options = module.parsed()
    options.peak_tflops = 0.1
    row = module.measure(options)
    assert (row["perf/teacher_tflops_per_gpu"] == 0) == (way == "cached")
    assert row["perf/total_mfu"] >= row["perf/student_mfu"] > 0
    assert "| small | small teacher | " + way in module.table([row])


def test_what_watching_costs_is_measured_on_the_shapes_of_the_demo() -> None:
    demo = yaml.safe_load((REPOSITORY / "configs/pipeline/demo.yaml").read_text())["stages"]
    told = {
        name: dict(override.split("=") for override in demo[stage]["overrides"] if override.startswith(prefix))
        for name, stage, prefix in (("TEACHER", "teacher", "student.shape."), ("STUDENT", "pruned", "target."))
    }
    for name, overrides in told.items():
        assert overrides
        for setting, value in overrides.items():
            assert getattr(getattr(overhead, name), setting.rpartition(".")[2]) == yaml.safe_load(value), setting
    assert {f"global_batch_rows={overhead.ROWS}"} <= set(demo["distilled"]["overrides"])
    assert {f"sequence_length={overhead.LENGTH}", "tokenizer.vocab_size=2048"} <= set(demo["data"]["overrides"])


def test_a_cost_is_what_a_block_takes_more_than_that_of_its_round() -> None:
    """A machine that is twice as slow in the second round changes no share."""
    plain = [overhead.Cost(10.0, 5.0, 0.0), overhead.Cost(20.0, 10.0, 0.0), overhead.Cost(10.0, 5.0, 0.0)]
    costs = [overhead.Cost(11.0, 5.1, 0.5), overhead.Cost(22.0, 10.2, 1.0), overhead.Cost(11.0, 5.1, 0.5)]
    assert overhead.share(costs, plain, "wall") == pytest.approx((0.1, 0.1, 0.1))
    assert overhead.share(costs, plain, "cpu", 0.2) == pytest.approx((0.004, 0.004, 0.004))
    assert overhead.share(costs, plain, "inside") == pytest.approx((0.05, 0.05, 0.05))


def test_every_way_of_watching_does_what_it_is_called(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    for name in ("TEACHER", "STUDENT"):
        monkeypatch.setattr(overhead, name, dataclasses.replace(getattr(overhead, name), **small, vocab_size=64))
    monkeypatch.setattr(overhead, "LENGTH", 16)
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--rounds=2", "--block=4", "--log-every=2"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = overhead.parsed()
    options.rounds = 1
    with overhead.bench(tmp_path / "run", options) as it:
        found = overhead.measure(it, options)
        assert found[overhead.NOTHING][0].inside < found[overhead.CHECKPOINTS][0].inside
        assert it.job.counters.step == 2 * 5 * 4
    rows = read_metrics(tmp_path / "run")
    assert len([row for row in rows if "train/loss" in row]) == 2 * 2 * (4 // 2)
    assert len([row for row in rows if "perf/save_s" in row]) == 2
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == len(list((tmp_path / "run" / "wandb").glob("o*")))
    options.block = 1
    found = {way: [overhead.Cost(1.0, 1.0, 0.01)] * 2 for way in overhead.WAYS}
    assert "| checkpoints | each 100 steps | 0.00% (0.00% to 0.00%)" in overhead.table(found, options)
