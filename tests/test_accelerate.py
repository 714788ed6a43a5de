"""One node under ``accelerate launch``: the files of configs/accelerate, and what a signal to it does to a run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

import invented
from conftest import REPOSITORY
from llamita import checkpoints, manifests, storage
from llamita.metrics import read_metrics

FILES = REPOSITORY / "configs" / "accelerate"
STEPS = 60


@pytest.mark.parametrize(("name", "processes"), [("1_gpu", 1), ("8_gpus", 8)])
def test_a_file_is_one_that_the_installed_accelerate_takes_and_decides_over_the_launch_alone(
    name: str, processes: int
) -> None:
    config = load_config_from_file(str(FILES / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    arguments = launch.launch_command_parser().parse_args(
        ["--config_file", str(FILES / f"{name}.yaml"), "recipes/distill.py", "deepspeed=zero2", "steps=3"]
    )
    arguments, _, _ = launch._validate_launch_command(arguments)
    assert (arguments.num_processes, arguments.multi_gpu) == (processes, processes > 1)
    assert {arguments.use_deepspeed, arguments.use_fsdp, arguments.use_megatron_lm} == {False}
    assert arguments.mixed_precision == "no"
    assert arguments.training_script_args == ["deepspeed=zero2", "steps=3"]


@pytest.fixture(scope="module")
def data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invented.packed(recipe("prepare"), tmp_path_factory.mktemp("accelerate"))


def start(name: str, data: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    """A small run, which saves often."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES / f"{name}.yaml")),
        *(*options, "--main_process_port", str(port), "recipes/distill.py", f"data.path={data}", f"out={out}"),
        *(f"student.shape.{key}={value}" for key, value in {**shape, "num_key_value_heads": 2}.items()),
        *(f"steps={STEPS}", "checkpoint_every=5", "global_batch_rows=4", "micro_batch_rows=2", "validation_rows=0"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY / "typings")}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_one_step_on_all_ranks_and_the_same_command_goes_on(
    data: Path, tmp_path: Path
) -> None:
    with start("8_gpus", data, tmp_path / "undisturbed", "--num_processes", "2") as process:
        assert process.wait(timeout=400) == 0, process.communicate()[0]
    out = tmp_path / "run"
    with start("8_gpus", data, out, "--num_processes", "2") as process:
        wait_for(out / "checkpoints" / "step-5", process)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "start it again to go on" in told
    newest = max((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    assert manifests.check_manifest(newest, hashes=True) is None
    state = storage.read_json(newest / "state.json")
    assert state["step"] == read_metrics(out)[-1]["step"] < STEPS, "the step that ran is the step that was saved"
    assert len(list(newest.glob("random-*.json"))) == state["world_size"] == 2
    with start("8_gpus", data, out, "--num_processes", "2") as process:
        assert process.wait(timeout=400) == 0, process.communicate()[0]
    assert storage.read_json(out / "run.json")["restarts"] == 1
    assert [row["step"] for row in read_metrics(out) if "train/loss" in row] == list(range(1, STEPS + 1))
    assert checkpoints.content_hash(out) == checkpoints.content_hash(tmp_path / "undisturbed")
