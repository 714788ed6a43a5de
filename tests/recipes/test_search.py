"""The search from its settings to its directory: every number of it is what the pruning recipe would measure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

import invented
import pruning_methods
from conftest import REPOSITORY, tiny_model
from llamita import chat, checkpoints, runs, storage
from llamita.data import loader, shards
from llamita.metrics import read_metrics
from llamita.prune import mend, plan, search, stream, surgery
from llamita.prune.ranking import ScoreConfig
from llamita.prune.scores import Scores
from llamita.prune.target import TargetConfig
from llamita.shapes import SIZES

BATCH = ("global_batch_rows=4", "micro_batch_rows=4", "optim.warmup_steps=1", "validation_rows=0")
LINE = (
    "calibration.tokens=1024",
    "calibration.batch_rows=4",
    "held_out.tokens=512",
    "budget.parameters=100000",
    "budget.slack=0.2",
    "axes.num_attention_heads.values=[4]",
    "axes.num_key_value_heads.values=[2]",
    "axes.hidden_size.step=8",
    "axes.intermediate_size.step=16",
    "candidates=4",
    "distill.best=2",
    "distill.steps=2",
    f"distill.overrides={json.dumps(BATCH)}",
)


CLOSED = [f"compensation.{part}_steps=0" for part in ("attention", "layer", "head", "tied")]


@pytest.fixture(scope="module")
def data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred short documents of invented words, a fifth of them held out."""
    return invented.packed(recipe("prepare"), tmp_path_factory.mktemp("search"), held_out=0.2)


@pytest.fixture(scope="module")
def model(data: Path) -> Path:
    path = data.parent / "model"
    path.mkdir()
    checkpoints.copy_tokenizer(data / "tokenizer", path)
    checkpoints.save_model(tiny_model(vocab_size=640, pad_token_id=None), path, source=None, provenance={})
    return path


