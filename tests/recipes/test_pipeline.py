"""A pipeline runs its stages in order, goes on where it was, and says which stage failed."""

from __future__ import annotations

import json
import os
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

from llamita import runs
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


def order(tmp_path: Path) -> list[str]:
    return (tmp_path / "out" / "order").read_text().split()


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
    assert runs.read_json(tmp_path / "out" / "pipeline.json") == {}


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
        runs.owned(tmp_path / "out", marker="pipeline.json"),
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


def test_a_stage_in_the_queue_with_other_settings_is_not_taken_for_the_new_one(
    recipe: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, queue = recipe("pipeline"), {}

    def submit(name: str, *_: object, **__: object) -> str:
        return queue.setdefault(name, "7")

    monkeypatch.setattr(module, "submit", lambda *_, name, **__: submit(name))
    monkeypatch.setattr(module, "queued", lambda name, out: queue.get(name))

    def start(word: str) -> None:
        stage = module.Stage(recipe="prune", overrides=[f"word={word}"])
        launcher = module.LauncherConfig(kind="slurm")
        module.run(module.Pipeline(stages={"a": stage}, launcher=launcher, out=tmp_path / "out"))

    start("old")
    start("old")
    with pytest.raises(ValueError, match="stage a waits in the queue with other settings: scancel 7 first"):
        start("new")
    queue.clear()
    start("new")


def test_a_dry_run_marks_nothing(
    recipe: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = recipe("pipeline")
    launcher = module.LauncherConfig(kind="slurm", dry_run=True)
    module.run(module.Pipeline(stages={"a": module.Stage(recipe="prune")}, launcher=launcher, out=tmp_path / "out"))
    assert "sbatch --parsable --job-name=a" in capsys.readouterr().out
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"a b": {}}, "a name has 1 to 64 letters"),
        ({"a": {"after": ["z"]}}, r"stages\.a\.after names \['z'\]"),
        ({"a": {"after": ["b"]}, "b": {"after": ["a"]}}, "wait for each other"),
        ({"a": {"processes": 0}}, r"stages\.a\.processes must be at least 1, got 0"),
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
