"""A run directory has one owner, one set of settings, and is finished or not."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from llamita import faults, runs, storage
from llamita.metrics import read_metrics
from llamita.runs import RunConfig

SETTINGS = {"lr": 0.1, "loss": {"temperature": 1.0}, "checkpoint_every": 10}


def finish(path: Path) -> None:
    with runs.start(path, "distill", SETTINGS, RunConfig()) as run:
        (path / "model.bin").write_bytes(b"weights")
        run.log({"train/loss": 1.0}, step=1)
        run.finish(["model.bin"], summary={"loss": 1.0})


def test_a_finished_directory_is_done_and_lists_what_it_holds(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    done = runs.check_done(tmp_path / "out")
    assert done["files"]["model.bin"]["bytes"] == 7
    assert done["files"]["model.bin"]["sha256"] == storage.sha256(tmp_path / "out" / "model.bin")
    with runs.start(tmp_path / "out", "distill", SETTINGS, RunConfig()) as run:
        assert run.done


def test_a_changed_file_in_a_finished_directory_is_noticed(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    (tmp_path / "out" / "model.bin").write_bytes(b"weight")
    with (
        pytest.raises(ValueError, match=r"model\.bin has 6 bytes"),
        runs.start(tmp_path / "out", "distill", SETTINGS, RunConfig()),
    ):
        pass


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    other = {**SETTINGS, "loss": {"temperature": 2.0}}
    with (
        pytest.raises(ValueError, match=r"loss\.temperature: 1\.0 -> 2\.0"),
        runs.start(tmp_path / "out", "distill", other, RunConfig()),
    ):
        pass


def test_a_setting_that_may_change_may_change(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with runs.start(out, "distill", SETTINGS, RunConfig()):
        pass
    with runs.start(out, "distill", {**SETTINGS, "checkpoint_every": 5}, RunConfig(), may_change={"checkpoint_every"}):
        pass


def test_of_what_a_run_is_told_about_itself_only_the_seed_must_stay(tmp_path: Path) -> None:
    first, other = RunConfig(), RunConfig(hang_seconds=5.0, project="other", min_allreduce_gb_per_s=3.0)
    for config in (first, other):
        with runs.start(tmp_path / "out", "distill", {**SETTINGS, "run": storage.plain(config)}, config):
            pass
    reseeded = RunConfig(seed=1)
    with (
        pytest.raises(ValueError, match=r"run\.seed: 0 -> 1"),
        runs.start(tmp_path / "out", "distill", {**SETTINGS, "run": storage.plain(reseeded)}, reseeded),
    ):
        pass
    assert {*runs.MAY_CHANGE, "seed"} == set(storage.plain(first))


def test_another_recipe_is_refused(tmp_path: Path) -> None:
    finish(tmp_path / "out")
    with (
        pytest.raises(ValueError, match="belongs to a run of recipe 'distill'"),
        runs.start(tmp_path / "out", "prune", SETTINGS, RunConfig()),
    ):
        pass


def test_a_directory_of_foreign_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(ValueError, match="holds files that no run wrote"),
        runs.start(tmp_path, "distill", SETTINGS, RunConfig()),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_first_start_that_fails_before_any_work_leaves_no_trace(tmp_path: Path) -> None:
    """So the corrected command is not refused for its other settings."""
    with pytest.raises(ValueError, match="wrong"), runs.start(tmp_path / "out", "x", SETTINGS, RunConfig()):
        raise ValueError("wrong")
    assert not (tmp_path / "out").exists()


def test_what_a_later_rank_tells_of_a_failed_first_start_refuses_no_corrected_command(tmp_path: Path) -> None:
    """In a batch job's directory, which stays; the ranks fail together, and not in the order of their numbers."""
    (tmp_path / "control").mkdir()
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "x-1.out").write_text("said")
    (tmp_path / "control" / "exit-1-0").mkdir()
    with pytest.raises(ValueError, match="wrong"), runs.start(tmp_path, "x", SETTINGS, RunConfig()):  # noqa: PT012
        (tmp_path / ".ERROR.json-0badf00d.tmp").write_text("{")  # which another rank is about to publish
        raise ValueError("wrong")
    faults.record(tmp_path, ValueError("wrong on rank 1 too"))
    with runs.start(tmp_path, "x", {"seed": 1}, RunConfig()) as run:
        assert run.settings == {"seed": 1}


