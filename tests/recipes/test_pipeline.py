"""A pipeline runs its stages in order, goes on where it was, and says which stage failed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from conftest import REPOSITORY
from llamita import directories, runs, storage
from llamita.progress import Progress

STAGE = """
import json, os, sys, time
from pathlib import Path
settings = dict(argument.split("=", 1) for argument in sys.argv[1:])
out = Path(settings["out"])
if (out / "DONE.json").exists():
    sys.exit(0)
out.mkdir(parents=True, exist_ok=True)
with (out.parent / "order").open("a") as file:
    file.write(out.name + "\\n")
if "signal" in settings:
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (out / "ready").touch()
    time.sleep(60)
if settings.get("code") == "kill":
    os.kill(os.getpid(), 9)
if (code := int(settings.get("code", 0))):
    print("the data is upside down")
    sys.exit(code)
(out / "DONE.json").write_text("{}")
print("hello from", out.name, settings.get("word", ""))
"""


@pytest.fixture
def pipeline(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Run stages made of a stub recipe: ``run(a={...}, b={...})``."""
    module = recipe("pipeline")
    (tmp_path / "prune.py").write_text(STAGE)
    monkeypatch.setattr(sys.modules["_local"], "RECIPES", tmp_path)

    def run(parallel: int = 1, **stages: dict[str, Any]) -> None:
        made = {name: module.Stage(recipe="prune", **stage) for name, stage in stages.items()}
        local = sys.modules["_local"].LocalConfig(parallel=parallel)
        module.run(module.Pipeline(stages=made, local=local, out=tmp_path / "out"))

    return run


def order(tmp_path: Path, folder: str = "") -> list[str]:
    return (tmp_path / "out" / folder / "order").read_text().split()


def test_a_stage_runs_after_those_it_reads(pipeline: Callable[..., None], tmp_path: Path) -> None:
    pipeline(c={"after": ["b"]}, a={}, b={"after": ["a"]})
    assert order(tmp_path) == ["a", "b", "c"]


def test_finished_stages_are_not_run_again(pipeline: Callable[..., None], tmp_path: Path) -> None:
    for _ in range(2):
        pipeline(a={}, b={"after": ["a"]})
    assert order(tmp_path) == ["a", "b"]


def test_a_finished_stage_of_other_settings_is_refused_and_so_is_what_read_it(
    pipeline: Callable[..., None], tmp_path: Path
) -> None:
    pipeline(a={}, b={}, c={"after": ["b"]})
    with pytest.raises(ValueError, match=r"remove \S*out/b, \S*out/c, or choose another out"):
        pipeline(a={}, b={"overrides": ["word=new"]}, c={"after": ["b"]})
    for name in ("b", "c"):
        shutil.rmtree(tmp_path / "out" / name)
    pipeline(a={}, b={"overrides": ["word=new"]}, c={"after": ["b"]})
    assert order(tmp_path) == ["a", "b", "c", "b", "c"]


def test_a_finished_stage_whose_input_is_gone_is_refused(pipeline: Callable[..., None], tmp_path: Path) -> None:
    pipeline(a={}, b={"after": ["a"]})
    shutil.rmtree(tmp_path / "out" / "a")
    with pytest.raises(ValueError, match="inputs that are not there any more: remove"):
        pipeline(a={}, b={"after": ["a"]})


