"""On a real Slurm of two nodes: preemption, time limits, failures, arrays, many nodes, the same bytes as locally."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

import invented
from conftest import REPOSITORY
from llamita import checkpoints, runs, storage
from llamita.metrics import read_metrics

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

UNAVAILABLE = 69
SHAPE = [
    "student.shape.num_hidden_layers=2",
    "student.shape.hidden_size=32",
    "student.shape.intermediate_size=48",
    "student.shape.num_attention_heads=4",
    "student.shape.num_key_value_heads=2",
]
TRAINING = ["global_batch_rows=4", "micro_batch_rows=2", "validation_rows=0", "optim.learning_rate=3e-3"]

STAGES = {
    "teacher": {
        "recipe": "distill",
        "processes": 2,
        "overrides": ["data.path=${inputs.data}", "steps=4", *TRAINING, *SHAPE],
    },
    "measured": {
        "recipe": "evaluate",
        "after": ["teacher"],
        "processes": 2,
        "overrides": ["model.path=${out}/teacher", "data.path=${inputs.data}", "data.batch_rows=1"],
    },
    "cached": {
        "recipe": "cache",
        "after": ["teacher"],
        "workers": 2,
        "overrides": ["teacher.path=${out}/teacher", "data.path=${inputs.data}", "shard_tokens=1024"],
    },
    "students": {
        "recipe": "distill",
        "after": ["teacher", "cached"],
        "sweep": {"optim.weight_decay": [0.0, 0.1]},
        "overrides": [
            "student.path=${out}/teacher",
            "teachers.teacher.cache=${out}/cached",
            "data.path=${inputs.data}",
            "steps=2",
            *TRAINING,
        ],
    },
}
BROKEN = {
    "data": {"recipe": "prepare", "overrides": ["source.path=/nowhere", "sequence_length=64"]},
    "child": {"recipe": "report", "after": ["data"], "overrides": ["runs.data=${out}/data"]},
    "grandchild": {"recipe": "report", "after": ["child"], "overrides": ["runs.data=${out}/data"]},
}

WAITING = """
import os, sys, time
from pathlib import Path
out = Path(next(word for word in sys.argv if word.startswith("out=")).removeprefix("out="))
start = os.environ.get("SLURM_RESTART_COUNT", "0")
with (out / "starts").open("a") as file:
    file.write(start + "\\n")
stop = out / "control" / f"stop-{os.environ['SLURM_JOB_ID']}-{start}"
while start == "0" and not stop.exists():
    time.sleep(0.1)
code = 75 if start == "0" else 0
Path(os.environ["LLAMITA_EXIT_DIR"], "rank-0").write_text(str(code))
sys.exit(code)
"""


@dataclass
class Cluster:
    """A Slurm that runs, and what its commands need to know."""

    environment: dict[str, str]

    def run(self, *command: str, **changes: str) -> str:
        """What a command prints; it must end well."""
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self.environment | changes, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def batch(self, out: Path, *words: str, **changes: str) -> str:
        """Submit ``run.sbatch``; options of sbatch come first."""
        options = [word for word in words if word.startswith("--")]
        (out / "slurm").mkdir(parents=True)
        rest = [word for word in words if not word.startswith("--")]
        log = f"--output={out}/slurm/%x-%j.out"
        return self.run("sbatch", "--parsable", log, *options, "slurm/run.sbatch", *rest, f"out={out}", **changes)

    def wait(self, *jobs: str, seconds: float = 300) -> dict[str, str]:
        """The state of every job, once all of them have ended."""
        deadline = time.monotonic() + seconds
        states: dict[str, str] = {}
        while time.monotonic() < deadline:
            for job in set(jobs) - states.keys():
                lines = self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").split()
                if not {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} & set(lines):
                    states[job] = "+".join(sorted(set(lines)))
            if states.keys() == set(jobs):
                return states
            time.sleep(0.5)
        raise AssertionError(f"still there after {seconds} s:\n{self.run('squeue')}")

    def restarts(self, job: str) -> int:
        """How often Slurm started a job again."""
        told = self.run("scontrol", "show", "job", job)
        return int(told.partition("Restarts=")[2].split()[0])


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="llamita-slurm-", dir="/tmp") as folder:
        script = REPOSITORY / "slurm" / "test_cluster.sh"
        environment = {**os.environ, "LLAMITA_CLUSTER": f"{folder}/cluster", "OMP_NUM_THREADS": "1"}
        environment = {key: value for key, value in environment.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        started = subprocess.run([script, "start"], env=environment, capture_output=True, text=True, timeout=500)
        if started.returncode == UNAVAILABLE:
            pytest.skip(started.stderr.strip().splitlines()[-1])
        assert started.returncode == 0, started.stderr
        try:
            yield Cluster(
                environment
                | {
                    "SLURM_CONF": f"{folder}/cluster/slurm.conf",
                    "LLAMITA_PYTHON": sys.executable,
                    "LLAMITA_ROOT": str(REPOSITORY),
                    "DS_ACCELERATOR": "cpu",
                    "GLOO_SOCKET_IFNAME": "lo",
                }
            )
        finally:
            subprocess.run([script, "stop"], env=environment, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def data(recipe: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return invented.packed(recipe("prepare"), tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job whose first start outlasts its limit; it runs while the other tests do."""
    root = tmp_path_factory.mktemp("limited")
    (root / "recipes").mkdir()
    (root / "recipes" / "prune.py").write_text(WAITING)
    options = ["--time=1", "--signal=B:USR1@50", "--nodes=1"]
    return cluster.batch(root / "out", *options, "prune", LLAMITA_ROOT=str(root)), root / "out"