def test_no_key_that_a_library_says_is_in_the_log(tmp_path: Path) -> None:
    address = "http://somebody:CanaryF6@proxy:3128"
    with pytest.raises(RuntimeError), runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:  # noqa: PT012
        run.log({"train/loss": 1.0}, step=1)
        logging.getLogger("llamita.sinks").warning("wandb failed: %s does not answer", address)
        raise RuntimeError(f"cannot reach {address}")
    text = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert "does not answer" in text
    assert "RuntimeError: cannot reach" in text
    assert "CanaryF6" not in text


def test_a_failure_after_some_work_keeps_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wrong"), runs.start(tmp_path / "out", "x", SETTINGS, RunConfig()) as run:  # noqa: PT012
        run.log({"train/loss": 1.0}, step=1)
        raise ValueError("wrong")
    assert (tmp_path / "out" / "config.yaml").is_file()


def test_a_folder_of_the_users_named_logs_makes_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "tokenizer").mkdir()
    with (
        pytest.raises(ValueError, match="holds files that no run wrote"),
        runs.start(tmp_path, "prepare", SETTINGS, RunConfig()),
    ):
        pass
    assert (tmp_path / "tokenizer").is_dir()


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "", "recipe: distill"])
def test_a_config_file_of_the_users_makes_no_run_directory(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with (
        pytest.raises(ValueError, match=r"config\.yaml that no run wrote"),
        runs.start(tmp_path, "distill", SETTINGS, RunConfig()),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_what_ended_a_run_is_in_its_log_with_its_traceback(tmp_path: Path) -> None:
    """The screen shows one line for any ``ValueError``, and a library's own tells nobody where it comes from."""
    with pytest.raises(ValueError, match="deep"), runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:  # noqa: PT012
        run.log({"train/loss": 1.0}, step=1)
        raise ValueError("deep inside")
    text = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert "Traceback" in text
    assert "ValueError: deep inside" in text


def test_half_written_files_of_a_killed_start_are_swept(tmp_path: Path) -> None:
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()):
        pass
    (tmp_path / ".run.json.0badf00d.tmp").write_text('{"id')
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()):
        pass
    assert not list(tmp_path.glob(".*.tmp"))


def test_identity_survives_a_restart(tmp_path: Path) -> None:
    ids = []
    for _ in range(2):
        with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
            ids.append(run.identity["id"])
    assert ids[0] == ids[1]


def test_a_metric_line_that_a_crash_cut_is_mended(tmp_path: Path) -> None:
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        run.log({"train/loss": 2.0}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/lo')
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        run.log({"train/loss": 1.0}, step=2)
    assert [row["train/loss"] for row in read_metrics(tmp_path)] == [2.0, 1.0]


def test_zeros_that_a_power_failure_left_are_mended(tmp_path: Path) -> None:
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        run.log({"train/loss": 2.0}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\0" * 4096 + "\n")
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        run.log({"train/loss": 1.0}, step=2)
    assert [row["train/loss"] for row in read_metrics(tmp_path)] == [2.0, 1.0]


def test_a_line_that_is_being_written_is_not_read_yet_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    whole = '{"step": 1, "restart": 0, "train/loss": 2.0}\n'
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "resta')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    (tmp_path / "metrics.jsonl").write_text(whole + '{"step": 2, "resta\n' + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is not a row"):
        read_metrics(tmp_path)


def test_a_full_disk_names_the_metrics_file(tmp_path: Path) -> None:
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        run._metrics = Path("/dev/full")
        with pytest.raises(OSError, match="/dev/full") as raised:
            run.log({"train/loss": 2.0}, step=1)
    assert raised.value.errno == errno.ENOSPC


def test_steps_repeated_after_a_restart_are_read_once(tmp_path: Path) -> None:
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        for step in (1, 2, 3):
            run.log({"train/loss": float(step)}, step=step)
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        for step in (2, 3, 4):
            run.log({"train/loss": float(10 * step)}, step=step)
    assert [row["train/loss"] for row in read_metrics(tmp_path)] == [1.0, 20.0, 30.0, 40.0]


def test_an_atomic_write_that_fails_leaves_the_old_text(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    storage.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        storage.write_json(path, {"a": object()})
    assert storage.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_stop_signal_sets_a_flag_and_nothing_else(tmp_path: Path) -> None:
    with runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:
        assert not run.stop.is_set()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert run.stop.is_set()


def test_a_stage_without_state_ends_where_it_is_asked_to_stop(tmp_path: Path) -> None:
    seen = []
    with pytest.raises(runs.Stopped), runs.start(tmp_path, "x", SETTINGS, RunConfig()) as run:  # noqa: PT012
        for item in run.until_stopped([1, 2, 3]):
            seen.append(item)
            os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [1]


class Colour(StrEnum):
    red = "red"


@dataclass(kw_only=True)
class Settings:
    colour: Colour = Colour.red
    path: Path = Path("a/b")
    sizes: tuple[int, ...] = (1, 2)


def test_settings_become_plain_values() -> None:
    assert storage.plain(Settings()) == {"colour": "red", "path": "a/b", "sizes": [1, 2]}


def test_a_seed_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"run\.seed must be in 0\.\.4294967295, got -1"):
        RunConfig(seed=-1)


def test_wandb_gets_the_metrics_without_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    with runs.start(tmp_path, "x", SETTINGS, RunConfig(wandb=runs.WandbMode.offline)) as run:
        run.log({"train/loss": 1.0}, step=1)
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_BASE_URL": "https://wandb.example.org:8080"}, "online"),
        ({}, "offline"),
    ],
)
def test_wandb_is_online_where_there_is_a_key_and_nobody_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], mode: str
) -> None:
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / ".netrc").write_text("machine wandb.example.org login user password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    told: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", told.update)
    with runs.start(tmp_path / "out", "x", SETTINGS, RunConfig(wandb=runs.WandbMode.auto)):
        pass
    assert told["mode"] == mode