def test_what_a_stage_printed_is_shown_again(pipeline: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        pipeline(a={"show": True, "overrides": ["word=there"]})
        assert "hello from a there" in capfd.readouterr().out


@pytest.mark.parametrize(("code", "error"), [(64, ValueError), (1, RuntimeError), (75, runs.Stopped)])
def test_a_failed_stage_ends_the_pipeline_with_its_kind(
    pipeline: Callable[..., None], tmp_path: Path, code: int, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"stage a"):
        pipeline(a={"overrides": [f"code={code}"]}, b={"after": ["a"]})
    assert order(tmp_path) == ["a"]
    assert storage.read_json(tmp_path / "out" / "pipeline.json") == {}


def test_the_end_of_the_log_is_in_the_message(pipeline: Callable[..., None]) -> None:
    with pytest.raises(ValueError, match="the data is upside down"):
        pipeline(a={"overrides": ["code=64"]})


def test_a_failed_stage_stops_those_beside_it(pipeline: Callable[..., None], tmp_path: Path) -> None:
    """Left alone, stage a would go on for a minute and then be done."""
    with pytest.raises(ValueError, match="stage b"):
        pipeline(parallel=2, a={"overrides": ["signal=1"]}, b={"overrides": ["code=64"]})
    assert not (tmp_path / "out" / "a" / "DONE.json").exists()


def test_two_launchers_do_not_share_a_directory(pipeline: Callable[..., None], tmp_path: Path) -> None:
    with (
        directories.owned(tmp_path / "out", marker="pipeline.json"),
        pytest.raises(ValueError, match=f"owned by another run: process {os.getpid()}"),
    ):
        pipeline(a={})
    assert not (tmp_path / "out" / "logs").exists(), "the other's logs are not touched"
    pipeline(a={})


def test_a_directory_of_foreign_files_is_no_pipelines(pipeline: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds files but no pipeline\.json"):
        pipeline(a={})
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("patience", [60.0, 0.0])
def test_a_stage_that_outlived_a_killed_launcher_is_waited_for(
    pipeline: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """Until it has saved; one that does not end is the stage's own error, which says who owns it."""
    local = sys.modules["_local"]
    monkeypatch.setattr(local, "ORPHAN_SECONDS", patience)
    asked = iter([True, True])
    monkeypatch.setattr(local, "_has_owner", lambda out: next(asked, False))
    pipeline(a={})
    assert order(tmp_path) == ["a"]
    assert len(list(asked)) == (0 if patience else 2)


def test_what_an_earlier_start_said_stays(pipeline: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="upside down"):
        pipeline(a={"overrides": ["code=64"]})
    pipeline(a={})
    logs = tmp_path / "out" / "logs"
    assert "upside down" in (logs / "a.earlier.log").read_text()
    assert "hello from a" in (logs / "a.log").read_text()


def test_a_stage_that_the_system_killed_says_so(pipeline: Callable[..., None]) -> None:
    with pytest.raises(runs.Crashed, match="stage a was killed, as by a system that has no memory left"):
        pipeline(a={"overrides": ["code=kill"]})


def test_a_finished_stage_stays_when_the_machine_changes(pipeline: Callable[..., None], tmp_path: Path) -> None:
    pipeline(a={})
    pipeline(a={"processes": 2})
    assert order(tmp_path) == ["a"]


def test_what_is_shown_may_be_gone(pipeline: Callable[..., None], tmp_path: Path) -> None:
    pipeline(a={"show": True})
    shutil.rmtree(tmp_path / "out" / "logs")
    pipeline(a={"show": True})


def on_slurm(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., None], dict[str, str], list[Any]]:
    """Submission to a queue that is a mapping: how to submit stages, the queue, and every stage that went into it."""
    module, queue, submitted = recipe("pipeline"), {}, []

    def submit(stage: Any, launcher: Any, snapshot: Any, after: list[str]) -> str:
        if stage.name not in queue:
            submitted.append((stage, after))
            queue[stage.name] = str(len(submitted))
        return queue[stage.name]

    monkeypatch.setattr(module, "submit", submit)
    monkeypatch.setattr(module, "queued", lambda name, out: queue.get(name))

    def start(**stages: dict[str, Any]) -> None:
        made = {name: module.Stage(recipe="prune", **stage) for name, stage in stages.items()}
        module.run(
            module.Pipeline(
                stages=made, launcher=sys.modules["_slurm"].LauncherConfig(kind="slurm"), out=tmp_path / "out"
            )
        )

    return start, queue, submitted


def test_a_stage_in_the_queue_with_other_settings_is_not_taken_for_the_new_one(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, queue, submitted = on_slurm(recipe, tmp_path, monkeypatch)
    start(a={"overrides": ["word=old"]})
    start(a={"overrides": ["word=old"]})
    assert len(submitted) == 1
    with pytest.raises(ValueError, match="stage a waits in the queue with other settings: scancel 1 first"):
        start(a={"overrides": ["word=new"]})
    queue.clear()
    start(a={"overrides": ["word=new"]})
    assert len(submitted) == 2


def test_a_launcher_that_died_after_it_had_submitted_submits_nothing_twice(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, queue, submitted = on_slurm(recipe, tmp_path, monkeypatch)
    module = recipe("pipeline")
    whole = module.submit

    def dies(*words: Any, **options: Any) -> str:
        whole(*words, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "submit", dies)
    with pytest.raises(KeyboardInterrupt):
        start(a={}, b={"after": ["a"]})
    monkeypatch.setattr(module, "submit", whole)
    start(a={}, b={"after": ["a"]})
    assert [(stage.name, after) for stage, after in submitted] == [("a", []), ("b", ["1"])]
    assert list(queue) == ["a", "b"]


def test_points_that_are_finished_are_not_submitted_again_and_new_ones_wait_for_the_old(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, queue, submitted = on_slurm(recipe, tmp_path, monkeypatch)
    start(a={"sweep": {"word": ["x", "y"]}}, b={"after": ["a"]})
    first = submitted[0][0]
    assert (list(first.points), list(first.left)) == (["word_x", "word_y"], [0, 1])
    with pytest.raises(ValueError, match="stage a waits in the queue with other settings"):
        start(a={"sweep": {"word": ["x", "y", "z"]}}, b={"after": ["a"]})
    queue.clear()
    (tmp_path / "out" / "a" / "word_x").mkdir(parents=True)
    (tmp_path / "out" / "a" / "word_x" / "DONE.json").touch()
    start(a={"sweep": {"word": ["x", "y", "z"]}}, b={"after": ["a"]})
    second, (last, after) = submitted[2][0], submitted[3]
    assert (list(second.points), list(second.left)) == (["word_x", "word_y", "word_z"], [1, 2])
    assert (last.name, after) == ("b", ["3"])


def test_the_resolved_settings_and_the_code_lie_in_the_directory(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, _, _ = on_slurm(recipe, tmp_path, monkeypatch)
    start(a={"overrides": ["word=x"]})
    out = tmp_path / "out"
    settings = yaml.safe_load((out / "pipeline.yaml").read_text())
    assert settings["stages"]["a"]["overrides"] == ["word=x"]
    assert settings["launcher"]["kind"] == "slurm"
    (code,) = out.glob("code-*")
    assert (code / "slurm" / "run.sbatch").read_bytes() == (REPOSITORY / "slurm" / "run.sbatch").read_bytes()


def test_a_dry_run_prints_scripts_and_commands_and_writes_nothing(
    recipe: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = recipe("pipeline")
    launcher = sys.modules["_slurm"].LauncherConfig(kind="slurm", dry_run=True)
    stages = {"a": module.Stage(recipe="prune"), "b": module.Stage(recipe="prune", after=["a"])}
    (tmp_path / "out").mkdir()  # as Hydra does
    module.run(module.Pipeline(stages=stages, launcher=launcher, out=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert f"\nsbatch --parsable {tmp_path}/out/slurm/a.sbatch\n" in printed
    assert "sbatch --parsable '--dependency=afterok:<a>' --kill-on-invalid-dep=yes" in printed
    assert printed.count("#!/bin/bash\n") == 2
    assert not (tmp_path / "out").exists()


def test_a_sweep_runs_every_combination_in_a_folder_of_its_own(
    pipeline: Callable[..., None], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep = {"word": ["x", "two words", "it's $(x)"], "rate": [0.1, True]}
    pipeline(a={"sweep": sweep, "show": True}, b={"after": ["a"]})
    made = sorted(path.parent.name for path in (tmp_path / "out" / "a").glob("*/DONE.json"))
    assert len(made) == 6
    assert {"word_x-rate_0.1", "word_x-rate_true"} <= set(made)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) for name in made)
    assert order(tmp_path) == ["b"]
    assert "hello from" in capfd.readouterr().out
    record = storage.read_json(tmp_path / "out" / "pipeline.json")
    pipeline(a={"sweep": sweep}, b={"after": ["a"]})
    assert order(tmp_path) == ["b"], "nothing ran again"
    assert len(order(tmp_path, "a")) == 6
    assert storage.read_json(tmp_path / "out" / "pipeline.json") == record


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_point_that_fails_does_not_stop_the_others_and_what_reads_them_never_starts(
    pipeline: Callable[..., None], tmp_path: Path, parallel: int
) -> None:
    with pytest.raises(ValueError, match=r"stage a\.code_64 ended with code 64"):
        pipeline(parallel, a={"sweep": {"code": [64, 0]}}, b={"after": ["a"]}, c={"after": ["b"]})
    assert sorted(order(tmp_path, "a")) == ["code_0", "code_64"]
    assert not (tmp_path / "out" / "order").exists()
    assert storage.read_json(tmp_path / "out" / "pipeline.json").keys() == {"a.code_0"}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a b": {}}, "a name has 1 to 64 letters"),
        ({"a": {"after": ["z"]}}, r"stages\.a\.after names \['z'\]"),
        ({"a": {"after": ["b"]}, "b": {"after": ["a"]}}, "wait for each other"),
        ({"a": {"processes": 0}}, r"stages\.a\.processes must be at least 1, got 0"),
        ({"a": {"workers": 0}}, r"stages\.a\.workers must be at least 1, got 0"),
        ({"a": {"workers": 2}}, r"stages\.a\.workers=2 needs recipe cache and no sweep"),
        ({"a": {"sweep": {"word": []}}}, r"stages\.a\.sweep\.word has no values"),
    ],
)
def test_stages_that_could_never_run_are_refused(
    pipeline: Callable[..., None], tmp_path: Path, stages: dict[str, Any], message: str
) -> None:
    module = sys.modules["recipe_pipeline"]
    with pytest.raises(ValueError, match=message):
        module.Pipeline(stages={n: module.Stage(recipe="prune", **s) for n, s in stages.items()}, out=tmp_path)


def test_a_signal_to_the_pipeline_reaches_the_stage_which_saves(tmp_path: Path) -> None:
    (tmp_path / "prune.py").write_text(STAGE)
    program = (
        "import sys; sys.path.insert(0, 'recipes'); import pipeline; from pathlib import Path\n"
        f"pipeline._local.RECIPES = Path({str(tmp_path)!r})\n"
        "stage = pipeline.Stage(recipe='prune', overrides=['signal=1'])\n"
        f"config = pipeline.Pipeline(stages={{'a': stage}}, out=Path({str(tmp_path / 'out')!r}))\n"
        "pipeline.exit_with(lambda: pipeline.run(config))\n"
    )
    repository = Path(__file__).resolve().parent.parent.parent
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=repository, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (tmp_path / "out" / "a" / "ready").exists():
            time.sleep(0.05)
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == runs.EXIT_REQUEUE
    assert "run the same command again" in errors


def test_progress_of_a_stage_is_read_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMITA_PROGRESS", str(tmp_path / "state"))
    with Progress("distil", 10) as progress:
        progress.update(3, "loss 1.0")
        progress._said -= 60
        progress.update(4, "loss 0.9")
    assert json.loads((tmp_path / "state").read_text())["completed"] == 4
    assert os.environ["LLAMITA_PROGRESS"]


def test_rounds_repeat_their_stages_each_after_the_last(recipe: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = recipe("pipeline")
    first = {"sft_1": module.Stage(recipe="distill"), "mean_1": module.Stage(recipe="distill", after=["sft_1"])}
    later = {
        "sft": module.Stage(recipe="distill", after=["mean_{last}"], overrides=["path=o/mean_{last}", "seed={n}"]),
        "mean": module.Stage(recipe="distill", after=["sft_{n}"]),
    }
    config = module.Pipeline(stages=first, round=later, rounds=3, out=tmp_path)
    assert list(config.stages) == ["sft_1", "mean_1", "sft_2", "mean_2", "sft_3", "mean_3"]
    assert config.stages["sft_3"].after == ["mean_2"]
    assert config.stages["sft_3"].overrides == ["path=o/mean_2", "seed=3"]
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        module.Pipeline(stages=first, round=later, rounds=0, out=tmp_path)
    with pytest.raises(ValueError, match=r"rounds must be 1: this pipeline has no rounds, got 2"):
        module.Pipeline(stages=first, rounds=2, out=tmp_path)
    with pytest.raises(ValueError, match=r"stages.sft_2.after names \[.mean_1.\], which are no stages"):
        module.Pipeline(stages={"sft_1": first["sft_1"]}, round=later, rounds=2, out=tmp_path)