def started(model: Path, data: Path, out: Path, *more: str, crash: str = "") -> subprocess.CompletedProcess[str]:
    """The command line; ``crash`` names where it dies."""
    words = [f"model.path={model}", f"calibration.path={data}", *LINE, *more, f"out={out}"]
    command = [sys.executable, str(REPOSITORY / "recipes/search.py"), *words]
    environment = {**os.environ, **({"LLAMITA_CRASH_AT": crash} if crash else {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def finished(model: Path, data: Path) -> Path:
    """A search that nobody disturbed."""
    done = started(model, data, data.parent / "finished")
    assert done.returncode == 0, done.stderr
    return data.parent / "finished"


def test_candidates_are_ranked_by_the_loss_of_what_is_cut_and_mended(
    finished: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    """Brute force: every shape is cut by the library, and its loss taken on the first held-out rows."""
    weights, found = checkpoints.Weights(model), search.load(finished)
    scores = Scores.load(finished)
    split = shards.PackedData.open(data).split("validation")
    rows = list(loader.Sequential(split, batch_rows=4, max_rows=8))
    text = list(loader.Sequential(shards.PackedData.open(data).split("train"), batch_rows=4, max_rows=16))
    pad = chat.borders(checkpoints.load_tokenizer(data / "tokenizer")).pad_id
    assert len(found) == 4
    for candidate in found:
        assert candidate.costs["parameters"] == candidate.shape.num_parameters <= 100_000
        target = TargetConfig(**search.sizes_of(candidate.shape))  # type: ignore[arg-type]
        cut = surgery.Pruned(weights, plan.make(scores, weights.shape, target, ScoreConfig()))
        mended = mend.mend(
            cut, text, pruning_methods.CLOSED, tmp_path / candidate.name, dtype=torch.float32, pad_id=pad
        )
        assert candidate.loss == pytest.approx(stream.mean_loss(mended, rows, dtype=torch.float32), abs=1e-6)
    assert not list((finished / "mended").iterdir())
    losses = [candidate.loss or 0.0 for candidate in found]
    distilled = {candidate.name for candidate in found if candidate.recovered is not None}
    assert distilled == {candidate.name for candidate in sorted(found, key=lambda c: c.loss or 0.0)[:2]}
    assert storage.read_json(finished / "whole.json")["loss"] == pytest.approx(
        stream.mean_loss(weights, rows, dtype=torch.float32)
    )
    assert len(set(losses)) == 4


def test_the_winner_is_the_best_behind_distillation_and_a_ready_target(finished: Path, model: Path, data: Path) -> None:
    found = [candidate for candidate in search.load(finished) if candidate.recovered is not None]
    best = min(found, key=lambda candidate: candidate.recovered or 0.0)
    runs.check_done(finished)
    assert storage.read_json(finished / "DONE.json")["summary"]["name"] == best.name
    rows = list(loader.Sequential(shards.PackedData.open(data).split("validation"), batch_rows=4, max_rows=8))
    student = checkpoints.Weights(finished / "distilled" / best.name)
    assert student.shape == best.shape
    assert best.recovered == pytest.approx(stream.mean_loss(student, rows, dtype=torch.float32), abs=1e-6)
    words = [f"--config-dir={finished}", "target=searched", f"model.path={model}", f"calibration.path={data}"]
    words += [f"scores.path={finished}", f"out={finished.parent / 'pruned'}", *CLOSED, *LINE[:2]]
    command = [sys.executable, str(REPOSITORY / "recipes/prune.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, kept = (checkpoints.Weights(path) for path in (finished.parent / "pruned", finished / "students" / best.name))
    assert made.shape == kept.shape == best.shape
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(made[name], kept[name])
    for index in range(best.shape.num_hidden_layers):
        assert all(torch.equal(tensor, kept.layer(index)[name]) for name, tensor in made.layer(index).items())


def times(out: Path) -> dict[str, int]:
    """When each finished thing was made."""
    files = [*out.glob("pruning/scores.safetensors"), *out.glob("students/*/llamita.json"), out / "whole.json"]
    files += out.glob("distilled/*/DONE.json")
    return {str(file.relative_to(out)): file.stat().st_mtime_ns for file in files if file.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "measured", "distilled"),
    [
        ("after_candidate:5", 4, 1),
        pytest.param("after_choice:1", 0, 0, marks=pytest.mark.long),
        pytest.param("after_candidate:2", 2, 0, marks=pytest.mark.long),
    ],
)
def test_killed_anywhere_it_goes_on_without_doing_anything_twice(
    place: str, measured: int, distilled: int, finished: Path, model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert started(model, data, out, crash=place).returncode == -signal.SIGKILL
    known, made = search.load(out), times(out)
    assert not (out / "DONE.json").exists()
    assert sum(candidate.loss is not None for candidate in known) == measured
    assert sum(candidate.recovered is not None for candidate in known) == distilled
    done = started(model, data, out)
    assert done.returncode == 0, done.stderr
    assert made.items() <= times(out).items()
    assert len(made) == 2 + 2 * distilled
    assert (out / "candidates.jsonl").read_bytes() == (finished / "candidates.jsonl").read_bytes()
    for kind, number in (("loss", 4), ("recovered", 2)):
        named = [row["candidate"] for row in read_metrics(out) if f"search/{kind}" in row]
        assert len(named) == len(set(named)) == number


@pytest.mark.parametrize("renamed", [1, 2, 4])
def test_a_student_of_which_some_files_have_their_names_is_published_anew(
    renamed: int, recipe: Callable[[str], ModuleType], model: Path, tmp_path: Path
) -> None:
    recipe("search")
    weights, kinds = checkpoints.Weights(model), ScoreConfig()
    write, out = sys.modules["_search"].write, tmp_path / "student"

    def publish() -> None:
        kept = plan.make(None, weights.shape, TargetConfig(keep_layers=[0, 1]), kinds)
        write(contextlib.nullcontext(surgery.Pruned(weights, kept)), out, model, {})

    if (child := os.fork()) == 0:
        os.environ["LLAMITA_CRASH_AT"] = f"mid_rename:{renamed}"
        publish()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    publish()
    assert checkpoints.Weights(out).shape.num_hidden_layers == 2
    made = (out / "config.json").stat().st_mtime_ns
    publish()
    assert (out / "config.json").stat().st_mtime_ns == made


def test_a_stop_is_obeyed_between_candidates_and_ends_with_75(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, main = recipe("search"), sys.modules["_main"]
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        words = [f"model.path={model}", f"calibration.path={data}", *LINE, "distill.best=0", f"out={tmp_path / 'out'}"]
        config = main.settings(compose("search", words), module.Search)
    note = sys.modules["_search"].Record.note

    def stopping(record: Any, candidate: search.Candidate, **found: float) -> None:
        note(record, candidate, **found)
        (tmp_path / "out/control").mkdir(exist_ok=True)
        (tmp_path / "out/control/stop").touch()

    monkeypatch.setattr(sys.modules["_search"].Record, "note", stopping)
    with pytest.raises(runs.Stopped, match="run the same command again"):
        module.run(config)
    assert sum(candidate.loss is not None for candidate in search.load(tmp_path / "out")) == 1
    monkeypatch.setattr(sys.modules["_search"].Record, "note", note)
    module.run(config)
    assert (tmp_path / "out/DONE.json").is_file()
    target = yaml.safe_load((tmp_path / "out/target/searched.yaml").read_text())
    best = min(search.load(tmp_path / "out"), key=lambda candidate: candidate.loss or 0.0)
    assert {name: target[name] for name in SIZES} == search.sizes_of(best.shape)


def test_latency_is_measured_where_it_is_a_budget(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path
) -> None:
    module, main = recipe("search"), sys.modules["_main"]
    timing = ["budget.latency_ms=10000", "latency.prompt=4", "latency.new_tokens=2", "latency.repeats=1"]
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        words = [f"model.path={model}", f"calibration.path={data}", *LINE, *timing, "distill.best=0"]
        config = main.settings(compose("search", [*words, f"out={tmp_path / 'out'}"]), module.Search)
    module.run(config)
    assert all(0 < candidate.costs["latency_ms"] < 10_000 for candidate in search.load(tmp_path / "out"))


def test_sizes_that_only_fit_each_other_are_searched(
    recipe: Callable[[str], ModuleType], data: Path, tmp_path: Path
) -> None:
    """Six heads do not divide the source's hidden size of 64, but both smaller ones: nothing else is ever asked for."""
    (tmp_path / "model").mkdir()
    checkpoints.copy_tokenizer(data / "tokenizer", tmp_path / "model")
    llama = tiny_model(vocab_size=640, pad_token_id=None, num_attention_heads=8, num_hidden_layers=4)
    checkpoints.save_model(llama, tmp_path / "model", source=None, provenance={})
    module, main = recipe("search"), sys.modules["_main"]
    words = [f"model.path={tmp_path / 'model'}", f"calibration.path={data}", *LINE[:3], *CLOSED]
    words += ["budget.slack=0.9", "axes.num_attention_heads.values=[6]", "axes.num_key_value_heads.values=[2]"]
    words += ["axes.hidden_size.values=[48,60]", "axes.num_hidden_layers.values=[2,3]", "distill.best=0"]
    words += ["axes.head_dim.values=[16]", "axes.intermediate_size.values=[96]", "budget.kv_bytes_per_token=400"]
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        config = main.settings(compose("search", [*words, f"out={tmp_path / 'out'}"]), module.Search)
    module.run(config)
    scores = Scores.load(tmp_path / "out")
    assert len(scores["depth.greedy"]) == 2
    assert {"heads.obs", "groups.obs"} <= scores.tensors.keys()
    found = search.load(tmp_path / "out")
    assert {candidate.shape.num_attention_heads for candidate in found} == {6}


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no budget": (("budget.parameters=null",), "set at least one of budget.parameters"),
    "no such budget": (("budget.parameters=-1",), "budget.parameters must be > 0 and finite, got -1"),
    "too small a budget": (("budget.parameters=100",), "no shape of axes is within the budget: the nearest"),
    "too large a budget": (("budget.parameters=1e12",), "the whole model is within the budget"),
    "nothing close": (("budget.slack=0",), "no shape uses 100.0% of the budget, the nearest"),
    "axis beyond the source": (
        ("axes.head_dim.values=[32]",),
        "axes.head_dim must stay within the source's 16, got 32",
    ),
    "list and range": (("axes.head_dim.values=[8]", "axes.head_dim.step=2"), "not both"),
    "no valid shape": (("axes.head_dim.values=[6]",), "target.head_dim must be even and divide"),
    "size and axis": (("target.hidden_size=32",), "target.hidden_size=32 leaves no choice"),
    "no data": (("calibration.path=null",), "calibration.path must be given"),
    "no such split": (("held_out.split=exam",), "exam"),
    "no candidates": (("candidates=0",), "candidates must be at least 1, got 0"),
    "output rows": (("target.output_rows=[1]",), "target.output_rows cannot be searched with"),
    "distillation setting": (('distill.overrides=["optim.learnin_rate=1"]',), "distill.overrides: optim.learnin_rate"),
    "distillation batch": (('distill.overrides=["global_batch_rows=3"]',), "global_batch_rows"),
    "distillation out": (('distill.overrides=["out=x"]',), "must leave student, teachers, steps and out alone"),
    "unknown key": (("budget.paramters=1",), "paramters"),
    "no such model": (("model.path=/nowhere",), "/nowhere"),
}


def test_a_reward_model_is_refused(
    recipe: Callable[[str], ModuleType], model: Path, data: Path, tmp_path: Path
) -> None:
    module, main, path = recipe("search"), sys.modules["_main"], tmp_path / "rewards"
    shutil.copytree(model, path)
    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = tensors.pop("lm_head.weight")[:1].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    rewards = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "reward"}}
    storage.write_json(path / "config.json", storage.read_json(path / "config.json") | rewards)
    with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
        words = [f"model.path={path}", f"calibration.path={data}", *LINE, f"out={tmp_path / 'out'}"]
        config = main.settings(compose("search", words), module.Search)
    with pytest.raises(ValueError, match=r"model\.path is a reward model, which gives one number for a dialogue"):
        module.run(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mistake", BAD)
def test_mistakes_end_with_64_before_anything_is_written(
    mistake: str,
    recipe: Callable[[str], ModuleType],
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, words = BAD[mistake]
    out, module = tmp_path / "out", recipe("search")
    given = {"model.path": str(model), "calibration.path": str(data), "out": str(out)}
    given |= dict(word.split("=", 1) for word in (*LINE, *overrides))
    monkeypatch.setattr(sys, "argv", ["search.py", *(f"{name}={value}" for name, value in given.items())])
    with pytest.raises(SystemExit) as ended:
        module.exit_with(module.main)
    said = capsys.readouterr().err
    assert ended.value.code == 64, said
    assert words in said
    assert "Traceback" not in said
    # What can only be known once shapes are ordered comes behind the scores, which are kept.
    assert mistake == "nothing close" or not out.exists()