def test_a_failure_of_wandb_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    class Broken:
        def log(self, *_: object, **__: object) -> None:
            raise OSError("no network")

        def finish(self) -> None:
            raise OSError("no network")

    def refuse(**_: object) -> None:
        raise RuntimeError("no server")

    for name, init in (("init", refuse), ("finish", lambda **_: Broken()), ("log", lambda **_: Broken())):
        monkeypatch.setattr(wandb, "init", init)
        with runs.start(tmp_path / name, "x", SETTINGS, RunConfig(wandb=runs.WandbMode.offline)) as run:
            if name == "log":
                run.log({"train/loss": 1.0}, step=1)
            run.finish([])
        assert runs.check_done(tmp_path / name)


def test_nothing_of_the_environment_the_command_line_or_the_host_is_written_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In no file of the run stands the environment; in none of what wandb would upload, who, where and with what."""
    canary = "hf_canaryCANARYcanaryCANARYcanaryCANARY00"
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setenv("LLAMITA_OTHER", "environment-canary")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("USER", "user-canary")
    monkeypatch.setattr(sys, "argv", ["recipes/program-canary.py", "out=command-line-canary"])
    monkeypatch.setattr(socket, "gethostname", lambda: "host-canary")
    settings = {**SETTINGS, "data": {"path": "/data/path-canary"}, "steps": 12}
    config = RunConfig(wandb=runs.WandbMode.offline, tensorboard=True)
    with runs.start(tmp_path / "out", "x", settings, config) as run:
        run.log({"train/loss": 1.0}, step=1)
        run.finish([])
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    for file in files:
        for word in (canary, "environment-canary", "command-line-canary"):
            assert word.encode() not in file.read_bytes(), (word, file)
    uploaded = [p for p in files if p.suffix == ".wandb" or p.parent.name == "files"]
    assert any(b"train/loss" in p.read_bytes() for p in uploaded)
    for file in uploaded:
        for word in ("program-canary", "host-canary", "user-canary", "path-canary", str(tmp_path)):
            assert word.encode() not in file.read_bytes(), (word, file)


@pytest.mark.parametrize(("out", "project"), [("a b", "llamita"), ("run", "a/b")])
def test_a_name_that_no_job_or_metric_could_have_is_refused(tmp_path: Path, out: str, project: str) -> None:
    with (
        pytest.raises(ValueError, match="a name has 1 to 64 letters"),
        runs.start(tmp_path / out, "x", SETTINGS, RunConfig(project=project)),
    ):
        pass
    assert not list(tmp_path.iterdir())
