"""``recipes/sample.py`` from prompts to what is learnt: the same bytes however the run was cut and shared out."""

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
from safetensors.torch import load_file, save_file

import assistants
from conftest import REPOSITORY
from llamita import chat, checkpoints, runs
from llamita.align import dialogues, generation, rejection
from llamita.align.dialogues import DialogueData, Task
from llamita.metrics import read_metrics

MADE = ("dialogues.json", "samples.jsonl", "train.dialogues.jsonl", "train.pairs.jsonl", "validation.dialogues.jsonl")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a reward model and dialogues."""
    folder = tmp_path_factory.mktemp("sample")
    return {
        "model": assistants.assistant(folder / "model"),
        "reward": assistants.reward_model(folder / "reward"),
        "data": assistants.data(folder / "data"),
    }


def settings(module: ModuleType, inputs: dict[str, Path], out: Path, **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "model": module.ModelConfig(path=inputs["model"]),
        "data": module.DataConfig(path=inputs["data"]),
        "reward": module.RewardConfig(path=inputs["reward"]),
        "samples_per_prompt": 4,
        "block_prompts": 2,
        "sampling": generation.SamplingConfig(max_new_tokens=12, batch_rows=3),
        "selection": rejection.SelectionConfig(gate=0.0),
        "out": out,
    }
    return module.Sample(**{**fields, **changes})


@pytest.fixture(scope="module")
def made(recipe: Callable[[str], ModuleType], inputs: dict[str, Path]) -> Path:
    module, out = recipe("sample"), inputs["data"].parent / "made"
    module.run(settings(module, inputs, out))
    return out


def contents(path: Path) -> dict[str, bytes]:
    blocks = [*(path / "answers").glob("*.jsonl"), *(path / "scores").glob("*.jsonl")]
    files = [*(path / name for name in MADE), *blocks]
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_best_answers_are_a_directory_of_dialogues(made: Path, inputs: dict[str, Path]) -> None:
    done, samples = runs.check_done(made), lines(made / "samples.jsonl")
    assert done["parents"] == {
        "model": checkpoints.content_hash(inputs["model"]),
        "tokenizer": checkpoints.dialogue_hash(inputs["model"]),
        "reward": checkpoints.content_hash(inputs["reward"]),
        "reward/tokenizer": checkpoints.dialogue_hash(inputs["reward"]),
        "data": DialogueData.open(inputs["data"]).content_hash,
    }
    assert len(samples) == (6 + 3) * 4
    data = DialogueData.open(made)
    by_name = {row["id"]: row for row in samples}
    for split in ("train", "validation"):
        for dialogue in data.dialogues(split):
            row = by_name[dialogue.id]
            rivals = [r for r in samples if r["id"].split("/")[0] == dialogue.id.split("/")[0]]
            assert row["answer"] == dialogue.messages[-1]["content"]
            assert (row["use"], row["status"], row["split"]) == ("chosen", "usable", split)
            assert row["reward"] == max(r["reward"] for r in rivals if r["status"] == "usable")
        for pair in data.pairs(split):
            assert by_name[pair.id]["answer"] == pair.chosen["content"] != pair.rejected["content"]
    assert data.dialogues("train")
    assert data.pairs("train")
    assert {row["status"] for row in samples} >= {"usable", "truncated"}
    assert done["summary"]["train"]["best_of_4"] > done["summary"]["train"]["best_of_1"]
    logged = read_metrics(made)[-2:]
    assert logged[0]["train/mean_reward"] == done["summary"]["train"]["mean_reward"]
    assert {"validation/pass_at_2", "validation/share_truncated"} <= logged[1].keys()


def test_tasks_alone_are_judged_by_their_verifiers(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path
) -> None:
    module = recipe("sample")
    config = settings(
        module, inputs, tmp_path / "out", reward=module.RewardConfig(), selection=rejection.SelectionConfig(gate=0.5)
    )
    module.run(config)
    samples = lines(tmp_path / "out" / "samples.jsonl")
    assert all(row["reward"] is None and 0 <= row["verified"] <= 1 for row in samples)
    assert all(row["verified"] >= 0.5 for row in samples if row["use"] == "chosen")
    assert runs.read_done(tmp_path / "out")["parents"].keys() == {"model", "tokenizer", "data"}


@pytest.mark.parametrize("at", [1, 4, 7])
def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    recipe: Callable[[str], ModuleType],
    inputs: dict[str, Path],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """Before an answer's block, and before a score's: what is finished is not done again."""
    module, out = recipe("sample"), tmp_path / "out"
    store = sys.modules["_sampling"].Store
    written, write = [], store.write

    def counted(self: Any, block: Any, rows: Any) -> None:
        write(self, block, rows)
        written.append((self.folder.name, block.name))
        if len(written) == at:
            (out / "control").mkdir(exist_ok=True)
            (out / "control" / "stop").touch()

    monkeypatch.setattr(store, "write", counted)
    with pytest.raises(runs.Stopped, match="goes on behind the last block"):
        module.run(settings(module, inputs, out))
    assert len(written) == at
    module.run(settings(module, inputs, out))
    assert len(written) == len(set(written)) == 10
    assert contents(out) == contents(made)


def test_a_damaged_block_is_made_again(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    module, out = recipe("sample"), tmp_path / "out"
    module.run(settings(module, inputs, out))
    (out / "DONE.json").unlink()
    (out / "answers" / "train-00001.jsonl").write_text("{}\n")
    module.run(settings(module, inputs, out))
    assert contents(out) == contents(made)


def test_answers_are_judged_again_by_a_reward_model_that_reads_otherwise(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path
) -> None:
    """Its weights are the same, and so are the answers; the chat template beside them was edited."""
    module, out = recipe("sample"), tmp_path / "out"
    judge = shutil.copytree(inputs["reward"], tmp_path / "reward")
    config = settings(module, inputs, out, reward=module.RewardConfig(path=judge))
    module.run(config)
    (out / "DONE.json").unlink()
    files = [file for name in ("answers", "scores") for file in (out / name).iterdir()]
    before = {file: file.stat().st_mtime_ns for file in files}
    (judge / "chat_template.jinja").write_text("{# as before #}" + chat.TEMPLATE)
    module.run(config)
    again = {file for file in files if file.stat().st_mtime_ns != before[file]}
    assert again == {file for file in files if file.parent.name == "scores"}


def test_another_selection_is_made_from_the_same_answers_until_the_run_is_finished(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    module, out = recipe("sample"), tmp_path / "out"
    strict = rejection.SelectionConfig(min_score=1e9)
    with pytest.raises(ValueError, match="no answer is good enough"):
        module.run(settings(module, inputs, out, selection=strict))
    before = {path: path.stat().st_mtime_ns for path in (out / "answers").iterdir()}
    module.run(settings(module, inputs, out))
    assert {path: path.stat().st_mtime_ns for path in (out / "answers").iterdir()} == before
    assert contents(out) == contents(made)
    with pytest.raises(ValueError, match=r"selection\.min_score"):
        module.run(settings(module, inputs, out, selection=strict))


def started(inputs: dict[str, Path], out: Path, *launcher: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The recipe as a user would run it, with the settings of ``made``."""
    overrides = [f"{name}.path={inputs[name]}" for name in ("model", "data", "reward")]
    overrides += ["samples_per_prompt=4", "block_prompts=2", "sampling.max_new_tokens=12", "sampling.batch_rows=3"]
    overrides += ["selection.gate=0", f"out={out}"]
    return subprocess.run(
        [sys.executable, *launcher, "recipes/sample.py", *overrides],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "typings"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(inputs: dict[str, Path], made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = started(inputs, out, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(out) == contents(made)


@pytest.mark.slow
def test_a_run_that_was_killed_loses_one_block_and_ends_in_the_same_bytes(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], made: Path, tmp_path: Path
) -> None:
    """Killed in the middle of writing its third file of answers, behind settings and identity."""
    out = tmp_path / "out"
    killed = started(inputs, out, LLAMITA_CRASH_AT="mid_write:5")
    assert killed.returncode not in (0, 64, 75)
    assert sorted(path.name for path in (out / "answers").iterdir() if path.suffix == ".jsonl") == [
        "train-00000.jsonl",
        "train-00001.jsonl",
    ]
    module = recipe("sample")
    module.run(settings(module, inputs, out))
    assert contents(out) == contents(made)


def test_a_reward_that_is_no_number_is_told_and_never_chosen(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, broken = recipe("sample"), assistants.reward_model(tmp_path / "reward")
    weights = load_file(broken / "model.safetensors")
    weights["score.weight"][:] = torch.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="no answer is good enough") as caught:
        module.run(settings(module, {**inputs, "reward": broken}, tmp_path / "out"))
    assert '"share_no_number": 0.0' not in str(caught.value)
    assert "the reward of t-train-0/0 is nan: it is not chosen" in caplog.text


def test_a_prompt_that_the_template_refuses_is_left_out_like_in_training_and_many_end_the_run(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path
) -> None:
    module, data = recipe("sample"), DialogueData.open(inputs["data"])
    shutil.copytree(inputs["model"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(chat.TEMPLATE + "{# another #}")
    wrong = Task("wrong", ({"role": "user", "content": f"What is {chat.TURN_END}?"},))
    many = [Task(f"t-{number}", ({"role": "user", "content": f"What is {number}?"},)) for number in range(30)]
    for tasks, name in (([*many, wrong], "few"), ([*many[:3], wrong], "much")):
        (tmp_path / name).mkdir()
        dialogues.write_all(tmp_path / name, {"train": {"tasks": tasks}}, {})
    config = settings(module, {**inputs, "model": tmp_path / "model", "data": tmp_path / "few"}, tmp_path / "out")
    assert [one.name for one in module.check(config)[1]["train"]] == [task.id for task in many]
    config.data.path = tmp_path / "much"
    with pytest.raises(ValueError, match=r"prompts of train: 1 of 4 rows were refused"):
        module.check(config)
    assert len(module.check(settings(module, inputs, tmp_path / "out"))[1]["train"]) == len(data.tasks("train"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_prompt": 0}, "samples_per_prompt must be at least 1"),
        ({"round": -1}, "round must be at least 0"),
        ({"prompts": rejection.Prompts.both, "reward": None}, "prompts=both needs reward.path="),
        ({"sampling": generation.SamplingConfig(temperature=0)}, "gives 4 equal answers"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"device": "tpu"}, "device must be auto"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    module = recipe("sample")
    if changes.get("reward", 1) is None:
        changes = {**changes, "reward": module.RewardConfig()}
    with pytest.raises(ValueError, match=r".+") as caught:
        settings(module, inputs, tmp_path / "out", **changes)
    assert message in str(caught.value)


def test_inputs_that_do_not_go_together_are_refused_before_anything_is_written(
    recipe: Callable[[str], ModuleType], inputs: dict[str, Path], tmp_path: Path
) -> None:
    module, out = recipe("sample"), tmp_path / "out"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"reward": module.RewardConfig(path=inputs["model"])}, "must be a LlamaForSequenceClassification"),
        ({"data": module.DataConfig(path=inputs["model"])}, "is not a directory that dialogues or sample wrote"),
        ({"model": module.ModelConfig(path=inputs["data"])}, "is not a model directory"),
        ({"sampling": generation.SamplingConfig(max_new_tokens=200000)}, "positions of model.path="),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=r".+") as caught:
            module.run(settings(module, inputs, out, **changes))
        assert message in str(caught.value)
        assert not out.exists()