def logs(out: Path) -> str:
    """What the jobs of a directory printed."""
    return "\n".join(file.read_text() for file in sorted(out.rglob("slurm/*.out")))


def finished(out: Path) -> dict[str, str]:
    """Content hashes of every finished run below a directory."""
    found = {}
    for marker in sorted(out.rglob("DONE.json")):
        done = runs.check_done(marker.parent)["files"]
        weights = [name for name in done if name.endswith((".safetensors", ".bin"))]
        found[str(marker.parent.relative_to(out))] = "".join(done[name]["sha256"] for name in weights)
    return found


def pipeline(folder: Path, stages: dict[str, Any], *words: str) -> list[str]:
    """The command of a pipeline of these stages."""
    (folder / "pipeline").mkdir(exist_ok=True)
    settings = {"out": "???", "inputs": {"data": "none"}, "stages": stages}
    (folder / "pipeline" / "small.yaml").write_text("# @package _global_\n" + yaml.safe_dump(settings))
    return [sys.executable, "recipes/pipeline.py", f"hydra.searchpath=[file://{folder}]", "pipeline=small", *words]


def test_a_pipeline_ends_with_the_bytes_of_a_local_one_and_its_array_of_workers_with_one_cache(
    cluster: Cluster, limited: tuple[str, Path], data: Path, tmp_path: Path
) -> None:
    """In a directory whose name holds a space, so that every directive and path is quoted for real."""
    remote, local = tmp_path / "on slurm", tmp_path / "here"
    arguments = ["launcher=slurm", "launcher.gpus_per_node=0", "launcher.nodes=2", "launcher.time=60"]
    command = pipeline(tmp_path, STAGES, f"inputs.data={data}")
    told = cluster.run(*command, *arguments, f"out={remote}")
    jobs = [line.split()[-1] for line in told.splitlines()]
    assert len(jobs) == 4
    again = cluster.run(*command, *arguments, f"out={remote}")
    assert [line.split()[-1] for line in again.splitlines()] == jobs, "what is in the queue is not submitted twice"
    here = subprocess.run(
        [*command, "launcher=local", "local.threads=1", f"out={local}"],
        cwd=REPOSITORY,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert here.returncode == 0, here.stdout + here.stderr
    assert set(cluster.wait(*jobs).values()) == {"COMPLETED"}, logs(remote)
    found = finished(remote)
    assert {f"cached/workers/{worker:05d}-of-00002" for worker in (0, 1)} <= found.keys()
    found = {name: digest for name, digest in found.items() if "/workers/" not in name}
    assert found == finished(local)
    assert len([name for name in found if name.startswith("students/weight_decay_")]) == 2
    for file in ("cache.json", "index.bin"):
        assert (remote / "cached" / file).read_bytes() == (local / "cached" / file).read_bytes()
    assert (remote / "measured" / "logs" / "rank-00001.log").is_file(), "two processes share the rows there too"
    there, here_too = (storage.read_json(out / "measured" / "evaluation.json")["models"] for out in (remote, local))
    assert there["model"]["values"] == here_too["model"]["values"]
    (code,) = remote.glob("code-*")
    assert all(code.name in file.read_text() for file in remote.glob("slurm/*.sbatch"))
    assert "finished earlier" in cluster.run(*command, *arguments, f"out={remote}")


def test_a_stage_that_fails_by_the_users_error_is_not_started_again_and_its_children_never_are(
    cluster: Cluster, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = pipeline(tmp_path, BROKEN, "launcher=slurm", "launcher.gpus_per_node=0", f"out={out}")
    told = cluster.run(*command)
    first, *children = [line.split()[-1] for line in told.splitlines()]
    assert cluster.wait(first, *children) == {first: "FAILED", **dict.fromkeys(children, "CANCELLED")}
    assert cluster.restarts(first) == 0
    assert "error of the settings or the data: not started again" in logs(out)
    assert not list((out / "child").glob("slurm/*.out"))


@pytest.fixture(scope="module")
def training(data: Path) -> list[str]:
    return ["distill", f"data.path={data}", "deepspeed=zero2", *SHAPE, *TRAINING, "steps=40", "checkpoint_every=5"]


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster, limited: tuple[str, Path], training: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run over two nodes with DeepSpeed, once the machine is free."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    job = cluster.batch(out, "--nodes=2", "--time=60", *training)
    assert cluster.wait(job) == {job: "COMPLETED"}, logs(out)
    return out


def test_two_nodes_train_one_student_with_deepspeed(undisturbed: Path) -> None:
    assert "on 2 node(s)" in logs(undisturbed)
    assert storage.read_json(undisturbed / "run.json")["restarts"] == 0
    assert sorted(path.name for path in (undisturbed / "logs").iterdir()) == ["rank-00000.log", "rank-00001.log"]
    (step,) = [path for path in (undisturbed / "checkpoints").iterdir() if path.name == "step-40"]
    assert storage.read_json(step / "state.json")["world_size"] == 2


def test_a_run_that_is_preempted_in_the_middle_ends_with_the_weights_of_one_that_was_not(
    cluster: Cluster, undisturbed: Path, training: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = cluster.batch(out, "--nodes=2", "--time=60", *training)
    deadline = time.monotonic() + 200
    while not (out / "checkpoints" / "step-5").exists():
        assert time.monotonic() < deadline, logs(out)
        time.sleep(0.02)
    cluster.run("scontrol", "requeue", job)
    assert cluster.wait(job) == {job: "COMPLETED"}, logs(out)
    assert cluster.restarts(job) == 1
    assert storage.read_json(out / "run.json")["restarts"] == 1, "the preemption came after the end"
    assert checkpoints.content_hash(out) == checkpoints.content_hash(undisturbed)
    rows = [row["step"] for row in read_metrics(out) if "train/loss" in row]
    assert rows == list(range(1, 41)), "a step was lost or counted twice"


def test_a_time_limit_is_seen_coming_and_gone_on_after(cluster: Cluster, limited: tuple[str, Path]) -> None:
    job, out = limited
    assert cluster.wait(job) == {job: "COMPLETED"}, logs(out)
    assert cluster.restarts(job) == 1
    assert (out / "starts").read_text().split() == ["0", "1"]
    told = logs(out)
    assert "asked to stop: wrote" in told
    assert "exit code 75; asking for another start" in told
    assert "TIMEOUT" not in told


RESTLESS = """
import os, sys, time
from pathlib import Path
out = Path(next(word for word in sys.argv if word.startswith("out=")).removeprefix("out="))
task, start = os.environ["SLURM_ARRAY_TASK_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
(out / f"task-{task}-start-{start}").touch()
deadline = time.monotonic() + 60
while not (out / "task-1-start-1").exists() and time.monotonic() < deadline and (task, start) != ("1", "0"):
    time.sleep(0.1)
code = 75 if (task, start) == ("1", "0") else 0
Path(os.environ["LLAMITA_EXIT_DIR"], "rank-0").write_text(str(code))
sys.exit(code)
"""


def test_a_job_of_an_array_that_starts_again_leaves_the_others_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The last one has the number of the whole array."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "prune.py").write_text(RESTLESS)
    out = tmp_path / "out"
    job = cluster.batch(out, "--nodes=1", "--array=0-1", "prune", LLAMITA_ROOT=str(tmp_path))
    assert cluster.wait(job) == {job: "COMPLETED"}, logs(out)
    assert sorted(path.name for path in out.glob("task-*")) == ["task-0-start-0", "task-1-start-0", "task-1-start-1"]


def test_a_job_that_is_cancelled_stays_so(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "prune.py").write_text(WAITING)
    out = tmp_path / "out"
    job = cluster.batch(out, "--nodes=1", "prune", LLAMITA_ROOT=str(tmp_path))
    deadline = time.monotonic() + 60
    while not (out / "starts").exists():
        assert time.monotonic() < deadline, logs(out)
        time.sleep(0.1)
    cluster.run("scancel", job)
    assert cluster.wait(job) == {job: "CANCELLED"}, logs(out)
    time.sleep(8)  # longer than a requeue takes
    assert cluster.wait(job) == {job: "CANCELLED"}
    assert (out / "starts").read_text().split() == ["0"]


def test_slurm_reads_from_a_script_what_the_pipeline_quoted(
    cluster: Cluster, recipe: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    recipe("pipeline")
    directive = sys.modules["_slurm"].directive
    for text in ["two  words", 'a "b" c', "it's # no comment", "back\\slash \\", "a&b;c|d$(x)`y`", "100%j", "naïve"]:
        script = tmp_path / "script"
        script.write_text(f"#!/bin/bash\n#SBATCH {directive(f'--comment={text}')}\n#SBATCH --hold\n")
        job = cluster.run("sbatch", "--parsable", str(script))
        assert cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%k") == text
        cluster.run("scancel", job)
